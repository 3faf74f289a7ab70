"""Drafts that are verified a step late, as under asynchronous scheduling: only what is verified is cut.

A step is planned before it is known how long its requests are. What is kept is what a replay keeps that cuts at the
same length, judged by the same queries; tokens that were computed until then saw everything.
"""

import os
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine import Engine
from random_models import numbers
from ranks import RankedEngine
from replay import Replay, follow_choice, gather
from test_draft_models import BLOCK, speculation
from test_drafts import NGRAM, crowd, drafts
from test_elastic import cut_once, preemptions
from ties import Served

from cake_vllm.integration.messages import Grant, StepPlan
from cake_vllm.policies import LayerScore, PagedPrompt, Policy, create_policy

pytestmark = pytest.mark.engine
assert speculation, "a fixture"

POOL = {"max_model_len": 1024, "max_num_batched_tokens": 256, "max_num_seqs": 8}
#: Rounding of scores to half precision may change the places of positions whose ranks differ by this.
HALF = 2**-7


class Cuts:
    """Follows an engine's evictions.

    Attributes:
        of: by request, up to which length it was cut, its length from which on that is so, and what it was granted.
    """

    def __init__(self, engine: Engine, patch: pytest.MonkeyPatch):
        self.engine, self.of = engine, defaultdict(list)
        half, self._under_way = engine.scheduler.connector.scheduler, {}
        self._plan, self._finish = half.plan, half.finish
        patch.setattr(half, "plan", self._planned)
        patch.setattr(half, "finish", self._finished)

    def _planned(self, output) -> StepPlan:
        plan = self._plan(output)
        granted = [what for what in (*plan.observations, *plan.cuts) if what.grant is not None]
        self._under_way |= {what.grant.epoch: (what.end, what.grant) for what in granted}
        return plan

    def _finished(self, evictions) -> None:
        """The step that evicted is over, and of it all tokens are known; the next one's are not."""
        for name, eviction in evictions.items():
            request = self.engine.scheduler.requests.get(name)
            end, grant = self._under_way.pop(eviction.epoch)
            if request is not None and not request.is_finished():
                self.of[name].append((end, request.num_tokens - 1, grant))
        self._finish(evictions)

    def __getitem__(self, name: str) -> list[tuple[int, int, Grant]]:
        return next(cuts for key, cuts in self.of.items() if key.rsplit("-", 1)[0] == name)


class ElasticReplay(Replay):
    """Cuts a request once while it decodes, by what its prompt was worth when that ended."""

    @torch.inference_mode()
    def verify_cut(self, prompt: list[int], served: Served, policy: Policy, cut: tuple[int, int, Grant]) -> None:
        end, length, grant = cut
        self._choices = iter(served.choices)
        state, token = self._prefill(tuple(prompt))
        inputs = [self._inputs(state, index, policy.num_queries) for index in self._evictable]
        for number, expected in enumerate(served.tokens):
            assert token == expected or state.gap < self.gap_bound, f"token {number} is {expected} instead of {token}"
            if number + 1 == len(served.tokens):
                break
            token = self._forward(state, [expected])
            if state.length == length:
                self._cut(state, policy, inputs, end, grant)
        assert next(self._choices, None) is None

    def _cut(self, state, policy, inputs, end: int, grant: Grant) -> None:
        prompt_len, num_new = grant.prompt_len, grant.num_generated(end)
        budget = grant.budget - num_new
        scores = policy.settle([_halved(policy.judge(of_layer)) for of_layer in inputs], budget)
        given, choice = policy.head_budgets(scores, prompt_len, budget), next(self._choices)
        for place, (index, score, counts) in enumerate(zip(self._evictable, scores, given, strict=True)):
            paged = PagedPrompt(end, policy.protected + num_new, BLOCK, end % BLOCK)
            counts = [min(count, prompt_len - policy.protected) for count in counts]
            ranks = policy.ranks(score, prompt_len, budget / prompt_len, counts)
            positions = paged.positions(ranks, [paged.pages(count) for count in counts])
            rest = torch.arange(paged.full_len, state.length)
            followed = follow_choice(positions, choice[place], ranks, HALF)
            gather(state, index, [torch.cat([head, rest]) for head in followed])


def _halved(score: LayerScore) -> LayerScore:
    """As it is remembered while a request decodes."""
    indicator, *extra = (tensor.bfloat16().float() for tensor in (score.indicator, *score.extra))
    return replace(score, indicator=indicator, extra=tuple(extra))


@pytest.fixture
def late(start_engine, tiny_model, drafts_a_step_late):
    """Starts an engine whose drafts are verified a step late."""

    def start(model: str = tiny_model, **settings: Any) -> Engine:
        pool = {"skip_tokenizer_init": True, "num_gpu_blocks_override": 1500, **POOL}
        engine = start_engine(model, **(pool | drafts_a_step_late | settings))
        assert engine.vllm_config.scheduler_config.async_scheduling
        return engine

    return start


@pytest.fixture
def drafting(tiny_model, speculation):
    """The target and an engine's arguments for what drafts for it; an MTP layer is of a target of its own."""

    def of(method: str | None) -> tuple[str, dict[str, Any]]:
        if method is None:
            return tiny_model, {}
        if method.startswith("ngram"):
            return tiny_model, {"speculative_config": {**NGRAM, "method": method}}
        config = speculation(method)
        return config["model"] if method == "mtp" else tiny_model, {"speculative_config": config}

    return of


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("cake", None),
        ("layer-defensivekv", None),
        pytest.param("layer-defensivekv", "eagle3", marks=pytest.mark.full),
        pytest.param("cake", "mtp", marks=pytest.mark.full),
    ],
)
def test_what_is_cut_when_memory_is_short_is_verified(late, drafting, monkeypatch, same_on_both, name, method):
    """In the middle of drafts, some of which are rejected."""
    model, speculative = drafting(method)
    engine = late(
        model, kv_eviction=name, kv_eviction_budget="auto", kv_eviction_config={"min_tokens": 64}, **speculative
    )
    cuts, replay, lags, before = Cuts(engine, monkeypatch), ElasticReplay(model), set(), drafts(engine)
    for count in range(3, 10):
        # The end of a block is near.
        prompt = numbers(300 + count, 13 * BLOCK - 2 * count)
        request = engine.add(prompt, 40)
        for _ in range(count):
            engine.step()
        cut_once(engine, request, 200)
        done = engine.run()
        (cut,) = cuts[request]
        replay.verify_cut(prompt, engine.served_as(request, done[request]), create_policy(name, {}), cut)
        lags.add(cut[1] - cut[0])
    accepted, rejected = (now - then for now, then in zip(drafts(engine), before, strict=True))
    assert rejected > 100
    # By what was accepted meanwhile there is more than what was cut.
    assert min(lags) >= 0
    if method is None:
        assert accepted > 20
        assert len(lags) > 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cake", {"decode": "cake"}),
        ("layer-defensivekv", {"decode": "window", "prefill": "progressive"}),
        # What drafts read is what the target reads.
        pytest.param("streamingllm", {"decode": "window", "n_sink": BLOCK}, marks=pytest.mark.interpreted),
        pytest.param("tova", {"decode": "window", "method": "ngram_gpu"}, marks=pytest.mark.interpreted),
        pytest.param("cake", {"decode": "window", "method": "eagle"}, marks=pytest.mark.full),
        pytest.param("layer-defensivekv", {"decode": "window", "method": "eagle3"}, marks=pytest.mark.full),
        pytest.param("cake", {"decode": "window", "method": "mtp"}, marks=pytest.mark.full),
    ],
)
def test_generated_tokens_are_evicted_once_they_are_verified(late, drafting, monkeypatch, is_v2, name, options):
    """Judged by the queries at the end of their block, whatever has been drafted and accepted behind it."""
    options, settings = dict(options), {"kv_eviction": name, "kv_eviction_budget": 4 * BLOCK}
    method = options.pop("method", None)
    if method == "ngram_gpu" and not is_v2:
        pytest.skip("these drafts are the second runner's alone")
    model, speculative = drafting(method)
    engine = late(model, **settings, **speculative, kv_eviction_config=options)
    cuts, before, num_tokens = Cuts(engine, monkeypatch), drafts(engine), 30 if is_v2 else 120
    prompt = numbers(321, 307)
    request = engine.add(prompt, num_tokens)
    done = engine.run()
    of_request = cuts[request]
    late_by_length = {length: end for end, length, grant in of_request if not grant.divides}
    # Every block is given back, but perhaps the last one.
    assert [*late_by_length.values()] == [320, 352, 384, 416][: len(late_by_length)]
    assert len(late_by_length) >= (1 if is_v2 else 3)
    served = engine.served_as(request, done[request])
    served = replace(served, choices=served.choices[: len(of_request)])
    knobs = {key: value for key, value in options.items() if key == "n_sink"}
    ways = {"decode": options["decode"], "chunk": of_request[0][0] if "prefill" in options else None}
    policy = create_policy(name, knobs)
    Replay(model).verify(prompt, served, policy, 4 * BLOCK, BLOCK, late=late_by_length, **ways)
    accepted, rejected = (now - then for now, then in zip(drafts(engine), before, strict=True))
    lags = [length - end for length, end in late_by_length.items()]
    assert min(lags) >= 0
    assert rejected > (10 if is_v2 else 50)
    if name == "streamingllm":
        assert accepted > (10 if is_v2 else 50)
        assert is_v2 or max(lags) > 0


@pytest.fixture
def two_ranks(no_engine, tiny_model, drafting, drafts_a_step_late, monkeypatch):
    """Starts an engine of two tensor-parallel ranks whose drafts are verified a step late."""
    engines = []

    def start(method: str, **settings: Any) -> RankedEngine:
        no_engine()
        cores = sorted(os.sched_getaffinity(0))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
        settings |= {"skip_tokenizer_init": True, "num_gpu_blocks_override": 1500, "tensor_parallel_size": 2}
        engines.append(RankedEngine(tiny_model, **(POOL | drafts_a_step_late | drafting(method)[1] | settings)))
        assert engines[0].vllm_config.scheduler_config.async_scheduling
        return engines[0]

    yield start
    for engine in engines:
        engine.shutdown()


@pytest.mark.slow
@pytest.mark.full
def test_two_ranks_cut_what_is_verified(two_ranks, tiny_model, monkeypatch, same_on_both):
    """When memory is short, and a block that was filled: both ranks at the same length, each of its own heads."""
    options = {"min_tokens": 64, "decode": "window"}
    engine = two_ranks("eagle3", kv_eviction="cake", kv_eviction_budget="auto", kv_eviction_config=options)
    cuts, replay, policy = Cuts(engine, monkeypatch), ElasticReplay(tiny_model), create_policy("cake", {})
    before = drafts(engine)
    prompt = numbers(310, 13 * BLOCK - 10)
    request = engine.add(prompt, 40)
    for _ in range(6):
        engine.step()
    cut_once(engine, request, 200)
    done = engine.run()
    (cut,) = cuts[request]
    replay.verify_cut(prompt, engine.served_as(request, done[request]), policy, cut)

    prompt = numbers(321, 307)
    request = engine.add(prompt, 120, extra_args={"kv_eviction_budget": 4 * BLOCK})
    done = engine.run()
    served, of_request = engine.served_as(request, done[request]), cuts[request]
    late_by_length = {length: end for end, length, grant in of_request if not grant.divides}
    assert len(late_by_length) >= 3
    served = replace(served, choices=served.choices[: len(of_request)])
    replay.verify(prompt, served, policy, 4 * BLOCK, BLOCK, decode="window", late=late_by_length)
    _, rejected = (now - then for now, then in zip(drafts(engine), before, strict=True))
    assert rejected > 50
    assert min(length - end for length, end in late_by_length.items()) >= 0
    assert engine.stats()["failures"] == 0


@pytest.mark.parametrize(
    ("budget", "options"),
    [
        ("auto", {"min_tokens": 64}),
        pytest.param(100, {"decode": "window"}, marks=pytest.mark.full),
    ],
)
def test_more_requests_than_the_pool_holds(late, same_on_both, budget, options):
    """Cut, preempted and aborted while drafts are under way, they end, and every page comes back."""
    is_elastic = budget == "auto"
    engine = late(
        kv_eviction="cake",
        kv_eviction_budget=budget,
        kv_eviction_config=options,
        num_gpu_blocks_override=40 if is_elastic else 30,
        max_model_len=700,
    )
    engine.stats()
    before, num_preempted = drafts(engine), preemptions(engine)
    crowd(engine, [numbers(30 + i, 100 + 60 * i) for i in range(8)])
    accepted, rejected = (now - then for now, then in zip(drafts(engine), before, strict=True))
    stats = engine.stats()
    assert accepted > 50
    assert rejected > 100
    assert stats["failures"] == 0
    assert stats["cuts" if is_elastic else "trims"] > 2
    assert is_elastic or preemptions(engine) > num_preempted
    assert engine.is_idle()
