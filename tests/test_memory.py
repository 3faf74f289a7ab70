"""What is held when: prefix caching beside eviction, bounded prefill, and a pool that is too small."""

import random

import pytest
from engine import Engine
from random_models import numbers
from replay import Replay
from ties import assert_same

from cake_vllm.policies import create_policy

pytestmark = pytest.mark.engine


PREFIX_CACHED = {"kv_eviction": "cake", "kv_eviction_budget": 100, "max_num_batched_tokens": 512}


def test_prefix_hits_give_the_tokens_of_a_cold_run(tiny):
    """Full, partial, by a later turn, of a finished owner, and of one that is still there."""
    engine: Engine = tiny(**PREFIX_CACHED)
    first = numbers(0, 700)
    prompts = [first, first[:500] + numbers(1, 200), first + engine.generate([first], 80)[0] + numbers(2, 100)]
    cold = []
    for prompt in prompts:
        engine.forget_prefixes()
        cold += engine.runs([prompt], 20)
    engine.forget_prefixes()

    # One after the other: each prefix was evicted, and its owner is gone. A repetition leaves the window to compute;
    # of a conversation, the turn's prompt is there but nothing that was computed after its eviction.
    for prompt, expected, hit in zip([first, *prompts], [cold[0], *cold], [0, 640, 480, 672], strict=True):
        (run,) = engine.runs([prompt], 20)
        assert engine.num_cached(list(engine.outputs)[-1]) == hit
        assert_same(run, expected)

    # Together: the second request reads the pages of the first while they are computed and given back.
    engine.forget_prefixes()
    names = [engine.add(first, 20)]
    engine.step()
    names += [engine.add(prompt, 20) for prompt in prompts]
    engine.run()
    for name, expected in zip(names, [cold[0], *cold], strict=True):
        assert_same(engine.run_of(name), expected)
    assert [engine.num_cached(name) > 0 for name in names] == [False, True, True, True]
    assert engine.is_idle()
    engine.forget_prefixes()
    for run, expected in zip(engine.runs(prompts, 20), cold, strict=True):
        assert_same(run, expected)


def test_shared_pages_are_not_rewritten_in_place(tiny):
    """Two requests on one prefix, and too few free pages to copy to: neither hurts the other."""
    prefix = numbers(3, 640)
    prompts = [prefix + numbers(4, 60), prefix + numbers(5, 400)]
    settings = {**PREFIX_CACHED, "kv_eviction_budget": 500, "max_model_len": 1100}
    roomy: Engine = tiny(**settings)
    expected = [roomy.runs([prompt], 20)[0] for prompt in prompts]
    # Both prompts fit, and beside them what the first eviction has to copy of the shared blocks, but not all of it.
    tight: Engine = tiny(**settings, num_gpu_blocks_override=22 + 13 + 14 + 1)
    tight.stats()
    names = [tight.add(prompt, 20) for prompt in prompts]
    tight.run()
    stats = tight.stats()
    assert stats["in_place"] >= 1
    assert stats["failures"] == 0
    assert tight.num_cached(names[1]) == 640
    # What was overwritten cannot be hit: a repetition gives the same again.
    again = [tight.runs([prompt], 20)[0] for prompt in prompts]
    for run, reference in zip([*map(tight.run_of, names), *again], 2 * expected, strict=True):
        assert_same(run, reference)
    assert tight.is_idle()


def test_a_request_waits_where_another_eviction_could_not_write(tiny):
    """There is room for both prompts as they share their pages, but not for what is kept of either beside these."""
    prefix = numbers(3, 640)
    prompts = [prefix + numbers(4, 60), prefix + numbers(5, 60)]
    settings = {**PREFIX_CACHED, "kv_eviction_budget": 500, "max_model_len": 760}
    roomy: Engine = tiny(**settings)
    expected = [roomy.runs([prompt], 20)[0] for prompt in prompts]
    engine: Engine = tiny(**settings, num_gpu_blocks_override=24 + 4 + 1)
    engine.stats()
    names = [engine.add(prompt, 20) for prompt in prompts]
    for _ in range(3):
        engine.step()
    assert engine.num_running == 1
    engine.run()
    # Alone, a request shares nothing: its own blocks are rewritten.
    stats = engine.stats()
    assert stats["requests"] == stats["in_place"] == 2
    for name, reference in zip(names, expected, strict=True):
        assert_same(engine.run_of(name), reference)
    assert engine.is_idle()


def test_a_running_request_is_preempted_for_an_eviction_that_could_not_write(tiny):
    """Two requests on one prompt outgrow their budget by their output, and all that is left are three blocks."""
    settings = {**PREFIX_CACHED, "kv_eviction_budget": 256, "max_model_len": 420}
    prompt = numbers(6, 250)
    roomy: Engine = tiny(**settings)
    (expected,) = roomy.runs([prompt], 60)
    # Seven that they share, and two of each at the end of the ninth.
    engine: Engine = tiny(**settings, num_gpu_blocks_override=7 + 2 + 2 + 3 + 1)
    names = [engine.add(prompt, 60) for _ in range(2)]
    engine.step()
    first, second = engine.scheduler.requests.values()
    while not second.num_preemptions:
        engine.step()
    # The first one is evicted in the step that ends its ninth block.
    assert first.num_computed_tokens == 9 * 32
    assert not first.num_preemptions
    engine.run()
    assert_same(engine.run_of(names[0]), expected)
    assert engine.is_idle()


def test_first_eviction_while_decoding_leaves_the_prefix_cache_alone(tiny, same_on_both):
    """A short prompt outgrows its budget by its output; its pages are shared with a request that goes on."""
    engine: Engine = tiny(**{**PREFIX_CACHED, "kv_eviction_budget": 256})
    prompt = numbers(6, 250)
    (expected,) = engine.runs([prompt], 200)
    engine.forget_prefixes()
    names = [engine.add(prompt, 200)]
    for _ in range(3):
        engine.step()
    names.append(engine.add(prompt, 200))
    engine.run()
    for name in names:
        assert_same(engine.run_of(name), expected)
    assert engine.stats()["trims"] > 2
    again = engine.add(prompt + engine.run_of(names[0]).tokens[:20], 180)
    engine.run()
    # Tokens up to the first eviction were computed from everything before them.
    assert engine.num_cached(again) == 256 // 32 * 32
    assert engine.is_idle()


def test_hit_rate_under_pressure_is_that_of_stock(tiny, same_on_both):
    """Requests on a few prefixes in a pool that holds a part of them."""
    dice = random.Random(7)
    prefixes = [numbers(100 + i, 640) for i in range(8)]
    prompts = [dice.choice(prefixes) + numbers(200 + i, 60 + dice.randrange(60)) for i in range(40)]
    blocks = 5 * -(-760 // 32)
    pool = {"max_model_len": 800, "max_num_seqs": 2}
    hits = []
    for settings in (
        {"num_gpu_blocks_override": blocks + 1},
        {"num_gpu_blocks_override": blocks + 1, **PREFIX_CACHED, "kv_eviction_budget": 150},
    ):
        engine: Engine = tiny(**pool, **settings)
        names = [engine.add(prompt, 8) for prompt in prompts]
        engine.run()
        hits.append(sum(engine.num_cached(name) for name in names))
    assert hits[0] > 0.3 * sum(map(len, prompts)), "nothing to compare"
    assert hits[1] >= 0.95 * hits[0]


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        pytest.param("cake", {}, marks=pytest.mark.full),
        ("layer-defensivekv", {}),
        ("echo", {"observe": 7}),
        pytest.param("cake", {"protect": {"first": 20}, "echo": 12}, marks=pytest.mark.full),
    ],
)
def test_progressive_prefill_equals_its_replay(tiny, tiny_model, name, knobs):
    options = {"prefill": "progressive", "decode": "window", **knobs}
    engine: Engine = tiny(
        kv_eviction=name, kv_eviction_budget=256, kv_eviction_config=options, max_num_batched_tokens=512
    )
    replay = Replay(tiny_model)
    engine.stats()
    prompt = numbers(41, 2049)
    (served,) = engine.served([prompt], 40)
    replay.verify(prompt, served, create_policy(name, knobs), 256, 32, decode="window", chunk=512)
    stats = engine.stats()
    assert stats["requests"] == 1
    assert stats["trims"] >= 4
    assert stats["failures"] == 0


def test_a_prompt_longer_than_the_pool(tiny):
    """With progressive prefill 6,000 tokens pass through a pool for 1,200; stock vLLM does not start."""
    blocks = 1200 // 32
    pool = {"max_model_len": 7000, "max_num_batched_tokens": 512}
    with pytest.raises(ValueError, match="max seq len"):
        tiny(**pool, num_gpu_blocks_override=blocks + 1)
    settings = {"kv_eviction": "cake", "kv_eviction_budget": 256, "kv_eviction_config": {"prefill": "progressive"}}
    prompt = numbers(8, 6000)
    roomy: Engine = tiny(**pool, **settings)
    (expected,) = roomy.trace([prompt], 40)
    tight: Engine = tiny(**pool, **settings, num_gpu_blocks_override=blocks + 1)
    name, most, done = tight.add(prompt, 40), 0, {}
    while tight.llm.llm_engine.has_unfinished_requests():
        done |= tight.step()
        most = max(most, tight.num_free - tight.pool.get_num_free_blocks())
    assert done[name] == expected[0]
    assert most <= (256 + 512) // 32 + 3
    assert tight.is_idle()
    # Several of them, and short ones between.
    prompts = [prompt, numbers(9, 100), numbers(10, 3000), numbers(11, 1500)]
    assert [len(tokens) for tokens in tight.generate(prompts, 20)] == [20] * 4


def test_a_prefix_hit_under_progressive_prefill(tiny):
    """The first chunk is exact and can be hit; what follows was computed from less and cannot."""
    options = {"prefill": "progressive", "decode": "window"}
    engine: Engine = tiny(**{**PREFIX_CACHED, "kv_eviction_config": options})
    prompt = numbers(12, 2000)
    expected = engine.generate([prompt], 20)
    name = engine.add(prompt, 20)
    done = engine.run()
    assert engine.num_cached(name) == 512
    # The chunks of the second run begin elsewhere: it evicts at other lengths, and only its length is the same.
    assert len(done[name]) == len(expected[0])
    assert engine.is_idle()


@pytest.mark.parametrize("prefill", ["progressive", "exact"])
def test_reports_that_come_a_step_late(tiny, prefill, monkeypatch, same_on_both):
    """Under asynchronous scheduling a step is planned before the one before it is reported."""
    options = {"prefill": prefill, "decode": "window"}
    engine: Engine = tiny(**{**PREFIX_CACHED, "kv_eviction_config": options})
    half = engine.scheduler.connector.scheduler
    prompts = [numbers(40, 1300), numbers(41, 200), numbers(42, 1300)[:700] + numbers(43, 100)]
    expected = [engine.runs([prompt], 90)[0] for prompt in prompts]
    assert engine.is_idle()

    late: list = []
    plan, finish = half.plan, half.finish

    def plan_first(output):
        planned, due = plan(output), late.copy()
        late.clear()
        for evictions in due:
            finish(evictions)
        return planned

    monkeypatch.setattr(half, "plan", plan_first)
    monkeypatch.setattr(half, "finish", late.append)
    monkeypatch.setattr(engine, "_check_halves", lambda: None)
    engine.forget_prefixes()
    engine.stats()
    for prompt, run in zip(prompts, expected, strict=True):
        assert engine.generate([prompt], 90) == [run.tokens]
    names = [engine.add(prompt, 90) for prompt in prompts]
    for _ in range(8):
        engine.step()
    engine.abort(names[0])
    engine.run()
    assert engine.stats()["requests"] >= 4
    for name, run in zip(names[1:], expected[1:], strict=True) if prefill == "exact" else ():
        assert_same(engine.run_of(name), run)
    assert engine.is_idle()


def test_the_longest_request_that_the_pool_holds(tiny, same_on_both):
    """``--max-model-len auto``: a bounded request may be as long as the model allows, in a pool of 2,000 tokens."""
    per_token = 4 * 2 * 2 * 32 * 4
    settings = {"num_gpu_blocks_override": None, "max_model_len": -1, "kv_cache_memory_bytes": 2000 * per_token}
    settings |= {"kv_eviction": "cake", "kv_eviction_budget": 100, "max_num_batched_tokens": 256}
    exact: Engine = tiny(**settings, kv_eviction_config={"decode": "off"})
    fits = exact.vllm_config.model_config.max_model_len
    assert 1900 < fits < 2000
    assert len(exact.generate([numbers(5, fits - 20)], 20)[0]) == 20
    bounded: Engine = tiny(**settings, kv_eviction_config={"prefill": "progressive", "decode": "cake"})
    assert bounded.vllm_config.model_config.max_model_len == 8192
    assert len(bounded.generate([numbers(5, 6000)], 20)[0]) == 20
    assert bounded.is_idle()
