"""Quantized KV caches replayed on a plain Hugging Face model, over the very numbers that an engine stored.

Rounding to eight bits turns a difference in the last bit of float32 into one of a few percent, now and then. So a
replay of its own numbers would soon be somewhere else. This one takes each number that the engine stored, after showing
that it is a neighbour of the model's own.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from engine import Engine
from replay import Replay, State
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from cake_vllm.integration.gates import GateFile

#: What vLLM's names mean on CPUs.
FLOATS = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def cpu_has_eight_bits() -> bool:
    """Whether vLLM has KV caches of eight bits on this CPU."""
    return torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()


class Scales(NamedTuple):
    """Of a layer."""

    query: float = 1.0
    key: float = 1.0
    value: float = 1.0


#: No power of two, and no two alike.
SCALES = [Scales(0.05, 0.03, 0.11), Scales(0.3, 0.7, 0.05), Scales(0.021, 0.013, 0.3), Scales(0.07, 0.09, 0.021)]


def save_scaled_model(path: Path, model: str, scales_queries: bool = True) -> str:
    """A random Llama of up to four layers as llm-compressor saves it with an 8-bit KV cache."""
    shutil.copytree(model, path)
    config = json.loads((path / "config.json").read_text())
    weights = load_file(path / "model.safetensors")
    for layer, scales in enumerate(SCALES[: config["num_hidden_layers"]]):
        of_layer = dict(zip(("q_scale", "k_scale", "v_scale"), scales, strict=True))
        if not scales_queries:
            del of_layer["q_scale"]
        for name, scale in of_layer.items():
            weights[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor([scale])
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": {"type": "float", "num_bits": 8, "strategy": "tensor", "symmetric": True, "dynamic": False},
    }
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def assert_neighbours(stored: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Every stored number is the next one above or below the exact one, whichever way the kernels round.

    Raises:
        AssertionError: if one is further away than rounding in float32 accounts for.
    """
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    every = every[every.isfinite()].sort().values
    slack = 5e-6 * exact.abs().max()
    below = torch.searchsorted(every, (exact - slack).contiguous(), right=True) - 1
    above = torch.searchsorted(every, (exact + slack).contiguous())
    assert (stored >= every[below.clamp(min=0)]).all()
    assert (stored <= every[above.clamp(max=len(every) - 1)]).all()


@dataclass
class Stored:
    """What the layers of an engine were given and wrote for one request, token by token, before scales.

    Attributes:
        dtype: what it is.
        scales: by layer.
        queries: by layer, in order, ``[n, Hq, D]``; nothing of layers that are given the model's own.
        written: by layer, keys and values in order, ``[n, Hkv, D]``.
    """

    dtype: torch.dtype
    scales: list[Scales]
    queries: defaultdict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    written: defaultdict[int, list[tuple[torch.Tensor, ...]]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def of(cls, engine: Engine, dtype: torch.dtype) -> "Stored":
        """Of the request that comes next."""
        layers = engine.connector.worker.layers.target
        modules = [layer.module for layer in layers]
        scales = [Scales(of._q_scale_float, of._k_scale_float, of._v_scale_float) for of in modules]
        stored = cls(dtype, scales)
        for index, layer in enumerate(layers):
            kind = type(layer.impl)
            layer.impl.do_kv_cache_update = stored._updating(index, layer, kind.do_kv_cache_update)
            layer.impl.forward = stored._forwarding(index, layer, kind.forward)
        return stored

    def _updating(self, index: int, layer: Any, update: Callable[..., None]) -> Callable[..., None]:
        def updating(module, key, value, kv_cache, slots):
            update(layer.impl, module, key, value, kv_cache, slots)
            slots = slots[slots >= 0]
            # [n, Hkv, E]
            size = layer.layout.block_size
            pages, slots = kv_cache[slots // size].flatten(2).cpu(), slots.cpu()
            token, place = torch.arange(len(slots)).view(-1, 1), slots % size
            orders = layer.layout.key_index.cpu(), layer.layout.value_index.cpu()
            found = (pages[token, :, order[place]].view(self.dtype).float().transpose(1, 2) for order in orders)
            self.written[index].append(tuple(found))

        return updating

    def _forwarding(self, index: int, layer: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        def forwarding(module, query, key, value, kv_cache, metadata, *args, **kwargs):
            if metadata is not None and query.dtype == self.dtype:
                self.queries[index].append(query[: metadata.num_actual_tokens].float().cpu())
            return forward(layer.impl, module, query, key, value, kv_cache, metadata, *args, **kwargs)

        return forwarding

    def take_queries(self, index: int, end: int, exact: torch.Tensor) -> torch.Tensor:
        """What a layer is given as the queries up to ``end``, which are exactly ``[Hq, n, D]``."""
        if not self.queries[index]:
            return exact
        return self._restored(torch.cat(self.queries[index]), end, exact, self.scales[index].query)

    def take_cached(self, index: int, end: int, exact: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        """What a layer reads of the tokens up to ``end``, whose keys and values are exactly ``[1, Hkv, n, D]``."""
        kinds = zip(zip(*self.written[index], strict=True), exact, self.scales[index][1:], strict=True)
        return [self._restored(torch.cat(parts), end, own[0], scale)[None] for parts, own, scale in kinds]

    def _restored(self, stored: torch.Tensor, end: int, exact: torch.Tensor, scale: float) -> torch.Tensor:
        found = stored[end - exact.shape[1] : end].transpose(0, 1)
        assert_neighbours(found, exact / scale, self.dtype)
        return found * scale


class StoredCache(DynamicCache):
    """A cache of what the engine stored."""

    def __init__(self, stored: Stored):
        super().__init__()
        self.stored = stored
        self.num_seen: defaultdict[int, int] = defaultdict(int)

    def update(self, keys: torch.Tensor, values: torch.Tensor, index: int, *args, **kwargs):
        self.num_seen[index] += keys.shape[2]
        taken = self.stored.take_cached(index, self.num_seen[index], (keys, values))
        return super().update(*taken, index, *args, **kwargs)


class StoredReplay(Replay):
    """A replay over what an engine stored; set :attr:`stored` before anything is served."""

    def __init__(self, model_dir: str, gates: GateFile | None = None):
        self.stored = Stored(torch.float8_e4m3fn, [])
        super().__init__(model_dir, gates=gates)

    def verify(self, *args, **kwargs) -> None:
        self._prefilled.clear()
        super().verify(*args, **kwargs)

    def _start(self) -> State:
        return State(StoredCache(self.stored))

    def _attention(self, module, query, *args, **kwargs):
        end = self._state.length + query.shape[2]
        taken = self.stored.take_queries(module.layer_idx, end, query[0])
        return super()._attention(module, taken[None], *args, **kwargs)
