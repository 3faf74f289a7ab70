"""Policies against their formulas, written out number by number: what recorded outputs have no case of."""

import cmath
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from cake_vllm.policies import LayerInputs, Protect, create_policy
from cake_vllm.policies.budgets import settle
from cake_vllm.policies.entries import Rotary, Rotation

WINDOW, KERNEL, COVERAGE = 4, 3, 0.9


@dataclass(frozen=True)
class Layer:
    """Float64 inputs of a layer: 2 KV heads, each read by 3 query heads."""

    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    weight: np.ndarray
    sinks: np.ndarray | None = None

    @classmethod
    def random(cls, seed: int, prompt_len: int, loudness: float = 1.0, has_sinks: bool = False) -> "Layer":
        """The louder, the sharper its attention, of which sinks take about half."""
        draw = np.random.default_rng(seed).standard_normal
        queries, keys, values = draw((6, WINDOW, 8)), draw((2, prompt_len, 8)), draw((2, prompt_len, 8))
        weight = draw((10, 6 * 8))
        return cls(loudness * queries, keys, values, weight, draw(6) + loudness + 3 if has_sinks else None)

    def inputs(self) -> LayerInputs:
        arrays = vars(self).values()
        queries, keys, values, weight, sinks = (None if of is None else torch.from_numpy(of).float() for of in arrays)
        return LayerInputs(queries, keys, 8**-0.5, values=values, output_weight=weight, sinks=sinks)

    def sink(self, head: int) -> float:
        """What a head's softmax has beside its keys."""
        return 0.0 if self.sinks is None else float(np.exp(self.sinks[head]))

    def attention(self, head: int, row: int) -> list[float]:
        """What the query head pays each position before the window, in a query of the window."""
        prefix_len = self.keys.shape[1] - WINDOW
        weights = np.exp(self.keys[head // 3, : prefix_len + row + 1] @ self.queries[head, row] * 8**-0.5)
        return list(weights[:prefix_len] / (weights.sum() + self.sink(head)))

    def size(self, kv_head: int, position: int) -> float:
        """L1 norm of a value behind the output projection, mean over the query heads that read it."""
        sizes = []
        for head in range(3 * kv_head, 3 * kv_head + 3):
            projected = self.weight[:, 8 * head : 8 * head + 8] @ self.values[kv_head, position]
            sizes.append(sum(abs(number) for number in projected))
        return sum(sizes) / 3


def pool(numbers: list[float]) -> list[float]:
    padded = [0.0] * (KERNEL // 2) + numbers + [0.0] * (KERNEL // 2)
    return [sum(padded[i : i + KERNEL]) / KERNEL for i in range(len(numbers))]


def defensive_score(layer: Layer, normalize_over: str, echo: Callable | None = None) -> list[list[float]]:
    """The largest pooled attention, at least its mean; times the share that the value's size has."""
    prefix_len = layer.keys.shape[1] - WINDOW
    sizes = [[layer.size(kv_head, position) for position in range(prefix_len)] for kv_head in range(2)]
    scores = []
    for kv_head in range(2):
        risk = [0.0] * prefix_len
        for head, row in itertools.product(range(3 * kv_head, 3 * kv_head + 3), range(WINDOW)):
            attention = layer.attention(head, row)
            pooled = pool(attention)
            for position in range(prefix_len):
                risk[position] = max(risk[position], pooled[position] * sum(attention) / sum(pooled))
        risk = echo(risk) if echo else risk
        least = sum(risk) / prefix_len
        scores.append([])
        for position in range(prefix_len):
            others = sizes[kv_head] if normalize_over == "positions" else [head[position] for head in sizes]
            scores[-1].append(max(risk[position], least) * sizes[kv_head][position] / sum(others))
    return scores


def defended(layer: Layer, keep_ratio: float, coverage: float = COVERAGE) -> tuple[list[set[int]], bool]:
    """Positions of each head that hold most of the mean attention; and whether it was the budget that ended them."""
    prefix_len = layer.keys.shape[1] - WINDOW
    rows = [[layer.attention(head, row) for row in range(WINDOW)] for head in range(6)]
    bias = np.mean([sum(row[-WINDOW:]) for head in rows for row in head])
    most = int(prefix_len * keep_ratio - WINDOW)
    chosen, is_cut = [], False
    for kv_head in range(2):
        group = [row for head in rows[3 * kv_head : 3 * kv_head + 3] for row in head]
        mean = [sum(row[position] for row in group) / len(group) for position in range(prefix_len)]
        order = sorted(range(prefix_len), key=lambda position: -mean[position])
        count, covered = 0, mean[order[0]] / sum(mean)
        while covered < coverage - bias:
            count += 1
            covered += mean[order[count]] / sum(mean)
        is_cut |= count > most
        chosen.append(set(order[: min(count, most)]))
    return chosen, is_cut


@pytest.mark.parametrize("keep_ratio", [0.2, 0.5, 0.95])
@pytest.mark.parametrize("loudness", [0.5, 3.0])
@pytest.mark.parametrize("normalize_over", ["heads", "positions"])
@pytest.mark.parametrize("protect_window", [False, True])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_defensivekv(keep_ratio, loudness, normalize_over, protect_window, has_sinks):
    layer = Layer.random(1, 60, loudness, has_sinks)
    options = {"window": WINDOW, "pool_kernel": KERNEL}
    policy = create_policy(
        "defensivekv", {**options, "normalize_over": normalize_over, "protect_window": protect_window}
    )
    expected = np.array(defensive_score(layer, normalize_over))
    score = policy.score(layer.inputs())
    np.testing.assert_allclose(score.indicator, expected, rtol=1e-4)
    largest = expected.max()
    chosen, is_cut = defended(layer, keep_ratio)
    for ranks, positions in zip(expected, chosen, strict=True):
        ranks[sorted(positions)] = largest
    if not protect_window:
        expected = np.concatenate([expected, np.full((2, WINDOW), largest)], axis=1)
    np.testing.assert_allclose(policy.rank(score, 60, keep_ratio), expected, rtol=1e-4)
    assert any(chosen)
    if keep_ratio == 0.2:
        assert is_cut, "the budget never mattered"
    if keep_ratio == 0.95:
        assert not is_cut
        for other in (COVERAGE - 0.02, COVERAGE + 0.02):
            assert defended(layer, keep_ratio, other)[0] != chosen, "the coverage never mattered"


@pytest.mark.parametrize("protect_window", [False, True])
@pytest.mark.parametrize("budget", [10, 20.5, 33.26])
def test_who_competes_in_defensivekv(budget, protect_window):
    """Heads with the heads of their layer, or with all; what is protected beforehand is not divided."""
    layers = [Layer.random(seed, 60, loudness) for seed, loudness in enumerate((0.3, 1.0, 3.0))]
    options = {"window": WINDOW, "pool_kernel": KERNEL, "protect_window": protect_window}
    protected = WINDOW if protect_window else 0
    for name, groups in (("defensivekv", [[0], [1], [2]]), ("layer-defensivekv", [[0, 1, 2]])):
        policy = create_policy(name, options)
        scores = [policy.score(layer.inputs()) for layer in layers]
        counts = policy.head_budgets(scores, 60, budget)
        ranks = [policy.rank(score, 60, budget / 60).tolist() for score in scores]
        for group in groups:
            rivals = [(rank, index, head) for index in group for head in range(2) for rank in ranks[index][head]]
            total = int(budget * 2 * len(group)) - protected * 2 * len(group)
            least = sorted(rank for rank, _, _ in rivals)[-total]
            surely = [[sum(rank > least for rank in ranks[index][head]) for head in range(2)] for index in group]
            at_most = [[sum(rank >= least for rank in ranks[index][head]) for head in range(2)] for index in group]
            given = [counts[index] for index in group]
            assert sum(map(sum, given)) == total
            assert (np.array(surely) <= given).all()
            assert (np.array(given) <= at_most).all()


def snapkv_score(layer: Layer) -> list[list[float]]:
    """Mean attention over the window's queries and the group, pooled."""
    scores = []
    for kv_head in range(2):
        rows = [layer.attention(head, row) for head in range(3 * kv_head, 3 * kv_head + 3) for row in range(WINDOW)]
        scores.append(pool([sum(column) / len(rows) for column in zip(*rows, strict=True)]))
    return scores


def ada_counts(scores: list[list[float]], budget: int, alpha: float) -> list[int]:
    """Each head's best are sure of a share of the mean budget, the window counted in; the rest goes to the best."""
    sure, rest = [], []
    guaranteed = max(int(budget * alpha) - WINDOW, 0)
    for head, ranks in enumerate(scores):
        best = sorted(ranks, reverse=True)
        sure.append(len(best[:guaranteed]))
        rest += [(rank, head) for rank in best[guaranteed:]]
    left = 2 * (budget - WINDOW) - sum(sure)
    winners = [head for _, head in sorted(rest, reverse=True)[:left]]
    return [count + winners.count(head) for head, count in enumerate(sure)]


@pytest.fixture(scope="module")
def lopsided() -> Layer:
    """Its first head attends to little, and hardly wins more than that against a second that attends to all alike."""
    layer = Layer.random(5, 60)
    layer.queries[:3] = 8 * layer.queries[0, 0]
    layer.queries[3:] *= 0.01
    return layer


@pytest.mark.parametrize(("budget", "alpha"), [(30, 0.0), (30, 0.5), (30, 0.9), (20, 1.0), (58, 0.5)])
@pytest.mark.parametrize("name", ["adakv", "criticaladakv"])
def test_every_head_has_its_guaranteed_share(lopsided, name, budget, alpha):
    scores = snapkv_score(lopsided)
    counts = ada_counts(scores, budget, alpha)
    if alpha and budget < 58:
        assert counts[0] == int(budget * alpha) - WINDOW > ada_counts(scores, budget, 0.0)[0] > 0
    for protect in (False, True) if name == "criticaladakv" else (True,):
        options = {"window": WINDOW, "pool_kernel": KERNEL, "alpha": alpha}
        policy = create_policy(name, options | ({"protect_window": protect} if name == "criticaladakv" else {}))
        (given,) = policy.head_budgets([policy.score(lopsided.inputs())], 60, budget)
        assert [count + policy.protected - WINDOW for count in given] == counts


DEFAULTS = {
    "adakv": {"window": 32, "pool_kernel": 5, "alpha": 0.2},
    "criticaladakv": {"window": 32, "pool_kernel": 5, "epsilon": 1e-4, "first_stage_ratio": 0.5, "alpha": 0.2},
    "criticalkv": {"window": 32, "pool_kernel": 5, "epsilon": 1e-4, "first_stage_ratio": 0.5},
    "dropkv": {"window": 8, "pool_kernel": 11},
    "echo": {"window": 32, "pool_kernel": 5, "echo": 12, "protect": Protect(4)},
    "lagkv": {"lag": 128, "n_sink": 4},
    "restkv": {"window": 32, "pool_kernel": 5, "alpha": 0.3, "scale": 2000},
    "cake": {"window": 32, "pool_kernel": 5, "gamma": 200, "tau1": 1, "tau2": 1, "cascade": True},
    "cake-mean": {"window": 32, "pool_kernel": 5, "gamma": 0, "tau1": 1, "tau2": 1, "cascade": True},
    "cake-uniform": {"window": 32, "pool_kernel": 5, "gamma": 200, "tau1": 1, "tau2": 1, "cascade": True},
    "defensivekv": {"window": 32, "pool_kernel": 5, "normalize_over": "heads"},
    "layer-defensivekv": {"window": 32, "pool_kernel": 5, "normalize_over": "heads"},
    "pyramidkv": {"window": 32, "pool_kernel": 5, "beta": 20},
    "rkv": {"window": 8, "pool_kernel": 7, "mix": 0.07, "similar": 0.5},
    "snapkv": {"window": 32, "pool_kernel": 5},
    "streamingllm": {"n_sink": 4},
    "triattention": {"reach": 65536},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_knobs_that_nobody_sets_are_the_published_ones(name):
    found = vars(create_policy(name, {}))
    assert {knob: found[knob] for knob in DEFAULTS[name]} == DEFAULTS[name]
    assert not found.get("protect_window")
    assert name == "echo" or (found.get("echo", 0), found["protect"]) == (0, Protect())


FIRST = 3.4e38


@pytest.mark.parametrize(
    ("name", "counts"), [("criticalkv", [20, 20]), ("criticaladakv", [33, 7]), ("criticalkv", [6] * 2)]
)
@pytest.mark.parametrize("protect_window", [False, True])
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_two_stages_of_criticalkv(name, counts, protect_window, ratio):
    """Half by attention, and of the rest attention times size; the window has the largest attention of its layer."""
    layer = Layer.random(7, 60)
    options = {"first_stage_ratio": ratio, "epsilon": 0.01, "protect_window": protect_window}
    policy = create_policy(name, {"window": WINDOW, "pool_kernel": KERNEL, **options})
    candidates = [count - policy.protected for count in counts]
    score = policy.score(layer.inputs())
    ranks = policy.rank(score, 60, max(counts) / 60, candidates).tolist()
    largest = max(map(max, snapkv_score(layer)))
    for kv_head, (base, count) in enumerate(zip(snapkv_score(layer), counts, strict=True)):
        base = base + [largest + 1] * WINDOW
        first = int(count * ratio)
        second = [(base[position] + 0.01) * layer.size(kv_head, position) for position in range(60)]
        by_attention = sorted(range(60), key=lambda position: -base[position])
        # The window's entries are tied: any of them may come first.
        if first < WINDOW:
            is_first = [rank > FIRST for rank in ranks[kv_head]]
            assert not any(is_first[: 60 - WINDOW])
            assert protect_window or sum(is_first) == first
        else:
            is_first = [position in by_attention[:first] for position in range(len(ranks[kv_head]))]
        assert len(is_first) == 60 - policy.protected
        for position, (rank, taken) in enumerate(zip(ranks[kv_head], is_first, strict=True)):
            assert rank > FIRST if taken else rank == pytest.approx(second[position], rel=1e-4)


def test_ablations_of_cake():
    """Equal budgets with CAKE's indicator, and CAKE's budgets with the mean attention as indicator."""
    layers = [Layer.random(seed, 60, loudness) for seed, loudness in enumerate((0.3, 1.0, 3.0))]
    options = {"window": WINDOW, "pool_kernel": KERNEL}
    scores = {
        name: [create_policy(name, options).score(layer.inputs()) for layer in layers]
        for name in ("cake", "cake-uniform", "cake-mean", "snapkv")
    }
    budgets = {name: create_policy(name, options).budgets(scores[name], 60, 20) for name in scores}
    assert budgets["cake-uniform"] == budgets["snapkv"] == [20 - WINDOW] * 3
    assert budgets["cake-mean"] == budgets["cake"] != budgets["snapkv"]
    for full, uniform, mean, snapkv in zip(*scores.values(), strict=True):
        assert torch.equal(uniform.indicator, full.indicator)
        torch.testing.assert_close(mean.indicator, snapkv.indicator)
        assert not torch.allclose(mean.indicator, full.indicator)


@pytest.mark.parametrize(
    ("shares", "total", "cap", "counts"),
    [
        # Truncated; what that lost goes to the first ones.
        ([5.9, 3.2, 0.9], 10, 10, [6, 4, 0]),
        # What is cut at the cap goes to those below it, and to the first of them what does not divide.
        ([12.0, 3.0, 4.0, 5.0], 24, 8, [8, 5, 5, 6]),
        # Twice: what was cut, then what truncation lost.
        ([12.5, 3.5, 4.0], 20, 8, [8, 6, 6]),
        # What lands above the cap is not shared out again.
        ([20.0, 7.0, 7.0], 34, 8, [8, 13, 13]),
        ([9.0, 9.0], 18, 8, [8, 8]),
        # Too many: nobody's last one is taken.
        ([5.0, 3.0, 1.0], 6, 10, [3, 2, 1]),
        ([1.0, 1.0], 1, 10, [1, 1]),
    ],
)
def test_counts_that_layers_settle_on(shares, total, cap, counts):
    assert settle(shares, total, cap) == counts


def outputs(layer: Layer, head: int, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Attention of a query of the window on all positions, and what it makes of the values."""
    kv_head, seen = head // 3, layer.keys.shape[1] - WINDOW + row + 1
    weights = np.zeros(layer.keys.shape[1])
    weights[:seen] = np.exp(layer.keys[kv_head, :seen] @ layer.queries[head, row] * 8**-0.5)
    weights /= weights.sum() + layer.sink(head)
    return weights, weights @ layer.values[kv_head]


@pytest.mark.parametrize("loudness", [0.5, 3.0, 6.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_dropkv(loudness, has_sinks):
    """What the outputs of the window would move by without a position, squared; pooled over the window too.

    Also where a query looks at one position alone, nearly.
    """
    layer = Layer.random(21, 60, loudness, has_sinks)
    expected = []
    for kv_head in range(2):
        moved = [0.0] * 60
        for head, row in itertools.product(range(3 * kv_head, 3 * kv_head + 3), range(WINDOW)):
            weights, output = outputs(layer, head, row)
            for j in range(60):
                others = weights.copy()
                others[j] = 0
                rest = others.sum() + 1 - weights.sum()
                without = others / rest @ layer.values[kv_head]
                # The authors' code adds 1e-6 to what it divides by.
                moved[j] += np.square((without - output) * rest / (rest + 1e-6)).sum() / 3
        expected.append(pool(moved)[: 60 - WINDOW])
    policy = create_policy("dropkv", {"window": WINDOW, "pool_kernel": KERNEL})
    np.testing.assert_allclose(policy.score(layer.inputs()).indicator, expected, rtol=1e-3)


@pytest.mark.parametrize(("prompt_len", "n_sink"), [(60, 4), (60, 0), (67, 3), (19, 4)])
def test_lagkv(prompt_len, n_sink):
    """By rank within a chunk; the sinks, the last chunk and what is behind it first."""
    lag, layer = 8, Layer.random(22, prompt_len)
    policy = create_policy("lagkv", {"lag": lag, "n_sink": n_sink})
    ranks = policy.score(layer.inputs()).indicator.tolist()
    num_chunks = (prompt_len - n_sink) // lag
    for kv_head in range(2):
        compared = 0
        for chunk in range(num_chunks - 1):
            worth = np.zeros(lag)
            for states in (layer.keys[kv_head], layer.values[kv_head]):
                start = n_sink + chunk * lag
                here, there = states[start : start + lag], states[start + lag : start + 2 * lag]
                least, most = there.min(axis=0), there.max(axis=0)
                spread = [np.std((entry - least) / (most - least), ddof=1) for entry in here]
                worth += np.exp(spread) / np.exp(spread).sum()
            expected = [sum(other < own for other in worth) / lag for own in worth]
            np.testing.assert_allclose(ranks[kv_head][start : start + lag], expected, rtol=1e-6)
            compared += lag
        assert compared == max(num_chunks - 1, 0) * lag
        behind = ranks[kv_head][n_sink + compared :]
        assert behind == sorted(behind)
        assert min([*ranks[kv_head][:n_sink], 3.0]) > max(behind) > min(behind) >= 1


@pytest.mark.parametrize(("prompt_len", "similar"), [(60, 0.2), (20, 0.2), (20, 0.9)])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_rkv(prompt_len, similar, has_sinks):
    """What is attended to, less what is like others; each forgives the last that is like it, or else the first."""
    layer, mix = Layer.random(24, prompt_len, 2.0, has_sinks), 0.3
    policy = create_policy("rkv", {"window": WINDOW, "pool_kernel": KERNEL, "mix": mix, "similar": similar})
    found, prefix_len, forgiven = policy.score(layer.inputs()).indicator.numpy(), prompt_len - WINDOW, set()
    for kv_head, keys in enumerate(layer.keys):
        weights = np.zeros(prefix_len)
        for row in range(WINDOW):
            heads = range(3 * kv_head, 3 * kv_head + 3)
            logits = [
                max(8**-0.5 * layer.queries[head, row] @ keys[place] for head in heads) for place in range(prefix_len)
            ]
            if has_sinks:
                logits.append(max(layer.sinks[head] for head in heads))
            weights += (np.exp(logits) / np.exp(logits).sum())[:prefix_len] / WINDOW
        likeness = np.zeros(prompt_len)
        for own, key in enumerate(keys):
            row = [
                0 if place == own else key @ other / np.linalg.norm(key) / np.linalg.norm(other)
                for place, other in enumerate(keys)
            ]
            last = max((place for place, value in enumerate(row) if value > similar), default=0)
            forgiven.add(last)
            row[last] = 0
            likeness += np.array(row) / prompt_len
        redundancy = np.exp(likeness) / np.exp(likeness).sum()
        for place in range(prefix_len):
            best = max(weights[max(place - KERNEL // 2, 0) : place + KERNEL // 2 + 1])
            expected = mix * best - (1 - mix) * redundancy[place]
            assert found[kv_head, place] == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert (0 in forgiven) == (similar == 0.9)
    assert len(forgiven) > 2


def turned(vector: np.ndarray, rotary: Rotary, speeds: list[float], position: int) -> np.ndarray:
    """A vector of a head as its rotary embedding turns it at a position, pair by pair."""
    vector, half = vector.copy(), rotary.size // 2
    for pair, speed in enumerate(speeds):
        first, second = (2 * pair, 2 * pair + 1) if rotary.neighbours else (pair, pair + half)
        a, b = vector[rotary.behind + first], vector[rotary.behind + second]
        cos, sin = math.cos(speed * position), math.sin(speed * position)
        vector[rotary.behind + first], vector[rotary.behind + second] = a * cos - b * sin, b * cos + a * sin
    return vector


def pairs_of(vector: np.ndarray, rotary: Rotary) -> tuple[list[complex], np.ndarray]:
    """Its pairs, and the channels that are not turned."""
    here, half = vector[rotary.behind : rotary.behind + rotary.size], rotary.size // 2
    others = np.concatenate([vector[: rotary.behind], vector[rotary.behind + rotary.size :]])
    if rotary.neighbours:
        return [complex(here[2 * pair], here[2 * pair + 1]) for pair in range(half)], others
    return [complex(here[pair], here[pair + half]) for pair in range(half)], others


ROTARIES = [Rotary(8), Rotary(8, neighbours=True), Rotary(4), Rotary(4, behind=4), Rotary(2, behind=5)]


@pytest.mark.parametrize("rotary", ROTARIES, ids=repr)
@pytest.mark.parametrize(("reach", "start"), [(65536, 0), (65536, 5000), (100, 7), (1, 0)])
def test_triattention(rotary, reach, start):
    """Number by number, from vectors that nothing turned yet; the cache holds them turned, with gaps between them."""
    layer, length = Layer.random(25, 40, 2.0), 40
    # Some heads lie around a centre, as the paper has it; some do not.
    layer.queries[:4] += 3 * layer.queries[:4, :1]
    speeds = [0.7 * 0.31**pair for pair in range(rotary.size // 2)]
    positions = [start + 3 * place for place in range(length - WINDOW)]
    now = positions[-1] + 9 + WINDOW
    positions += range(now - WINDOW, now)
    ahead = [2**power for power in range(20) if 2**power <= reach]
    expected = np.empty((2, length))
    for kv_head in range(2):
        heads = []
        for head in range(3 * kv_head, 3 * kv_head + 3):
            seen = [pairs_of(query, rotary) for query in layer.queries[head]]
            centre = [sum(pairs[pair] for pairs, _ in seen) / WINDOW for pair in range(len(speeds))]
            norm = [sum(abs(pairs[pair]) for pairs, _ in seen) / WINDOW for pair in range(len(speeds))]
            plain = sum(others for _, others in seen) / WINDOW
            scores = []
            for position, key in zip(positions, layer.keys[kv_head], strict=True):
                pairs, others = pairs_of(key, rotary)
                score = float(plain @ others)
                for q, length_of_q, k, speed in zip(centre, norm, pairs, speeds, strict=True):
                    phase = cmath.phase(q) - cmath.phase(k)
                    waves = [math.cos(speed * (now - position + more) + phase) for more in ahead]
                    score += abs(q) * abs(k) * sum(waves) / len(waves) + (length_of_q - abs(q)) * abs(k)
                scores.append(score)
            heads.append((np.array(scores) - np.mean(scores)) / np.std(scores))
        expected[kv_head] = np.max(heads, axis=0)
    queries = np.array(
        [[turned(query, rotary, speeds, now - WINDOW + row) for row, query in enumerate(of)] for of in layer.queries]
    )
    keys = np.array(
        [[turned(key, rotary, speeds, at) for at, key in zip(positions, of, strict=True)] for of in layer.keys]
    )
    inputs = replace(layer, queries=queries, keys=keys).inputs()
    rotation = Rotation(rotary, torch.tensor(speeds, dtype=torch.float64))
    policy = create_policy("triattention", {"window": WINDOW, "reach": reach})
    found = policy.score(replace(inputs, rotation=rotation)).indicator
    np.testing.assert_allclose(found, expected[:, :-WINDOW], rtol=1e-3, atol=1e-4)
    assert policy.decodes[0] == "window"


@pytest.mark.parametrize(("scale", "budget"), [(1000, 20.0), (3, 20.0), (1, 9.0), (3, None)])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_restkv(scale, budget, has_sinks):
    """Averaged attention and what is lost of its output, averaged over a range that follows the attention's drift."""
    layer, alpha, prefix_len = Layer.random(23, 60, 2.0, has_sinks), 0.3, 60 - WINDOW
    expected, shifts = np.zeros((2, prefix_len)), set()
    for head in range(6):
        rows = [outputs(layer, head, row)[0] for row in range(WINDOW)]
        average = rows[0]
        for row in rows[1:]:
            average = alpha * row + (1 - alpha) * average
        weight, values = layer.weight[:, 8 * head : 8 * head + 8], layer.values[head // 3, :prefix_len]
        output = weight @ (average[:prefix_len] @ values)
        worth = [a / (1 - a) * np.linalg.norm(output - weight @ v) for a, v in zip(average, values, strict=False)]
        shift = 0
        if budget is not None:
            best = [np.argsort(row)[-(int(budget) - WINDOW) :] for row in rows]
            front, rear = (int(sum(map(sum, half))) for half in (best[: WINDOW // 2], best[WINDOW // 2 :]))
            shift = int(Fraction(front - rear, len(best[0]) * WINDOW // 2 * scale))
        shifts.add(shift)
        reach = max(KERNEL // 2, abs(shift))
        for place in range(prefix_len):
            span = [min(max(place + shift + j, 0), prefix_len - 1) for j in range(-reach, reach + 1)]
            expected[head // 3, place] += sum(worth[i] for i in span) / len(span) / 3
    options = {"window": WINDOW, "pool_kernel": KERNEL, "alpha": alpha, "scale": scale}
    inputs = replace(layer.inputs(), budget=budget)
    np.testing.assert_allclose(create_policy("restkv", options).score(inputs).indicator, expected, rtol=1e-4)
    assert (len(shifts) > 1) == (scale < 1000 and budget is not None)
    assert scale != 1 or {np.sign(shift) for shift in shifts} >= {-1, 1}


@pytest.mark.parametrize("name", ["criticalkv", "criticaladakv", "defensivekv"])
def test_a_cache_is_scored_again_as_a_prompt_of_its_length(name):
    """The budget that ranks depend on is that of the head with the most, the window included."""
    options = {"window": WINDOW, "pool_kernel": KERNEL, "protect_window": True}
    policy, inputs = create_policy(name, options), Layer.random(11, 60, 0.3).inputs()
    counts = [30, 10]
    kept = [positions.tolist() for positions in policy.rescore(inputs, counts)]

    def keep(budget: int) -> list[list[int]]:
        return [positions.tolist() for positions in policy.keep(policy.score(inputs), counts, 60, budget / 60)]

    assert kept == keep(30 + WINDOW)
    if name != "criticaladakv":
        assert kept not in (keep(30), keep(10 + WINDOW)), "the budget never mattered"


def test_a_key_that_is_no_number_goes_first():
    inputs = Layer.random(12, 60).inputs()
    inputs.keys[0, 7] = float("nan")
    inputs.keys[1, 9] = float("inf")
    policy = create_policy("knorm", {})
    first, second = policy.keep(policy.score(inputs), [59, 59], 60, 59 / 60)
    assert set(range(60)) - set(first.tolist()) == {7}
    assert set(range(60)) - set(second.tolist()) == {9}
