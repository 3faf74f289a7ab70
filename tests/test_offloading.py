"""Eviction beside vLLM's KV offloading, whose scheduler half runs as it is, over copies that are late (``tiers.py``).

What the lower tier holds is compared, byte by byte up to rounding, with what the same prompts store that are not
evicted.
"""

import torch
import pytest
from random_models import numbers
from tiers import Tier, beside

pytestmark = pytest.mark.engine

OFF = {"extra_args": {"kv_eviction": "none"}}


def exact_chunks(engine, prompts):
    """What prompts store that nobody evicts."""
    tier = Tier(engine)
    tier.forget()
    engine.generate(prompts, 2, **OFF)
    tier.drain()
    chunks = tier.chunks()
    tier.forget()
    return chunks


def assert_exact(chunks, exact):
    assert chunks
    for key, chunk in chunks.items():
        for ours, theirs in zip(chunk, exact[key], strict=True):
            torch.testing.assert_close(ours.view(torch.float32), theirs.view(torch.float32), rtol=1e-3, atol=1e-4)


def test_smoke(tiny):
    engine = tiny(kv_eviction="cake", kv_eviction_budget=100, max_num_batched_tokens=512, **beside())
    prompts = [numbers(1, 1000), numbers(2, 700)]
    exact = exact_chunks(engine, prompts)
    print(len(exact))
    tier = Tier(engine)
    runs = engine.runs(prompts, 40)
    tier.drain()
    assert_exact(tier.chunks(), exact)
    assert tier.chunks().keys() == exact.keys()
    print(engine.stats())
    engine.forget_prefixes()
    again = engine.runs(prompts, 40)
    print([engine.outputs[n].num_cached_tokens for n in engine.outputs], engine.stats())
    print([a.tokens == b.tokens for a, b in zip(runs, again)])
    tier.drain()
