"""Caches of eight bits: what is kept and said is what their numbers, times their scales, make of it."""

import pytest
import torch
from conftest import with_random_gates
from engine import Engine, same_positions
from random_models import gates_of, numbers
from stock import stock
from stored import (
    FLOATS,
    SCALES,
    Scales,
    Stored,
    StoredReplay,
    assert_neighbours,
    cpu_has_eight_bits,
    save_scaled_model,
)
from vllm import _custom_ops as ops

from cake_vllm.integration.worker.cpu_attention import probe_block_layout
from cake_vllm.policies import create_policy

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        not cpu_has_eight_bits(),
        reason="vLLM has no 8-bit caches on CPUs without AVX-512 or AMX",
    ),
]


@pytest.fixture(scope="module")
def scaled_model(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return with_random_gates(save_scaled_model(tmp_path_factory.mktemp("scaled") / "model", tiny_model))


@pytest.fixture(scope="module")
def replay(tiny_model: str) -> StoredReplay:
    return StoredReplay(tiny_model, gates_of(tiny_model))


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


def test_nothing_changes_where_nothing_is_evicted(tiny, tiny_model, same_on_both):
    prompts = [numbers(170 + i, length) for i, length in enumerate((20, 300, 900))]
    expected = stock(False, tiny_model, prompts, 8, skip_tokenizer_init=True, kv_cache_dtype="fp8_e5m2")
    engine: Engine = tiny(
        num_gpu_blocks_override=None, kv_cache_dtype="fp8_e5m2", kv_eviction="cake", kv_eviction_budget=1000
    )
    assert engine.generate(prompts, 8) == [tokens for tokens, _ in expected]


#: Method, cache, prefill and decode.
WAYS = [
    ("cake", "scaled", "exact", "cake"),
    ("layer-defensivekv", "scaled", "progressive", "window"),
    ("criticaladakv", "fp8_e5m2", "exact", "window"),
    ("gate", "scaled", "progressive", "window"),
    *(
        pytest.param(*way, marks=pytest.mark.full)
        for way in [
            ("layer-defensivekv", "scaled", "exact", "off"),
            ("layer-defensivekv", "fp8_e5m2", "progressive", "off"),
            ("criticalkv", "scaled", "exact", "off"),
            ("gate", "fp8_e5m2", "exact", "window"),
            ("cake", "fp8", "progressive", "window"),
        ]
    ),
]


@pytest.mark.parametrize(("name", "cache", "prefill", "decode"), WAYS)
def test_served_tokens_equal_replay(
    start_engine, tiny_model, scaled_model, replay, name, cache, prefill, decode, is_v2
):
    """With the scales of a checkpoint that declares its cache, which ``auto`` takes, or without any."""
    is_scaled = cache == "scaled"
    engine: Engine = start_engine(
        scaled_model if is_scaled else tiny_model,
        skip_tokenizer_init=True,
        kv_cache_dtype="auto" if is_scaled else cache,
        max_num_batched_tokens=256,
        num_gpu_blocks_override=1500,
        kv_eviction=name,
        kv_eviction_budget=150,
        kv_eviction_config={"prefill": prefill, "decode": decode},
    )
    replay.stored = Stored.of(engine, FLOATS["fp8" if is_scaled else cache])
    expected = SCALES if is_scaled else [Scales()] * len(SCALES)
    assert torch.tensor(replay.stored.scales).allclose(torch.tensor(expected))
    prompt, num_tokens = numbers(174, 900), 40 if is_v2 else 110
    (served,) = engine.served([prompt], num_tokens)
    chunk = 256 if prefill == "progressive" else None
    replay.verify(prompt, served, create_policy(name, {}), 150, block_size=32, decode=decode, chunk=chunk)
    stats = engine.stats()
    assert stats["failures"] == 0
    assert stats["requests"] == 1
    assert stats["trims"] > 0 or decode == "off"
    engine.shutdown()


def test_policies_see_numbers_of_the_model(start_engine, scaled_model, same_on_both):
    engine: Engine = start_engine(
        scaled_model, skip_tokenizer_init=True, kv_eviction="criticalkv", kv_eviction_budget=100
    )
    stored, worker = Stored.of(engine, FLOATS["fp8"]), engine.connector.worker
    seen = []
    worker.judging.on_judged = lambda layer, inputs, score: seen.append(inputs)
    engine.generate([numbers(177, 500)], 2)
    assert len(seen) == len(SCALES)
    for index, (inputs, scales) in enumerate(zip(seen, SCALES, strict=True)):
        keys, values = (torch.cat(parts)[:500].transpose(0, 1) for parts in zip(*stored.written[index], strict=True))
        torch.testing.assert_close(inputs.keys, keys * scales.key)
        torch.testing.assert_close(inputs.values, values * scales.value)
    engine.shutdown()


@pytest.mark.parametrize("name", ["cake", "layer-defensivekv"])
def test_eviction_in_place_is_the_same(start_engine, scaled_model, name, same_on_both):
    """Bytes moved among the request's own blocks or copied to others."""
    settings = {"kv_eviction": name, "kv_eviction_budget": 300, "max_model_len": 760, "skip_tokenizer_init": True}
    runs = []
    for blocks in (1500, -(-760 // 32) + 1):
        engine: Engine = start_engine(scaled_model, num_gpu_blocks_override=blocks, **settings)
        engine.stats()
        runs += engine.trace([numbers(175, 700)], 30)
        assert engine.stats()["in_place"] == (blocks < 1500)
        assert engine.is_idle()
    (tokens, kept), (tight_tokens, tight_kept) = runs
    assert tokens == tight_tokens
    assert kept
    assert same_positions(kept, tight_kept)


def test_pages_are_as_small_as_their_numbers(tiny, same_on_both):
    """The same memory holds four times as many blocks as of float32, and an eviction frees as many of them."""
    seen = []
    for name in ("auto", "fp8"):
        engine: Engine = tiny(
            kv_cache_dtype=name, kv_eviction="snapkv", kv_eviction_budget=200, num_gpu_blocks_override=None
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
