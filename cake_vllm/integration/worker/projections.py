"""Finds the projection behind each attention layer, for policies that weigh values by what becomes of them.

No hook shows a plugin the loaded model, so a step of the loader is wrapped (ledger: ``patches/README.md``).
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.model_loader import base_loader

from cake_vllm.integration.patching import wrap

_projections: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[torch.nn.Module]] = weakref.WeakKeyDictionary()


def remember_projections() -> None:
    """From now on, loaded models' projections can be found. Repeatable; in time while a model is being built."""
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


def _process_weights_after_loading(
    original: Callable[..., None], model: torch.nn.Module, *args: Any, **kwargs: Any
) -> None:
    original(model, *args, **kwargs)
    for parent in model.modules():
        siblings = list(parent.children())
        for attention in siblings:
            if isinstance(attention, Attention):
                width = attention.num_heads * attention.head_size_v
                for linear in siblings:
                    if isinstance(linear, RowParallelLinear) and linear.input_size_per_partition == width:
                        _projections[attention] = weakref.ref(linear)
