"""Models with attention sinks, with layers that read another's cache, and with attention within chunks."""

import pytest
from engine import Engine
from random_models import KINDS, numbers, save_random_kind
from replay import Replay
from ties import assert_same

from cake_vllm.policies import create_policy

pytestmark = pytest.mark.engine

BUDGET = 100
SETTINGS = {
    "kv_eviction": "cake",
    "kv_eviction_budget": BUDGET,
    "skip_tokenizer_init": True,
    "max_model_len": 2048,
    "max_num_batched_tokens": 256,
}


@pytest.fixture(scope="module")
def model(request, tmp_path_factory) -> str:
    return save_random_kind(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("model", KINDS, indirect=True)
def test_by_layer_and_by_head_as_replayed(start_engine, model):
    """Both kinds of owners and a request that keeps everything, in one batch; generated tokens are evicted by layer."""
    engine: Engine = start_engine(model, **SETTINGS)
    verify_batch(engine, Replay(model), ("cake", "layer-defensivekv", "cake"), block_size=32)


@pytest.mark.parametrize("model", ["sinks"], indirect=True)
def test_keys_from_other_positions_as_replayed(start_engine, model):
    """By angles that YaRN has scaled."""
    engine: Engine = start_engine(model, **SETTINGS | {"kv_eviction": "triattention"})
    verify_batch(engine, Replay(model), ("triattention", "triattention", "cake"), block_size=32)


def verify_batch(engine: Engine, replay: Replay, policies: tuple[str, ...], block_size: int) -> None:
    """Three prompts by a method each, in one batch, are as replayed; the last is too short to be evicted."""
    prompts = [numbers(length, length) for length in (420, 333, 60)]
    requests = [
        engine.add(prompt, 40, extra_args={"kv_eviction": policy}, logprobs=2, detokenize=False)
        for prompt, policy in zip(prompts, policies, strict=True)
    ]
    engine.stats()
    done = engine.run()
    assert engine.stats()["requests"] == 2
    for prompt, request, policy in zip(prompts, requests, policies, strict=True):
        served = engine.served_as(request, done[request])
        assert bool(served.choices) == (len(prompt) > BUDGET)
        replay.verify(prompt, served, create_policy(policy, {}), BUDGET, block_size=block_size)
        # Closer than tokens tell.
        assert engine.run_of(request).gaps == pytest.approx(replay.gaps, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("model", ["sinks", pytest.param("shared", marks=pytest.mark.full)], indirect=True)
def test_chunks_of_an_evicted_prompt_as_replayed(start_engine, model):
    """Rows of several queries each, over pages of their heads."""
    settings = {**SETTINGS, "kv_eviction": "layer-defensivekv", "kv_eviction_config": {"prefill": "progressive"}}
    engine: Engine = start_engine(model, **settings | {"max_num_batched_tokens": 96})
    prompt = numbers(7, 300)
    (served,) = engine.served([prompt], 12)
    assert len(served.choices) > 1
    Replay(model).verify(prompt, served, create_policy("layer-defensivekv", {}), BUDGET, block_size=32, chunk=96)


@pytest.mark.parametrize("model", ["chunks"], indirect=True)
def test_what_was_computed_after_an_eviction_is_nobodys_prefix(start_engine, model):
    """Nor is it in layers with chunks: what these compute comes from those that were evicted from.

    The last request finds all layers' blocks up to the same length: those of full attention are of those before it.
    """
    engine: Engine = start_engine(model, **SETTINGS)
    engine.forget_prefixes()
    prompt, whole = numbers(11, 300), {"extra_args": {"kv_eviction": "none"}}
    engine.stats()
    (tokens,) = engine.generate([prompt], 150)
    assert engine.stats()["requests"] == 1
    longer = [*prompt, *tokens]
    engine.generate([longer], 1, **whole)
    hit = engine.add([*longer, *numbers(12, 40)], 8, logprobs=2, detokenize=False, **whole)
    engine.run()
    assert engine.num_cached(hit) >= 384
    engine.forget_prefixes()
    cold = engine.add([*longer, *numbers(12, 40)], 8, logprobs=2, detokenize=False, **whole)
    engine.run()
    assert_same(engine.run_of(hit), engine.run_of(cold))
    assert engine.run_of(hit).gaps == pytest.approx(engine.run_of(cold).gaps, rel=1e-3)
