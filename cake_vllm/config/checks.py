"""What settings are refused that can be read: options that do not go together, and budgets that leave nothing."""

from typing import Any

from cake_vllm.config.keys import (
    AUTO,
    BUDGET_KEY,
    CEILING_KEY,
    CONFIG_KEY,
    ELASTIC_KEYS,
    EVERY_KEY,
    FLOOR_KEY,
    PREFILLS,
    RECENT_KEY,
    flag,
    parse_budget,
)
from cake_vllm.policies.parsing import MAX_INT, shown


def refuse(config: Any) -> None:
    """Checks settings.

    Args:
        config: a ``KVEvictionConfig``.

    Raises:
        ValueError: one sentence that names the flag and the fix.
    """
    for option, choices in (("decode", config.policy.decodes), ("prefill", PREFILLS)):
        if config.options.get(option, choices[0]) not in choices:
            raise ValueError(
                f"{flag(CONFIG_KEY)}: {option} {shown(config.options[option])} is unknown to {config.policy_name}: "
                f"choose {', '.join(choices)}"
            )
    _refuse_elastic(config)
    _refuse_every(config)
    _refuse_prompt(config)
    _refuse_budget(config)


def _refuse_elastic(config: Any) -> None:
    for key in ELASTIC_KEYS:
        if key in config.options and not config.is_elastic:
            raise ValueError(f"{flag(CONFIG_KEY)}: {key} has no effect without {flag(BUDGET_KEY)} auto: drop it")
    for key in (FLOOR_KEY, CEILING_KEY):
        if key not in config.options:
            continue
        try:
            is_auto = parse_budget(config.options[key]) == AUTO
        except ValueError:
            is_auto = True
        if is_auto:
            raise ValueError(
                f"{flag(CONFIG_KEY)}: {key} {shown(config.options[key])} is not an amount: give a positive whole "
                f"number of tokens up to {MAX_INT}, or a fraction of the prompt above 0 and up to 1.0"
            )
    if not config.is_elastic:
        return
    for option, ways in (("decode", ("off", "window")), ("prefill", ("exact",)), (EVERY_KEY, ())):
        asked = config.options.get(option)
        if option in config.options and asked not in ways:
            raise ValueError(
                f"{flag(CONFIG_KEY)}: {option} {shown(asked) if option == EVERY_KEY else asked} needs "
                f"a budget that is known beforehand: drop it, or give {flag(BUDGET_KEY)} a number"
            )
    _refuse_recent(config)


def _refuse_recent(config: Any) -> None:
    if RECENT_KEY not in config.options:
        return
    recent = config.options[RECENT_KEY]
    if not config.cuts_outputs:
        raise ValueError(
            f"{flag(CONFIG_KEY)}: {RECENT_KEY} has no effect where generated tokens are not evicted: drop it, or "
            "decode off"
        )
    if isinstance(recent, bool) or not isinstance(recent, int) or not 1 <= recent <= MAX_INT:
        raise ValueError(
            f"{flag(CONFIG_KEY)}: {RECENT_KEY} {shown(recent)} is no number of tokens: give a positive whole number "
            f"up to {MAX_INT}"
        )


def _refuse_every(config: Any) -> None:
    every = config.options.get(EVERY_KEY, 1)
    if isinstance(every, bool) or not isinstance(every, int) or not 1 <= every <= MAX_INT:
        raise ValueError(
            f"{flag(CONFIG_KEY)}: {EVERY_KEY} {shown(every)} is no number of tokens: give a positive whole number "
            f"up to {MAX_INT}"
        )
    if EVERY_KEY in config.options and config.decode == "off":
        raise ValueError(
            f"{flag(CONFIG_KEY)}: {EVERY_KEY} has no effect where generated tokens are not evicted: drop it, or "
            "give decode"
        )


def _refuse_prompt(config: Any) -> None:
    if not config.policy.protect.prompt:
        return
    for is_so, what, fix in (
        (config.is_progressive, "prefill progressive", "drop it"),
        (config.decode == "off" and not config.cuts_outputs, "decode off", "give decode"),
    ):
        if is_so:
            raise ValueError(
                f"{flag(CONFIG_KEY)}: protect.prompt keeps whole prompts and evicts what is generated, which does "
                f"not go with {what}: {fix}, or drop protect.prompt"
            )


def _refuse_budget(config: Any) -> None:
    window, first = config.policy.window_size, config.policy.protect.first
    if isinstance(config.budget, int) and config.budget <= window + first:
        protected = f" and the {first} protected first ones" if first else ""
        raise ValueError(
            f"{flag(BUDGET_KEY)} {config.budget} leaves nothing beside the window of {window} tokens{protected}: "
            f"give more than {window + first}, or a fraction of the prompt such as 0.2"
        )
    if isinstance(config.budget, int) and config.budget < config.policy.least_budget:
        raise ValueError(
            f"{flag(BUDGET_KEY)} {config.budget} is too little for {config.policy_name}, which keeps no window: "
            f"give {config.policy.least_budget} or more, or a fraction of the prompt such as 0.2"
        )
