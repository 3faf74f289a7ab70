"""What a request may ask of a server's settings: the same three keys, and a report. Imports no vLLM."""

import functools
import json
from collections.abc import Mapping
from typing import Any

from cake_vllm.config.keys import (
    AUTO,
    BUDGET_KEY,
    CONFIG_KEY,
    ELASTIC_KEYS,
    EVERY_KEY,
    KEYS,
    OFF,
    POLICY_KEY,
    TAUS,
    flag,
    parse_options,
)
from cake_vllm.config.settings import KVEvictionConfig, has_presets
from cake_vllm.policies import knobs, policy_class, policy_names
from cake_vllm.policies.parsing import shown, written

#: A request's wish to hear what was kept of it.
REPORT_KEY = "kv_eviction_report"
#: What a request may ask for.
REQUEST_KEYS = (*KEYS, REPORT_KEY)
#: Knobs that cost the server memory or time.
COSTLY_KNOBS = ("window", "pool_kernel")
#: Knobs that name files of the server's.
FILE_KNOBS = ("gates",)


def for_request(
    server: KVEvictionConfig, asked: Mapping[str, Any] | None, max_model_len: int
) -> KVEvictionConfig | None:
    """What a request gets that asks for settings of its own; ``None`` if it asks for no eviction.

    Its knobs are laid over the server's if the policy is the server's, else over the policy's defaults; ways of
    prefill and decoding are the server's as far as the policy knows them. Equal wishes are parsed once.

    Args:
        server: its settings.
        asked: its ``vllm_xargs``; keys that are not ours are ignored.
        max_model_len: the longest request, tokens.

    Raises:
        ValueError: one sentence that names the key and the fix.
    """
    # Nearly all requests, and this is asked of each in the scheduler.
    if not asked or asked.keys().isdisjoint(KEYS):
        return server
    return _for_request(server, as_json(asked), max_model_len)


def as_json(asked: Mapping[str, Any] | None) -> str:
    """The three keys of a request in plain types, which messages carry; short, however long the text of its knobs.

    Raises:
        ValueError: one sentence that names the keys.
    """
    wishes = {key: asked[key] for key in KEYS if key in asked} if asked else {}
    if wishes.get(CONFIG_KEY) is not None:
        wishes[CONFIG_KEY] = parse_options(wishes[CONFIG_KEY], CONFIG_KEY)
    try:
        return json.dumps(wishes, sort_keys=True, default=shown)
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"{' and '.join(wishes)} of a request must be JSON, not {shown(wishes)}") from None


@functools.lru_cache(maxsize=256)
def _for_request(server: KVEvictionConfig, wishes_json: str, max_model_len: int) -> KVEvictionConfig | None:
    wishes = json.loads(wishes_json)
    try:
        config = KVEvictionConfig.from_settings(_merge_wishes(server, wishes))
    except ValueError as error:
        message = str(error)
        for key in (BUDGET_KEY, CONFIG_KEY, POLICY_KEY):
            message = message.replace(flag(key), key)
        raise ValueError(message) from None
    if config is not None and CONFIG_KEY in wishes:
        _refuse_costly(server, config)
    most = server.max_request_tokens(max_model_len, 0)
    if most is not None:
        asked_for = config.max_request_tokens(max_model_len, 0) if config else None
        if asked_for is None or asked_for > most:
            raise ValueError(
                f"{BUDGET_KEY} and {POLICY_KEY} of a request must not let it hold more than the server's "
                f"{flag(BUDGET_KEY)} {server.budget}, on which progressive prefill counts: ask for less"
            )
    return server if config == server else config


def _merge_wishes(server: KVEvictionConfig, wishes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a request: its wishes over the server's."""
    settings = {**server.settings(), **wishes}
    name = settings[POLICY_KEY] or OFF
    if name == OFF:
        return dict(wishes)
    if name == AUTO:
        raise ValueError(f"{POLICY_KEY} {AUTO} is for the server to choose: name a method, or drop the key")
    own = parse_options(wishes.get(CONFIG_KEY))
    elastic = ELASTIC_KEYS if settings[BUDGET_KEY] == AUTO else ()
    if name in policy_names():
        known = {*knobs(name), *(("preset",) if has_presets(name) else ()), *elastic}.difference(FILE_KNOBS)
        for key in own.keys() - known:
            is_servers = key in ("decode", EVERY_KEY, "prefill", *FILE_KNOBS)
            why = "is for the server to choose" if is_servers else f"is unknown to {name}"
            raise ValueError(f"{CONFIG_KEY}: {written(key)} {why}; a request may give {', '.join(sorted(known))}")
    if name == server.policy_name:
        # A preset stands for both taus.
        replaced = (*ELASTIC_KEYS, *(TAUS if "preset" in own else ()))
        options = {key: value for key, value in server.options.items() if key not in replaced}
    elif name in policy_names() and not server.is_elastic:
        options = {"prefill": server.prefill}
        if server.decode in policy_class(name).decodes:
            options["decode"] = server.decode
            if EVERY_KEY in server.options:
                options[EVERY_KEY] = server.options[EVERY_KEY]
    else:
        options = {}
    if elastic:
        options = {key: value for key, value in options.items() if key not in ("decode", EVERY_KEY, "prefill")}
        options |= {key: server.options[key] for key in elastic if key in server.options}
        if server.options.get("decode") == "off":
            options["decode"] = "off"
    return settings | {CONFIG_KEY: options | own}


def _refuse_costly(server: KVEvictionConfig, config: KVEvictionConfig) -> None:
    """A request must not take more of what it shares with others than the server's settings or the defaults do."""
    default = KVEvictionConfig(config.policy_name, config.budget, {"prefill": config.prefill}).policy
    for knob in COSTLY_KNOBS:
        value = getattr(config.policy, knob, 0)
        most = max(getattr(policy, knob, 0) for policy in (server.policy, default))
        if value > most:
            raise ValueError(f"{CONFIG_KEY}: {knob} of a request may be {most} at most, not {value}: ask for less")
    observed = getattr(config.policy, "observe", 0)
    densest = min(filter(None, (getattr(policy, "observe", 0) for policy in (server.policy, default))), default=0)
    if observed and not 0 < densest <= observed:
        allowed = f"0, or at least {densest}" if densest else "0, as the server's is"
        raise ValueError(f"{CONFIG_KEY}: observe of a request may be {allowed}, not {observed}")


def parse_flag(key: str, value: Any) -> bool:
    """Reads a yes or no as people write it: ``true``, ``"yes"``, ``"1"``, ``1``, ``"on"`` and their opposites.

    Raises:
        ValueError: one sentence that names ``key`` and the fix.
    """
    text = (value if isinstance(value, str) else shown(value)).strip().lower()
    if text in ("true", "yes", "on", "1", "1.0"):
        return True
    if text in ("false", "no", "off", "0", "0.0", "", "none"):
        return False
    raise ValueError(f"{key} {shown(value)} is neither yes nor no: give true or false")
