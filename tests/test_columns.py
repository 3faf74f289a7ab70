"""One stock KV cache group, and private columns beside it: what vLLM sees, and what the two halves tell each other."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from engine import Engine, same_positions
from random_models import numbers
from replay import Replay
from ties import assert_same

from cake_vllm.integration.messages import Eviction, EvictionReport
from cake_vllm.policies import create_policy

pytestmark = pytest.mark.engine


def test_memory_is_managed_by_vllm_itself(tiny, same_on_both):
    """The same coordinator, groups, blocks and capacity as without eviction; one class of ours manages them."""
    seen = []
    for settings in ({}, {"kv_eviction": "layer-defensivekv", "kv_eviction_budget": 200}):
        engine: Engine = tiny(**settings, num_gpu_blocks_override=None, kv_cache_memory_bytes=2**27)
        config = engine.scheduler.kv_cache_config
        (group,) = config.kv_cache_groups
        (manager,) = engine.manager.coordinator.single_type_managers
        seen.append(
            (
                type(engine.manager.coordinator).__name__,
                type(engine.pool).__name__,
                config.num_blocks,
                group.layer_names,
                group.kv_cache_spec.page_size_bytes,
                engine.vllm_config.cache_config.num_gpu_blocks,
            )
        )
        engine.add(numbers(60, 190), 3)
        engine.step()
        seen[-1] += (engine.manager.usage, [len(row) for row in manager.req_to_blocks.values()])
        engine.run()
    assert seen[0] == seen[1]
    assert type(manager).__name__ == "EvictingManager"


def test_a_prompt_whose_eviction_would_free_nothing_is_left_alone(tiny, same_on_both):
    """Columns are rounded up; up to this length they would take as much as the prompt."""
    engine: Engine = tiny(kv_eviction="snapkv", kv_eviction_budget=128)
    engine.stats()
    engine.generate([numbers(61, 5 * 32 + 31)], 4)
    assert not engine.stats()
    engine.generate([numbers(61, 6 * 32)], 4)
    stats = engine.stats()
    assert stats["requests"] == 1
    # 128 tokens in each layer are four pages.
    assert stats["freed_blocks"] == 2
    assert stats["rounding_tokens"] == 0


@pytest.mark.parametrize("name", ["cake", "layer-defensivekv", "adakv"])
def test_columns_are_as_few_as_their_pages(tiny, name, same_on_both):
    engine: Engine = tiny(kv_eviction="cake", kv_eviction_budget=200, kv_eviction_config={"decode": "off"})
    engine.forget_prefixes()
    request = engine.add(numbers(62, 1000), 6, extra_args={"kv_eviction": name})
    engine.step()
    (held,) = engine.connector.worker.moving.held.values()
    assert held.by_head == (name != "cake")
    assert len(held.used) == (4 if name == "cake" else 8)
    assert held.num_columns == -(-held.used.sum() // len(held.used)) <= 200 // 32 + 2
    assert len(set(held.used.tolist())) > 1
    # All that was lent beyond these is back: its row's partial block is what it has beside them.
    assert engine.num_free - engine.pool.get_num_free_blocks() == held.num_columns + 1
    engine.run()
    assert engine.outputs[request].finished


@pytest.fixture(scope="module")
def replay(tiny_model) -> Replay:
    return Replay(tiny_model)


WAYS = [("exact", "window"), ("progressive", "off"), ("progressive", "window")]


@pytest.mark.parametrize(("prefill", "decode"), WAYS)
def test_heads_are_served_as_published_in_every_way(tiny, replay, prefill, decode, is_v2):
    """Heads of different lengths scored again after chunks and while decoding: the tokens of the replay."""
    options = {"prefill": prefill, "decode": decode}
    settings = {"kv_eviction": "cake", "kv_eviction_budget": 150, "kv_eviction_config": options}
    engine: Engine = tiny(**settings, max_num_batched_tokens=256)
    prompt, num_tokens = numbers(63, 900), 40 if is_v2 else 110
    names = ("layer-defensivekv",) if is_v2 else ("defensivekv", "layer-defensivekv", "adakv", "criticaladakv", "cake")
    for name in names:
        engine.forget_prefixes()
        engine.stats()
        (served,) = engine.served([prompt], num_tokens, extra_args={"kv_eviction": name})
        chunk = 256 if prefill == "progressive" else None
        replay.verify(prompt, served, create_policy(name, {}), 150, block_size=32, decode=decode, chunk=chunk)
        stats = engine.stats()
        assert stats["failures"] == 0
        assert stats["trims"] > 0 or decode == "off"
        assert engine.is_idle()


@pytest.mark.parametrize(
    ("name", "prefill", "decode"),
    [
        ("cake", "exact", "cake"),
        ("cake", "progressive", "window"),
        ("defensivekv", "exact", "window"),
        ("adakv", "progressive", "window"),
        ("triattention", "progressive", "window"),
        pytest.param("layer-defensivekv", "progressive", "off", marks=pytest.mark.full),
    ],
)
def test_blocks_of_four_pages(tiny, replay, name, prefill, decode, same_on_both):
    """A CPU's default blocks: a request holds its budget in pages of 32 tokens, and at most a block of 128 more."""
    budget, block, page = 300, 128, 32
    settings = {"kv_eviction": "cake", "kv_eviction_budget": budget, "max_num_batched_tokens": 256}
    settings["kv_eviction_config"] = {"prefill": prefill, "decode": decode}
    engine: Engine = tiny(**settings, block_size=block)
    assert engine.connector.worker.layers.grid.page_size == page
    engine.forget_prefixes()
    engine.stats()
    prompt, num_tokens, most = numbers(66, 1100), 200, 0
    request = engine.add(prompt, num_tokens, extra_args={"kv_eviction": name})
    (manager,) = engine.manager.coordinator.single_type_managers
    while engine.scheduler.requests:
        engine.step()
        if engine.decoding:
            (cut,) = manager.cuts.values()
            most = max(most, len(cut.columns))
    # Rounded up to columns once, where owners that round up to blocks take one more for each.
    assert -(-budget // block) <= most <= -(-(budget + page) // block) == 3
    served = engine.served_as(request, list(engine.outputs[request].outputs[0].token_ids))
    engine.run()
    chunk, sizes = 256 if prefill == "progressive" else None, {"block_size": block, "page_size": page}
    replay.verify(prompt, served, create_policy(name, {}), budget, **sizes, decode=decode, chunk=chunk)
    stats = engine.stats()
    assert stats["failures"] == 0
    assert stats["trims"] > 0 or decode == "off"
    assert engine.is_idle()


@pytest.mark.interpreted
@pytest.mark.contract
def test_rows_of_all_kinds_share_a_batch(tiny, is_v2):
    """Layer-wise, head-wise and whole rows, in prefill and decoding: everyone's tokens are those of its solo run."""
    engine: Engine = tiny(kv_eviction="cake", kv_eviction_budget=150, max_num_batched_tokens=300, max_num_seqs=8)
    wishes = [{}, {"kv_eviction": "layer-defensivekv"}, {"kv_eviction": "none"}, {"kv_eviction": "adakv"}] * 2
    num_tokens = 20 if is_v2 else 60
    prompts = [numbers(64 + i, 200 + (30 if is_v2 else 130) * i) for i in range(len(wishes))]
    alone = [
        engine.runs([prompt], num_tokens, extra_args=wish)[0] for prompt, wish in zip(prompts, wishes, strict=True)
    ]
    engine.forget_prefixes()
    names = [engine.add(prompt, num_tokens, extra_args=wish) for prompt, wish in zip(prompts, wishes, strict=True)]
    engine.run()
    for name, expected in zip(names, alone, strict=True):
        assert_same(engine.run_of(name), expected)


def test_a_row_that_is_not_found_stops_the_step(tiny, monkeypatch, same_on_both):
    """It would read blocks that were given back, and say nothing."""
    from cake_vllm.kernels import EvictedRows

    engine: Engine = tiny(kv_eviction="cake", kv_eviction_budget=100, seed=3)
    engine.add(numbers(65, 500), 50)
    for _ in range(3):
        engine.step()
    find = EvictedRows.find
    monkeypatch.setattr(EvictedRows, "find", lambda self, tails: find(self, tails) * 0)
    with pytest.raises(RuntimeError, match="evicted requests are not where the scheduler put them"):
        engine.step()
    engine.shutdown()


def test_messages_do_not_grow_with_the_load(tiny, same_on_both):
    """A step in which nothing changes tells the worker how many rows to expect, and nothing of any of them."""
    engine: Engine = tiny(kv_eviction="layer-defensivekv", kv_eviction_budget=150)
    half, plans = engine.scheduler.connector.scheduler, []
    plan = half.plan

    def record(output):
        plans.append(plan(output))
        return plans[-1]

    half.plan = record
    try:
        for seed in range(6):
            engine.add(numbers(70 + seed, 640), 40)
        engine.run()
    finally:
        half.plan = plan
    decoding = [plan for plan in plans if plan.redirected.get(True) and plan.redirected[True].num_rows == 6]
    assert len(decoding) > 20
    quiet = [plan for plan in decoding if not (plan.grown or plan.observations or plan.released)]
    assert len(quiet) >= len(decoding) - 4


def part(columns: int, kept, by_head: bool = True, **fields) -> Eviction:
    return Eviction(7, by_head, columns, True, kept, tuple(tuple(n - 1 for n in layer) for layer in kept), **fields)


def test_reports_of_ranks_and_stages_are_joined():
    first = EvictionReport({0: {"a": part(3, ((10,), (20,)))}})
    second = EvictionReport({0: {"a": part(5, ((11,), (21,)))}})
    third = EvictionReport({1: {"a": part(4, ((30,),))}})
    fourth = EvictionReport({1: {"a": part(2, ((31,),), failed=True)}})
    joined = first.aggregate(second).aggregate(third).aggregate(fourth).evictions()["a"]
    assert joined.kept == ((10, 11), (20, 21), (30, 31))
    assert joined.wanted == ((9, 10), (19, 20), (29, 30))
    # What one of them uses stays.
    assert joined.columns == 5
    assert joined.failed
    assert joined.is_traded
    still = first.aggregate(EvictionReport({0: {"a": replace(part(5, ((11,), (21,))), is_traded=False)}}))
    assert not still.evictions()["a"].is_traded
    # Who took longest held the others up; a report may have no more to tell.
    assert first.aggregate(EvictionReport({1: {}}, 0.2)).aggregate(EvictionReport({1: {}}, 0.1)).seconds == 0.2
    assert EvictionReport({0: {}}, 0.2).evictions() == {}
    alike = EvictionReport({0: {"a": part(3, ((10,), (20,)), by_head=False)}})
    assert alike.aggregate(alike).evictions()["a"].kept == ((10,), (20,))


class Stages:
    """Two workers in place of one, each with half of the layers, as pipeline stages have them."""

    def __init__(self, engine: Engine):
        from cake_vllm.integration.worker.worker import EvictionWorker

        (group,) = engine.scheduler.kv_cache_config.kv_cache_groups
        config = engine.connector.worker.judging.config
        self.workers = []
        for stage, names in enumerate((group.layer_names[:2], group.layer_names[2:])):
            half = replace(engine.scheduler.kv_cache_config, kv_cache_groups=[replace(group, layer_names=names)])
            self.workers.append(EvictionWorker(config, engine.vllm_config, half))
            self.workers[-1]._stage = stage

    def begin(self, plan, attn_metadata):
        for worker in self.workers:
            # Each stage has metadata of its own.
            if attn_metadata:
                own = copy.copy(attn_metadata[worker.layers.target[0].name])
                attn_metadata |= {layer.name: own for layer in worker.layers.target}
            worker.begin(plan, attn_metadata)

    def finish(self):
        reports = [report for worker in self.workers if (report := worker.finish())]
        return reports[0].aggregate(reports[1]) if reports else None

    def end(self):
        for worker in self.workers:
            worker.end()


@pytest.mark.parametrize("name", ["snapkv", "cake", "layer-defensivekv"])
def test_stages_divide_their_own_budgets(tiny, monkeypatch, name, same_on_both):
    """They need as many columns as a whole model, whatever they divide; equal budgets are equal in any division."""
    options = {"decode": "window"}
    engine: Engine = tiny(kv_eviction=name, kv_eviction_budget=150, kv_eviction_config=options, seed=4)
    prompts = [numbers(80, 700), numbers(81, 100), numbers(82, 1000)]
    whole = engine.generate(prompts, 80)
    engine.forget_prefixes()
    engine.stats()
    monkeypatch.setattr(engine, "_check_halves", lambda: None)
    monkeypatch.setattr(engine.connector, "worker", Stages(engine))
    names = [engine.add(prompt, 80, extra_args={"kv_eviction_report": 1}) for prompt in prompts]
    done = engine.run()
    assert [len(done[name]) for name in names] == [80, 80, 80]
    reports = [(engine.outputs[name].kv_transfer_params or {})["kv_eviction"]["kept_tokens"] for name in names]
    assert [report is None for report in reports] == [False, True, False]
    for report in (reports[0], reports[2]):
        assert len(report) == 4
        # Each stage has what its share of the layers is given.
        assert all(110 <= np.mean(report[stage : stage + 2]) <= 150 + 64 for stage in (0, 2))
    if name == "snapkv":
        assert [done[name] for name in names] == whole
    assert engine.stats()["failures"] == 0
    assert engine.is_idle()
    engine.shutdown()


def test_positions_do_not_depend_on_where_pages_come_from(tiny, same_on_both):
    """Copied to columns of the pool, or in place among those of the request: a smaller pool changes nothing."""
    prompt = numbers(90, 900)
    for name in ("cake", "layer-defensivekv"):
        settings = {"kv_eviction": name, "kv_eviction_budget": 200, "max_model_len": 1000}
        runs = []
        for blocks in (1500, 33):
            engine: Engine = tiny(**settings, num_gpu_blocks_override=blocks)
            engine.forget_prefixes()
            engine.stats()
            runs += engine.trace([prompt], 40)
            assert engine.stats()["in_place"] == (blocks == 33)
        assert runs[0][0] == runs[1][0]
        assert same_positions(runs[0][1], runs[1][1])
