"""Eviction beside vLLM's KV offloading, whose scheduler half runs as it is, over copies that are late (``tiers.py``).

What the lower tier holds is compared with what the same prompts store when nobody evicts them. What keeps it so is
taken away once in each test, to show that the test would see it.
"""

import pytest
from random_models import numbers
from tiers import (
    SCARCE,
    WHOLE,
    Tier,
    assert_stored,
    beside,
    exact_chunks,
    inexact,
    loads,
    protected,
    store,
    unprotected,
)
from ties import assert_same
from vllm.v1.request import RequestStatus

from cake_vllm.integration.beside import KVEvictionBesideConnector
from cake_vllm.integration.scheduler.scheduler import EvictionScheduler

pytestmark = pytest.mark.engine

#: One that stores nothing.
UNSTORED = {"extra_args": {"kv_transfer_params": {"max_offload_tokens": 0}, "kv_eviction_budget": 160}}


@pytest.fixture
def scarce(tiny):
    return tiny(**SCARCE, **beside())


@protected
def test_given_back_blocks_have_been_stored(scarce, is_protected, monkeypatch):
    """The next prompt is written to the blocks that an evicted one gave back a step before."""
    tier, exact = store(scarce, [numbers(1, 1000), numbers(2, 1000)], 30, is_protected, monkeypatch)
    assert_stored(tier, exact, is_protected)
    assert scarce.stats()["in_place"] == 0


@pytest.mark.interpreted
@protected
def test_blocks_that_are_rewritten_in_place_have_been_stored(scarce, is_protected, monkeypatch):
    """The pool can lend no column, and the last chunk's blocks become some."""
    neighbour, prompt = numbers(3, 440), numbers(4, 1000)
    exact, tier = exact_chunks(scarce, [neighbour, prompt]), Tier(scarce)
    scarce.add(neighbour, 60, **WHOLE)
    scarce.step()
    if not is_protected:
        unprotected(monkeypatch)
    scarce.add(prompt, 5)
    scarce.run()
    assert scarce.stats()["in_place"] == 1
    assert_stored(tier, exact, is_protected)


@protected
def test_columns_were_stored_by_those_who_had_them(scarce, is_protected, monkeypatch):
    """A prompt that stores nothing itself borrows blocks of one that has just finished."""
    before, prompt = numbers(5, 440), numbers(6, 1000)
    exact, tier = exact_chunks(scarce, [before]), Tier(scarce)
    if not is_protected:
        monkeypatch.setattr(KVEvictionBesideConnector, "_lend", lambda *_: None)
    scarce.add(before, 1)
    scarce.add(prompt, 10, **UNSTORED)
    scarce.run()
    assert scarce.stats()["requests"] == 1
    assert_stored(tier, exact, is_protected)


@protected
def test_nothing_is_stored_of_a_row_that_was_traded(scarce, is_protected):
    """A lower tier that was emptied asks for all blocks again; those of an evicted request are others' by now."""
    prompts = [numbers(7, 1000), numbers(8, 600)]
    exact, tier = exact_chunks(scarce, prompts), Tier(scarce)
    connector = scarce.scheduler.connector
    states = connector._states
    if not is_protected:
        connector._states = {}
    scarce.add(prompts[0], 60)
    for _ in range(8):
        scarce.step()
    assert scarce.scheduler.reset_connector_cache()
    scarce.add(prompts[1], 30)
    scarce.run()
    connector._states = states
    tier.drain()
    chunks = tier.chunks()
    assert (inexact(chunks, exact) == 0) == is_protected
    assert (len(chunks) == len(prompts[1]) // 32) == is_protected


PROGRESSIVE = {**SCARCE, "kv_eviction_config": {"prefill": "progressive", "decode": "window"}}


@protected
def test_only_what_is_exact_is_stored(tiny, is_protected):
    """Of a progressive prefill the first chunk, of generated tokens those before the first eviction."""
    engine = tiny(**PROGRESSIVE, **beside(offload_prompt_only=False))
    tier, states = Tier(engine), engine.scheduler.connector._states
    tier.forget()
    if not is_protected:
        engine.scheduler.connector._states = {}
    prompts = [numbers(9, 70), numbers(10, 1000)]
    answers = engine.generate(prompts, 100)
    engine.scheduler.connector._states = states
    assert engine.stats()["trims"] > 0
    tier.drain()
    chunks = tier.chunks()
    short, long = (prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True))
    engine = tiny(**SCARCE, **beside())
    exact = exact_chunks(engine, [short, long])
    assert (inexact(chunks, exact) == 0) == is_protected
    # Together they have 512 tokens in the first step. What is generated is evicted at the end of the block with which
    # there is more than the budget.
    first = (512 - 70) // 32
    assert (len(chunks) == 160 // 32 + first) == is_protected


@protected
def test_a_load_leaves_the_window_to_be_computed(scarce, is_protected, monkeypatch):
    """The whole prompt lies in the lower tier, and is evicted as if it had been computed."""
    prompt = numbers(11, 992)
    exact_chunks(scarce, [])
    (computed,) = scarce.runs([prompt], 20)
    scarce.forget_prefixes()
    scarce.stats()
    found = loads(scarce, monkeypatch)
    if not is_protected:
        monkeypatch.setattr(EvictionScheduler, "most_hits", lambda _, request: request.num_tokens)
    name = scarce.add(prompt, 20, logprobs=2, detokenize=False)
    scarce.run()
    if not is_protected:
        assert found == [992]
        assert not scarce.stats()
        return
    assert found == [960]
    assert scarce.num_cached(name) == 960
    assert scarce.stats()["requests"] == 1
    assert_same(scarce.run_of(name), computed)


def test_a_preempted_request_loads_its_prompt_and_is_evicted_again(scarce, monkeypatch):
    """Three neighbours that are not evicted grow until memory is short."""
    prompt, tier = numbers(12, 300), Tier(scarce)
    tier.forget()
    for seed in (13, 14, 15):
        scarce.add(numbers(seed, 370), 90, **WHOLE)
    name = scarce.add(prompt, 95, logprobs=2, detokenize=False)
    scarce.step()
    request = next(of for key, of in scarce.scheduler.requests.items() if key.startswith(name))
    state = scarce.scheduler.connector._states[request.request_id]
    while not request.num_preemptions:
        assert not request.is_finished()
        assert state.max_offload_tokens == (0 if request.num_output_tokens else None)
        scarce.step()
    found = loads(scarce, monkeypatch)
    # What is computed again is exact until it is evicted again.
    assert state.max_offload_tokens is None
    so_far = list(request.output_token_ids)
    scarce.run()
    # Not the queries of its prompt's window, as at first.
    assert found == [256]
    assert scarce.stats()["requests"] == 2
    run = scarce.run_of(name)
    assert run.tokens[: len(so_far)] == so_far
    tier.forget()
    (alone,) = scarce.runs([prompt], 95)
    assert_same(run, alone)


def test_aborts_leave_nothing_behind(scarce):
    """While a prompt is loaded; and when it was evicted, its last blocks not copied yet."""
    prompt, tier = numbers(16, 1000), Tier(scarce)
    exact = exact_chunks(scarce, [prompt])
    for num_steps in (1, 2, 3):
        name = scarce.add(prompt, 30)
        for _ in range(num_steps):
            scarce.step()
        scarce.abort(name)
        tier.drain()
        assert scarce.is_idle()
        assert inexact(tier.chunks(), exact) == 0
    assert tier.chunks().keys() == exact.keys()
    scarce.forget_prefixes()
    for num_steps in (1, 2, 5):
        name = scarce.add(prompt, 30)
        scarce.step()
        (request,) = scarce.scheduler.requests.values()
        assert request.status == RequestStatus.WAITING_FOR_REMOTE_KVS or num_steps > 1
        for _ in range(num_steps - 1):
            scarce.step()
        scarce.abort(name)
        tier.drain()
        assert scarce.is_idle()
    assert inexact(tier.chunks(), exact) == 0
