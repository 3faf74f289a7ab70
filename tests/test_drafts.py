"""Drafts of tokens beside eviction: what is kept and said is what it would be without them."""

import pytest
from engine import Engine
from random_models import numbers
from replay import Replay
from ties import Run, assert_same

from cake_vllm.policies import create_policy

pytestmark = pytest.mark.engine

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def drafts(engine: Engine) -> tuple[int, int]:
    """Accepted and rejected ones so far."""
    counts = {metric.name: getattr(metric, "value", 0) for metric in engine.llm.get_metrics()}
    drafted, accepted = (counts[f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    return accepted, drafted - accepted


def crowd(engine: Engine, prompts: list[list[int]]) -> None:
    """More requests than the pool holds, two of which are aborted; all others come to their end."""
    names = [engine.add(prompt, 150) for prompt in prompts]
    for _ in range(60):
        engine.step()
    engine.abort(names[0], names[3])
    done = engine.run()
    assert all(len(done[name]) == 150 for name in done)
    assert {*names} - {*done} <= {names[0], names[3]}


@pytest.mark.interpreted
def test_generated_tokens_are_evicted_as_without_drafts(start_engine, model_dir, text_ids):
    """Token for token, and position for position, what a replay keeps that knows of no drafts."""
    engine: Engine = start_engine(
        kv_eviction="cake",
        kv_eviction_budget=128,
        kv_eviction_config={"decode": "cake"},
        max_num_batched_tokens=512,
        speculative_config=NGRAM,
    )
    prompt, num_tokens = text_ids[:200] * 2, 170
    (served,) = engine.served([prompt], num_tokens)
    Replay(model_dir).verify(prompt, served, create_policy("cake", {}), 128, block_size=32, decode="cake")
    accepted, rejected = drafts(engine)
    assert accepted > 20
    assert rejected > 0
    stats = engine.stats()
    assert stats["requests"] == 1
    assert stats["trims"] >= num_tokens // 32 - 1
    assert engine.is_idle()


@pytest.mark.parametrize(
    "decode",
    [pytest.param("off", marks=pytest.mark.contract), pytest.param("window", marks=pytest.mark.contract)],
)
def test_rows_of_all_kinds_share_a_batch(tiny, is_v2, decode):
    """Drafts fill blocks and are taken back; a real model accepts more of them."""
    if is_v2 and decode != "off":
        pytest.skip("slow under Triton's interpreter, where a real model shows as much: run on v1")
    options = {"kv_eviction": "cake", "kv_eviction_budget": 100, "kv_eviction_config": {"decode": decode}}
    prompts = [numbers(1, 300), numbers(2, 50), numbers(3, 400)]
    wishes = [{}, {"kv_eviction": "layer-defensivekv"}, {"kv_eviction": "none"}]
    num_tokens = 24 if is_v2 else 100

    def serve(engine: Engine) -> list[Run]:
        names = [
            engine.add(prompt, num_tokens, extra_args=wish, logprobs=2, detokenize=False)
            for wish in wishes
            for prompt in prompts
        ]
        engine.run()
        return [engine.run_of(name) for name in names]

    plain: Engine = tiny(**options)
    plain.stats()
    expected, stats = serve(plain), plain.stats()
    engine: Engine = tiny(**options, speculative_config=NGRAM)
    for run, reference in zip(serve(engine), expected, strict=True):
        assert_same(run, reference)
    assert drafts(engine)[1] > 5 * num_tokens
    assert engine.stats()["trims"] == stats["trims"]
    assert (stats["trims"] > 0) == (decode != "off")
    assert engine.is_idle()


@pytest.mark.full
def test_a_pool_that_is_too_small(tiny, same_on_both):
    """Blocks that drafts filled come back from requests that are preempted or aborted."""
    engine: Engine = tiny(
        kv_eviction="cake",
        kv_eviction_budget=100,
        kv_eviction_config={"decode": "window"},
        num_gpu_blocks_override=30,
        max_model_len=700,
        speculative_config=NGRAM,
    )
    crowd(engine, [numbers(6 + i, 60 + 40 * i) for i in range(8)])
    assert engine.is_idle()


def test_a_prompt_from_the_cache_is_not_longer_by_its_drafts(tiny):
    """vLLM pads the step of a prompt that is all there but for its last token with drafts that are none."""
    engine: Engine = tiny(kv_eviction="knorm", kv_eviction_budget=100, speculative_config=NGRAM, max_num_seqs=8)
    prompt, wish = numbers(4, 32 * 10 + 1), {"kv_eviction_report": True}
    (expected,) = engine.runs([prompt], 40, extra_args=wish)
    first = list(engine.outputs)[-1]
    engine.add(numbers(5, 60), 60)
    for _ in range(4):
        engine.step()
    again = engine.add(prompt, 40, logprobs=2, detokenize=False, extra_args=wish)
    engine.run()
    assert engine.num_cached(again) == 320
    assert_same(engine.run_of(again), expected)
    assert engine.outputs[again].kv_transfer_params == engine.outputs[first].kv_transfer_params
