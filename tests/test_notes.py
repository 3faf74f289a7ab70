"""Policies that take notes of a prompt while it is computed, on the real engine."""

import pytest
from engine import Engine
from random_models import numbers
from replay import Replay
from vllm.exceptions import VLLMValidationError

from cake_vllm.policies import create_policy

pytestmark = pytest.mark.engine

KNOBS = {"observe": 5}


@pytest.mark.parametrize("chunk", [512, pytest.param(96, marks=pytest.mark.full)])
def test_notes_do_not_depend_on_chunks(tiny, tiny_model, chunk):
    """Beside a request that takes none, in one batch; nothing is left of them."""
    engine: Engine = tiny(
        kv_eviction="echo", kv_eviction_budget=128, kv_eviction_config=KNOBS, max_num_batched_tokens=chunk
    )
    prompt = numbers(31, 1000)
    other = engine.add(prompt[100:], 8, extra_args={"kv_eviction_config": '{"observe": 0}'})
    noted = engine.add(prompt, 16)
    done, worker, most = {}, engine.connector.worker, 0
    while engine.llm.llm_engine.has_unfinished_requests():
        done |= engine.step()
        most = max(most, sum(bool(watched.notes) for watched in worker.judging.watched.values()))
    assert most == 1
    assert not worker.judging.watched
    replay = Replay(tiny_model)
    for name, text, knobs in ((noted, prompt, KNOBS), (other, prompt[100:], {})):
        replay.verify(text, engine.served_as(name, done[name]), create_policy("echo", knobs), 128, 32)
    with pytest.raises(AssertionError):
        replay.verify(prompt, engine.served_as(noted, done[noted]), create_policy("echo", {}), 128, 32)
    assert engine.is_idle()


def test_notes_are_taken_of_what_is_computed(tiny, tiny_model):
    """What the prefix cache has is looked at by later queries, and none of its own."""
    engine: Engine = tiny(
        kv_eviction="echo", kv_eviction_budget=128, kv_eviction_config=KNOBS, enable_prefix_caching=True
    )
    prompt, shared = numbers(32, 700), 400
    engine.generate([prompt[:shared]], 1)
    name = engine.add(prompt, 12)
    done = engine.run()
    hit = engine.num_cached(name)
    assert 300 < hit <= shared
    replay = Replay(tiny_model)
    replay.verify(prompt, engine.served_as(name, done[name]), create_policy("echo", KNOBS), 128, 32, hit=hit)


def test_a_request_may_not_observe_more_than_the_server(tiny):
    engine: Engine = tiny(kv_eviction="echo", kv_eviction_budget=128, kv_eviction_config=KNOBS)
    with pytest.raises(VLLMValidationError, match="observe of a request may be 0, or at least 5, not 4"):
        engine.add(numbers(33, 300), 1, extra_args={"kv_eviction_config": '{"observe": 4}'})
    assert len(engine.generate([numbers(33, 300)], 4, extra_args={"kv_eviction_config": '{"observe": 50}'})[0]) == 4
