"""Files of gates: which model they are of, where they lie, and what is in them.

``cake-vllm calibrate`` writes them; the front end looks whether there is one before anything is loaded; the workers
read what belongs to their layers and heads.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cake_vllm.policies.entries import LinearGate, Rotary

FORMAT = "cake_vllm gates 1"
#: Bytes that a model's files are known by: so many at the beginning, in the middle and at the end of each.
SAMPLE = 2**16
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
#: What of a model's config makes it another one for gates.
FIELDS = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class GateFile:
    """The gates of a model.

    Attributes:
        weight: ``[L, Hkv, F]`` float32, of the layers that can be evicted from.
        bias: ``[L, Hkv]`` float32.
        layers: their indices in the model, ascending.
        rotaries: of each, what its keys' features are made by.
        about: what else is known, text by key: ``fingerprint`` and ``model`` among it.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    layers: tuple[int, ...]
    rotaries: tuple[Rotary, ...]
    about: Mapping[str, str]

    def save(self, path: Path) -> None:
        """Writes a safetensors file; folders are made, and a file that is there is replaced at once."""
        turned = [[rotary.size, rotary.neighbours, rotary.behind] for rotary in self.rotaries]
        more = {"format": FORMAT, "layers": json.dumps(self.layers), "rotary": json.dumps(turned)}
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
        tensors = {"weight": self.weight.cpu().contiguous(), "bias": self.bias.cpu().contiguous()}
        save_file(tensors, scratch, {**self.about, **more})
        scratch.replace(path)

    @classmethod
    def read(cls, path: Path) -> "GateFile":
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: if it is something else.
        """
        about = read_about(path)
        with safe_open(path, "pt") as file:
            weight, bias = (file.get_tensor(name) for name in ("weight", "bias"))
        rotaries = tuple(Rotary(*turned) for turned in json.loads(about["rotary"]))
        return cls(weight, bias, tuple(json.loads(about["layers"])), rotaries, about)

    def gate(self, layer: int, heads: slice, device: torch.device) -> LinearGate:
        """The gate of some KV heads of a layer of the model.

        Raises:
            ValueError: if it has none for this layer.
        """
        if layer not in self.layers:
            raise ValueError(f"the gates have none for layer {layer}: {remedy(self.about['model'])}")
        row = self.layers.index(layer)
        return LinearGate(self.weight[row, heads].to(device), self.bias[row, heads].to(device), self.rotaries[row])


def read_about(path: Path) -> dict[str, str]:
    """What a file says of itself.

    Raises:
        ValueError: if it holds no gates.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from None
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} is no file of gates that this release can read: {remedy('MODEL')}")
    return about


def find_gates(model: Any, path: str = "") -> Path:
    """The file with the gates of a model, once it is known that they are its own.

    Args:
        model: vLLM's ``ModelConfig``.
        path: of the file; by default the one that ``calibrate`` writes.

    Raises:
        ValueError: one sentence that says how to make it, if there is none.
    """
    print_ = fingerprint(model)
    found = Path(path) if path else default_path(print_)
    if not found.is_file():
        where = f" --out {path}" if path else ""
        raise ValueError(
            f"the policy gate needs gates of {model.model}, and there are none at {found}: {remedy(model.model)}{where}"
        )
    about = read_about(found)
    if about["fingerprint"] != print_:
        raise ValueError(f"{found} has gates of another model ({about['model']}): {remedy(model.model)}")
    return found


def remedy(model: str) -> str:
    """How gates are made."""
    return f"make them with: cake-vllm calibrate {model}"


def default_path(fingerprint: str) -> Path:
    """Where the gates of a model lie: in ``$CAKE_VLLM_GATES``, or in ``gates`` of ``$CAKE_VLLM_CACHE``, which is by
    default ``cake_vllm`` in the user's cache.
    """
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = os.environ.get("CAKE_VLLM_CACHE") or os.path.join(user_cache, "cake_vllm")
    folder = os.environ.get("CAKE_VLLM_GATES") or os.path.join(cache, "gates")
    return Path(folder).absolute() / f"{fingerprint}.safetensors"


def fingerprint(model: Any) -> str:
    """What tells a model from others: its shape, and samples of its files, or the revision that the hub calls it by.

    Args:
        model: vLLM's ``ModelConfig``.
    """
    text = model.hf_text_config
    shape = [getattr(text, name, None) for name in FIELDS] + [model.get_total_num_kv_heads(), model.get_head_size()]
    revision = getattr(model.hf_config, "_commit_hash", None) or model.revision
    weights = _of_files(model.model) if os.path.exists(model.model) else f"{model.model}@{revision}"
    return hashlib.sha256(json.dumps([FORMAT, shape, weights]).encode()).hexdigest()[:24]


@functools.cache
def _of_files(path: str) -> str:
    """A digest of samples of a model's weights."""
    files = [Path(path)]
    if os.path.isdir(path):
        files = sorted(file for file in Path(path).iterdir() if file.suffix in WEIGHTS)
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.suffix} {size}".encode())
        with file.open("rb") as weights:
            for place in (0, size // 2, max(size - SAMPLE, 0)):
                weights.seek(place)
                digest.update(weights.read(SAMPLE))
    return digest.hexdigest()
