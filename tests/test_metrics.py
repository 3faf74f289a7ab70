"""What is counted of an eviction, summed over intervals, logged and shown on ``/metrics``."""

import itertools
import time
from types import SimpleNamespace

import pytest
from engine import Engine
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.utils import floatToGoString
from random_models import numbers

from cake_vllm.integration.messages import Eviction
from cake_vllm.integration.metrics import EvictionPromMetrics, EvictionStats
from cake_vllm.integration.worker.clock import Clock, Moment

BLOCK = 32
COUNTED = (
    "requests",
    "evicted_tokens",
    "evicted_generated_tokens",
    "kept_generated_tokens",
    "freed_blocks",
    "rounding_tokens",
    "trims",
    "cuts",
    "cut_blocks",
    "preemptions_avoided",
    "in_place",
    "failures",
)
#: Layers kept 120 and 200 tokens of a prompt of 467 in pages of 32: with its last 19 tokens 115 and 179 were chosen.
BY_LAYER = Eviction(1, False, 5, True, kept=((115,), (179,)), wanted=((100,), (170,)))
#: The same of two heads in each of two layers.
BY_HEAD = Eviction(2, True, 4, True, kept=((51, 179), (83, 115)), wanted=((40, 170), (70, 100)))


def count(*evictions: Eviction, freed: int = 9, in_place: bool = False, prompt_len: int | None = 467) -> EvictionStats:
    stats = EvictionStats.empty()
    for eviction in evictions:
        stats.record(eviction, freed, BLOCK, in_place, prompt_len)
    return stats


def timed(*seconds: float) -> EvictionStats:
    stats = EvictionStats.empty()
    stats.data["seconds"] += seconds
    return stats


def counters(stats: EvictionStats) -> dict[str, int]:
    """Those that are not 0."""
    return {name: stats.data[name] for name in COUNTED if stats.data[name]}


def test_the_end_of_a_prompt():
    assert counters(count(BY_LAYER)) == {
        "requests": 1,
        "freed_blocks": 9,
        "evicted_tokens": 9 * 32,
        # Five columns and the partial block's 19 tokens are held, in the mean 135 tokens were asked for.
        "rounding_tokens": 5 * 32 + 19 - 135,
    }
    assert count(BY_LAYER).data["kept_tokens"] == [115, 179]


def test_what_heads_keep_is_counted_beside_their_mean():
    stats = count(BY_LAYER, BY_HEAD)
    assert counters(stats)["rounding_tokens"] == 5 * 32 + 19 - 135 + 4 * 32 + 19 - 95
    assert stats.data["kept_tokens"] == [115 + 115, 179 + 99]
    assert stats.data["kept_by_head"] == [[51, 179], [83, 115]]
    assert (stats.data["requests"], stats.data["head_requests"]) == (2, 1)


def test_while_a_request_decodes():
    assert counters(count(BY_LAYER, freed=1, prompt_len=None)) == {"freed_blocks": 1, "evicted_tokens": 32, "trims": 1}
    # Rewritten, and nothing given back.
    assert counters(count(BY_LAYER, freed=0, prompt_len=None)) == {}
    assert count(BY_LAYER, prompt_len=None).data["kept_tokens"] == []


def test_cuts_are_counted_apart():
    stats = EvictionStats.empty()
    stats.record(BY_LAYER, 5, BLOCK, False, None, is_cut=True)
    assert counters(stats) == {"freed_blocks": 5, "evicted_tokens": 5 * 32, "cuts": 1, "cut_blocks": 5}
    stats.record(BY_LAYER, 5, BLOCK, False, None, is_cut=True, num_generated=120)
    assert counters(stats)["evicted_generated_tokens"] == 120


def test_how_things_stand_is_of_the_last_interval():
    stats, quiet, late = count(BY_LAYER), EvictionStats.empty(), EvictionStats.empty()
    stats.data["in_force"], late.data["in_force"] = [300, 0], [200, 4]
    assert stats.aggregate(quiet).data["in_force"] == [300, 0]
    assert stats.aggregate(late).data["in_force"] == [200, 4]
    assert stats.reduce()["budget in force"] == 200
    assert stats.reduce()["requests at their floor"] == 4


def test_in_place_and_failed():
    assert counters(count(BY_LAYER, in_place=True))["in_place"] == 1
    failed = Eviction(3, False, 0, False, kept=((467,), (467,)), wanted=((467,), (467,)), failed=True)
    # The request keeps its blocks: its prompt was not evicted, nothing was rewritten or rounded.
    stats = count(failed, freed=0, in_place=True)
    assert counters(stats) == {"failures": 1}
    assert stats.data["kept_tokens"] == []


def test_intervals_add_up():
    everything = EvictionStats.empty()
    for part in (
        count(BY_LAYER),
        EvictionStats.empty(),
        count(BY_HEAD),
        count(BY_HEAD, freed=2, in_place=True),
        count(BY_LAYER, freed=1, prompt_len=None),
    ):
        everything.aggregate(part)
    together = count(BY_LAYER, BY_HEAD)
    together.record(BY_HEAD, 2, BLOCK, True, 467)
    together.record(BY_LAYER, 1, BLOCK, False, None)
    everything.aggregate(timed(0.3)).aggregate(timed(0.1, 0.2))
    together.data["seconds"] = [0.3, 0.1, 0.2]
    assert everything.data == together.data
    assert not everything.is_empty()
    everything.reset()
    assert everything.is_empty()
    assert everything.data == EvictionStats.empty().data


def test_what_is_logged():
    stats = count(BY_LAYER, BY_HEAD)
    assert stats.reduce() == {
        **{f"KV eviction {name}": stats.data[name] for name in COUNTED},
        "mean tokens kept per layer": 127.0,
        "least": 115.0,
        "most": 139.0,
        "least of a KV head": 51.0,
        "most of a KV head": 179.0,
    }
    assert "least" not in EvictionStats.empty().reduce()
    assert "longest" not in stats.reduce()
    late = timed(0.03, 0.01)
    assert not late.is_empty()
    assert (late.reduce()["mean seconds of a step's evictions"], late.reduce()["longest"]) == (0.02, 0.03)


def test_what_is_on_metrics():
    registry = CollectorRegistry()

    def made(cls):
        return lambda *args, **kwargs: cls(*args, **kwargs, registry=registry)

    types = {cls: made(cls) for cls in (Counter, Gauge, Histogram)}
    config = SimpleNamespace(kv_transfer_config=None)
    metrics = EvictionPromMetrics(config, types, ["engine"], {0: ["0"], 1: ["1"]})

    def read() -> dict[tuple[str, ...], float]:
        """By name, engine and what else tells series apart."""
        return {
            (sample.name.removeprefix("vllm:kv_eviction_"), *sample.labels.values()): sample.value
            for metric in registry.collect()
            for sample in metric.samples
            if not sample.name.endswith("_created")
        }

    shown = read()
    bounds = sorted({float(key[2]) for key in shown if key[0] == "step_seconds_bucket"})
    steps = {(f"step_seconds_{part}", engine): 0 for part in ("count", "sum") for engine in "01"}
    steps |= {("step_seconds_bucket", engine, floatToGoString(bound)): 0 for bound in bounds for engine in "01"}
    assert shown == {(f"{name}_total", engine): 0 for name in COUNTED for engine in "01"} | steps
    for stats in (count(BY_LAYER, BY_HEAD), count(BY_LAYER), count(BY_LAYER, freed=1, prompt_len=None), timed(0.03, 9)):
        metrics.observe(stats.data, 1)
    elastic = EvictionStats.empty()
    elastic.data["in_force"] = [300, 2]
    metrics.observe(elastic.data, 0)
    buckets = {float(key[2]): n for key, n in read().items() if key[0] == "step_seconds_bucket" and key[1] == "1"}
    assert {bound: (bound >= 0.03) + (bound >= 9) for bound in bounds} == buckets
    assert 0.001 in buckets
    seen = {key: number for key, number in read().items() if number and "bucket" not in key[0]}
    assert seen == {
        ("requests_total", "1"): 3,
        ("freed_blocks_total", "1"): 9 + 9 + 9 + 1,
        ("evicted_tokens_total", "1"): 28 * 32,
        ("rounding_tokens_total", "1"): 44 + 52 + 44,
        ("trims_total", "1"): 1,
        ("step_seconds_count", "1"): 2,
        ("step_seconds_sum", "1"): 9.03,
        ("budget_in_force", "0"): 300,
        ("requests_at_floor", "0"): 2,
        # Of the last interval that had any.
        ("kept_tokens", "1", "0"): 115,
        ("kept_tokens", "1", "1"): 179,
        ("head_kept_tokens", "1", "0", "0"): 51,
        ("head_kept_tokens", "1", "0", "1"): 179,
        ("head_kept_tokens", "1", "1", "0"): 83,
        ("head_kept_tokens", "1", "1", "1"): 115,
    }


class Passed(Moment):
    """Of a device that is behind the host.

    Attributes:
        now: seconds, of the device.
        is_past: whether it has come this far.
    """

    now, is_past = 0.0, True

    def record(self) -> None:
        self._seconds = Passed.now

    def query(self) -> bool:
        return Passed.is_past


def test_a_step_is_read_when_the_device_has_passed_it(monkeypatch):
    """As many steps later on each rank, so that the longest of their times is of one step."""
    clock = Clock(Passed, 2)

    def step(*parts: float) -> float:
        def work(seconds: float) -> float:
            monkeypatch.setattr(Passed, "now", Passed.now + seconds)
            return -seconds

        for seconds in parts:
            assert clock.timed(work)(seconds) == -seconds
        # Beside the parts.
        work(10)
        return clock.end_step()

    assert [step(1, 2), step(), step(4), step(), step(), step()] == [0, 0, 3, 0, 4, 0]
    # One that is not over is not waited for, and never told of in the place of another.
    step(8)
    step(16)
    monkeypatch.setattr(Passed, "is_past", False)
    assert step() == 0
    monkeypatch.setattr(Passed, "is_past", True)
    assert [step(), step()] == [16, 0]


def test_a_step_on_the_host_is_read_at_once():
    clock = Clock(Moment, 0)
    clock.timed(time.sleep)(0.01)

    def failing() -> None:
        time.sleep(0.01)
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        clock.timed(failing)()
    assert clock.end_step() >= 0.02
    assert clock.end_step() == 0


class Tick(Moment):
    """Of a clock by which every part of a step takes a millisecond, and nothing else any time."""

    count = itertools.count()

    def record(self) -> None:
        self._seconds = next(Tick.count) / 1e3


@pytest.mark.engine
def test_each_step_that_evicts_says_how_long_that_took(tiny, monkeypatch, is_v2):
    """At the prompts' ends, and while they decode: in each layer, and for each request behind them. No other step says
    anything.
    """
    engine: Engine = tiny(kv_eviction="cake", kv_eviction_budget=100, kv_eviction_config={"decode": "window"})
    worker = engine.connector.worker
    monkeypatch.setattr(worker, "clock", Clock(Tick, 0))
    engine.stats()
    for length in (64, 300, 340):
        engine.add(numbers(length, length), 8 if is_v2 else 40)
    told, silent = 0, 0
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
        if stats := engine.stats():
            num_evicted = stats["requests"] + stats["trims"]
            assert num_evicted > 0
            assert stats["seconds"] == pytest.approx([(len(worker.layers.target) + num_evicted) / 1e3])
            told += 1
        else:
            silent += 1
    assert told >= (1 if is_v2 else 2)
    assert silent > told
