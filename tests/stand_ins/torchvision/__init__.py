"""What image processors ask of torchvision, for machines where there is no build of it for their torch.

A build for another torch cannot be imported, so ``deploy/setup.sh`` removes it, and without any vLLM cannot import
most models that take pictures. Of this one the tests need that it can be imported, and that two programs make the same
numbers of a picture: they are not those of the real one, whose resizing rounds otherwise.
"""

import enum
import sys
import types

import torch

__version__ = "0.28.0+tests"


class InterpolationMode(enum.Enum):
    """How a picture is resized; by the names of torch."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def pil_to_tensor(picture) -> torch.Tensor:
    """``[C, H, W]`` uint8 of a Pillow image."""
    channels = len(picture.getbands())
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(picture.height, picture.width, channels).permute(2, 0, 1).contiguous()


def resize(picture: torch.Tensor, size, interpolation=InterpolationMode.BILINEAR, antialias=True) -> torch.Tensor:
    """``[..., H, W]`` to another height and width."""
    flat = picture.reshape(-1, 1, *picture.shape[-2:]).float()
    flat = torch.nn.functional.interpolate(flat, tuple(size), mode=interpolation.value, antialias=antialias)
    flat = flat.reshape(*picture.shape[:-2], *flat.shape[-2:])
    return flat if picture.is_floating_point() else flat.round().clamp(0, 255).to(picture.dtype)


def normalize(picture: torch.Tensor, mean, std, inplace=False) -> torch.Tensor:
    """``[..., C, H, W]`` with a mean and a deviation for each channel taken out."""
    mean, std = (torch.as_tensor(each, dtype=picture.dtype).view(-1, 1, 1) for each in (mean, std))
    return (picture - mean) / std


class _Module(types.ModuleType):
    """With whatever else is imported by name, as something that cannot be called."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _module(name: str, **content) -> types.ModuleType:
    module = sys.modules[f"{__name__}.{name}"] = _Module(f"{__name__}.{name}")
    vars(module).update(content)
    return module


_FUNCTIONS = {
    "InterpolationMode": InterpolationMode,
    "pil_to_tensor": pil_to_tensor,
    "resize": resize,
    "normalize": normalize,
}
io = _module("io")
transforms = _module(
    "transforms",
    InterpolationMode=InterpolationMode,
    functional=_module("transforms.functional", **_FUNCTIONS),
    v2=_module("transforms.v2", functional=_module("transforms.v2.functional", **_FUNCTIONS)),
)
