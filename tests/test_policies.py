"""Properties of the policies and of the arithmetic around them."""

import copy
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from cake_vllm.kernels import columns_for
from cake_vllm.policies import LayerInputs, PagedPrompt, Policy, create_policy, knobs, paging, policy_names, scores
from cake_vllm.policies.base import LayerScore
from cake_vllm.policies.budgets import cascade, kept_after, proportional, settle
from cake_vllm.policies.cake import PRESETS, Cake
from cake_vllm.policies.entries import LinearGate, Rotary, Rotation
from cake_vllm.policies.scores import average_pool, heads_at_once, prefix_attention


def test_pure_packages_do_not_import_vllm():
    code = (
        "import importlib, sys\n"
        "for package in ('policies', 'kernels', 'config'):\n"
        "    importlib.import_module(f'cake_vllm.{package}')\n"
        "    assert 'vllm' not in sys.modules, package"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registry_refuses_unknown_names():
    assert "cake" in policy_names()
    with pytest.raises(ValueError, match=r"unknown eviction policy 'cade'; choose one of .*cake"):
        create_policy("cade", {})


def reference_attention(queries, keys, scale, sinks=None):
    """The whole softmax in float64, one query at a time, beside a logit of nothing where heads have one."""
    num_heads, window, _ = queries.shape
    prompt_len = keys.shape[1]
    group = num_heads // keys.shape[0]
    out = torch.zeros(num_heads, window, prompt_len - window, dtype=torch.float64)
    for head in range(num_heads):
        for row in range(window):
            visible = prompt_len - window + row + 1
            logits = keys[head // group, :visible].double() @ queries[head, row].double() * scale
            if sinks is not None:
                logits = torch.cat([logits, sinks[head : head + 1].double()])
            out[head, row] = logits.softmax(0)[: prompt_len - window]
    return out


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (6, 2), (8, 2), (8, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_prefix_attention(num_heads, num_kv_heads, dtype, has_sinks):
    queries = torch.randn(num_heads, 8, 16).to(dtype)
    keys = torch.randn(num_kv_heads, 50, 16).to(dtype)
    before = queries.clone(), keys.clone()
    sinks = torch.linspace(0, 5, num_heads).to(dtype) if has_sinks else None
    got = torch.cat(list(prefix_attention(LayerInputs(queries, keys, 0.25, sinks=sinks)))).flatten(0, 1)
    torch.testing.assert_close(got.double(), reference_attention(queries, keys, 0.25, sinks), rtol=1e-4, atol=1e-7)
    assert torch.equal(queries, before[0])
    assert torch.equal(keys, before[1])


def test_prefix_attention_soft_cap():
    queries, keys = 3 * torch.randn(1, 4, 16), 3 * torch.randn(1, 20, 16)
    ((capped,),) = prefix_attention(LayerInputs(queries, keys, 1.0, logits_soft_cap=5.0))
    logits = 5.0 * torch.tanh(queries[0] @ keys[0].T / 5.0)
    logits[:, 16:].masked_fill_(torch.ones(4, 4, dtype=torch.bool).triu(1), float("-inf"))
    torch.testing.assert_close(capped[0], logits.softmax(-1)[:, :16])


def test_prefix_attention_refuses_a_prompt_without_prefix():
    with pytest.raises(ValueError, match="no prefix"):
        list(prefix_attention(LayerInputs(torch.zeros(1, 8, 4), torch.zeros(1, 8, 4), 1.0)))


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


@pytest.mark.parametrize("prompt_len", [33, 64, 100, 129, 256])
@pytest.mark.parametrize(("block_size", "page_size"), [(1, 1), (16, 16), (32, 32), (128, 128), (128, 32), (48, 16)])
@pytest.mark.parametrize("window", [4, 32])
def test_paging_keeps_what_the_policy_chose(prompt_len, block_size, page_size, window):
    prompt = PagedPrompt(prompt_len, window, page_size, prompt_len % block_size)
    ranks = torch.randn(3, prompt_len - window)
    score = LayerScore(ranks, torch.zeros(2))
    for count in range(0, prompt_len - window + 1, 7):
        pages = prompt.pages(count)
        chosen = Cake(window=window).keep(score, [count] * 3, prompt_len, 0.5)
        if pages == prompt.full_pages:
            continue
        positions = torch.stack(prompt.positions(ranks, [pages] * 3))
        assert positions.shape == (3, pages * page_size)
        assert (positions.diff(dim=1) > 0).all()
        assert positions.numel() == 0 or positions.max() < prompt.full_len
        for head in range(3):
            held = set(positions[head].tolist()) | set(range(prompt.full_len, prompt_len))
            assert set(chosen[head].tolist()) <= held
            assert len(held) == prompt.kept_len(pages) >= count + window
        if block_size == 1:
            assert torch.equal(positions, torch.stack(chosen))


def test_paging_gives_heads_their_own_number_of_pages():
    prompt, generator = PagedPrompt(150, 20, 16, 6), torch.Generator().manual_seed(3)
    ranks = torch.randn(5, 130, generator=generator)
    pages = [0, 1, 4, 9, 2]
    together = prompt.positions(ranks, pages)
    assert [len(head) for head in together] == [16 * count for count in pages]
    for head, count in enumerate(pages):
        (alone,) = prompt.positions(ranks[head : head + 1], [count])
        assert torch.equal(together[head], alone)


def test_presets_are_the_official_table():
    assert PRESETS == {
        "llama2-7b@128": (0.9, 2.3),
        "llama2-7b@1024": (1.9, 1.8),
        "llama2-13b@128": (1.8, 2.0),
        "llama2-13b@1024": (0.5, 0.4),
        "llama3.1-8b@128": (1.6, 0.6),
        "llama3.1-8b@1024": (1.6, 0.4),
        "mistral-0.3-7b@128": (1.0, 0.8),
        "mistral-0.3-7b@1024": (0.8, 0.5),
        "qwen2.5-7b@128": (0.4, 0.6),
        "qwen2.5-7b@1024": (1.5, 0.6),
    }


@dataclass(frozen=True)
class Shape:
    num_heads: int = 8
    num_kv_heads: int = 2
    prompt_len: int = 90
    num_layers: int = 3
    dtype: torch.dtype = torch.float32

    def layers(self, policy: Policy, fill: float | None = None) -> list[LayerInputs]:
        """Random inputs, or equal ones."""
        generator = torch.Generator().manual_seed(self.prompt_len)
        size, hidden = 16, 24

        def draw(*shape: int) -> torch.Tensor:
            if fill is not None:
                return torch.full(shape, fill, dtype=self.dtype)
            return torch.randn(*shape, generator=generator).to(self.dtype)

        return [
            LayerInputs(
                draw(self.num_heads, policy.num_queries, size),
                draw(self.num_kv_heads, self.prompt_len, size),
                size**-0.5,
                values=draw(self.num_kv_heads, self.prompt_len, size),
                output_weight=draw(hidden, self.num_heads * size),
                layer_index=layer,
                gate=LinearGate.random(self.num_kv_heads, size, Rotary(size), layer),
                rotation=Rotation.plain(size),
            )
            for layer in range(self.num_layers)
        ]


SHAPES = {
    "gqa1": Shape(num_kv_heads=8),
    "gqa3": Shape(num_heads=6),
    "gqa4": Shape(),
    "gqa8": Shape(num_kv_heads=1),
    "one-layer": Shape(num_layers=1),
    "bf16": Shape(dtype=torch.bfloat16),
    "long": Shape(prompt_len=400),
}


def small(name: str) -> Policy:
    """The policy with a window that fits the shapes above."""
    return create_policy(name, {"window": 8} if "window" in knobs(name) else {})


def check_kept(policy: Policy, scores: list[LayerScore], prompt_len: int, budget: int) -> None:
    """What every policy must keep to."""
    num_heads = len(scores[0].indicator)
    scores = list(policy.settle(scores, budget))
    heads = policy.head_budgets(scores, prompt_len, budget)
    protected = policy.protected
    assert [len(layer) for layer in heads] == [num_heads] * len(scores)
    for counts in heads:
        assert all(0 <= count <= prompt_len - protected for count in counts)
        assert policy.selection != "layer" or len(set(counts)) == 1
    if policy.selection != "all":
        sums = [sum(counts) for counts in heads]
        assert type(policy).budgets is not Policy.budgets or len(set(sums)) == 1
    total = sum(map(sum, heads)) + protected * num_heads * len(scores)
    # Clamped layers and PyramidKV's rounding may miss the total, but never by more than rounding upwards.
    assert total <= budget * num_heads * len(scores) + num_heads * len(scores)
    for score, counts in zip(scores, heads, strict=True):
        kept = policy.keep(score, counts, prompt_len, budget / prompt_len)
        for positions, count in zip(kept, counts, strict=True):
            assert len(positions) == count + protected
            assert (positions.diff() > 0).all()
            assert positions.numel() == 0 or 0 <= positions[0] <= positions[-1] < prompt_len
            assert set(range(prompt_len - protected, prompt_len)) <= set(positions.tolist())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("name", policy_names())
def test_every_policy(name, shape):
    policy = small(name)
    inputs = shape.layers(policy)
    before = copy.deepcopy(inputs)
    scores = [policy.score(layer) for layer in inputs]
    for budget in (16, 40, shape.prompt_len):
        check_kept(policy, scores, shape.prompt_len, budget)
    for layer, untouched in zip(inputs, before, strict=True):
        for field in ("queries", "keys", "values", "output_weight"):
            assert torch.equal(getattr(layer, field), getattr(untouched, field))
    again = [policy.score(layer) for layer in inputs]
    assert all(torch.equal(a.indicator, b.indicator) for a, b in zip(scores, again, strict=True))


#: As published, these take a mean or a maximum over all heads of a layer, or divide by one.
MIX_HEADS = {"tova", "criticalkv", "criticaladakv", "defensivekv", "layer-defensivekv", "echo"}


@pytest.mark.parametrize("name", sorted(set(policy_names()) - MIX_HEADS - {"random"}))
def test_all_heads_at_once_are_scored_as_one_by_one(name):
    """Heads are a batch; and terms are sums over heads, so that tensor-parallel ranks can add theirs."""
    policy = small(name)
    for layer in Shape(num_heads=12, num_kv_heads=3).layers(policy):
        together = policy.score(layer)
        alone = []
        for head, queries in enumerate(layer.queries.split(4)):
            mine = slice(head, head + 1)
            weight = layer.output_weight.unflatten(1, (3, -1))[:, head]
            alone.append(
                policy.score(
                    replace(
                        layer,
                        queries=queries,
                        keys=layer.keys[mine],
                        values=layer.values[mine],
                        output_weight=weight,
                        gate=layer.gate.heads(mine),
                    )
                )
            )
        assert torch.equal(together.indicator, torch.cat([score.indicator for score in alone]))
        torch.testing.assert_close(together.terms, sum(score.terms for score in alone), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", policy_names())
def test_how_many_heads_are_looked_at_together_changes_nothing(name, monkeypatch):
    """Here one by one; elsewhere as many as fit, the last piece smaller."""
    policy = small(name)
    for layer in Shape(num_heads=10, num_kv_heads=5).layers(policy):
        alone = policy.score(layer)
        with monkeypatch.context() as patch:
            patch.setattr(scores, "heads_at_once", lambda device, weights_per_head: 2)
            together = policy.score(layer)
        for a, b in zip([together.indicator, *together.extra], [alone.indicator, *alone.extra], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(together.terms, alone.terms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", policy_names())
def test_whoever_looks_at_queries_sees_sinks(name):
    """But for the one that has no softmax."""
    policy = small(name)
    for layer in Shape().layers(policy):
        without, beside = policy.score(layer), policy.score(replace(layer, sinks=torch.linspace(-1, 3, 8)))
        sees_none = policy.num_queries == 0 or name == "triattention"
        assert torch.equal(without.indicator, beside.indicator) == sees_none


def test_the_current_query_sees_sinks():
    """When it trims."""
    policy = small("cake")
    (layer,) = Shape(num_layers=1).layers(policy)
    layer = replace(layer, queries=layer.queries[:, -1:], sinks=torch.linspace(-1, 3, 8))
    weights = reference_attention(layer.queries, layer.keys, layer.scale, layer.sinks)[:, 0, : 90 - 8]
    expected = average_pool(weights, policy.pool_kernel).unflatten(0, (2, 4)).mean(dim=1)
    torch.testing.assert_close(policy.trim_ranks(layer, 20), expected.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("at_once", [1, 2, 5])
@pytest.mark.parametrize("pages", [[3, 3, 3, 3, 3], [1, 4, 0, 6, 2]])
def test_pages_hold_the_best_of_each_head(monkeypatch, at_once, pages):
    """Ascending, the window's part behind them, however many heads are looked at together."""
    monkeypatch.setattr(paging, "heads_at_once", lambda device, weights_per_head: at_once)
    torch.manual_seed(6)
    # 96 positions in full pages, of which the window has four, and five behind them.
    prompt = PagedPrompt(101, 9, 16, 5)
    ranks = torch.randn(5, 92)
    for row, count, kept in zip(ranks, pages, prompt.positions(ranks, pages), strict=True):
        best = sorted(row.tolist(), reverse=True)[: max(16 * count - 4, 0)]
        expected = [place for place, worth in enumerate(row.tolist()) if worth in best]
        assert kept.tolist() == ([*expected, 92, 93, 94, 95] if count else [])


def test_heads_at_once_fit_a_fixed_amount():
    elsewhere = torch.device("meta")
    assert heads_at_once(torch.device("cpu"), 1) == 1
    assert heads_at_once(elsewhere, 4 * 32 * 8192) == 16
    assert heads_at_once(elsewhere, 4 * 32 * 2**20) == 1


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_can_score_a_cache_again(name):
    """Decoding: from 90 cached entries, gaps in their positions, to 40."""
    policy, shape = small(name), Shape()
    for layer in shape.layers(policy):
        kept = torch.stack(policy.rescore(layer, [40 - policy.protected] * 2))
        assert kept.shape == (2, 40)
        assert (kept.diff(dim=1) > 0).all()
        assert 0 <= kept.min() <= kept.max() < 90
        assert (kept[:, 40 - policy.protected :] == torch.arange(90 - policy.protected, 90)).all()


@pytest.mark.parametrize("fill", [0.0, 1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", policy_names())
def test_every_policy_with_equal_or_unusable_inputs(name, fill):
    policy, shape = small(name), Shape()
    scores = [policy.score(layer) for layer in shape.layers(policy, fill)]
    assert all(torch.isfinite(score.indicator).all() for score in scores)
    check_kept(policy, scores, shape.prompt_len, 40)


@pytest.mark.parametrize("name", policy_names())
def test_short_prompts_are_not_evicted(name):
    policy = create_policy(name, {})
    assert not policy.is_evicted(policy.window_size, 1)
    assert not policy.is_evicted(100, 100)
    assert policy.is_evicted(1000, 100)


def test_mended_defensivekv_keeps_the_window():
    shape = Shape(prompt_len=200)
    for name in ("defensivekv", "layer-defensivekv"):
        policy = create_policy(name, {"window": 8, "protect_window": True, "normalize_over": "positions"})
        scores = [policy.score(layer) for layer in shape.layers(policy)]
        check_kept(policy, scores, 200, 20)
    assert policy.protected == 8


@pytest.mark.parametrize("name", policy_names())
def test_no_policy_needs_more_columns_than_it_is_granted(name):
    """Owners round up to whole pages, with and without room for their whole window, and the request to columns."""
    generator, page_size = torch.Generator().manual_seed(0), 16
    for _ in range(20):
        prompt_len = int(torch.randint(60, 300, (), generator=generator))
        policy, shape = small(name), Shape(prompt_len=prompt_len)
        budget = int(torch.randint(policy.window_size + 1, prompt_len, (), generator=generator))
        scores = [policy.score(layer) for layer in shape.layers(policy)]
        prompt = PagedPrompt(prompt_len, policy.protected, page_size, prompt_len % 48)
        given = policy.head_budgets(policy.settle(scores, budget), prompt_len, budget)
        heads = [count for layer in given for count in layer]
        needed = [max(prompt.pages(count), -(-(count + policy.protected) // page_size)) for count in heads]
        for per_block in (1, 3):
            columns = columns_for(budget, per_block * page_size, page_size)
            assert sum(needed) <= len(heads) * columns * per_block


HEADS_COMPETE = [name for name in policy_names() if create_policy(name, {}).selection != "layer"]


def cut_short(layer: LayerInputs, lengths: list[int]) -> LayerInputs:
    """The layer with so many of each head's last positions."""
    prompt_len = layer.keys.shape[1]
    valid = torch.arange(prompt_len) >= prompt_len - torch.tensor(lengths).unsqueeze(1)
    return replace(
        layer,
        keys=layer.keys.masked_fill(~valid.unsqueeze(-1), 0),
        values=None if layer.values is None else layer.values.masked_fill(~valid.unsqueeze(-1), 0),
        valid=valid,
    )


@pytest.mark.parametrize("budget", [17, 24, 40])
@pytest.mark.parametrize("name", HEADS_COMPETE)
def test_what_is_not_there_is_never_kept(name, budget):
    """Whatever else goes by: under the smallest of these budgets DefensiveKV protects all but the end of its order."""
    policy = create_policy(name, {"window": 16})
    judged = [policy.judge(cut_short(layer, [40, 90])) for layer in Shape().layers(policy)]
    scores = policy.settle(judged, budget)
    counts = policy.head_budgets(scores, 90, budget)
    kept = [policy.keep(score, heads, 90, budget / 90)[0] for score, heads in zip(scores, counts, strict=True)]
    assert sum(map(len, kept)) > 0
    assert all((positions >= 50).all() for positions in kept)


@pytest.mark.parametrize("name", sorted({*HEADS_COMPETE, "triattention"} - {"echo"}))
def test_heads_of_different_lengths_are_scored_as_each_alone(name):
    """Aligned at the end, with nothing in front of the shorter ones."""
    options = {"normalize_over": "positions"} if "defensivekv" in name else {}
    policy = create_policy(name, {"window": 8} | options)
    (layer,) = Shape(num_layers=1).layers(policy)
    lengths = [40, 90]
    ragged = cut_short(layer, lengths)
    together = policy.judge(ragged)
    group = len(layer.queries) // 2
    for head, length in enumerate(lengths):
        mine = slice(head * group, (head + 1) * group)
        weight = layer.output_weight
        size = layer.keys.shape[-1]
        alone = policy.score(
            replace(
                layer,
                queries=layer.queries[mine],
                keys=layer.keys[head : head + 1, -length:],
                values=None if layer.values is None else layer.values[head : head + 1, -length:],
                output_weight=None if weight is None else weight[:, head * group * size : (head + 1) * group * size],
                gate=layer.gate.heads(slice(head, head + 1)),
            )
        ).indicator[0]
        ours = together.indicator[head]
        assert torch.isneginf(ours[: len(ours) - len(alone)]).all()
        if name == "criticaladakv":
            # The window shares the layer's largest score, whichever head it is in.
            ours, alone = ours[:-8], alone[:-8]
        torch.testing.assert_close(ours[len(ours) - len(alone) :], alone)
    counts = policy.head_budgets([together], 90, 30)[0]
    kept = policy.rescore(ragged, [min(count, 40 - policy.protected) for count in counts])
    assert all((positions >= 90 - length).all() for positions, length in zip(kept, lengths, strict=True))
