"""The plugin's settings: three keys, parsed once into one frozen object. Imports no vLLM.

The command line flags, the keyword arguments of ``LLM`` and the keys of ``VllmConfig.additional_config`` are the same
three names. The front-end process validates them and writes them back with the preset that fits the model, so
that every other process reads what was decided once.
"""

import bisect
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

from cake_vllm.config.checks import refuse
from cake_vllm.config.keys import (
    AUTO,
    BUDGET_KEY,
    CEILING_KEY,
    CONFIG_KEY,
    DEFAULT_BUDGET,
    DEFAULT_FLOOR,
    DEFAULT_RECENT,
    ELASTIC_KEYS,
    EVERY_KEY,
    FLOOR_KEY,
    KEYS,
    OFF,
    POLICY_KEY,
    PREFILLS,
    RECENT_KEY,
    TAUS,
    WITH_GATES,
    WITHOUT_GATES,
    check_keys,
    flag,
    parse_budget,
    parse_options,
)
from cake_vllm.policies import Policy, create_policy, knobs, policy_class, policy_names
from cake_vllm.policies.cake import PRESETS
from cake_vllm.policies.parsing import MAX_INT, shown


@dataclass(frozen=True)
class KVEvictionConfig:
    """What to evict and how much to keep.

    Attributes:
        policy_name: a registered policy.
        budget: an int is the mean number of tokens per layer and request, window included (CAKE's ``cache_size``);
            a float in (0, 1] is a fraction of the prompt; ``"auto"`` keeps prompts whole until memory is short.
        options: the policy's knobs as the user gave them, and beside them ``preset`` (see :meth:`resolve`),
            ``decode``, ``every``, ``prefill`` and, with the budget ``"auto"``, ``min_tokens``, ``max_tokens`` and
            ``recent_tokens``.
    """

    policy_name: str
    budget: int | float | str
    # A dict, left out of the hash so that there is one.
    options: Mapping[str, Any] = field(hash=False)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], has_gates: bool = False) -> "KVEvictionConfig | None":
        """Reads the three keys out of a mapping that may hold others; ``None`` when eviction is off.

        Args:
            settings: the mapping.
            has_gates: whether the model has gates, if that is known already.

        Raises:
            ValueError: one sentence that names the flag and the fix.
        """
        check_keys(settings, KEYS, "--additional-config")
        name = OFF if settings.get(POLICY_KEY) is None else settings[POLICY_KEY]
        budget, options = settings.get(BUDGET_KEY), settings.get(CONFIG_KEY)
        if name == OFF:
            for key, value in ((BUDGET_KEY, budget), (CONFIG_KEY, options)):
                if value is not None:
                    raise ValueError(
                        f"{flag(key)} has no effect without {flag(POLICY_KEY)}: name a policy or {AUTO}, or drop it"
                    )
            return None
        if name == AUTO:
            name = WITH_GATES if has_gates else WITHOUT_GATES
        if name not in policy_names():
            known = ", ".join((OFF, AUTO, *policy_names()))
            raise ValueError(f"{flag(POLICY_KEY)} {shown(name)} is unknown: choose {known}")
        config = cls(str(name), parse_budget(DEFAULT_BUDGET if budget is None else budget), parse_options(options))
        refuse(config)
        return config

    def beside(self, prompt_len: int) -> "KVEvictionConfig":
        """The settings of a request whose prompt has ``prompt_len`` tokens: if these are to stay, they are protected
        and the budget comes beside them. Where budgets are elastic there is none, and cuts leave prompts alone.
        """
        if not self.policy.protect.prompt or self.is_elastic:
            return self
        protect = {**dataclasses.asdict(self.policy.protect), "first": prompt_len}
        options = {**self.options, "protect": protect}
        return KVEvictionConfig(self.policy_name, prompt_len + self.tokens(prompt_len), options)

    def settings(self) -> dict[str, Any]:
        """The three keys, such that :meth:`from_settings` gives this object back; JSON types only."""
        return {POLICY_KEY: self.policy_name, BUDGET_KEY: self.budget, CONFIG_KEY: dict(self.options)}

    @cached_property
    def policy(self) -> Policy:
        """The policy with its knobs set.

        Raises:
            ValueError: for an unknown or bad knob, naming the flag.
        """
        preset_key = ("preset",) if has_presets(self.policy_name) else ()
        beside = ("decode", EVERY_KEY, "prefill", *ELASTIC_KEYS, *preset_key)
        options = {key: value for key, value in self.options.items() if key not in beside}
        preset = self.options.get("preset") if has_presets(self.policy_name) else None
        if preset is not None:
            if not isinstance(preset, str) or preset not in PRESETS:
                raise ValueError(
                    f"{flag(CONFIG_KEY)}: unknown preset {shown(preset)}; choose {', '.join(sorted(PRESETS))}"
                )
            options = dict(zip(TAUS, PRESETS[preset], strict=True)) | options
        if self.is_progressive:
            options = {**policy_class(self.policy_name).when_progressive, **options}
        try:
            return create_policy(self.policy_name, options, beside)
        except ValueError as error:
            raise ValueError(f"{flag(CONFIG_KEY)}: {error}") from None

    @cached_property
    def decode(self) -> str:
        """How generated tokens are evicted under a budget that is known; one of :attr:`Policy.decodes`."""
        return "off" if self.is_elastic else self.options.get("decode", self.policy.decodes[0])

    @cached_property
    def cuts_outputs(self) -> bool:
        """Whether requests that are cut give of what they have generated, too."""
        default = "window" if "window" in self.policy.decodes else "off"
        return self.is_elastic and self.options.get("decode", default) != "off"

    @cached_property
    def recent_tokens(self) -> int:
        """The last tokens generated that a cut leaves in any case; at least the policy's window."""
        return max(self.options.get(RECENT_KEY, DEFAULT_RECENT), self.policy.window_size)

    def period(self, block_size: int) -> int:
        """Blocks that a decoding request fills between two evictions; at least one."""
        return -(-self.options.get(EVERY_KEY, 1) // block_size)

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
        if self.policy.protect.prompt:
            return MAX_INT
        least = self._amount(FLOOR_KEY, DEFAULT_FLOOR) if self.is_elastic else self.budget
        if not isinstance(least, int) or self.decode == "window":
            return 0
        least = max(least, self.policy.least_budget)
        lengths = range(least, least + 2 * MAX_INT)
        return least + bisect.bisect(lengths, False, key=lambda length: self.policy.is_evicted(length + 1, least))

    def max_request_tokens(self, max_model_len: int, max_in_flight: int) -> int | None:
        """What a layer holds of a request at most, in the mean over layers; ``None`` where nothing bounds it.

        Args:
            max_model_len: the longest request, tokens.
            max_in_flight: tokens that may be scheduled before the report on an earlier chunk is back.
        """
        if not self.is_progressive or self.decode == "off":
            return None
        every = self.options.get(EVERY_KEY, 1)
        return self.tokens(max_model_len) + self.policy.window_size + max_in_flight + every - 1

    def tokens(self, prompt_len: int, num_media: int = 0) -> int:
        """The budget for a request whose prompt has ``prompt_len`` tokens, in tokens per layer.

        At least the policy's least, with ``num_media`` placeholders that stay, unless it is a number. Where budgets are
        elastic, what it keeps while memory is ample.
        """
        if self.is_elastic:
            return max(_of_prompt(self._amount(CEILING_KEY, 1.0), prompt_len), self.least_tokens(prompt_len, num_media))
        assert not isinstance(self.budget, str)
        return (
            self.budget
            if isinstance(self.budget, int)
            else max(_of_prompt(self.budget, prompt_len), self.policy.least_with(num_media))
        )

    def least_tokens(self, prompt_len: int, num_media: int = 0) -> int:
        """Where budgets are elastic, what it keeps of its prompt however short memory is; in tokens per layer."""
        if self.policy.protect.prompt:
            return prompt_len
        return max(_of_prompt(self._amount(FLOOR_KEY, DEFAULT_FLOOR), prompt_len), self.policy.least_with(num_media))

    def check_media(self, num_media: int, length: int, max_model_len: int) -> None:
        """Refuses a request whose budget cannot hold what stands for its pictures, where these are protected.

        Args:
            num_media: how many tokens that are.
            length: up to which the request may grow, tokens.
            max_model_len: the longest request, tokens.

        Raises:
            ValueError: one sentence that names the keys and the fix.
        """
        is_bounded = self.max_request_tokens(max_model_len, 0) is not None
        most = self.tokens(max_model_len) if is_bounded or isinstance(self.budget, int) else length
        needed = self.policy.least_with(num_media)
        if self.policy.protect.media and needed > most and self.policy.is_evicted(length, most):
            other = "" if is_bounded else ", or a fraction of the prompt such as 0.2"
            raise ValueError(
                f"{BUDGET_KEY} {self.budget} is too little for the {num_media} tokens of pictures and other media that "
                f"protect.media keeps: it must be {needed} tokens or more{other}; or set protect.media to false"
            )

    def _amount(self, key: str, default: int | float) -> int | float:
        amount = parse_budget(self.options.get(key, default))
        assert not isinstance(amount, str)
        return amount

    def resolve(self, model: Any) -> "KVEvictionConfig":
        """Chooses the tau preset for ``model`` where the user chose neither a preset nor taus.

        Args:
            model: a Hugging Face text config, or anything with its attributes.
        """
        if not has_presets(self.policy_name) or {"preset", *TAUS} & set(self.options):
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


def has_presets(name: str) -> bool:
    """Whether CAKE's table of taus is for policy ``name``."""
    return set(TAUS) <= set(knobs(name))


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
