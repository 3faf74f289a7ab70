"""Conversations whose prefix lies in a lower tier: what comes back from where, and what is said of it."""

import random

import pytest
from engine import Engine, Late
from random_models import numbers
from tiers import (
    SCARCE,
    WHOLE,
    Tier,
    assert_stored,
    beside,
    exact_chunks,
    inexact,
    protected,
    serve_at_random,
    store,
)
from ties import assert_same
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import BlockStored

from cake_vllm.integration.beside import KVEvictionBesideConnector
from cake_vllm.integration.scheduler.scheduler import EvictionScheduler

pytestmark = pytest.mark.engine

EVENTS = {"kv_events_config": KVEventsConfig(enable_kv_cache_events=True, publisher="null")}
STOCK = {key: value for key, value in SCARCE.items() if not key.startswith("kv_eviction")}


def turns(engine: Engine) -> tuple[list[int], set, set, dict[str, float]]:
    """Three conversations in turns, each of which pushes the others out; what was cached, stored and said of it."""
    told: list = []
    engine.scheduler.kv_event_publisher.publish = lambda batch: told.extend(batch.events)
    conversations = [numbers(20 + index, 1100) for index in range(3)]
    names = []
    for length in (500, 730, 1000):
        for conversation in conversations:
            names.append(engine.add(conversation[:length], 6))
            engine.run()
    tier = Tier(engine)
    tier.drain()
    stored = {
        name
        for event in told
        if isinstance(event, BlockStored) and event.medium == "CPU"
        for name in event.block_hashes
    }
    series = {metric.name: getattr(metric, "value", 0) for metric in engine.llm.get_metrics()}
    return [engine.num_cached(name) for name in names], set(tier.chunks()), stored, series


def test_turns_are_cached_and_counted_as_without_eviction(tiny, same_on_both):
    cached, chunks, events, series = turns(tiny(**STOCK, **EVENTS, **beside()))
    assert cached == [0] * 3 + [480] * 3 + [704] * 3
    engine = tiny(**SCARCE, **EVENTS, **beside())
    ours = turns(engine)
    assert ours[:3] == (cached, chunks, events)
    counts, name = ours[3], "vllm:external_prefix_cache_hits"
    local = "vllm:prefix_cache_hits"
    assert 0 < counts[name] <= sum(cached)
    assert counts[name] + counts[local] == series[name] + series[local] == sum(cached)
    assert counts["vllm:kv_eviction_requests"] == engine.stats()["requests"] == 9


def test_a_server_evicts_what_another_one_computed(tiny, tmp_path):
    """Prefill and decoding apart, over files: what is kept, and what is said, is as if the prompt had been computed."""
    prompts, disk = [numbers(30, 1000), numbers(31, 700)], beside("DiskSpec", path=str(tmp_path))
    prefilling = tiny(**STOCK, **disk)
    prefilling.generate(prompts, 1)
    while prefilling.scheduler.connector.has_pending_push_work():
        prefilling.step()
    decoding = tiny(**SCARCE, **disk)
    names = [decoding.add(prompt, 40, logprobs=2, detokenize=False) for prompt in prompts]
    decoding.run()
    received = [decoding.run_of(name) for name in names]
    # All but the window, and what of a block is left beside it.
    assert [decoding.num_cached(name) for name in names] == [960, 640]
    assert decoding.stats()["requests"] == 2
    for file in tmp_path.iterdir():
        file.unlink()
    decoding.forget_prefixes()
    computed = decoding.runs(prompts, 40)
    for run, reference in zip(received, computed, strict=True):
        assert run.kept
        assert_same(run, reference)


ELASTIC = {**SCARCE, "kv_eviction_budget": "auto", "kv_eviction_config": {"min_tokens": 64}}


@protected
def test_a_cut_waits_for_stores(tiny, is_protected, monkeypatch):
    """A prompt that has just ended is cut for the next one, which is written where its last chunk was."""
    engine = tiny(**ELASTIC, **beside())
    tier, exact = store(engine, [numbers(32, 1000), numbers(33, 900)], 12, is_protected, monkeypatch)
    assert engine.stats()["cuts"] > 0
    assert_stored(tier, exact, is_protected)


class Untold:
    """Is not told that a request was passed over."""

    def __init__(self, half: EvictionScheduler):
        self.half = half

    def __getattr__(self, name: str):
        return (lambda: None) if name == "admitted" else getattr(self.half, name)


@pytest.mark.parametrize("is_told", [True, pytest.param(False, marks=pytest.mark.full)])
def test_who_waits_for_a_load_is_not_short_of_memory(tiny, is_told, monkeypatch):
    """Two requests want the same blocks of the lower tier; the second one waits for the first one's copy."""
    engine = tiny(**ELASTIC, **beside())
    prompt, neighbour = numbers(34, 600), numbers(35, 700)
    tier = Tier(engine)
    tier.forget()
    engine.generate([prompt], 1, **WHOLE)
    tier.drain()
    engine.forget_prefixes()
    engine.add(neighbour, 30)
    for _ in range(3):
        engine.step()
    if not is_told:
        half = engine.scheduler.connector.scheduler
        monkeypatch.setattr(KVEvictionBesideConnector, "scheduler", Untold(half))
    engine.stats()
    for _ in range(2):
        engine.add(prompt, 10)
    engine.run()
    assert (engine.stats().get("cuts", 0) == 0) == is_told


@pytest.mark.parametrize(
    "settings", ["fixed", *(pytest.param(name, marks=pytest.mark.full) for name in ("late", "elastic"))]
)
def test_random_load_over_a_small_tier(tiny, settings, is_v2, monkeypatch):
    """Requests come, are preempted and aborted at any moment: the tier is exact, and nothing is lost in either."""
    dice = random.Random(7)
    shared = [numbers(40 + index, 1000) for index in range(4)]
    prompts = [dice.choice(shared)[: dice.randint(40, 1000)] + numbers(50 + index, 150) for index in range(12)]
    scarce = ELASTIC if settings == "elastic" else SCARCE
    # Two blocks a chunk, of which a load may want one.
    truth = exact_chunks(tiny(**SCARCE, **beside(blocks_per_chunk=2)), prompts)
    engine = tiny(**scarce, **beside(blocks_per_chunk=2, cpu_bytes_to_use=40 << 16))
    assert len(truth) > Tier(engine).half.manager._num_chunks > 10
    late = Late(engine.scheduler.connector.scheduler, monkeypatch) if settings == "late" else None
    if late:
        monkeypatch.setattr(engine, "_check_halves", lambda: None)
    tier = Tier(engine)
    serve_at_random(engine, [prompt[:1100] for prompt in prompts], 15 if is_v2 else 30, dice)
    tier.drain()
    if late:
        late.deliver()
    assert engine.is_idle()
    assert inexact(tier.chunks(), truth) == 0
    stats = engine.stats()
    assert stats["requests"] + stats["cuts"] >= (2 if is_v2 else 6)
    assert not stats["failures"]
    preempted = sum(metric.value for metric in engine.llm.get_metrics() if metric.name == "vllm:num_preemptions")
    print(f"{preempted} preempted, {stats}")
