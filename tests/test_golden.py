"""Policies against recorded outputs of the official implementations (``tests/golden``, ``--golden-dir``)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cake_vllm.policies import LayerInputs, LayerScore, Policy, create_policy
from cake_vllm.policies.base import total_tokens
from cake_vllm.policies.budgets import cascade, proportional, settle
from cake_vllm.policies.cake import Cake

CLOSE = {"rtol": 1e-4, "atol": 1e-6}


class Case:
    """One file: its configuration and its inputs as tensors."""

    def __init__(self, path: Path):
        self.data = np.load(path)
        self.config = json.loads(str(self.data["config"]))
        self.prompt_len, self.window = self.config["S"], self.config["window"]
        self.scale = self.config["D"] ** -0.5

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.data[name])

    def score(self, policy: Policy, layer: int | None = None) -> LayerScore:
        """Scores one of several layers, or the only one."""
        pick = (lambda array: array) if layer is None else (lambda array: array[layer])
        optional = {
            field: pick(self.tensor(name)) if name in self.data.files else None
            for field, name in (("values", "v"), ("output_weight", "Wo"))
        }
        queries = pick(self.tensor("q"))[:, -policy.num_queries :] if policy.num_queries else pick(self.tensor("q"))
        return policy.score(LayerInputs(queries, pick(self.tensor("k")), self.scale, **optional))


class CakeCase(Case):
    """A ``cake_*`` file and what our policy makes of its inputs."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.policy = Cake(**{name: self.config[name] for name in ("window", "gamma", "tau1", "tau2")})
        self.num_layers = self.config["L"]
        self.budget = self.config["cache_size"]
        self.cap = self.prompt_len - self.window
        self.scores = [self.score(self.policy, layer) for layer in range(self.num_layers)]

    @property
    def is_evicted(self) -> bool:
        return self.policy.is_evicted(self.prompt_len, self.budget)


@pytest.fixture(scope="module")
def case(request) -> CakeCase:
    return CakeCase(request.param)


def test_preferences(case: CakeCase):
    np.testing.assert_allclose(case.policy.preferences(case.scores), case.data["pref"], rtol=1e-4)


def test_indicators(case: CakeCase):
    ours = torch.stack([score.indicator for score in case.scores]).numpy()
    np.testing.assert_allclose(ours, case.data["hh"], **CLOSE)


@pytest.mark.parametrize("tag", ["nc", "ca"])
def test_stages(case: CakeCase, tag: str):
    raw, budgets = case.data[f"{tag}_stage_raw"], case.data[f"{tag}_stage_budget"]
    preferences = case.policy.preferences(case.scores)
    total = total_tokens(case.budget, case.window, case.num_layers)
    recorded = [row for row in range(case.num_layers) if budgets[row, 0] >= 0]
    assert bool(recorded) == case.is_evicted
    ours = cascade(preferences, total, case.cap)
    for row in recorded:
        np.testing.assert_allclose(proportional(preferences[: row + 1], total), raw[row, : row + 1], rtol=1e-4)
        assert ours[row] == budgets[row, : row + 1].tolist()


@pytest.mark.parametrize("tag", ["nc", "ca"])
def test_kept(case: CakeCase, tag: str):
    if not case.is_evicted:
        for layer in range(case.num_layers):
            kept = case.data[f"{tag}_kept_l{layer}"]
            assert kept.tolist() == [list(range(case.prompt_len))] * len(kept)
        return
    policy = Cake(**{**vars(case.policy), "cascade": tag == "ca"})
    counts = policy.budgets(case.scores, case.prompt_len, case.budget)
    assert counts == case.data[f"{tag}_n_kept_prefix"].tolist()
    heads = policy.head_budgets(case.scores, case.prompt_len, case.budget)
    for layer, (score, count) in enumerate(zip(case.scores, heads, strict=True)):
        kept = policy.keep(score, count, case.prompt_len, case.budget / case.prompt_len)
        assert torch.stack(kept).tolist() == case.data[f"{tag}_kept_l{layer}"].tolist()


@pytest.mark.parametrize("tag", ["nc", "ca"])
def test_reported_layer_budgets(case: CakeCase, tag: str):
    """What the official cache object reports; its decode stage uses it."""
    if not case.is_evicted:
        expected = [case.budget - case.window] * case.num_layers
    else:
        total = total_tokens(case.budget, case.window, case.num_layers)
        last = settle(proportional(case.policy.preferences(case.scores), total), total, case.cap)
        expected = [min(count, case.cap) for count in last]
    assert case.data[f"{tag}_layer_budget"].tolist() == expected


@pytest.fixture(scope="module")
def decode_case(request) -> CakeCase:
    return CakeCase(request.param)


@pytest.mark.parametrize("tag", ["nc", "ca"])
def test_decode_steps(decode_case: CakeCase, tag: str):
    """The recorded order of the cache after each step; the token of step t has position S + t."""
    case = decode_case
    for layer in range(case.num_layers):
        keys = torch.cat([case.tensor("k")[layer], case.tensor("dec_k")[:, layer, :, 0].transpose(0, 1)], dim=1)
        order = torch.from_numpy(case.data[f"{tag}_order_l{layer}"].astype(np.int64))
        count = int(case.data[f"{tag}_layer_budget"][layer])
        for step in range(case.config["decode_steps"]):
            new = torch.full((len(order), 1), case.prompt_len + step)
            order = torch.cat([order, new], dim=1)
            if order.shape[1] > count + case.window:
                cached = keys.gather(1, order[:, :, None].expand(-1, -1, keys.shape[-1]))
                picked = case.policy.trim(LayerInputs(case.tensor("dec_q")[step, layer], cached, case.scale), count)
                order = order.gather(1, picked)
            assert order.tolist() == case.data[f"{tag}_dec{step}_order_l{layer}"].tolist()


@pytest.fixture(scope="module")
def kvpress_case(request) -> Case:
    return Case(request.param)


def kvpress_policy(name: str, config: dict) -> Policy:
    options = {
        "snapkv": {"window": "window", "pool_kernel": "kernel"},
        "pyramidkv": {"window": "window", "pool_kernel": "kernel", "beta": "beta"},
        "adakv": {"window": "window", "pool_kernel": "kernel", "alpha": "alpha"},
        "criticalkv": {"window": "window", "pool_kernel": "kernel", "epsilon": "criticalkv_epsilon"},
        "criticaladakv": {"window": "window", "pool_kernel": "kernel", "alpha": "alpha"},
        "streamingllm": {"n_sink": "n_sink"},
    }.get(name, {})
    return create_policy(name, {knob: config[key] for knob, key in options.items()})


RECORDED_AS = {"streamingllm": "streaming"}
KVPRESS = ["snapkv", "tova", "knorm", "keydiff", "criticalkv", "streamingllm", "adakv", "criticaladakv"]


@pytest.mark.parametrize("name", KVPRESS)
def test_kvpress_methods(kvpress_case: Case, name: str):
    case, prefix = kvpress_case, RECORDED_AS.get(name, name)
    policy = kvpress_policy(name, case.config)
    score = case.score(policy)
    for ratio in case.config["compression_ratios"]:
        keep_ratio = 1 - ratio
        tokens = case.prompt_len * keep_ratio
        (counts,) = policy.head_budgets([score], case.prompt_len, tokens)
        kept = policy.keep(score, counts, case.prompt_len, keep_ratio)
        if f"{prefix}_{ratio}_n_kept_head" in case.data.files:
            recorded = [case.data[f"{prefix}_{ratio}_kept_h{head}"].tolist() for head in range(len(kept))]
            assert [len(head) for head in kept] == case.data[f"{prefix}_{ratio}_n_kept_head"].tolist()
        else:
            recorded = case.data[f"{prefix}_{ratio}_kept"].tolist()
            # StreamingLLM's recorded scores are 0 and 1; ours order what lies between.
            if name != "streamingllm":
                ranks = policy.rank(score, case.prompt_len, keep_ratio).numpy()
                theirs = case.data[f"{prefix}_{ratio}_scores"][:, : ranks.shape[1]]
                np.testing.assert_allclose(ranks, theirs, **CLOSE)
        assert [head.tolist() for head in kept] == recorded


def test_pyramidkv(kvpress_case: Case):
    case = kvpress_case
    policy = kvpress_policy("pyramidkv", case.config)
    num_layers = case.config["pyramid_num_layers"]
    scores = [case.score(policy)] * num_layers
    for ratio in case.config["pyramid_compression_ratios"]:
        counts = policy.budgets(scores, case.prompt_len, case.prompt_len * (1 - ratio))
        recorded = case.data[f"pyramidkv_{ratio}_layer_budgets"].tolist()
        assert [count + policy.window for count in counts] == recorded
        for layer, count in enumerate(counts):
            kept = policy.keep(scores[layer], [count] * len(scores[layer].indicator), case.prompt_len, 1 - ratio)
            assert torch.stack(kept).tolist() == case.data[f"pyramidkv_{ratio}_kept_l{layer}"].tolist()


@pytest.fixture(scope="module")
def defensive_case(request) -> Case:
    return Case(request.param)


@pytest.mark.parametrize(("name", "tag"), [("defensivekv", "defensive"), ("layer-defensivekv", "layer")])
def test_defensivekv(defensive_case: Case, name: str, tag: str):
    case = defensive_case
    policy = create_policy(name, {"window": case.window, "pool_kernel": case.config["kernel"]})
    scores = [case.score(policy, layer) for layer in range(case.config["L"])]
    for ratio in case.config["compression_ratios"]:
        keep_ratio = 1 - ratio
        recorded = {name: case.data[f"{tag}_{ratio}_{name}"] for name in ("scores", "window_bias", "n_kept_layer")}
        np.testing.assert_allclose([score.extra[1] for score in scores], recorded["window_bias"], rtol=1e-4)
        ranks = torch.stack([policy.rank(score, case.prompt_len, keep_ratio) for score in scores])
        np.testing.assert_allclose(ranks.numpy(), recorded["scores"], **CLOSE)
        counts = policy.head_budgets(scores, case.prompt_len, case.prompt_len * keep_ratio)
        assert [sum(heads) for heads in counts] == recorded["n_kept_layer"].tolist()
        if case.config["ties_possible"]:
            continue
        assert counts == case.data[f"{tag}_{ratio}_n_kept_head"].tolist()
        for layer, (score, heads) in enumerate(zip(scores, counts, strict=True)):
            kept = policy.keep(score, heads, case.prompt_len, keep_ratio)
            for head, positions in enumerate(kept):
                assert positions.tolist() == case.data[f"{tag}_{ratio}_kept_l{layer}_h{head}"].tolist()
