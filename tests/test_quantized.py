"""Caches of eight bits: what is kept and said is what their numbers, times their scales, make of it."""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Engine, same_positions
from random_models import numbers
from replay import Replay, State
from safetensors.torch import load_file, save_file
from stock import stock
from transformers import DynamicCache
from vllm import _custom_ops as ops

from cake_vllm.integration.worker.cpu_attention import probe_block_layout
from cake_vllm.policies import create_policy

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()),
        reason="vLLM has no 8-bit caches on CPUs without AVX-512 or AMX",
    ),
]

FLOATS = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
#: By layer, of keys and of values. None is a power of two, and no two are alike.
SCALES = [(0.03, 0.11), (0.7, 0.05), (0.013, 0.3), (0.09, 0.021)]
UNSCALED = [(1.0, 1.0)] * len(SCALES)


@pytest.fixture(scope="session")
def scaled_model(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model as llm-compressor would save it with an 8-bit KV cache."""
    path = tmp_path_factory.mktemp("scaled") / "model"
    shutil.copytree(tiny_model, path)
    weights = load_file(path / "model.safetensors")
    for layer, scales in enumerate(SCALES):
        for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
            weights[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor([scale])
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
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
    """Every stored number is the one above or below the exact one, whichever way the kernels round.

    Raises:
        AssertionError: if one is further away than rounding in float32 accounts for.
    """
    for factor, is_below in ((1 - 1e-4, True), (1 + 1e-4, False)):
        bound = (exact.abs() * factor).clamp(max=torch.finfo(dtype).max)
        nearest = bound.to(dtype)
        wrong = nearest.float() > bound if is_below else nearest.float() < bound
        step = -1 if is_below else 1
        neighbour = torch.where(wrong, nearest.view(torch.uint8) + step, nearest.view(torch.uint8)).view(dtype).float()
        bad = stored.abs() < neighbour if is_below else stored.abs() > neighbour
        if bad.any(): print("BAD", int(bad.sum()), bad.numel(), stored[bad][:8].tolist(), exact[bad][:8].tolist(), neighbour[bad][:8].tolist(), exact.abs().max().item(), flush=True)
    assert (stored * exact >= 0).all()


@dataclass
class Stored:
    """What an engine wrote for one request, token by token, before scales.

    Attributes:
        dtype: what it is.
        scales: by layer, of keys and of values.
        written: by layer, keys and values in order, ``[n, Hkv, D]``.
    """

    dtype: torch.dtype
    scales: list[tuple[float, float]]
    written: defaultdict[int, list[tuple[torch.Tensor, torch.Tensor]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def follow(self, engine: Engine) -> None:
        """Remembers what is written from now on."""
        for index, layer in enumerate(engine.connector.worker.layers):
            layer.impl.do_kv_cache_update = self._remembering(index, layer, type(layer.impl).do_kv_cache_update)

    def _remembering(self, index: int, layer: Any, update: Callable[..., None]) -> Callable[..., None]:
        def updating(module, key, value, kv_cache, slots):
            update(layer.impl, module, key, value, kv_cache, slots)
            slots = slots[slots >= 0]
            # [n, Hkv, E]
            pages = kv_cache[slots // layer.block_size].flatten(2)
            token, place = torch.arange(len(slots)).view(-1, 1), slots % layer.block_size
            self.written[index].append(
                tuple(
                    pages[token, :, order[place]].view(self.dtype).float().transpose(1, 2)
                    for order in (layer.layout.key_index, layer.layout.value_index)
                )
            )

        return updating

    def take(self, index: int, start: int, exact: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        """What a layer reads of the tokens from ``start`` on, whose exact keys and values are ``[1, Hkv, n, D]``."""
        found = []
        for kind, (numbers_, scale) in enumerate(zip(exact, self.scales[index], strict=True)):
            written = torch.cat([both[kind] for both in self.written[index]])[start : start + numbers_.shape[2]]
            written = written.transpose(0, 1)[None]
            assert_neighbours(written, numbers_ / scale, self.dtype)
            found.append(written * scale)
        return found


class StoredCache(DynamicCache):
    """A cache of the numbers that the engine stored, where these are neighbours of the model's own."""

    def __init__(self, stored: Stored):
        super().__init__()
        self.stored = stored
        self.num_seen: defaultdict[int, int] = defaultdict(int)

    def update(self, keys: torch.Tensor, values: torch.Tensor, index: int, *args, **kwargs):
        start = self.num_seen[index]
        self.num_seen[index] += keys.shape[2]
        return super().update(*self.stored.take(index, start, (keys, values)), index, *args, **kwargs)


class QuantizedReplay(Replay):
    """A replay over the numbers that an engine stored."""

    stored = Stored(torch.float8_e4m3fn, UNSCALED)

    def _start(self) -> State:
        return State(StoredCache(self.stored))

    def verify(self, *args, **kwargs) -> None:
        self._prefilled.clear()
        super().verify(*args, **kwargs)


@pytest.fixture(scope="module")
def replay(tiny_model: str) -> QuantizedReplay:
    return QuantizedReplay(tiny_model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("block_size", [32, 128])
def test_bytes_are_found_where_the_kernel_puts_them(name, dtype, block_size, same_on_both):
    layout = probe_block_layout(block_size, 64, dtype, "vec", name)
    tokens = torch.randn(2, block_size, 1, 64, dtype=dtype)
    cache = torch.zeros(1, 1, 2 * block_size, 64, dtype=torch.uint8)
    slots = torch.arange(block_size)
    ops.cpu_attn_reshape_and_cache(*tokens, *cache.chunk(2, dim=2), slots, "vec", 0.3, 0.7, name)
    reads = (layout.read_keys, 0.3), (layout.read_values, 0.7)
    for exact, (read, scale) in zip(tokens.float(), reads, strict=True):
        found = read(cache.view(1, -1), torch.tensor([[0]]), block_size).view(FLOATS[name]).float()
        assert_neighbours(found[0], exact[:, 0] / scale, FLOATS[name])


@pytest.mark.parametrize("name", ["fp8", "fp8_e5m2"])
def test_nothing_changes_where_nothing_is_evicted(tiny, tiny_model, name, is_v2):
    prompts = [numbers(170 + i, length) for i, length in enumerate((20, 300, 900))]
    expected = stock(is_v2, tiny_model, prompts, 8, skip_tokenizer_init=True, kv_cache_dtype=name)
    engine: Engine = tiny(
        num_gpu_blocks_override=None, kv_cache_dtype=name, kv_eviction="cake", kv_eviction_budget=1000
    )
    assert engine.generate(prompts, 8) == [tokens for tokens, _ in expected]


#: Method, cache, prefill and decode.
WAYS = [
    ("cake", "scaled", "exact", "cake"),
    ("layer-defensivekv", "scaled", "progressive", "window"),
    ("criticalkv", "scaled", "exact", "off"),
    ("layer-defensivekv", "fp8_e5m2", "exact", "window"),
    ("cake", "fp8", "progressive", "window"),
]


@pytest.mark.parametrize(("name", "cache", "prefill", "decode"), WAYS)
def test_served_tokens_equal_replay(start_engine, tiny_model, scaled_model, replay, name, cache, prefill, decode, is_v2):
    """Over numbers of eight bits, with scales of a checkpoint, whose cache ``auto`` takes, or without."""
    is_scaled = cache == "scaled"
    engine: Engine = start_engine(
        scaled_model if is_scaled else tiny_model,
        skip_tokenizer_init=True,
        kv_cache_dtype="auto" if is_scaled else cache,
        max_num_batched_tokens=256,
        kv_eviction=name,
        kv_eviction_budget=150,
        kv_eviction_config={"prefill": prefill, "decode": decode},
        num_gpu_blocks_override=1500,
    )
    scales = [(layer.module._k_scale_float, layer.module._v_scale_float) for layer in engine.connector.worker.layers]
    assert torch.tensor(scales).allclose(torch.tensor(SCALES if is_scaled else UNSCALED))
    engine.stats()
    engine.forget_prefixes()
    replay.stored = Stored(FLOATS["fp8" if is_scaled else cache], scales)
    replay.stored.follow(engine)
    prompt, num_tokens = numbers(174, 900), 40 if is_v2 else 110
    (served,) = engine.served([prompt], num_tokens)
    chunk = 256 if prefill == "progressive" else None
    replay.verify(prompt, served, create_policy(name, {}), 150, block_size=32, decode=decode, chunk=chunk)
    stats = engine.stats()
    assert stats["failures"] == 0
    assert stats["requests"] == 1
    assert stats["trims"] > 0 or decode == "off"
    engine.shutdown()


@pytest.mark.parametrize("name", ["cake", "layer-defensivekv"])
def test_eviction_in_place_is_the_same(start_engine, scaled_model, name, same_on_both):
    """Bytes moved among the request's own blocks or copied to others."""
    settings = {"kv_eviction": name, "kv_eviction_budget": 300, "max_model_len": 760, "skip_tokenizer_init": True}
    runs = []
    for blocks in (1500, -(-760 // 32) + 1):
        engine: Engine = start_engine(scaled_model, num_gpu_blocks_override=blocks, **settings)
        runs += engine.trace([numbers(175, 700)], 30)
        assert engine.stats()["in_place"] == (blocks < 1500)
        assert engine.is_idle()
    (tokens, kept), (tight_tokens, tight_kept) = runs
    assert tokens == tight_tokens
    assert kept
    assert same_positions(kept, tight_kept)


def test_pages_are_as_small_as_their_numbers(tiny, same_on_both):
    """The same memory holds four times as many blocks as of float32, and lends as many of them."""
    seen = []
    for name in ("auto", "fp8"):
        engine: Engine = tiny(
            kv_cache_dtype=name, kv_eviction="cake", kv_eviction_budget=200, num_gpu_blocks_override=None
        )
        (group,) = engine.scheduler.kv_cache_config.kv_cache_groups
        engine.stats()
        engine.generate([numbers(176, 1000)], 4)
        seen.append((group.kv_cache_spec.page_size_bytes, engine.num_free + 1, engine.stats()["freed_blocks"]))
        assert engine.is_idle()
    (page, blocks, freed), (small_page, more_blocks, freed_too) = seen
    assert page == 4 * small_page
    assert 4 * blocks <= more_blocks < 4 * (blocks + 1)
    assert freed == freed_too > 0
