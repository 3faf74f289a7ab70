"""What load does not change: a request that waits, is preempted, or shares what it reads answers as it does alone."""

import random
import time
from collections import defaultdict
from typing import Any

import pytest
import torch
from engine import Engine, Late
from random_models import numbers
from ties import assert_same

pytestmark = pytest.mark.engine

BUDGET = 128
#: What a request may ask for, as far as every engine here grants it.
WISHES: list[dict[str, Any]] = [
    {},
    {},
    {"kv_eviction": "none"},
    {"kv_eviction_budget": 60},
    {"kv_eviction": "snapkv", "kv_eviction_budget": 100},
    {"kv_eviction": "layer-defensivekv", "kv_eviction_budget": 90},
]


def preempt(engine: Engine) -> None:
    """As vLLM does with what runs when memory is short: the prefix cache stays what it is."""
    scheduler = engine.scheduler
    while scheduler.running:
        scheduler._preempt_request(scheduler.running.pop(), time.monotonic(), drop_stale_output=True)
    # They start again in the very next step, see vLLM's ``reset_prefix_cache``.
    scheduler.prev_step_scheduled_req_ids.clear()


def test_fifty_requests_in_a_small_pool(tiny, same_on_both):
    """They share prefixes, so that there are few blocks to rewrite, and some are preempted."""
    dice = random.Random(0)
    heads = [numbers(900 + seed, 400) for seed in range(4)]
    jobs = []
    for seed in range(50):
        head = dice.choice(heads)[: dice.randint(200, 400)]
        jobs.append((head + numbers(1000 + seed, dice.randint(10, 120)), dice.randint(10, 160), dice.choice(WISHES)))
    engine: Engine = tiny(
        kv_eviction="cake",
        kv_eviction_budget=BUDGET,
        kv_eviction_config={"decode": "off"},
        max_model_len=1024,
        max_num_batched_tokens=256,
        num_gpu_blocks_override=110,
    )
    engine.stats()
    names, preempted = [], set()
    while len(names) < len(jobs) or engine.scheduler.requests:
        if len(names) < len(jobs):
            prompt, max_tokens, wish = jobs[len(names)]
            names.append(engine.add(prompt, max_tokens, extra_args=wish))
        for _ in range(dice.randrange(3)):
            engine.step()
        requests = engine.scheduler.requests.values()
        preempted |= {request.request_id for request in requests if request.num_preemptions}
    stats = engine.stats()
    assert stats["in_place"] > 10
    assert len(preempted) >= 4
    together = [engine.run_of(name) for name in names]
    for (prompt, max_tokens, wish), run in zip(jobs, together, strict=True):
        engine.forget_prefixes()
        (alone,) = engine.runs([prompt], max_tokens, extra_args=wish)
        assert_same(run, alone)


@pytest.mark.parametrize("when", ["at once", pytest.param("a step late", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("decode", "wishes"),
    [
        # The last two take notes of the prompt, and look at none of its queries: that one is hit as a whole.
        ("off", [{}, {"kv_eviction": "layer-defensivekv"}, {"kv_eviction": "echo"}, {"kv_eviction": "knorm"}]),
        ("cake", [{}, {"kv_eviction_budget": 70}]),
        ("window", [{}, {"kv_eviction": "layer-defensivekv", "kv_eviction_config": {"window": 12}}]),
    ],
)
def test_preempted_requests_are_evicted_as_they_were(tiny, decode, wishes, when, asynchronous, monkeypatch, is_v2):
    """By the queries of the prompt, whatever the prefix cache has, and while they decode where they were."""
    config: dict[str, Any] = {"decode": decode, **({"every": 40} if decode == "window" else {})}
    engine: Engine = tiny(
        kv_eviction="cake",
        kv_eviction_budget=150,
        kv_eviction_config=config,
        max_num_batched_tokens=256,
        max_model_len=1024,
        **(asynchronous if when == "a step late" else {}),
    )
    late = None
    if when == "a step late":
        # In one process no step is planned before the one before it has run.
        late = Late(engine.scheduler.connector.scheduler, monkeypatch)
        monkeypatch.setattr(engine, "_check_halves", lambda: None)
    grants, evicted = engine.scheduler.connector.scheduler._grants, defaultdict(set)
    grant = grants.grant

    def granting(tracked, *args, **kwargs):
        given = grant(tracked, *args, **kwargs)
        if given is not None:
            evicted[tracked.name.partition("-")[0]].add(grants._pending[given.epoch].length)
        return given

    monkeypatch.setattr(grants, "grant", granting)
    # The second one's first token fills a block; the last one outgrows its budget by its output.
    lengths, max_tokens = (320, 319, 90), 40 if is_v2 else 130
    jobs = [(numbers(length, length), wish) for length in lengths[is_v2:] for wish in wishes]
    alone, ends = [], []
    for prompt, wish in jobs:
        engine.forget_prefixes()
        alone += engine.runs([prompt], max_tokens, extra_args=wish)
        ends.append(set().union(*evicted.values()))
        evicted.clear()
    engine.forget_prefixes()
    engine.stats()
    names = [engine.add(prompt, max_tokens, extra_args=wish) for prompt, wish in jobs]
    requests = list(engine.scheduler.requests.values())
    for num_tokens in (20,) if is_v2 else (25, 110):
        while min(request.num_output_tokens for request in requests) < num_tokens:
            engine.step()
        preempt(engine)
        for _ in range(2):
            # While they are computed again.
            engine.step()
        preempt(engine)
    engine.run()
    # Some still waited when others were preempted while they were computed again.
    counts = [request.num_preemptions for request in requests]
    assert min(counts) >= (1 if is_v2 else 2)
    assert max(counts) == (2 if is_v2 else 4)
    for name, reference, lengths_then in zip(names, alone, ends, strict=True):
        assert_same(engine.run_of(name), reference)
        assert evicted[name] == lengths_then
    if late:
        late.deliver()
    assert engine.is_idle()


def test_a_preempted_request_is_cut_by_its_prompts_queries(tiny, same_on_both):
    """Elastic budgets: what judges it when memory is short is what judged it before."""
    engine: Engine = tiny(kv_eviction="cake", kv_eviction_budget="auto", max_num_batched_tokens=256)
    engine.forget_prefixes()
    name = engine.add(numbers(321, 320), 60)
    while not engine.scheduler.requests or next(iter(engine.scheduler.requests.values())).num_output_tokens < 40:
        engine.step()
    watched = engine.connector.worker.judging.watched

    def queries() -> list[torch.Tensor]:
        (found,) = (of.queries for key, of in watched.items() if key.startswith(name))
        return [found[layer].last(len(found[layer]), 320) for layer in sorted(found)]

    before = queries()
    preempt(engine)
    while next(iter(engine.scheduler.requests.values())).num_output_tokens < 45:
        engine.step()
    after = queries()
    assert len(before) == 4
    for ours, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    engine.run()
    assert engine.is_idle()
