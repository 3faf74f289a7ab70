"""Models that mix attention with linear attention, state-space layers or short convolutions.

What stock vLLM cannot do for them on a CPU is in docs/compatibility.md, with what follows for these tests.
"""

import pytest
from engine import Engine
from hybrids import HYBRIDS, Hybrid, save_hybrid
from random_models import numbers
from replay import Replay
from ties import GAP_BOUND, RANK_BOUND, Run, assert_same

from cake_vllm.policies import create_policy

pytestmark = pytest.mark.engine


COMMON = {"skip_tokenizer_init": True, "max_model_len": 4096, "max_num_batched_tokens": 512}
BUDGET, PAGE = 150, 32
CAKE = {"kv_eviction": "cake", "kv_eviction_budget": BUDGET}
WHOLE = {"kv_eviction": "none"}


@pytest.fixture(scope="module")
def hybrid(request, tmp_path_factory) -> tuple[str, Hybrid]:
    """The model's folder, and what it is."""
    return save_hybrid(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> tuple[str, Hybrid]:
    """The one whose prefixes can be shared in float32."""
    return save_hybrid("lfm2", tmp_path_factory.mktemp("shared"))


def rounding(alone: list[Run], together: list[Run]) -> dict[str, float]:
    """Bounds for other shapes of computation, by what they do to stock vLLM: to the distance of its two best logits.

    What is a weight of attention, as ranks are, changes by as much of itself as its logit changes.
    """
    moved = 0.0
    for one, other in zip(alone, together, strict=True):
        same = [a == b for a, b in zip(one.tokens, other.tokens, strict=True)]
        first = same.index(False) + 1 if False in same else len(same)
        moved = max(moved, *(abs(a - b) for a, b in zip(one.gaps[:first], other.gaps[:first], strict=True)))
    return {"gap_bound": max(GAP_BOUND, 2 * moved), "rank_bound": max(RANK_BOUND, 2 * moved)}


def away(run: Run) -> Run:
    """Without what was kept: to be compared with one that kept everything."""
    return Run(run.tokens, run.gaps, [], {})


CASES = [pytest.param(name, marks=[pytest.mark.full] if name in ("falcon-h1", "qwen3.5") else []) for name in HYBRIDS]


@pytest.mark.parametrize("hybrid", CASES, indirect=True)
def test_attention_layers_are_evicted(start_engine, hybrid, is_v2):
    """Served in full it is stock vLLM; evicted, by layer and by head, prompts and what is generated, it is what a plain
    model says over the same caches, or where there is none that computes the same, what it is alone.

    Where stock rounds otherwise in a batch, in half precision by as much as a layer's share of the budget hangs on, the
    latter is shown for the same batch alone.
    """
    model, of = hybrid
    if is_v2 and of.model_type.startswith("qwen3"):
        pytest.skip("vLLM's code for it asks for Triton's driver, for which there is but a stand-in without a GPU")
    settings, num_tokens = {**COMMON, **of.settings}, 20
    plain: Engine = start_engine(model, **settings)
    block_size = plain.vllm_config.cache_config.block_size
    # The first ends a block after ten tokens of its own, the last is not evicted.
    longest = (max(-(-500 // block_size), 2) + 1) * block_size - 10
    prompts = [numbers(200 + length, length) for length in (longest, longest - 150, 60)]
    together, alone = plain.runs(prompts, num_tokens), []
    for prompt in prompts:
        plain.forget_prefixes()
        alone += plain.runs([prompt], num_tokens)
    bounds = rounding(alone, together)
    is_exact = all(a.tokens == b.tokens and a.gaps == b.gaps for a, b in zip(alone, together, strict=True))
    engine: Engine = start_engine(model, **settings, **CAKE, kv_eviction_config={"decode": "window"})
    grid = engine.connector.worker.layers.grid
    assert (grid.num_layers, grid.block_size, grid.page_size) == (of.layers, block_size, PAGE)
    for run, expected in zip(engine.runs(prompts, num_tokens, extra_args=WHOLE), together, strict=True):
        assert_same(run, away(expected), **bounds)
    replay = Replay(model) if of.is_replayed else None
    for name in ("cake", "layer-defensivekv"):
        engine.forget_prefixes()
        engine.stats()
        wish = {"logprobs": 2, "detokenize": False, "extra_args": {"kv_eviction": name}}
        names = [engine.add(prompt, num_tokens, **wish) for prompt in prompts]
        done = engine.run()
        runs, served = [engine.run_of(one) for one in names], [engine.served_as(one, done[one]) for one in names]
        stats = engine.stats()
        assert (stats["requests"], stats["failures"], len(stats["kept_tokens"])) == (2, 0, of.layers)
        # In pages, whatever a block is, and its partial block.
        most = sum(BUDGET + PAGE + len(prompt) % block_size for prompt in prompts[:2])
        assert sum(stats["kept_tokens"]) <= of.layers * most
        assert [len(run.choices) for run in served] == [2, 1, 0]
        # In bfloat16 tokens may be the same.
        assert runs[0].gaps != pytest.approx(together[0].gaps, rel=1e-2)
        if replay is not None:
            for prompt, what in zip(prompts, served, strict=True):
                policy = create_policy(name, {})
                replay.verify(prompt, what, policy, BUDGET, block_size, page_size=PAGE, decode="window")
            continue
        again: list[Run] = []
        for batch in [[prompt] for prompt in prompts] if is_exact else [prompts]:
            engine.forget_prefixes()
            again += engine.runs(batch, num_tokens, extra_args=wish["extra_args"])
        for run, other in zip(runs, again, strict=True):
            assert_same(other, run)


def test_no_state_that_came_after_an_eviction_is_a_prefix(start_engine, shared, same_on_both):
    """A request that begins as an evicted one went on is answered as where nothing was evicted."""
    model, of = shared
    size = of.settings["block_size"]
    # By default vLLM keeps no states of what is generated.
    settings = {**COMMON, **of.settings, "prefix_cache_retention_interval": size}
    engine: Engine = start_engine(model, **settings, **CAKE, kv_eviction_config={"decode": "off", "window": 2})
    prompt = numbers(210, 5 * size + 10)
    engine.stats()
    (tokens,) = engine.generate([prompt], 2 * size)
    assert engine.stats()["requests"] == 1
    longer = [*prompt, *tokens[: size + 20]]
    # What its attention layers compute is cached now; states of the same tokens may have been there before.
    first = engine.add(longer, 2, extra_args=WHOLE)
    engine.run()
    assert engine.num_cached(first) == 5 * size
    found = []
    for num_hits in (6 * size, 0):
        # As little behind the state as the window lets: a convolution's is of two tokens.
        name = engine.add(longer[: 6 * size + 2], 12, logprobs=2, detokenize=False, extra_args=WHOLE)
        engine.run()
        assert engine.num_cached(name) == num_hits
        found.append(engine.run_of(name))
        engine.forget_prefixes()
    assert_same(*found)
    assert max(abs(hit - cold) for hit, cold in zip(found[0].gaps, found[1].gaps, strict=True)) < GAP_BOUND


def test_progressive_prefill(start_engine, shared, same_on_both):
    """Evicted after each chunk, and while it decodes."""
    model, of = shared
    config = {"prefill": "progressive", "decode": "window"}
    engine: Engine = start_engine(model, **COMMON, **of.settings, **CAKE, kv_eviction_config=config)
    # Chunks end where vLLM keeps a state: at 512, 1,024 and the end.
    prompt, replay = numbers(212, 1050), Replay(model)
    for name in ("cake", "layer-defensivekv"):
        engine.forget_prefixes()
        (served,) = engine.served([prompt], 50, extra_args={"kv_eviction": name})
        assert len(served.choices) == 4
        ways = {"page_size": PAGE, "decode": "window", "chunk": 512}
        replay.verify(prompt, served, create_policy(name, {}), BUDGET, of.settings["block_size"], **ways)


@pytest.mark.parametrize("prefill", ["progressive", "exact"])
def test_preempted_and_shared_prefixes(start_engine, shared, prefill, same_on_both):
    """With generated tokens evicted and wishes of their own: as each is alone."""
    model, of = shared
    config = {"prefill": prefill, "decode": "window"}
    engine: Engine = start_engine(model, **COMMON, **of.settings, **CAKE, kv_eviction_config=config)
    head = numbers(220, 200)
    prompts = [[*head, *numbers(221 + seed, length)] for seed, length in enumerate((400, 460, 520, 40))]
    wishes = [{}, {"kv_eviction": "layer-defensivekv"}, WHOLE if prefill == "exact" else {}, {}]
    alone = []
    # Where chunks end depends on the batch, and with progressive prefill what is kept on where they end.
    for prompt, wish in zip(prompts, wishes, strict=True) if prefill == "exact" else ():
        engine.forget_prefixes()
        alone += engine.runs([prompt], 80, extra_args=wish)
    engine.forget_prefixes()
    engine.stats()
    settings = {"logprobs": 2, "detokenize": False}
    names = [engine.add(prompt, 80, extra_args=wish, **settings) for prompt, wish in zip(prompts, wishes, strict=True)]
    requests = list(engine.scheduler.requests.values())
    while min(request.num_output_tokens for request in requests) < 40:
        engine.step()
    assert engine.core.reset_prefix_cache(reset_running_requests=True)
    engine.run()
    assert [request.num_preemptions for request in requests] == [1] * 4
    assert engine.stats()["failures"] == 0
    for name, expected in zip(names, alone, strict=False):
        assert_same(engine.run_of(name), expected)


def test_a_prompt_is_admitted_by_cuts(start_engine, shared, same_on_both):
    """Elastic budgets: of a state a request takes a block, whatever its length, and attention layers alone give."""
    model, of = shared
    settings = {"kv_eviction": "cake", "kv_eviction_budget": "auto", "kv_eviction_config": {"min_tokens": 256}}
    # Two prompts of 17 blocks and their states leave too little for a third.
    small = COMMON | {"num_gpu_blocks_override": 40, "max_model_len": 1280}
    engine: Engine = start_engine(model, **small, **of.settings, **settings)
    engine.stats()
    names = [engine.add(numbers(230 + seed, 1080), 60) for seed in range(2)]
    while engine.num_running < 2 or any(
        request.num_output_tokens < 2 for request in engine.scheduler.requests.values()
    ):
        engine.step()
    assert "cuts" not in engine.stats()
    names.append(engine.add(numbers(232, 1080), 20))
    for _ in range(4):
        engine.step()
    assert engine.num_running == 3
    assert engine.stats()["cuts"] == 2
    done = engine.run()
    assert [len(done[name]) for name in names] == [60, 60, 20]
    assert all(engine.outputs[name].num_cached_tokens == 0 for name in names)
