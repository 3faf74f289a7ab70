"""Properties of the policies and of the arithmetic around them."""

import subprocess
import sys

import pytest
import torch

from cake_vllm.policies import PagedPrompt, create_policy, policy_names, register_policy
from cake_vllm.policies.base import LayerScore, total_tokens
from cake_vllm.policies.budgets import cascade, kept_after, proportional, settle
from cake_vllm.policies.cake import PRESETS, Cake
from cake_vllm.policies.scores import average_pool, prefix_attention


@pytest.mark.parametrize("package", ["policies", "kernels", "config"])
def test_pure_packages_do_not_import_vllm(package):
    code = f"import sys, cake_vllm.{package}; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_registry_refuses_duplicates_and_unknown_names():
    assert "cake" in policy_names()
    with pytest.raises(ValueError, match="already registered"):
        register_policy("cake", "somewhere:Else")
    with pytest.raises(ValueError, match=r"unknown eviction policy 'cade'; choose one of .*cake"):
        create_policy("cade", {})


def reference_attention(queries, keys, scale):
    """The whole softmax in float64, one query at a time."""
    num_heads, window, _ = queries.shape
    prompt_len = keys.shape[1]
    group = num_heads // keys.shape[0]
    out = torch.zeros(num_heads, window, prompt_len - window, dtype=torch.float64)
    for head in range(num_heads):
        for row in range(window):
            visible = prompt_len - window + row + 1
            logits = keys[head // group, :visible].double() @ queries[head, row].double() * scale
            out[head, row] = logits.softmax(0)[: prompt_len - window]
    return out


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (6, 2), (8, 2), (8, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefix_attention(num_heads, num_kv_heads, dtype):
    queries = torch.randn(num_heads, 8, 16).to(dtype)
    keys = torch.randn(num_kv_heads, 50, 16).to(dtype)
    before = queries.clone(), keys.clone()
    got = torch.cat(list(prefix_attention(queries, keys, 0.25)))
    torch.testing.assert_close(got.double(), reference_attention(queries, keys, 0.25), rtol=1e-4, atol=1e-7)
    assert torch.equal(queries, before[0])
    assert torch.equal(keys, before[1])


def test_prefix_attention_soft_cap():
    queries, keys = 3 * torch.randn(1, 4, 16), 3 * torch.randn(1, 20, 16)
    (capped,) = prefix_attention(queries, keys, 1.0, logits_soft_cap=5.0)
    logits = 5.0 * torch.tanh(queries[0] @ keys[0].T / 5.0)
    logits[:, 16:].masked_fill_(torch.ones(4, 4, dtype=torch.bool).triu(1), float("-inf"))
    torch.testing.assert_close(capped[0], logits.softmax(-1)[:, :16])


def test_prefix_attention_refuses_a_prompt_without_prefix():
    with pytest.raises(ValueError, match="no prefix"):
        list(prefix_attention(torch.zeros(1, 8, 4), torch.zeros(1, 8, 4), 1.0))


def test_average_pool_counts_zeros_beyond_the_ends():
    assert average_pool(torch.ones(1, 4), 5).tolist() == [pytest.approx([0.6, 0.8, 0.8, 0.6])]


@pytest.mark.parametrize("cap", [10, 100, 1000])
@pytest.mark.parametrize("preferences", [[1.0], [1.0, 2.0, 3.0], [5.0, 0.0, 1e-9, 2.0], [0.0, 0.0], [1.0] * 7])
def test_budgets_meet_the_total_or_the_cap(preferences, cap):
    total = 83 * len(preferences)
    counts = settle(proportional(preferences, total), total, cap)
    assert min(counts) >= 0
    if cap * len(preferences) >= total:
        assert sum(counts) == total
    kept = kept_after(cascade(preferences, total, cap), cap)
    assert all(0 <= k <= min(c, cap) for k, c in zip(kept, counts, strict=True))


def test_cake_with_unusable_scores_keeps_the_window_and_divides_equally():
    queries, keys = torch.full((2, 4, 8), float("nan")), torch.randn(1, 40, 8)
    policy = Cake(window=4)
    score = policy.score(queries, keys, 1.0)
    assert torch.isfinite(score.indicator).all()
    assert policy.budgets(torch.stack([score.terms] * 3), 40, 14) == [10, 10, 10]
    kept = policy.keep(score, 10)
    assert kept.shape == (1, 14)
    assert kept[0, -4:].tolist() == [36, 37, 38, 39]


@pytest.mark.parametrize("prompt_len", [33, 64, 100, 129, 256])
@pytest.mark.parametrize("block_size", [1, 16, 32, 128])
@pytest.mark.parametrize("window", [4, 32])
def test_paging_keeps_what_the_policy_chose(prompt_len, block_size, window):
    prompt = PagedPrompt(prompt_len, window, block_size)
    score = LayerScore(torch.randn(3, prompt_len - window), torch.zeros(2))
    for count in range(0, prompt_len - window + 1, 7):
        pages = prompt.pages(count)
        chosen = Cake(window=window).keep(score, count)
        if pages == prompt.full_blocks:
            continue
        positions = prompt.positions(score, pages)
        assert positions.shape == (3, pages * block_size)
        assert (positions.diff(dim=1) > 0).all()
        assert positions.numel() == 0 or positions.max() < prompt.full_len
        for head in range(3):
            held = set(positions[head].tolist()) | set(range(prompt.full_len, prompt_len))
            assert set(chosen[head].tolist()) <= held
            assert len(held) == prompt.kept_len(pages) >= count + window
        if block_size == 1:
            assert torch.equal(positions, chosen)


def test_paging_never_needs_more_than_was_granted():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        layers, block_size, window = 5, 16, 8
        prompt_len = int(torch.randint(window + 1, 400, (), generator=generator))
        budget = int(torch.randint(window, 200, (), generator=generator))
        prompt = PagedPrompt(prompt_len, window, block_size)
        total = total_tokens(budget, window, layers)
        preferences = torch.rand(layers, generator=generator).pow(4).tolist()
        counts = kept_after(cascade(preferences, total, prompt_len - window), prompt_len - window)
        assert sum(map(prompt.pages, counts)) <= prompt.max_pages(total, layers)


def test_presets_are_the_official_table():
    assert PRESETS["llama3.1-8b@1024"] == (1.6, 0.4)
    assert PRESETS["llama2-13b@128"] == (1.8, 2.0)
    assert len(PRESETS) == 10
