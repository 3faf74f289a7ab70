"""What is counted of an eviction, summed over intervals, logged and shown on ``/metrics``."""

from types import SimpleNamespace

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cake_vllm.integration.messages import Eviction
from cake_vllm.integration.metrics import EvictionPromMetrics, EvictionStats

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

    assert read() == {(f"{name}_total", engine): 0 for name in COUNTED for engine in "01"}
    for stats in (count(BY_LAYER, BY_HEAD), count(BY_LAYER), count(BY_LAYER, freed=1, prompt_len=None)):
        metrics.observe(stats.data, 1)
    elastic = EvictionStats.empty()
    elastic.data["in_force"] = [300, 2]
    metrics.observe(elastic.data, 0)
    seen = {key: number for key, number in read().items() if number}
    assert seen == {
        ("requests_total", "1"): 3,
        ("freed_blocks_total", "1"): 9 + 9 + 9 + 1,
        ("evicted_tokens_total", "1"): 28 * 32,
        ("rounding_tokens_total", "1"): 44 + 52 + 44,
        ("trims_total", "1"): 1,
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
