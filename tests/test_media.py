"""Placeholders of pictures and other media that stay: every method, and what is checked where."""

from dataclasses import replace

import pytest
import torch
from test_policies import HEADS_COMPETE, Shape, cut_short, small

from cake_vllm.config import KVEvictionConfig
from cake_vllm.policies import LayerInputs, Policy, create_policy, policy_names
from cake_vllm.policies.base import Protect

PICTURES = [*range(20, 35), *range(200, 225)]
PROTECTED = {
    "media": Protect(media=True),
    "and first": Protect(first=6, media=True),
    "and both ends": Protect(first=2, boundary=0.4, media=True),
}


def with_pictures(layers: list[LayerInputs], first: int = 0) -> list[LayerInputs]:
    """Layers that hold the tokens from ``first`` on."""
    marks = torch.zeros(len(layers[0].keys), layers[0].keys.shape[1], dtype=torch.bool)
    marks[:, [place - first for place in PICTURES]] = True
    return [replace(layer, media=marks) for layer in layers]


def kept_of(policy: Policy, layers: list[LayerInputs], budget: int) -> list[set[int]]:
    """What each head of each layer keeps."""
    length = layers[0].keys.shape[1]
    scores = policy.settle([policy.judge(layer) for layer in layers], budget)
    counts = policy.head_budgets(scores, length, budget)
    assert sum(map(sum, counts)) + policy.protected * 6 <= budget * 6 + 6
    return [
        set(head.tolist())
        for score, of_layer in zip(scores, counts, strict=True)
        for head in policy.keep(score, of_layer, length, min(1.0, budget / length))
    ]


@pytest.mark.parametrize("protect", PROTECTED.values(), ids=PROTECTED)
@pytest.mark.parametrize("name", policy_names())
def test_placeholders_stay(name, protect):
    """In every head of every layer, if the budget just holds them and if it is larger; when a cache is scored again."""
    policy, shape = replace(small(name), protect=protect), Shape(prompt_len=300)
    layers, num_media = shape.layers(policy), len(PICTURES)
    least = policy.least_with(num_media)
    assert policy.least_with(0) == policy.least_budget < least - num_media + 1 <= 300 - num_media
    for budget in (least, least + 60):
        kept = kept_of(policy, with_pictures(layers), budget)
        assert all(head >= {*PICTURES, *range(protect.first)} for head in kept)
    if protect == Protect(media=True):
        assert any(not head >= set(PICTURES) for head in kept_of(policy, layers, least)), "nobody needed it"
    (layer,) = with_pictures(layers[:1])
    for head in policy.rescore(layer, [least - policy.protected] * 2):
        assert set(head.tolist()) >= set(PICTURES)
    if "cake" in policy.decodes:
        kept = policy.trim(replace(layer, queries=layer.queries[:, -1:]), least - policy.protected)
        assert all(set(head.tolist()) >= set(PICTURES) for head in kept)


@pytest.mark.parametrize("name", HEADS_COMPETE)
def test_placeholders_of_shorter_heads(name):
    """Heads that hold different numbers of tokens hold all of them, at places of their own."""
    policy = create_policy(name, {"window": 8, "protect": {"media": True}})
    layers = [cut_short(layer, [90, 120]) for layer in Shape(prompt_len=120).layers(policy)]
    marks = torch.zeros(2, 120, dtype=torch.bool)
    marks[0, 40:60] = marks[1, 10:30] = True
    layers = [replace(layer, media=marks) for layer in layers]
    short, long = kept_of(policy, layers, policy.least_with(20))[:2]
    assert short >= set(range(40, 60))
    assert long >= set(range(10, 30))


def settings(budget, **config) -> KVEvictionConfig:
    name = config.pop("name", "snapkv")
    keys = {"kv_eviction": name, "kv_eviction_budget": budget, "kv_eviction_config": {"window": 32, **config}}
    made = KVEvictionConfig.from_settings(keys)
    assert made is not None
    return made


def test_what_a_fraction_means():
    """Never less than what stays, and something beside it; a number is what it says."""
    for config in (settings(0.1), settings("auto", min_tokens=50)):
        assert config.least_tokens(1000, 400) == 433
    assert settings(0.1).tokens(1000) == 100
    assert settings(0.1).tokens(1000, 400) == 433
    assert settings(0.6).tokens(1000, 400) == 600
    assert settings(200).tokens(1000, 400) == 200
    assert settings("auto", min_tokens=600).least_tokens(1000, 400) == 600
    assert settings(0.1, protect={"first": 10, "boundary": 0.5, "media": True}).tokens(1000, 400) == 886


@pytest.mark.parametrize(
    ("config", "num_media", "length", "least"),
    [
        (settings(200, protect={"media": True}), 167, 1000, None),
        (settings(200, protect={"media": True}), 168, 1000, 201),
        (settings(200, protect={"media": True, "first": 10}), 158, 1000, 201),
        # It is never evicted.
        (settings(200, protect={"media": True}), 180, 200, None),
        (settings(200, protect={"media": True}), 180, 201, 213),
        (settings(200), 900, 1000, None),
        (settings(0.1, protect={"media": True}), 900, 1000, None),
        (settings("auto", protect={"media": True}), 900, 1000, None),
        (settings(0.1, protect={"media": True}, prefill="progressive"), 900, 1000, None),
        # A request is promised to hold no more than the longest one's tenth.
        (settings(0.1, protect={"media": True}, prefill="progressive", decode="window"), 367, 1000, None),
        (settings(0.1, protect={"media": True}, prefill="progressive", decode="window"), 368, 1000, 401),
    ],
)
def test_budgets_that_hold_the_pictures(config, num_media, length, least):
    if least is None:
        return config.check_media(num_media, length, 4000)
    message = rf"^kv_eviction_budget {config.budget} is too little for the {num_media} tokens .*: it must be {least} "
    with pytest.raises(ValueError, match=message):
        config.check_media(num_media, length, 4000)
