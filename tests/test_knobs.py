"""Every setting with every kind of value: it is computed with, or refused in one sentence that names it."""

import argparse
import json
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_policies import Shape

import cake_vllm
from cake_vllm.config import KEYS, KVEvictionConfig, argument, flag, for_request, parse_budget, parse_options
from cake_vllm.policies import Policy, knobs, policy_names

cake_vllm.register()

from cake_vllm.integration.front.args import merge_settings  # noqa: E402

POLICY, BUDGET, CONFIG = KEYS


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


TOKENS = [0, -1, 1, 2, 8, 9, 60, 2**15 + 1, 2**31 - 1, 2**31, -(2**31), 2**63, 10**20, 10**400]
FLOATS = [0.0, 0.5, 1.0, 1e-320, 1e15, 1e16, -1e38, 1e39, 1e308, float("nan"), float("inf"), -float("inf")]
TEXTS = ["", "none", "auto", "cake", "0.5", "1e400", "nan", "1" + 30 * "0", "\ud800", "\n"]
OTHERS = [None, True, False, [], [1], {}, {"first": 1}, {"\ud800": 1}, nested(20)]
VALUES = [*TOKENS, *FLOATS, *TEXTS, *OTHERS]
LONG = [10**5000, 5000 * "9", 10**5 * "x", nested(5000)]
#: Keys beside knobs, known and unknown ones.
BESIDE = [
    "decode",
    "every",
    "prefill",
    "preset",
    "min_tokens",
    "max_tokens",
    "recent_tokens",
    "gama",
    "\ud800",
    1000 * "k",
]

SERVER = KVEvictionConfig("cake", 0.5, {})
SHAPE = Shape(num_layers=2)
_computed: set[Policy] = set()


def sentence(error: Exception, *names: str) -> None:
    """What people are told fits on a line, can be sent, and says what it is about."""
    text = str(error)
    assert "\n" not in text
    assert len(text.encode()) < 1000
    assert any(name in text for name in names), text


def compute(config: KVEvictionConfig | None) -> None:
    """A prompt goes through all steps of the policy, if it is evicted at all."""
    if config is None:
        return
    policy, prompt_len = config.policy, SHAPE.prompt_len
    config.never_evicted_len()
    budget = config.least_tokens(prompt_len) if config.is_elastic else config.tokens(prompt_len)
    if policy in _computed or not policy.is_evicted(prompt_len, budget):
        return
    _computed.add(policy)
    layers = SHAPE.layers(policy)
    if policy.takes_notes:
        assert set(policy.noted(0, prompt_len)) <= set(range(prompt_len))
    scores = [policy.judge(layer) for layer in layers]
    for score in scores:
        assert torch.isfinite(score.indicator).all(), policy
    scores = list(policy.settle(scores, budget))
    for score, counts in zip(scores, policy.head_budgets(scores, prompt_len, budget), strict=True):
        for kept, count in zip(policy.keep(score, counts, prompt_len, budget / prompt_len), counts, strict=True):
            assert len(kept) == count + policy.protected


def flagged(key: str, text: str) -> Any:
    """What a flag makes of its text; the command line shows nothing but what an ``ArgumentTypeError`` says."""
    try:
        return argument({POLICY: str, BUDGET: parse_budget, CONFIG: parse_options}[key])(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from None


def ways(key: str, value: Any, others: dict[str, Any], *names: str) -> None:
    """A flag, an argument of ``LLM`` or a key of ``--additional-config``, and a request's wish."""
    try:
        compute(KVEvictionConfig.from_settings(merge_settings({}, {**others, key: value})))
    except ValueError as error:
        sentence(error, flag(key), *names)
    try:
        compute(for_request(SERVER, {**others, key: value}, 4096))
    except ValueError as error:
        sentence(error, key, *names)
    try:
        text = value if isinstance(value, str) else json.dumps(value)
    except (ValueError, RecursionError):
        return
    try:
        compute(KVEvictionConfig.from_settings(merge_settings({}, {**others, key: flagged(key, text)})))
    except ValueError as error:
        sentence(error, flag(key), *names)


@pytest.mark.parametrize("key", KEYS)
def test_every_setting(key):
    for value in (*VALUES, *LONG, *({"gamma": value} for value in LONG)):
        ways(key, value, {} if key == POLICY else {POLICY: "cake"})


@pytest.mark.parametrize("name", policy_names())
def test_every_knob(name):
    for knob in (*knobs(name), *BESIDE):
        for value in VALUES:
            ways(CONFIG, {knob: value}, {POLICY: name, BUDGET: "auto" if "tokens" in knob else 0.5})
    for part in ("first", "boundary", "media", "last"):
        for value in VALUES:
            ways(CONFIG, {"protect": {part: value}}, {POLICY: name, BUDGET: 0.5})


@pytest.mark.parametrize(
    "text", [200_000 * "[", 100_000 * '{"gamma": ', '{"gamma": 1' + 400 * "0" + "}", "\ud800", "{} {}"]
)
def test_text_that_no_object_is_made_of(text):
    ways(CONFIG, text, {POLICY: "cake"})
    with pytest.raises(ValueError, match=r"^kv_eviction_config"):
        for_request(SERVER, {CONFIG: text}, 4096)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8)
JSON = st.recursive(
    SCALARS, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=4), part), max_leaves=6
)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_objects_of_any_shape(data):
    name = data.draw(st.sampled_from(policy_names()))
    keys = st.sampled_from([*knobs(name), *BESIDE]) | st.text(max_size=4)
    others = {POLICY: name, BUDGET: data.draw(JSON)}
    ways(CONFIG, data.draw(st.dictionaries(keys, JSON, max_size=4)), others, flag(BUDGET), BUDGET)
