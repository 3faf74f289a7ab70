"""Cuts take of what was generated, too: no preemption, and what stays is what a plain model's replay keeps."""

import itertools
from collections import defaultdict

import numpy as np
import pytest
from cutting_replay import CuttingReplay, Seen
from engine import Engine, Late
from random_models import gates_of, numbers
from test_elastic import POOL, cut_once, preemptions

from cake_vllm.integration.messages import Parts
from cake_vllm.integration.scheduler.outputs import Share, divide
from cake_vllm.policies import create_policy

MIN_TOKENS, RECENT = 64, 64
OPTIONS = {"min_tokens": MIN_TOKENS, "recent_tokens": RECENT}


@pytest.mark.parametrize("roll", range(20))
def test_the_larger_part_gives_first(roll):
    """The smaller part is as large as it can be, and no part is below its floor or above what it has."""
    dice = np.random.default_rng(roll)
    for _ in range(50):
        has, share = dice.integers(0, 40, 2), dice.random(2)
        floor = (has * share).astype(int)
        budget = int(dice.integers(floor.sum(), has.sum() + 5))
        left = divide(Share(*map(int, has)), Share(*map(int, floor)), budget)
        fitting = [
            pair
            for pair in itertools.product(*(range(low, high + 1) for low, high in zip(floor, has, strict=True)))
            if sum(pair) <= budget
        ]
        most = max(map(sum, fitting))
        fairest = max((min(pair), -max(pair)) for pair in fitting if sum(pair) == most)
        assert left.total == most
        assert (min(left.prompt, left.generated), -max(left.prompt, left.generated)) == fairest


@pytest.fixture(scope="module")
def replay(tiny_model: str) -> CuttingReplay:
    return CuttingReplay(tiny_model, gates=gates_of(tiny_model))


def crowded(tiny, blocks: int, **options) -> Engine:
    return tiny(
        **POOL | {"max_model_len": 32 * blocks},
        kv_eviction="cake",
        kv_eviction_budget="auto",
        kv_eviction_config=OPTIONS | options,
        num_gpu_blocks_override=blocks + 1,
    )


def run_cut(
    engine: Engine, prompts: list[list[int]], num_tokens: int, **wishes
) -> tuple[list[str], dict[str, list[Seen]]]:
    """Requests that run together, and the cuts of each."""
    cuts: defaultdict[str, list[Seen]] = defaultdict(list)
    worker = engine.connector.worker
    follow = worker.on_evicted

    def record(what, choice, eviction):
        follow(what, choice, eviction)
        assert eviction.is_traded
        chosen = [[head.clone() for head in layer] for layer in choice.chosen]
        cuts[what.req_id.rsplit("-", 1)[0]].append(Seen(what.end, what.grant, chosen))

    worker.on_evicted = record
    try:
        names = [engine.add(prompt, num_tokens, extra_args=wishes | {"kv_eviction_report": True}) for prompt in prompts]
        engine.run()
    finally:
        worker.on_evicted = follow
    return names, cuts


@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("cake", {}),
        ("layer-defensivekv", {}),
        ("knorm", {}),
        ("snapkv", {"protect": {"prompt": True}}),
        *(
            pytest.param(name, knobs, marks=pytest.mark.full)
            for name, knobs in (
                ("adakv", {}),
                ("criticalkv", {}),
                ("echo", {}),
                ("gate", {}),
                ("lagkv", {"lag": 32}),
                ("rkv", {}),
                ("triattention", {}),
                ("random", {"recent": 16}),
                ("echo", {"protect": {"prompt": True}}),
            )
        ),
    ],
)
def test_long_outputs_shrink_instead_of_being_preempted(tiny, replay, name, knobs, is_v2):
    """In a pool for half of what three requests generate: none is preempted, and each keeps what its replay keeps."""
    if is_v2 and name != "layer-defensivekv":
        pytest.skip("slow under Triton's interpreter, where a method by head is run")
    num_tokens = 400
    prompts = [numbers(300 + i, length) for i, length in enumerate((100, 150, 40))]
    engine = crowded(tiny, 28)
    engine.forget_prefixes()
    engine.stats()
    before = preemptions(engine)
    names, cuts = run_cut(engine, prompts, num_tokens, kv_eviction=name, kv_eviction_config=knobs)
    assert preemptions(engine) == before
    stats = engine.stats()
    assert stats["failures"] == 0
    policy = create_policy(name, knobs)
    given = [cut for seen in cuts.values() for cut in seen if cut.grant.parts]
    assert len(given) >= 3
    assert max(map(len, cuts.values())) > 1
    losing = sum(any(cut.grant.parts for cut in seen) for seen in cuts.values())
    assert stats["evicted_generated_tokens"] + stats["kept_generated_tokens"] == losing * num_tokens
    assert 0 < stats["evicted_generated_tokens"] < losing * num_tokens
    for request, prompt in zip(names, prompts, strict=True):
        tokens = list(engine.outputs[request].outputs[0].token_ids)
        assert len(tokens) == num_tokens
        seen = cuts[request]
        assert engine.outputs[request].kv_transfer_params["kv_eviction"]["cut_to"] == [of.grant.budget for of in seen]
        held = replay.follow(prompt, tokens, seen, policy, 32)
        for head in itertools.chain(*held):
            if seen and seen[-1].grant.parts:
                assert head[-RECENT:] == list(range(seen[-1].end - RECENT, seen[-1].end))
                in_prompt = sum(position < len(prompt) for position in head)
                if policy.protect.prompt or len(prompt) <= MIN_TOKENS:
                    assert in_prompt == len(prompt)
    assert engine.is_idle()


@pytest.mark.engine
@pytest.mark.parametrize("keeps_prompt", [False, True])
def test_no_cut_goes_below_the_floor(tiny, keeps_prompt, same_on_both):
    """As deep a cut as there can be leaves what is said to stay, and nothing more to give until more is generated."""
    engine = crowded(tiny, 28)
    engine.forget_prefixes()
    prompt, grants = numbers(320, 160), []
    follow = engine.connector.worker.on_evicted
    engine.connector.worker.on_evicted = lambda what, *rest: (grants.append(what.grant), follow(what, *rest))
    wish = {"kv_eviction": "knorm", "kv_eviction_config": {"protect": {"prompt": keeps_prompt}}}
    request, pressure = engine.add(prompt, 400, extra_args=wish), engine.scheduler.connector.scheduler._pressure
    for _ in range(301):
        engine.step()
    cut_once(engine, request, 0)
    engine.connector.worker.on_evicted = follow
    (grant,) = grants
    prompt_floor = 160 if keeps_prompt else MIN_TOKENS
    assert grant.budget == prompt_floor + RECENT
    assert grant.parts == Parts(None if keeps_prompt else MIN_TOKENS, RECENT, RECENT)
    assert pressure.in_force() == (grant.budget, 1)
    for _ in range(40):
        engine.step()
    assert pressure.in_force() == (grant.budget, 0)
    assert len(engine.run()[request]) == 400
    assert engine.is_idle()


@pytest.mark.engine
def test_outputs_stay_where_decode_is_off(tiny, same_on_both):
    """What becomes of the requests above where nothing but prompts gives."""
    engine = tiny(
        **POOL | {"max_model_len": 32 * 28},
        kv_eviction="cake",
        kv_eviction_budget="auto",
        kv_eviction_config={"min_tokens": MIN_TOKENS, "decode": "off"},
        num_gpu_blocks_override=29,
    )
    before = preemptions(engine)
    _, cuts = run_cut(engine, [numbers(300 + i, length) for i, length in enumerate((100, 150, 40))], 400)
    assert preemptions(engine) > before
    assert not any(cut.grant.parts for seen in cuts.values() for cut in seen)


@pytest.mark.engine
@pytest.mark.parametrize("late", [False, True])
def test_who_waits_is_let_in_once_outputs_can_be_judged(tiny, monkeypatch, late, same_on_both):
    """Nobody has kept the queries that a prompt takes by surprise: it waits for a window of them, and no longer."""
    engine = crowded(tiny, 28)
    engine.forget_prefixes()
    if late:
        Late(engine.scheduler.connector.scheduler, monkeypatch)
        monkeypatch.setattr(engine, "_check_halves", lambda: None)
    before = preemptions(engine)
    long = engine.add(numbers(310, 40), 600, extra_args={"kv_eviction_report": True})
    watched = engine.connector.worker.judging.watched
    for _ in range(450):
        engine.step()
        assert not any(of.latest for of in watched.values())
    short, steps = engine.add(numbers(311, 600), 4), 0
    while short not in engine.outputs:
        engine.step()
        steps += 1
    assert long not in engine.outputs
    assert 32 <= steps <= 32 + 8
    assert len(engine.run()[long]) == 600
    assert len(engine.outputs[long].kv_transfer_params["kv_eviction"]["cut_to"]) == 1
    assert preemptions(engine) == before
    assert engine.is_idle()
