"""Policies against recorded outputs of the official implementations (``--golden-dir``)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cake_vllm.policies.base import LayerScore, total_tokens
from cake_vllm.policies.budgets import cascade, proportional, settle
from cake_vllm.policies.cake import Cake


class CakeCase:
    """One ``cake_*.npz`` file and what our policy makes of its inputs."""

    def __init__(self, path: Path):
        self.data = np.load(path)
        self.config = json.loads(str(self.data["config"]))
        self.policy = Cake(
            window=self.config["window"],
            gamma=self.config["gamma"],
            tau1=self.config["tau1"],
            tau2=self.config["tau2"],
        )
        self.num_layers = self.config["L"]
        self.prompt_len = self.config["S"]
        self.budget = self.config["cache_size"]
        self.cap = self.prompt_len - self.config["window"]
        queries = torch.from_numpy(self.data["q"])
        keys = torch.from_numpy(self.data["k"])
        scale = self.config["D"] ** -0.5
        self.scores: list[LayerScore] = [self.policy.score(q, k, scale) for q, k in zip(queries, keys, strict=True)]
        self.terms = torch.stack([score.terms for score in self.scores])

    @property
    def is_evicted(self) -> bool:
        return self.policy.is_evicted(self.prompt_len, self.budget)


@pytest.fixture(scope="module")
def case(request) -> CakeCase:
    return CakeCase(request.param)


def test_preferences(case: CakeCase):
    np.testing.assert_allclose(case.policy.preferences(case.terms), case.data["pref"], rtol=1e-4)


def test_indicators(case: CakeCase):
    ours = torch.stack([score.indicator for score in case.scores]).numpy()
    np.testing.assert_allclose(ours, case.data["hh"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tag", ["nc", "ca"])
def test_stages(case: CakeCase, tag: str):
    raw, budgets = case.data[f"{tag}_stage_raw"], case.data[f"{tag}_stage_budget"]
    preferences = case.policy.preferences(case.terms)
    total = total_tokens(case.budget, case.policy.window, case.num_layers)
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
    counts = policy.budgets(case.terms, case.prompt_len, case.budget)
    assert counts == case.data[f"{tag}_n_kept_prefix"].tolist()
    for layer, (score, count) in enumerate(zip(case.scores, counts, strict=True)):
        assert policy.keep(score, count).tolist() == case.data[f"{tag}_kept_l{layer}"].tolist()


@pytest.mark.parametrize("tag", ["nc", "ca"])
def test_reported_layer_budgets(case: CakeCase, tag: str):
    """What the official cache object reports; its decode stage uses it."""
    if not case.is_evicted:
        expected = [case.budget - case.policy.window] * case.num_layers
    else:
        total = total_tokens(case.budget, case.policy.window, case.num_layers)
        last = settle(proportional(case.policy.preferences(case.terms), total), total, case.cap)
        expected = [min(count, case.cap) for count in last]
    assert case.data[f"{tag}_layer_budget"].tolist() == expected
