"""The three settings: what is accepted, what is refused and with which words."""

import json
from types import SimpleNamespace

import pytest

from cake_vllm.config import KVEvictionConfig, for_request, parse_budget


def parse(**settings) -> KVEvictionConfig | None:
    return KVEvictionConfig.from_settings({f"kv_eviction{key}": value for key, value in settings.items()})


@pytest.mark.parametrize("settings", [{}, {"": None}, {"": "none"}])
def test_off(settings):
    assert parse(**settings) is None


def test_defaults():
    config = parse(**{"": "cake"})
    assert config.budget == 1024
    assert (config.policy.window, config.policy.gamma, config.policy.pool_kernel) == (32, 200, 5)
    assert (config.policy.tau1, config.policy.tau2) == (1.0, 1.0)


def test_settings_survive_the_trip_between_processes():
    config = parse(**{"": "cake", "_budget": "0.25", "_config": '{"window": 16, "gamma": 5}'})
    assert KVEvictionConfig.from_settings(json.loads(json.dumps(config.settings()))) == config


@pytest.mark.parametrize(
    ("text", "value"), [("1024", 1024), (64, 64), ("0.2", 0.2), ("1.0", 1.0), (0.5, 0.5), ("auto", "auto")]
)
def test_budget(text, value):
    parsed = parse_budget(text)
    assert (parsed, type(parsed)) == (value, type(value))


def test_a_fraction_is_exact_and_never_below_the_window():
    config = parse(**{"": "cake", "_budget": 0.29})
    assert config.tokens(1000) == 290
    # Not 56: in binary 0.57 * 100 is a little less than 57.
    assert parse(**{"": "cake", "_budget": 0.57}).tokens(100) == 57
    assert config.tokens(50) == config.policy.floor == config.policy.window + 1
    assert parse(**{"": "knorm", "_budget": 0.01}).tokens(64) == 32


def test_an_elastic_budget_lies_between_its_floor_and_its_ceiling():
    config = parse(**{"": "cake", "_budget": "auto"})
    assert (config.least_tokens(1000), config.tokens(1000)) == (256, 1000)
    assert (config.decode, config.cuts_outputs, config.recent_tokens) == ("off", True, 256)
    assert config.never_evicted_len() == 256 + 32
    options = {"min_tokens": 0.1, "max_tokens": 500}
    config = parse(**{"": "cake", "_budget": "auto", "_config": options})
    assert (config.least_tokens(1000), config.tokens(1000)) == (100, 500)
    assert (config.least_tokens(10), config.tokens(10)) == (33, 500)
    assert config.never_evicted_len() == 0
    wide = parse(**{"": "cake", "_budget": "auto", "_config": {"window": 400}})
    assert (wide.least_tokens(1000), wide.recent_tokens) == (401, 400)


def test_a_request_sets_its_own_floor():
    server = parse(**{"": "cake", "_budget": "auto", "_config": {"min_tokens": 100, "gamma": 5}})
    own = for_request(server, {"kv_eviction_config": {"min_tokens": 0.5}}, 4096)
    assert (own.least_tokens(1000), own.policy.gamma) == (500, 5)
    other = for_request(server, {"kv_eviction": "snapkv"}, 4096)
    assert (other.budget, other.least_tokens(1000)) == ("auto", 100)
    fixed = for_request(server, {"kv_eviction_budget": 300}, 4096)
    assert (fixed.tokens(1000), fixed.policy.gamma, fixed.decode) == (300, 5, "cake")
    elastic = for_request(parse(**{"": "cake", "_config": {"decode": "window"}}), {"kv_eviction_budget": "auto"}, 4096)
    assert (elastic.tokens(1000), elastic.decode, elastic.cuts_outputs) == (1000, "off", True)


def test_where_what_is_generated_stays_a_request_does_not_change_that():
    """It may keep more of what it generated last, where that gives."""
    server = parse(**{"": "cake", "_budget": "auto", "_config": {"decode": "window", "recent_tokens": 64}})
    own = {"kv_eviction": "snapkv", "kv_eviction_config": {"recent_tokens": 500}}
    assert [for_request(server, wish, 4096).recent_tokens for wish in ({"kv_eviction": "snapkv"}, own)] == [64, 500]
    fixed = for_request(server, {"kv_eviction_budget": 300}, 4096)
    assert (fixed.decode, fixed.cuts_outputs) == ("window", False)
    for budget in ("auto", 400):
        server = parse(**{"": "cake", "_budget": budget, "_config": {"decode": "off"}})
        for wish in ({"kv_eviction_budget": "auto"}, {"kv_eviction": "knorm", "kv_eviction_budget": "auto"}):
            config = for_request(server, wish, 4096)
            assert (config.is_elastic, config.decode, config.cuts_outputs) == (True, "off", False)
        with pytest.raises(ValueError, match="recent_tokens has no effect where generated tokens are not evicted"):
            for_request(server, {**wish, "kv_eviction_config": {"recent_tokens": 64}}, 4096)


def test_prompts_that_stay_beside_an_elastic_budget():
    """Their floor is their length, whatever else is asked."""
    options = {"protect": {"prompt": True}, "min_tokens": 64, "max_tokens": 0.5}
    config = parse(**{"": "snapkv", "_budget": "auto", "_config": options}).beside(1000)
    assert (config.least_tokens(1000), config.tokens(1000), config.cuts_outputs) == (1000, 1000, True)


def test_a_question_that_is_not_known_yet_asks_for_the_prompts_own_queries():
    """Under progressive prefill ``echo`` observes, unless it is told not to; a request may ask for as much."""
    assert parse(**{"": "echo"}).policy.observe == 0
    observing = parse(**{"": "echo", "_config": {"prefill": "progressive"}})
    assert observing.policy.observe == 8
    assert KVEvictionConfig.from_settings(observing.settings()).policy.observe == 8
    assert parse(**{"": "echo", "_config": {"prefill": "progressive", "observe": 0}}).policy.observe == 0
    server = parse(**{"": "snapkv", "_config": {"prefill": "progressive"}})
    assert for_request(server, {"kv_eviction": "echo"}, 4096).policy.observe == 8
    sparse = {"kv_eviction": "echo", "kv_eviction_config": {"observe": 20}}
    assert for_request(server, sparse, 4096).policy.observe == 20
    with pytest.raises(ValueError, match="observe of a request may be 0, or at least 8, not 4"):
        for_request(server, {"kv_eviction": "echo", "kv_eviction_config": {"observe": 4}}, 4096)


def test_a_method_that_is_ours_to_choose():
    """By whether the model has gates; a request names one."""
    settings = {"kv_eviction": "auto", "kv_eviction_budget": "auto"}
    assert KVEvictionConfig.from_settings(settings).policy_name == "echo"
    server = KVEvictionConfig.from_settings(settings, has_gates=True)
    assert (server.policy_name, server.budget, server.settings()["kv_eviction"]) == ("gate", "auto", "gate")
    with pytest.raises(ValueError, match="kv_eviction auto is for the server to choose: name a method"):
        for_request(server, {"kv_eviction": "auto"}, 4096)


BAD = [
    ({"": "cade"}, "--kv-eviction 'cade' is unknown: choose none, auto, .*cake"),
    (
        {"": "cake", "_config": {"min_tokens": 64}},
        "min_tokens has no effect without --kv-eviction-budget auto: drop it",
    ),
    *(
        ({"": "snapkv", "_config": {"protect": {"prompt": True}, **options}, **more}, f"does not go with {what}")
        for options, more, what in (
            ({}, {}, "decode off: give decode, or drop protect.prompt"),
            ({"decode": "window", "prefill": "progressive"}, {}, "prefill progressive: drop it"),
            ({"decode": "off"}, {"_budget": "auto"}, "decode off: give decode, or drop protect.prompt"),
        )
    ),
    ({"": "cake", "_config": {"every": 0}}, "every 0 is no number of tokens: give a positive whole number"),
    ({"": "cake", "_config": {"every": True}}, "every True is no number of tokens"),
    ({"": "snapkv", "_config": {"every": 64}}, "every has no effect where generated tokens are not evicted: drop it"),
    ({"": "cake", "_budget": "auto", "_config": {"every": 64}}, "every 64 needs a budget that is known beforehand"),
    ({"": "cake", "_config": {"recent_tokens": 64}}, "recent_tokens has no effect without --kv-eviction-budget auto"),
    *(
        ({"": "cake", "_budget": "auto", "_config": {"recent_tokens": bad}}, f"recent_tokens {bad!r} is no number of")
        for bad in (0, -1, True, 0.5, "64")
    ),
    (
        {"": "cake", "_budget": "auto", "_config": {"recent_tokens": 64, "decode": "off"}},
        "recent_tokens has no effect where generated tokens are not evicted: drop it, or decode off",
    ),
    ({"": "cake", "_budget": "auto", "_config": {"min_tokens": 0}}, "min_tokens 0 is not an amount: give a positive"),
    ({"": "cake", "_budget": "auto", "_config": {"max_tokens": "auto"}}, "max_tokens 'auto' is not an amount"),
    ({"": "cake", "_budget": "auto", "_config": {"decode": "cake"}}, "decode cake needs a budget that is known before"),
    ({"": "cake", "_budget": "auto", "_config": {"prefill": "progressive"}}, "prefill progressive needs a budget"),
    ({"": "cake", "_budget": 0}, "--kv-eviction-budget 0 is not a budget: give a positive whole number"),
    ({"": "cake", "_budget": -5}, "--kv-eviction-budget -5 is not a budget"),
    ({"": "cake", "_budget": "-5"}, "--kv-eviction-budget '-5' is not a budget"),
    ({"": "cake", "_budget": 1.5}, "--kv-eviction-budget 1.5 is not a budget"),
    ({"": "cake", "_budget": 0.0}, "--kv-eviction-budget 0.0 is not a budget"),
    ({"": "cake", "_budget": "nan"}, "--kv-eviction-budget 'nan' is not a budget"),
    ({"": "cake", "_budget": "much"}, "--kv-eviction-budget 'much' is not a budget"),
    ({"": "cake", "_budget": True}, "--kv-eviction-budget True is not a budget"),
    ({"": "cake", "_budget": [1]}, r"--kv-eviction-budget \[1\] is not a budget"),
    ({"": "cake", "_budget": 32}, "--kv-eviction-budget 32 leaves nothing beside the window of 32 tokens: give more"),
    (
        {"": "cake", "_budget": 42, "_config": {"protect": {"first": 10}}},
        "--kv-eviction-budget 42 leaves nothing beside the window of 32 tokens and the 10 protected first ones: "
        "give more than 42",
    ),
    ({"": "cake", "_config": {"protect": {"rest": 1}}}, "--kv-eviction-config: unknown key 'rest' in protect"),
    ({"": "knorm", "_budget": 36, "_config": {"protect": {"first": 5}}}, "is too little for knorm, .*: give 37"),
    ({"": "knorm", "_budget": 31}, "--kv-eviction-budget 31 is too little for knorm, which keeps no window: give 32"),
    ({"_budget": 512}, "--kv-eviction-budget has no effect without --kv-eviction: name a policy or auto, or"),
    ({"": "none", "_config": {"gamma": 1}}, "--kv-eviction-config has no effect without --kv-eviction"),
    ({"": "cake", "_config": "{gamma: 1}"}, "--kv-eviction-config is not valid JSON"),
    ({"": "cake", "_config": "[1]"}, "--kv-eviction-config must be a JSON object"),
    ({"": "cake", "_config": {"gama": 1}}, "--kv-eviction-config: unknown key 'gama' .* known keys: .*gamma"),
    ({"": "cake", "_config": {"gamma": "big"}}, "--kv-eviction-config: gamma must be of type float, not 'big'"),
    ({"": "cake", "_config": {"gamma": -1}}, "--kv-eviction-config: gamma must be a finite number of at least 0"),
    ({"": "cake", "_config": {"gamma": float("nan")}}, "--kv-eviction-config: gamma must be a finite number"),
    ({"": "cake", "_config": {"window": 1}}, "--kv-eviction-config: window must be at least 2"),
    ({"": "cake", "_config": {"window": 3.5}}, "--kv-eviction-config: window must be of type int"),
    ({"": "cake", "_config": {"tau1": 0}}, "--kv-eviction-config: tau1 must be a finite number of at least 0.1"),
    ({"": "cake", "_config": {"tau2": -1.0}}, "--kv-eviction-config: tau2 must be a finite number of at least 0.1"),
    ({"": "cake", "_config": {"pool_kernel": 4}}, "--kv-eviction-config: pool_kernel must be a positive odd number"),
    ({"": "cake", "_config": {"decode": "on"}}, "decode 'on' is unknown to cake: choose cake, off, window"),
    ({"": "snapkv", "_config": {"decode": "cake"}}, "decode 'cake' is unknown to snapkv: choose off, window"),
    ({"": "cake", "_config": {"prefill": "fast"}}, "prefill 'fast' is unknown to cake: choose exact, progressive"),
    ({"": "cake", "_config": {"cascade": 1}}, "--kv-eviction-config: cascade must be of type bool"),
    ({"": "cake", "_config": {"preset": "gpt"}}, "--kv-eviction-config: unknown preset 'gpt'; choose llama2-13b@1024"),
    ({"": "cake", "_config": {"preset": 7}}, "--kv-eviction-config: unknown preset 7"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        parse(**settings)


LLAMA31 = SimpleNamespace(model_type="llama", num_hidden_layers=32, hidden_size=4096, vocab_size=128256)


@pytest.mark.parametrize(
    ("budget", "options", "taus"),
    [
        (1024, {}, (1.6, 0.4)),
        (128, {}, (1.6, 0.6)),
        (300, {}, (1.6, 0.6)),
        (512, {}, (1.6, 0.4)),
        (0.1, {}, (1.6, 0.4)),
        (1024, {"tau1": 2.0}, (2.0, 1.0)),
        (1024, {"preset": "qwen2.5-7b@128"}, (0.4, 0.6)),
        (1024, {"preset": "qwen2.5-7b@128", "tau2": 3.0}, (0.4, 3.0)),
    ],
)
def test_presets(budget, options, taus):
    policy = parse(**{"": "cake", "_budget": budget, "_config": options}).resolve(LLAMA31).policy
    assert (policy.tau1, policy.tau2) == taus


def test_no_preset_for_an_unknown_model():
    config = parse(**{"": "cake"})
    assert config.resolve(SimpleNamespace(model_type="llama", num_hidden_layers=30)) is config
