"""Served tokens against a plain Hugging Face model whose cache is pruned to what the policy chose."""

import pytest
from engine import Engine
from replay import Replay

from cake_vllm.policies.cake import Cake

pytestmark = pytest.mark.engine

NUM_TOKENS = 16


@pytest.fixture(scope="module")
def replay(model_dir: str) -> Replay:
    return Replay(model_dir)


@pytest.mark.parametrize("budget", [128, 256, 512])
def test_served_tokens_equal_replay(start_engine, replay: Replay, prompts, budget: int):
    engine: Engine = start_engine(kv_eviction="cake", kv_eviction_budget=budget, max_num_batched_tokens=2048)
    served = engine.trace(list(prompts.values()), NUM_TOKENS)
    for prompt, (tokens, positions) in zip(prompts.values(), served, strict=True):
        expected, kept = replay.generate(prompt, NUM_TOKENS, Cake(), budget, block_size=32)
        full_len = len(prompt) // 32 * 32
        for ours, theirs in zip(positions, kept, strict=True):
            theirs_moved = [[p for p in head if p < full_len] for head in theirs]
            assert ours is None or ours.tolist() == theirs_moved
        assert tokens == expected


def test_eviction_changes_the_output(start_engine, prompts):
    """The comparison above would be empty if eviction changed nothing."""
    tight = start_engine(kv_eviction="cake", kv_eviction_budget=64).generate(list(prompts.values()), NUM_TOKENS)
    loose = start_engine(kv_eviction="cake", kv_eviction_budget=8192).generate(list(prompts.values()), NUM_TOKENS)
    assert tight != loose
