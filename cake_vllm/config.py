"""The plugin's settings: three keys, parsed once into one frozen object. Imports no vLLM.

The command line flags, the keyword arguments of ``LLM`` and the keys of ``VllmConfig.additional_config`` are the same
three names. The front-end process validates them and writes them back with the preset that fits the model, so
that every other process reads what was decided once. Under the same names a request may ask for settings of its own.
"""

import argparse
import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

from cake_vllm.policies import Policy, create_policy, knobs, policy_class, policy_names
from cake_vllm.policies.cake import PRESETS

POLICY_KEY = "kv_eviction"
BUDGET_KEY = "kv_eviction_budget"
CONFIG_KEY = "kv_eviction_config"
KEYS = (POLICY_KEY, BUDGET_KEY, CONFIG_KEY)
#: A request's wish to hear what was kept of it.
REPORT_KEY = "kv_eviction_report"
#: What a request may ask for.
REQUEST_KEYS = (*KEYS, REPORT_KEY)
#: The knobs that a preset sets.
TAUS = ("tau1", "tau2")
#: Knobs that cost the server memory or time.
COSTLY_KNOBS = ("window", "pool_kernel")
#: Knobs that name files of the server's.
FILE_KNOBS = ("gates",)

OFF = "none"
AUTO = "auto"
DEFAULT_BUDGET = 1024
#: Options of the budget ``auto``: what a layer keeps of a request however short memory is, and however ample.
FLOOR_KEY, CEILING_KEY = "min_tokens", "max_tokens"
DEFAULT_FLOOR = 256
#: Ways to compute a prompt, the default first: whole and then evicted, or evicted after every chunk.
PREFILLS = ("exact", "progressive")


@dataclass(frozen=True)
class KVEvictionConfig:
    """What to evict and how much to keep.

    Attributes:
        policy_name: a registered policy.
        budget: an int is the mean number of tokens per layer and request, window included (CAKE's ``cache_size``);
            a float in (0, 1] is a fraction of the prompt; ``"auto"`` keeps prompts whole until memory is short.
        options: the policy's knobs as the user gave them, and beside them ``preset`` (see :meth:`resolve`),
            ``decode``, ``prefill`` and, with the budget ``"auto"``, ``min_tokens`` and ``max_tokens``.
    """

    policy_name: str
    budget: int | float | str
    # A dict, left out of the hash so that there is one.
    options: Mapping[str, Any] = field(hash=False)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "KVEvictionConfig | None":
        """Reads the three keys out of a mapping that may hold others; ``None`` when eviction is off.

        Raises:
            ValueError: one sentence that names the flag and the fix.
        """
        name = settings.get(POLICY_KEY) or OFF
        budget, options = settings.get(BUDGET_KEY), settings.get(CONFIG_KEY)
        if name == OFF:
            for key, value in ((BUDGET_KEY, budget), (CONFIG_KEY, options)):
                if value is not None:
                    raise ValueError(f"{flag(key)} has no effect without {flag(POLICY_KEY)}: name a policy or drop it")
            return None
        if name not in policy_names():
            raise ValueError(f"{flag(POLICY_KEY)} {name!r} is unknown: choose {', '.join((OFF, *policy_names()))}")
        config = cls(name, parse_budget(DEFAULT_BUDGET if budget is None else budget), parse_options(options))
        window, first = config.policy.window_size, config.policy.protect.first
        for option, choices in (("decode", config.policy.decodes), ("prefill", PREFILLS)):
            if config.options.get(option, choices[0]) not in choices:
                raise ValueError(
                    f"{flag(CONFIG_KEY)}: {option} {config.options[option]!r} is unknown to {name}: "
                    f"choose {', '.join(choices)}"
                )
        config._check_elastic()
        if isinstance(config.budget, int) and config.budget <= window + first:
            protected = f" and the {first} protected first ones" if first else ""
            raise ValueError(
                f"{flag(BUDGET_KEY)} {config.budget} leaves nothing beside the window of {window} tokens{protected}: "
                f"give more than {window + first}, or a fraction of the prompt such as 0.2"
            )
        if isinstance(config.budget, int) and config.budget < config.policy.least_budget:
            raise ValueError(
                f"{flag(BUDGET_KEY)} {config.budget} is too little for {name}, which keeps no window: "
                f"give {config.policy.least_budget} or more, or a fraction of the prompt such as 0.2"
            )
        return config

    def _check_elastic(self) -> None:
        for key in (FLOOR_KEY, CEILING_KEY):
            if key not in self.options:
                continue
            if not self.is_elastic:
                raise ValueError(f"{flag(CONFIG_KEY)}: {key} has no effect without {flag(BUDGET_KEY)} auto: drop it")
            try:
                is_auto = parse_budget(self.options[key]) == AUTO
            except ValueError:
                is_auto = True
            if is_auto:
                raise ValueError(
                    f"{flag(CONFIG_KEY)}: {key} {self.options[key]!r} is not an amount: give a positive whole number "
                    "of tokens, or a fraction of the prompt above 0 and up to 1.0"
                )
        for option, only in (("decode", "off"), ("prefill", "exact")):
            if self.is_elastic and self.options.get(option, only) != only:
                raise ValueError(
                    f"{flag(CONFIG_KEY)}: {option} {self.options[option]} needs a budget that is known beforehand: "
                    f"drop it, or give {flag(BUDGET_KEY)} a number"
                )

    def for_request(self, asked: Mapping[str, Any] | None, max_model_len: int) -> "KVEvictionConfig | None":
        """What a request gets that asks for settings of its own; ``None`` if it asks for no eviction.

        Its knobs are laid over the server's if the policy is the server's, else over the policy's defaults; ways of
        prefill and decoding are the server's as far as the policy knows them. Equal wishes are parsed once.

        Args:
            asked: its ``vllm_xargs``; keys that are not ours are ignored.
            max_model_len: the longest request, tokens.

        Raises:
            ValueError: one sentence that names the key and the fix.
        """
        wishes = {key: asked[key] for key in KEYS if key in asked} if asked else {}
        if not wishes:
            return self
        return _for_request(self, json.dumps(wishes, sort_keys=True, default=repr), max_model_len)

    def settings(self) -> dict[str, Any]:
        """The three keys, such that :meth:`from_settings` gives this object back; JSON types only."""
        return {POLICY_KEY: self.policy_name, BUDGET_KEY: self.budget, CONFIG_KEY: dict(self.options)}

    @cached_property
    def policy(self) -> Policy:
        """The policy with its knobs set.

        Raises:
            ValueError: for an unknown or bad knob, naming the flag.
        """
        preset_key = ("preset",) if _has_presets(self.policy_name) else ()
        beside = ("decode", "prefill", FLOOR_KEY, CEILING_KEY, *preset_key)
        options = {key: value for key, value in self.options.items() if key not in beside}
        preset = self.options.get("preset") if _has_presets(self.policy_name) else None
        if preset is not None:
            if preset not in PRESETS:
                raise ValueError(f"{flag(CONFIG_KEY)}: unknown preset {preset!r}; choose {', '.join(sorted(PRESETS))}")
            options = dict(zip(TAUS, PRESETS[preset], strict=True)) | options
        if self.is_progressive:
            options = {**policy_class(self.policy_name).when_progressive, **options}
        try:
            return create_policy(self.policy_name, options, beside)
        except ValueError as error:
            raise ValueError(f"{flag(CONFIG_KEY)}: {error}") from None

    @cached_property
    def decode(self) -> str:
        """How generated tokens are evicted; one of :attr:`Policy.decodes`."""
        return self.options.get("decode", "off" if self.is_elastic else self.policy.decodes[0])

    @property
    def is_elastic(self) -> bool:
        """Whether requests are cut when memory is short, and not before."""
        return self.budget == AUTO

    @cached_property
    def num_rescoring(self) -> int:
        """Last queries that have to be at hand whenever a block is full."""
        return self.policy.num_queries if self.decode == "window" else 0

    @cached_property
    def num_watched(self) -> int:
        """Tokens at the end of every block with which a decoding request is looked at."""
        return 0 if self.decode == "off" else max(self.num_rescoring, 1)

    @property
    def prefill(self) -> str:
        """How prompts are evicted; one of :data:`PREFILLS`."""
        return self.options.get("prefill", PREFILLS[0])

    @property
    def is_progressive(self) -> bool:
        """Whether prompts are evicted after every chunk."""
        return self.prefill == "progressive"

    def never_evicted_len(self) -> int:
        """Prompts up to this length are kept whole, and nothing asks for their last queries; in tokens."""
        least = self._amount(FLOOR_KEY, DEFAULT_FLOOR) if self.is_elastic else self.budget
        if not isinstance(least, int) or self.decode == "window":
            return 0
        least = max(least, self.policy.least_budget)
        return next(length for length in range(least, least + 4096) if self.policy.is_evicted(length + 1, least))

    def max_request_tokens(self, max_model_len: int, max_in_flight: int) -> int | None:
        """What a layer holds of a request at most, in the mean over layers; ``None`` where nothing bounds it.

        Args:
            max_model_len: the longest request, tokens.
            max_in_flight: tokens that may be scheduled before the report on an earlier chunk is back.
        """
        if not self.is_progressive or self.decode == "off":
            return None
        return self.tokens(max_model_len) + self.policy.window_size + max_in_flight

    def tokens(self, prompt_len: int) -> int:
        """The budget for a request whose prompt has ``prompt_len`` tokens, in tokens per layer.

        At least the policy's least. Where budgets are elastic, what it keeps while memory is ample.
        """
        if self.is_elastic:
            return max(_of_prompt(self._amount(CEILING_KEY, 1.0), prompt_len), self.least_tokens(prompt_len))
        assert not isinstance(self.budget, str)
        return (
            self.budget
            if isinstance(self.budget, int)
            else max(_of_prompt(self.budget, prompt_len), self.policy.least_budget)
        )

    def least_tokens(self, prompt_len: int) -> int:
        """Where budgets are elastic, what it keeps of its prompt however short memory is; in tokens per layer."""
        return max(_of_prompt(self._amount(FLOOR_KEY, DEFAULT_FLOOR), prompt_len), self.policy.least_budget)

    def _amount(self, key: str, default: int | float) -> int | float:
        amount = parse_budget(self.options.get(key, default))
        assert not isinstance(amount, str)
        return amount

    def resolve(self, model: Any) -> "KVEvictionConfig":
        """Chooses the tau preset for ``model`` where the user chose neither a preset nor taus.

        Args:
            model: a Hugging Face text config, or anything with its attributes.
        """
        if not _has_presets(self.policy_name) or {"preset", *TAUS} & set(self.options):
            return self
        family = model_family(model)
        if family is None:
            return self
        # The official table has two cache sizes; the nearer one on a logarithmic scale.
        small = isinstance(self.budget, int) and self.budget < math.sqrt(128 * 1024)
        preset = f"{family}@{128 if small else 1024}"
        return KVEvictionConfig(self.policy_name, self.budget, {**self.options, "preset": preset})


def _of_prompt(amount: int | float, prompt_len: int) -> int:
    return amount if isinstance(amount, int) else int(Fraction(str(amount)) * prompt_len)


def _has_presets(name: str) -> bool:
    return set(TAUS) <= set(knobs(name))


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
    own = parse_options(wishes.get(CONFIG_KEY))
    elastic = (FLOOR_KEY, CEILING_KEY) if settings[BUDGET_KEY] == AUTO else ()
    if name in policy_names():
        known = {*knobs(name), *(("preset",) if _has_presets(name) else ()), *elastic}.difference(FILE_KNOBS)
        for key in own.keys() - known:
            is_servers = key in ("decode", "prefill", *FILE_KNOBS)
            why = "is for the server to choose" if is_servers else f"is unknown to {name}"
            raise ValueError(f"{CONFIG_KEY}: {key} {why}; a request may give {', '.join(sorted(known))}")
    if name == server.policy_name:
        # A preset stands for both taus.
        replaced = (FLOOR_KEY, CEILING_KEY, *(TAUS if "preset" in own else ()))
        options = {key: value for key, value in server.options.items() if key not in replaced}
    elif name in policy_names() and not server.is_elastic:
        options = {"prefill": server.prefill}
        if server.decode in policy_class(name).decodes:
            options["decode"] = server.decode
    else:
        options = {}
    if elastic:
        options = {key: value for key, value in options.items() if key not in ("decode", "prefill")}
        options |= {key: server.options[key] for key in elastic if key in server.options}
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


def flag(key: str) -> str:
    """The command line flag of a key."""
    return "--" + key.replace("_", "-")


def parse_budget(value: Any) -> int | float | str:
    """Reads a budget: ``"1024"`` or 1024 are tokens, ``"0.2"`` or 0.2 a fraction of the prompt, ``"auto"`` is itself.

    Raises:
        ValueError: one sentence that names the flag and the fix.
    """
    refusal = ValueError(
        f"{flag(BUDGET_KEY)} {value!r} is not a budget: give a positive whole number of tokens, "
        "a fraction of the prompt above 0 and up to 1.0, or auto"
    )
    if value == AUTO:
        return AUTO
    if isinstance(value, str):
        try:
            value = int(value) if value.strip().lstrip("+-").isdigit() else float(value)
        except ValueError:
            raise refusal from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refusal
    if isinstance(value, int) and value > 0:
        return value
    if isinstance(value, float) and 0 < value <= 1:
        return value
    raise refusal


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """``parse`` as a type of ``argparse``, which tells its users what a ``ValueError`` says."""

    def typed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed


def parse_flag(key: str, value: Any) -> bool:
    """Reads a yes or no as people write it: ``true``, ``"yes"``, ``"1"``, ``1``, ``"on"`` and their opposites.

    Raises:
        ValueError: one sentence that names ``key`` and the fix.
    """
    text = str(value).strip().lower()
    if text in ("true", "yes", "on", "1", "1.0"):
        return True
    if text in ("false", "no", "off", "0", "0.0", "", "none"):
        return False
    raise ValueError(f"{key} {value!r} is neither yes nor no: give true or false")


def wishes_of(asked: Mapping[str, Any] | None) -> dict[str, Any]:
    """What among a request's extra arguments is meant for this plugin, misspelt keys included."""
    if not asked:
        return {}
    return {key: value for key, value in asked.items() if key.replace("-", "_").lower().startswith(POLICY_KEY)}


def check_keys(wishes: Mapping[str, Any]) -> None:
    """Refuses keys that nobody reads.

    Raises:
        ValueError: one sentence that names the key and the known ones.
    """
    for key in wishes:
        if key not in REQUEST_KEYS:
            raise ValueError(f"{key} is unknown: a request may give {', '.join(REQUEST_KEYS)}")


def parse_options(value: Any) -> dict[str, Any]:
    """Reads the policy's knobs: a mapping, or the JSON text of one.

    Raises:
        ValueError: one sentence that names the flag and the fix.
    """
    if value is None:
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{flag(CONFIG_KEY)} is not valid JSON ({error}): give an object such as '{{\"gamma\": 200}}'"
            ) from None
    if not isinstance(value, Mapping):
        raise ValueError(f"{flag(CONFIG_KEY)} must be a JSON object such as '{{\"gamma\": 200}}', not {value!r}")
    return dict(value)


def model_family(model: Any) -> str | None:
    """Name of a model in the official tau table, by its Hugging Face config; ``None`` if it is not there."""
    names = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
    return {
        ("llama", 32, 4096, 128256): "llama3.1-8b",
        ("mistral", 32, 4096, 32768): "mistral-0.3-7b",
        ("qwen2", 28, 3584, 152064): "qwen2.5-7b",
        ("llama", 32, 4096, 32000): "llama2-7b",
        ("llama", 40, 5120, 32000): "llama2-13b",
    }.get(tuple(getattr(model, name, None) for name in names))  # type: ignore[arg-type]
