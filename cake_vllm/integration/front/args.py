"""The flags ``--kv-eviction*`` of vLLM's engine arguments, and the same names as keyword arguments of ``LLM``."""

import argparse
import functools
from collections.abc import Callable, Mapping
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

from cake_vllm.config import (
    AUTO,
    BUDGET_KEY,
    CONFIG_KEY,
    DEFAULT_BUDGET,
    KEYS,
    OFF,
    POLICY_KEY,
    WITH_GATES,
    WITHOUT_GATES,
    KVEvictionConfig,
    argument,
    flag,
    parse_budget,
    parse_options,
)
from cake_vllm.integration.patching import wrap
from cake_vllm.policies import policy_names


def install_args(stand_aside: Callable[[str], None]) -> None:
    """Wraps the engine arguments' constructors and command line (ledger: ``patches/README.md``).

    Args:
        stand_aside: takes the reason why there are no flags, if they cannot be made.
    """
    wrap(EngineArgs, "add_cli_args", functools.partial(_add_cli_args, stand_aside))
    wrap(EngineArgs, "from_cli_args", _from_cli_args)
    # Dataclasses: each class has a generated constructor of its own.
    wrap(EngineArgs, "__init__", _init)
    wrap(AsyncEngineArgs, "__init__", _init)


def _add_cli_args(
    stand_aside: Callable[[str], None], original: Callable[..., Any], parser: argparse.ArgumentParser
) -> argparse.ArgumentParser:
    parser = original(parser)
    try:
        _add_flags(parser)
    except (argparse.ArgumentError, ValueError) as error:
        # A flag that vLLM has by itself, or policies of other packages that contradict these.
        stand_aside(str(error))
    return parser


def _add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        title="KVEviction",
        description="Evict the KV cache of long prompts, each layer to its own budget (plugin cake_vllm).",
    )
    group.add_argument(
        flag(POLICY_KEY),
        choices=(OFF, AUTO, *policy_names()),
        default=argparse.SUPPRESS,
        help=f"Eviction policy; {OFF}, the default, leaves vLLM as it is, and {AUTO} chooses one: {WITH_GATES} if "
        f"there are gates of the model, else {WITHOUT_GATES}.",
    )
    group.add_argument(
        flag(BUDGET_KEY),
        type=argument(parse_budget),
        default=argparse.SUPPRESS,
        metavar="N|F|auto",
        help="A whole number is the mean number of tokens that a layer keeps of a request, the window included; a "
        "fraction in (0, 1] is a share of the prompt; auto keeps prompts whole until memory is short. "
        f"Default {DEFAULT_BUDGET}.",
    )
    group.add_argument(
        flag(CONFIG_KEY),
        type=argument(parse_options),
        default=argparse.SUPPRESS,
        metavar="JSON",
        help='A JSON object, such as \'{"window": 32, "gamma": 200}\': the knobs of the policy; prefill, exact or '
        "progressive; decode, off, window or cake, for the eviction of generated tokens; and with the budget auto "
        "min_tokens and max_tokens, tokens or fractions of the prompt, and recent_tokens, tokens of the output.",
    )


def _from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    engine_args = original(cls, args)
    given = {key: getattr(args, key) for key in KEYS if hasattr(args, key)}
    if given:
        engine_args.additional_config = merge_settings(engine_args.additional_config, given)
        # With several API servers, each makes its engine arguments of these before it has loaded any plugin.
        args.additional_config = engine_args.additional_config
    return engine_args


def _init(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    given = {key: kwargs.pop(key) for key in KEYS if key in kwargs}
    original(self, *args, **kwargs)
    settings = getattr(self, "additional_config", None)
    if given or settings:
        self.additional_config = merge_settings(settings, given)


def merge_settings(additional_config: Any, given: Mapping[str, Any]) -> Any:
    """Adds flags or keyword arguments to ``additional_config`` and validates the result.

    Raises:
        ValueError: if both set a key to different values, or the settings are bad.
    """
    if not isinstance(additional_config, dict):
        if given:
            raise ValueError(f"{flag(POLICY_KEY)} needs --additional-config to be a JSON object, not another object")
        return additional_config
    for key, value in given.items():
        if additional_config.get(key, value) != value:
            raise ValueError(f"{flag(key)} contradicts the key {key!r} of --additional-config: give one of them")
    given = {key: value for key, value in given.items() if value not in (None, OFF)}
    merged = {**additional_config, **given} if given else additional_config
    KVEvictionConfig.from_settings(merged)
    return merged
