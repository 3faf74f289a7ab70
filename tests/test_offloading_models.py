"""KV offloading beside eviction of models whose layers are not all of full attention: windows, chunks and states.

vLLM names and stores the blocks of each group of layers by themselves. Of a prefix a layer with a window needs what
lies within it, and a layer with a state that of its end: so a hit has to end where these are.
"""

import random

import pytest
from engine import Engine
from hybrids import save_hybrid
from random_models import KINDS, numbers, save_random_kind
from test_turns import EVENTS, turns
from tiers import (
    SCARCE,
    Tier,
    assert_stored,
    beside,
    exact_chunks,
    inexact,
    loads,
    protected,
    serve_at_random,
    store,
)
from ties import assert_same
from vllm.v1.kv_offload.base import OffloadKey, make_offload_key
from vllm.v1.request import Request

pytestmark = pytest.mark.engine

#: In pools in which what a prompt of 1,000 tokens gave back is written to by the next one.
MODELS = {
    "sinks": {"num_gpu_blocks_override": 73},
    "chunks": {"num_gpu_blocks_override": 73},
    "lfm2": {"num_gpu_blocks_override": 30, "block_size": 64},
}


@pytest.fixture(scope="module")
def model(request, tmp_path_factory) -> tuple[str, str]:
    """A model's name and its folder."""
    path = tmp_path_factory.mktemp(request.param)
    return request.param, save_random_kind(path, request.param) if request.param in KINDS else save_hybrid(
        request.param, path
    )[0]


@pytest.fixture
def start(start_engine, model):
    """Starts it over a lower tier."""
    name, path = model

    def with_tier(tier: dict | None = None, **settings) -> Engine:
        more = {**MODELS[name], "skip_tokenizer_init": True, **settings}
        return start_engine(path, **{**SCARCE, **more}, **beside(**(tier or {})))

    return with_tier


each = pytest.mark.parametrize("model", MODELS, indirect=True)


def dense(name: str, blocks_per_chunk: int = 1) -> dict:
    """Settings with which vLLM keeps windows and states wherever a chunk ends; attention in chunks is always kept."""
    size = MODELS[name].get("block_size", 32) * blocks_per_chunk
    return {} if name == "chunks" else {"prefix_cache_retention_interval": size}


@each
@protected
def test_given_back_blocks_have_been_stored(start, model, is_protected, monkeypatch, is_v2):
    """The next prompt is written to the blocks that an evicted one gave back a step before."""
    if is_v2 and model[0] == "lfm2":
        pytest.skip("vLLM's runner V2 clears new blocks beside states before it waits for copies that read them")
    # Else an evicted prompt leaves a window more than one that is served whole; states are where chunks end.
    engine: Engine = start(**(dense(model[0]) if model[0] != "lfm2" else {}))
    tier, exact = store(engine, [numbers(1, 1000), numbers(2, 1000)], 30, is_protected, monkeypatch)
    assert len({key[-4:] for key in exact}) == 2
    assert_stored(tier, exact, is_protected)


@each
@protected
def test_only_the_first_chunk_of_a_progressive_prefill_is_stored(start, is_protected):
    """Layers that are not evicted computed the others from what was kept, too."""
    engine: Engine = start(kv_eviction_config={"prefill": "progressive", "decode": "window"})
    tier, states = Tier(engine), engine.scheduler.connector._states
    tier.forget()
    if not is_protected:
        engine.scheduler.connector._states = {}
    prompt = numbers(3, 1000)
    engine.generate([prompt], 60)
    engine.scheduler.connector._states = states
    tier.drain()
    chunks = tier.chunks()
    exact = exact_chunks(start(), [prompt])
    assert len(chunks) > 2
    assert (inexact({key: of for key, of in chunks.items() if key in exact}, exact) == 0) == is_protected
    if is_protected:
        assert chunks.keys() <= exact.keys()


def key_of(tier: Tier, request: Request, end: int) -> OffloadKey:
    """What layers with a window, or a state, have of a prompt at the end of ``end`` tokens."""
    (group,) = (of.group_idx for of in tier.half.config.kv_group_configs if of.sliding_window_size_in_chunks)
    return make_offload_key(request.block_hashes[end // tier.half.config.tokens_per_hash - 1], group)


@pytest.mark.parametrize(
    ("model", "lost", "end"), [("sinks", 928, 896), ("chunks", 928, 896), ("lfm2", 960, 512)], indirect=["model"]
)
def test_a_hit_ends_where_all_layers_have_what_they_need(start, model, monkeypatch, lost, end):
    """Before the queries by which the prompt is evicted; and if a chunk is missing there, before that."""
    engine: Engine = start(**dense(model[0]))
    prompt, tier = numbers(4, 992), Tier(engine)
    tier.forget()
    (computed,) = engine.runs([prompt], 20)
    tier.drain()
    assert engine.stats()["requests"] == 1
    for is_lost in (False, True):
        engine.forget_prefixes()
        found = loads(engine, monkeypatch)
        name = engine.add(prompt, 20, logprobs=2, detokenize=False)
        if is_lost:
            (request,) = engine.scheduler.requests.values()
            tier.lose(key_of(tier, request, lost))
        engine.run()
        assert found == [end if is_lost else 960]
        assert engine.num_cached(name) == found[0]
        assert_same(engine.run_of(name), computed)
        tier.drain()
    assert engine.stats()["requests"] == 2


@pytest.mark.parametrize("model", ["sinks", pytest.param("chunks", marks=pytest.mark.full)], indirect=True)
def test_a_prompt_that_comes_again_is_hit_in_both(start, monkeypatch, same_on_both):
    """Windows are kept where it goes on, which is a block before the place where one goes on that is not evicted."""
    engine: Engine = start()
    prompt, tier = numbers(8, 965), Tier(engine)
    tier.forget()
    found = loads(engine, monkeypatch)
    for is_below in (False, True):
        engine.generate([prompt], 10)
        tier.drain()
        if is_below:
            engine.forget_prefixes()
        name = engine.add(prompt, 10)
        engine.run()
        assert engine.num_cached(name) == 928
    assert found == [928]


@pytest.mark.parametrize(
    ("model", "blocks_per_chunk"), [("sinks", 1), ("sinks", 4), ("chunks", 2), ("lfm2", 1)], indirect=["model"]
)
def test_random_load_over_a_small_tier(start, model, blocks_per_chunk, same_on_both):
    """Requests come, are preempted and aborted at any moment: the tier is exact, and nothing is lost in either."""
    dice = random.Random(7)
    shared = [numbers(40 + index, 1000) for index in range(4)]
    prompts = [dice.choice(shared)[: dice.randint(40, 1000)] + numbers(50 + index, 100) for index in range(12)]
    settings = {**dense(model[0], blocks_per_chunk), "max_num_batched_tokens": 64}
    truth = exact_chunks(start({"blocks_per_chunk": blocks_per_chunk}, **settings), prompts)
    small = {"blocks_per_chunk": blocks_per_chunk, "cpu_bytes_to_use": 80 << 15}
    engine: Engine = start(small, max_num_batched_tokens=160)
    tier = Tier(engine)
    assert len(truth) > tier.half.manager._num_chunks > 10
    serve_at_random(engine, prompts, 40, dice)
    tier.drain()
    assert engine.is_idle()
    assert inexact(tier.chunks(), truth) == 0
    stats = engine.stats()
    assert stats["requests"] >= 6
    assert not stats["failures"]


@each
def test_turns_are_cached_and_counted_as_without_eviction(start_engine, model, start, same_on_both):
    name, path = model
    settings = {**SCARCE, **MODELS[name], **EVENTS, "skip_tokenizer_init": True}
    stock = {key: value for key, value in settings.items() if not key.startswith("kv_eviction")}
    cached, chunks, events, _ = turns(start_engine(path, **stock, **beside()))
    assert min(cached[3:]) > 0
    engine: Engine = start(**EVENTS)
    ours = turns(engine)
    assert ours[0] == cached
    assert ours[1] >= chunks
    assert ours[2] >= events
    # Windows before the queries of prompts that are evicted.
    more, windows = ours[1] - chunks, Tier(engine).half._sliding_window_groups
    assert {key[-1] for key in more} == (set(windows) if name == "sinks" else set())
