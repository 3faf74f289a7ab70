"""Finds what stands beside each attention layer: the projection behind it, for policies that weigh values by what
becomes of them, and the rotary embedding before it, for those that read keys without their positions, or at others.

No hook shows a plugin the loaded model, so a step of the loader is wrapped (ledger: ``patches/README.md``).
"""

import contextlib
import math
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.model_loader import base_loader

from cake_vllm.integration.patching import wrap
from cake_vllm.policies.entries import Rotary, Rotation

Found = weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[torch.nn.Module]]
_projections: Found = weakref.WeakKeyDictionary()
_rotaries: Found = weakref.WeakKeyDictionary()
#: The module that each attention layer is in.
_around: Found = weakref.WeakKeyDictionary()
#: Layers without a rotary embedding, in models of which it is known where theirs are.
_unturned: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

#: Positions at which a rotary embedding is tried.
TRIED = (0, 1, 5, 42, 911)
#: The farthest at which its angles are read, and what they may be off there, radians, by rounding of any dtype.
FARTHEST, ROUNDING = 2**16, 0.1


def remember_projections() -> None:
    """From now on, what loaded models have can be found. Repeatable; in time while a model is being built."""
    wrap(base_loader, "process_weights_after_loading", _process_weights_after_loading)


def output_projection(attention: torch.nn.Module) -> Any:
    """The row-parallel linear layer beside ``attention`` in its parent module whose input is the attention's output.

    Raises:
        ValueError: if there is none.
    """
    found = _projections.get(attention)
    projection = found() if found is not None else None
    if projection is None:
        raise ValueError(
            f"this --kv-eviction policy weighs values by the output projection, and {attention.layer_name} has none "
            "that can be found: choose another policy"
        )
    return projection


def rotary_embedding(attention: Any, size: int, dtype: torch.dtype) -> Rotary:
    """Which channels of its keys the rotary embedding before ``attention`` turns together; tried, and not only read.

    Args:
        attention: the layer.
        size: channels that the embedding is given.
        dtype: the model's.

    Raises:
        ValueError: if that cannot be found out.
    """
    module = _embedding(attention)
    if module is None:
        if attention in _unturned:
            return Rotary()
        raise ValueError(_unknown(attention, "cannot be found"))
    key = torch.randn(1, size, generator=torch.Generator().manual_seed(0)).repeat(len(TRIED), 1)
    positions = [min(position, _most_positions(module) - 1) for position in TRIED]
    try:
        num_turned, turned = _turn(module, key.to(dtype), positions)
    except Exception as error:
        raise ValueError(_unknown(attention, f"({type(module).__name__}) fails on one head: {error}")) from None
    for rotary in (Rotary(num_turned), Rotary(num_turned, neighbours=True)):
        kept = torch.cat(rotary.parts(turned)[0], dim=-1)
        # What is left of a key is the same at all positions, up to rounding.
        if torch.allclose(kept, kept[:1].expand_as(kept), rtol=0.03, atol=0.03):
            return rotary
    raise ValueError(_unknown(attention, f"({type(module).__name__}) does more than to turn pairs"))


def rotation(attention: Any, rotary: Rotary, size: int, dtype: torch.dtype) -> Rotation:
    """By how much the rotary embedding before ``attention`` turns its keys from each position to the next.

    Read off at 1, 2, 4, and so on: what is known of one distance says how many whole turns there are at twice that, and
    whatever the dtype rounds counts half as much there. So scaled frequencies of any kind are what they are.

    Args:
        attention: the layer.
        rotary: which channels are turned, from :func:`rotary_embedding`.
        size: channels that the embedding is given.
        dtype: the model's.

    Raises:
        ValueError: if there is no rotary embedding, or if angles do not grow alike from each position to the next.
    """
    module = _embedding(attention)
    if module is None or not rotary.size or _is_passed_by(attention, dtype):
        raise ValueError(
            "this --kv-eviction policy looks at keys from other positions, and no rotary embedding turns those of "
            f"{attention.layer_name}: choose another policy"
        )
    positions = [2**power for power in range(FARTHEST.bit_length()) if 2**power < _most_positions(module)]
    keys = torch.zeros(1 + len(positions), size, dtype=dtype)
    rotary.split(keys[:, : rotary.size])[0].fill_(1)
    _, turned = _turn(module, keys, [0, *positions])
    first, second = rotary.split(turned[:, : rotary.size].double())
    angles = torch.atan2(second, first)
    speeds = torch.zeros_like(angles[0])
    for position, angle in zip(positions, angles[1:] - angles[0], strict=True):
        # Within half a turn.
        more = torch.remainder(angle - position * speeds + math.pi, 2 * math.pi) - math.pi
        if position > 1 and not more.abs().max() <= ROUNDING:
            raise ValueError(
                _unknown(attention, f"({type(module).__name__}) turns them by other angles from place to place")
            )
        speeds += more / position
    return Rotation(rotary, speeds)


def _embedding(attention: Any) -> Any:
    """The rotary embedding before a layer, or ``None`` if none is known."""
    found = _rotaries.get(attention)
    return found() if found is not None else None


class _Seen(Exception):
    """Ends a forward where attention would begin."""


def _is_passed_by(attention: Any, dtype: torch.dtype) -> bool:
    """Whether keys come to a layer as they are, past the rotary embedding that stands before it.

    Some models have one in every layer and use it in those with windows alone. So what is around the layer runs, up to
    the layer, on one hidden state at several positions. Where it does not run as most of vLLM's models do, nobody
    knows, and keys are taken to be turned.
    """
    around: Any = _around[attention]()
    asks = next((child for child in around.children() if isinstance(child, ColumnParallelLinear)), None)
    if asks is None or isinstance(attention, MLAAttention):
        return False
    hidden = torch.randn(1, asks.input_size, generator=torch.Generator().manual_seed(0)).repeat(len(TRIED), 1)
    seen: list[torch.Tensor] = []

    def stop(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        seen.append(given[1])
        raise _Seen

    hook = attention.register_forward_pre_hook(stop)
    with contextlib.suppress(Exception), torch.inference_mode():
        device = next(asks.parameters()).device
        around(positions=torch.tensor(TRIED, device=device), hidden_states=hidden.to(device, dtype))
    hook.remove()
    return any(bool((keys - keys[:1]).abs().max() <= 0.01 * keys.abs().max()) for keys in seen)


def _most_positions(module: Any) -> int:
    """At how many positions a rotary embedding can be tried and is what it is at all of them."""
    for name in ("max_position_embeddings", "original_max_seq_len"):
        if hasattr(module, name):
            return int(getattr(module, name))
    return TRIED[-1] + 1


def _turn(module: Any, key: torch.Tensor, at: Sequence[int]) -> tuple[int, torch.Tensor]:
    """How many channels a rotary embedding turns at most, and ``[n, D]`` float32 keys at these positions."""
    device = next((buffer.device for buffer in module.buffers()), torch.device("cpu"))
    key, positions = key.to(device), torch.tensor(at, device=device)
    if hasattr(module, "rotary_dim"):
        return int(module.rotary_dim), module(positions, key.clone(), key.clone())[1].view_as(key).float()
    # Of the library Transformers: angles for all layers, and a function beside the module that turns by them.
    apply = sys.modules[type(module).__module__].apply_rotary_pos_emb
    cos, sin = module(key[None], positions[None])
    size = cos.shape[-1]
    turned = apply(key[None, None, :, :size], key[None, None, :, :size], cos, sin)[1][0, 0]
    return size, torch.cat([turned, key[:, size:]], dim=-1).float()


def _unknown(attention: torch.nn.Module, why: str) -> str:
    return (
        f"this --kv-eviction policy cannot read keys, the rotary embedding of {attention.layer_name} {why}: "
        "choose another policy"
    )


def _is_rotary(module: torch.nn.Module) -> bool:
    return type(module).__name__.endswith("RotaryEmbedding")


def _remember_rotaries(model: torch.nn.Module) -> None:
    """Notes the nearest rotary embedding of each attention layer: beside it, or beside a module that it is in."""
    modules = dict(model.named_modules())
    beside: dict[str, torch.nn.Module] = {}
    for name, module in modules.items():
        # By their parents: layers share one, and a walk through the model meets it once.
        for child in module.children():
            if _is_rotary(child):
                beside[name] = child
    layers = {name: module for name, module in modules.items() if isinstance(module, Attention | MLAAttention)}
    is_any = any(map(_is_rotary, modules.values()))
    unturned = []
    for name, attention in layers.items():
        parents = [*(name.rsplit(".", up)[0] for up in range(1, name.count(".") + 1)), ""]
        _around[attention] = weakref.ref(modules[parents[0]])
        nearest = next((beside[parent] for parent in parents if parent in beside), None)
        if nearest is None:
            unturned.append(attention)
        else:
            _rotaries[attention] = weakref.ref(nearest)
    # If there is one somewhere, and no layer's, it is unknown whose it is.
    if not is_any or len(unturned) < len(layers):
        _unturned.update(unturned)


def _process_weights_after_loading(
    original: Callable[..., None], model: torch.nn.Module, *args: Any, **kwargs: Any
) -> None:
    original(model, *args, **kwargs)
    _remember_rotaries(model)
    for parent in model.modules():
        siblings = list(parent.children())
        for attention in siblings:
            if isinstance(attention, Attention | MLAAttention):
                size = attention.v_head_dim if isinstance(attention, MLAAttention) else attention.head_size_v
                width = attention.num_heads * size
                for linear in siblings:
                    if isinstance(linear, RowParallelLinear) and linear.input_size_per_partition == width:
                        _projections[attention] = weakref.ref(linear)
