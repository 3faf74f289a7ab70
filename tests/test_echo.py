"""Echo, joined rankings and protected spans against their definitions, written out number by number."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_formulas import KERNEL, WINDOW, Layer, defended, defensive_score, pool, snapkv_score
from test_policies import HEADS_COMPETE, Shape, cut_short, small

from cake_vllm.policies import LayerInputs, create_policy, knobs, policy_names
from cake_vllm.policies.scores import better_ranks, echoed, prefix_attention

SINKS, REACH = 4, 63
OPTIONS = {"window": WINDOW, "pool_kernel": KERNEL}


def echo(numbers: list[float], half_life: float, silent: int = 0) -> list[float]:
    """The best of the predecessors, decayed; ``silent`` first ones pass nothing on."""
    return [
        max([own, *(2 ** (-j / half_life) * numbers[i - j] for j in range(1, REACH + 1) if i - j >= silent)])
        for i, own in enumerate(numbers)
    ]


def echo_score(layer: Layer, half_life: float, first: int) -> list[list[float]]:
    """What the window attends to most, passed on, at least its mean; times the share of the largest projection."""
    prefix_len = layer.keys.shape[1] - WINDOW
    lengths = []
    for head in range(6):
        weight = layer.weight[:, 8 * head : 8 * head + 8]
        lengths.append([np.linalg.norm(weight @ value) for value in layer.values[head // 3, :prefix_len]])
    sizes = [[max(column) for column in zip(*lengths[3 * k : 3 * k + 3], strict=True)] for k in range(2)]
    scores = []
    for kv_head in range(2):
        rows = [layer.attention(head, row) for head in range(3 * kv_head, 3 * kv_head + 3) for row in range(WINDOW)]
        peak = [0.0] * first + [max(column) for column in zip(*rows, strict=True)][first:]
        worth = echo(pool(peak), half_life)
        least = sum(worth) / prefix_len
        scores.append(
            [max(worth[i], least) * sizes[kv_head][i] / (sizes[0][i] + sizes[1][i]) for i in range(prefix_len)]
        )
    return scores


@pytest.mark.parametrize(("half_life", "first"), [(12.0, 4), (3.0, 0), (30.0, 9)])
def test_score_of_echo(half_life, first):
    layer = Layer.random(3, 150, 4.0)
    # The last silent position, and the first that is not, draw much attention.
    layer.keys[:, max(first - 1, 0) : first + 1] = layer.queries[::3, :1]
    policy = create_policy("echo", {**OPTIONS, "echo": half_life, "protect": {"first": first}})
    expected = np.array(echo_score(layer, half_life, first))
    np.testing.assert_allclose(policy.score(layer.inputs()).indicator, expected, rtol=1e-4)
    others = echo_score(layer, half_life, first + 1), echo_score(layer, 1.2 * half_life, first)
    assert not any(np.allclose(expected, other, rtol=1e-2) for other in others)


def best_ranks(*rankings: list[float]) -> list[int]:
    """The best place of each entry in any of the rankings; ties in one are broken by the next."""
    places = [len(rankings[0])] * len(rankings[0])
    for index in range(len(rankings)):
        keys = list(zip(*rankings[index:], strict=True))
        for place, entry in enumerate(sorted(range(len(keys)), key=lambda entry: keys[entry], reverse=True)):
            places[entry] = min(places[entry], place)
    return places


@pytest.mark.parametrize("budget", [12, 16.5, 30])
def test_what_echo_keeps(budget):
    """The best of all layers and heads by the better of both ranks, sinks and window beside them."""
    length, prefix_len, first = 120, 120 - WINDOW, 4
    layers = [Layer.random(seed, length, loudness) for seed, loudness in enumerate((0.5, 2.0, 4.0))]
    policy = create_policy("echo", OPTIONS)
    published, own = [], []
    for layer in layers:
        theirs = defensive_score(layer, "heads")
        largest = max(map(max, theirs))
        for ranks, positions in zip(theirs, defended(layer, budget / length)[0], strict=True):
            published += [largest if place in positions else rank for place, rank in enumerate(ranks)]
        own += list(itertools.chain(*echo_score(layer, 12.0, first)))
    places = best_ranks(published, own)
    for entry in range(len(places)):
        if entry % prefix_len < first:
            places[entry] = -1
    total = int(budget * 6) - WINDOW * 6
    cut = sorted(places)[total - 1]
    scores = policy.settle([policy.score(layer.inputs()) for layer in layers], budget)
    counts = policy.head_budgets(scores, length, budget)
    assert sum(map(sum, counts)) == total
    heads = [
        head
        for score, of_layer in zip(scores, counts, strict=True)
        for head in policy.keep(score, of_layer, length, budget / length)
    ]
    by_one = 0
    for index, head in enumerate(heads):
        kept, ours = set(head.tolist()), places[index * prefix_len : (index + 1) * prefix_len]
        assert kept >= {*range(first), *range(prefix_len, length)}
        assert kept >= {place for place, rank in enumerate(ours) if rank < cut}
        assert all(ours[place] <= cut for place in kept if place < prefix_len)
        entries = [index * prefix_len + place for place in kept if first <= place < prefix_len]
        by_one += sum(best_ranks(own)[entry] > cut for entry in entries)
    assert 0 < by_one < total, "one of the rankings never mattered"


def test_joined_rankings():
    """Layers of different lengths, with ties."""
    generator = torch.Generator().manual_seed(5)
    rankings = [
        [torch.randint(0, most, (2, length), generator=generator).float() for length in (7, 30, 1)]
        for most in (4, 9, 10**6)
    ]
    flat = [torch.cat([layer.flatten() for layer in ranking]).tolist() for ranking in rankings]
    joined = better_ranks(*rankings)
    assert [layer.shape for layer in joined] == [layer.shape for layer in rankings[0]]
    expected = [1 - place / len(flat[0]) for place in best_ranks(*flat)]
    torch.testing.assert_close(torch.cat([layer.flatten() for layer in joined]), torch.tensor(expected))
    assert len(set(flat[0])) == 4


def test_an_echo_reaches_so_far_and_dies():
    scores = torch.zeros(1, 100)
    scores[0, 10], scores[0, 12] = 1.0, 0.1
    expected = [0.0] * 10 + [max(2 ** (-j / 7), 0.1 * (j == 2)) for j in range(64)] + [0.1 * 2 ** (-62 / 7)]
    got = echoed(scores, 7)[0]
    torch.testing.assert_close(got[:75], torch.tensor(expected), rtol=1e-5, atol=1e-9)
    assert got[76:].eq(0).all()
    assert torch.equal(echoed(scores, 0), scores)


@pytest.mark.parametrize("name", sorted(name for name in policy_names() if "echo" in knobs(name) and name != "echo"))
def test_echo_as_a_knob(name):
    """Where attention is pooled, successors inherit it; sinks, and what pooling makes of them, pass nothing on."""
    layer, silent = Layer.random(8, 150, 4.0), SINKS + KERNEL // 2
    plain = create_policy(name, OPTIONS).score(layer.inputs())
    loud = create_policy(name, {**OPTIONS, "echo": 9.0}).score(layer.inputs())
    if "defensivekv" in name:
        prefix_len, scores = 150 - WINDOW, []
        for kv_head, row in enumerate(defensive_score(layer, "heads", echo=lambda risk: echo(risk, 9.0, silent))):
            assert len(row) == prefix_len, kv_head
            scores.append(row)
    elif name.startswith("cake"):
        scores = [echo(row, 9.0, silent) for row in plain.indicator.double().tolist()]
    else:
        scores = [echo(row, 9.0, silent) for row in snapkv_score(layer)]
    np.testing.assert_allclose(loud.indicator[:, : 150 - WINDOW], np.array(scores), rtol=1e-4)
    assert not torch.allclose(loud.indicator, plain.indicator)
    assert torch.equal(loud.terms, plain.terms)


def test_echo_under_heads_of_different_lengths():
    """Sinks are each head's own first positions, and what is not there has no part in the mean."""
    policy = create_policy("echo", {"window": 8})
    (layer,) = Shape(num_layers=1).layers(policy)
    for lengths in ([40, 90], [90, 33]):
        ragged = cut_short(layer, lengths)
        # Where all values are alike a head's share of the layer is a half.
        equal = replace(
            ragged, values=torch.ones_like(layer.values), output_weight=torch.ones_like(layer.output_weight)
        )
        worth = 2 * policy.score(equal).indicator
        for head, length in enumerate(lengths):
            alone = replace(
                layer,
                queries=layer.queries[4 * head : 4 * head + 4],
                keys=layer.keys[head : head + 1, -length:],
                values=layer.values[head : head + 1, -length:],
                output_weight=layer.output_weight[:, 64 * head : 64 * head + 64],
            )
            # A head alone has the whole of its layer.
            torch.testing.assert_close(worth[head, 90 - length :], policy.score(alone).indicator[0])


@pytest.mark.parametrize("chunks", [[150], [64, 1, 2, 83], [0, 90, 60]])
def test_notes_of_echo(chunks):
    """The most that any third query pays what lies further behind it than 64, whatever the chunks."""
    every, generator = 3, torch.Generator().manual_seed(11)
    keys, queries = torch.randn(2, 150, 8, generator=generator), 2 * torch.randn(6, 150, 8, generator=generator)
    policy, notes, end = create_policy("echo", {"observe": every}), None, 0
    for length in chunks:
        end += length
        places = policy.noted(end - length, end)
        inputs = LayerInputs(queries[:, list(places)], keys[:, :end], 8**-0.5)
        notes = policy.note(inputs, places, notes)
    expected = np.zeros((2, 150))
    for head, place in itertools.product(range(6), range(0, 150, every)):
        weights = np.exp(
            keys[head // 3, : place + 1].double().numpy() @ queries[head, place].double().numpy() * 8**-0.5
        )
        far = (weights / weights.sum())[: max(place - 64, 0)]
        expected[head // 3, : len(far)] = np.maximum(expected[head // 3, : len(far)], far)
    np.testing.assert_allclose(notes, expected, rtol=1e-4)
    assert (expected > 0).sum() == 2 * (147 - 64)


def test_notes_are_a_third_ranking():
    """They judge as the window's attention does: passed on, at least their mean, times the head's share."""
    layer, policy = Layer.random(3, 150, 4.0), create_policy("echo", {**OPTIONS, "observe": 9})
    inputs = layer.inputs()
    peak = torch.cat(list(prefix_attention(inputs))).amax(dim=(1, 2))
    window = policy.score(inputs)
    same = policy.score(replace(inputs, notes=torch.nn.functional.pad(peak, (0, WINDOW), value=9.0)))
    torch.testing.assert_close(same.extra[3], window.indicator)
    notes = torch.rand(2, 150, generator=torch.Generator().manual_seed(1))
    score = policy.score(replace(inputs, notes=notes))
    (joined,) = policy.settle([score], 30)
    published = policy._published.rank(replace(score, indicator=score.extra[0], extra=score.extra[1:3]), 150, 0.2)
    (expected,) = better_ranks([published[:, :-WINDOW]], [window.indicator], [score.extra[3]])
    assert torch.equal(joined.indicator, expected)
    assert not torch.equal(joined.indicator, policy.settle([window], 30)[0].indicator)


@pytest.mark.parametrize("first", [1, 6])
@pytest.mark.parametrize("name", policy_names())
def test_protected_first_positions_stay(name, first):
    """In every head of every layer, out of the budget; when a cache is scored again, too."""
    plain = small(name)
    policy, shape = replace(plain, protect=type(plain.protect)(first)), Shape(prompt_len=300)
    judged = [policy.judge(layer) for layer in shape.layers(policy)]
    lost = 0
    for budget in (policy.window_size + first + 8, 60):
        scores = policy.settle(judged, budget)
        counts = policy.head_budgets(scores, 300, budget)
        most = budget * 6 + 6
        assert sum(map(sum, counts)) + policy.protected * 6 <= most
        for score, of_layer in zip(scores, counts, strict=True):
            for head in policy.keep(score, of_layer, 300, budget / 300):
                assert set(head.tolist()) >= set(range(first))
        unprotected = plain.settle(judged, budget)
        counts = plain.head_budgets(unprotected, 300, budget)
        for score, of_layer in zip(unprotected, counts, strict=True):
            kept = plain.keep(score, of_layer, 300, budget / 300)
            lost += sum(not set(head.tolist()) >= set(range(first)) for head in kept)
    assert lost or first == 1 or plain.protect.first or name in ("streamingllm", "lagkv"), "nobody needed it"
    (layer,) = Shape(num_layers=1).layers(policy)
    for head in policy.rescore(layer, [40 - policy.protected] * 2):
        assert set(head.tolist()) >= set(range(first))


@pytest.mark.parametrize("name", HEADS_COMPETE)
def test_protected_first_positions_of_shorter_heads(name):
    """They are the first that a head has."""
    policy = create_policy(name, {"window": 8, "protect": {"first": 5}})
    judged = [policy.judge(cut_short(layer, [40, 90])) for layer in Shape().layers(policy)]
    scores = policy.settle(judged, 24)
    for score, counts in zip(scores, policy.head_budgets(scores, 90, 24), strict=True):
        short, long = policy.keep(score, counts, 90, 24 / 90)
        assert set(short.tolist()) >= set(range(50, 55))
        assert short.min() == 50
        assert set(long.tolist()) >= set(range(5))


def test_protected_first_positions_when_the_current_token_judges():
    policy = create_policy("cake", {"window": 8, "protect": {"first": 5}})
    (layer,) = Shape(num_layers=1).layers(policy)
    kept = policy.trim(replace(layer, queries=layer.queries[:, -1:]), 20)
    assert all(set(head.tolist()) >= set(range(5)) for head in kept)


@pytest.mark.parametrize("name", policy_names())
def test_a_share_of_the_budget_for_both_ends(name):
    """Half of it for the first positions, half for the last ones before the window, out of the budget."""
    plain = small(name)
    policy, shape = replace(plain, protect=type(plain.protect)(first=2, boundary=0.4)), Shape(prompt_len=300)
    judged = [policy.judge(layer) for layer in shape.layers(policy)]
    before_window = 300 - getattr(policy, "window", policy.protected)
    for budget in (60, 96):
        half = budget // 5
        ends = {*range(half), *range(before_window - half, before_window)}
        scores = policy.settle(judged, budget)
        counts = policy.head_budgets(scores, 300, budget)
        assert sum(map(sum, counts)) + policy.protected * 6 <= budget * 6 + 6
        kept = [
            set(head.tolist())
            for score, of_layer in zip(scores, counts, strict=True)
            for head in policy.keep(score, of_layer, 300, budget / 300)
        ]
        assert all(head >= ends for head in kept)
        # It is a share: what lies between is chosen as before.
        assert any(head - ends - {*range(before_window, 300)} for head in kept)
    (layer,) = Shape(num_layers=1).layers(policy)
    length = layer.keys.shape[1]
    for head in policy.rescore(layer, [40 - policy.protected] * 2):
        assert set(head.tolist()) >= set(range(8))
        last = length - getattr(policy, "window", policy.protected)
        assert set(head.tolist()) >= set(range(last - 8, last))
    if "cake" in policy.decodes:
        kept = policy.trim(replace(layer, queries=layer.queries[:, -1:]), 40 - policy.window)
        assert all(set(head.tolist()) >= {*range(8), *range(last - 8, last)} for head in kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protect": {"last": 4}}, "unknown key 'last' in protect; known keys: boundary, first, media"),
        ({"protect": {"boundary": 0.6}}, "protect: boundary must be a share of the budget from 0 to 0.5, not 0.6"),
        ({"protect": {"first": "4"}}, "protect.first must be of type int, not '4'"),
        ({"protect": {"first": -1}}, "protect: first must be at least 0, not -1"),
        ({"protect": 4}, "protect must be of type object, not 4"),
        ({"echo": -1.0}, "echo must be a number of positions of at least 0, not -1.0"),
        ({"echo": float("nan")}, "echo must be a finite number, at most 1e\\+15 in size, not nan"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_policy("snapkv", options)
