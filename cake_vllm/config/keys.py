"""The keys of the settings, and how values of theirs are read. Imports no vLLM."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cake_vllm.policies.parsing import MAX_INT, shown, written

POLICY_KEY = "kv_eviction"
BUDGET_KEY = "kv_eviction_budget"
CONFIG_KEY = "kv_eviction_config"
KEYS = (POLICY_KEY, BUDGET_KEY, CONFIG_KEY)
#: The knobs that a preset sets.
TAUS = ("tau1", "tau2")

OFF = "none"
#: A method and a budget that are ours to choose.
AUTO = "auto"
#: The method that is chosen, where a model has gates and where it has none: what answered best when the question came
#: after the eviction, and no worse when it was in the window (``benchmarks/README.md``).
WITH_GATES, WITHOUT_GATES = "gate", "echo"
DEFAULT_BUDGET = 1024
#: Options of the budget ``auto``: what a layer keeps of a prompt however short memory is, and however ample; and how
#: many of the last tokens that were generated stay in any case.
FLOOR_KEY, CEILING_KEY, RECENT_KEY = "min_tokens", "max_tokens", "recent_tokens"
ELASTIC_KEYS = (FLOOR_KEY, CEILING_KEY, RECENT_KEY)
DEFAULT_FLOOR, DEFAULT_RECENT = 256, 256
#: Tokens that a request generates between two evictions of what it generates.
EVERY_KEY = "every"
#: Ways to compute a prompt, the default first: whole and then evicted, or evicted after every chunk.
PREFILLS = ("exact", "progressive")


def flag(key: str) -> str:
    """The command line flag of a key."""
    return "--" + key.replace("_", "-")


def parse_budget(value: Any) -> int | float | str:
    """Reads a budget: ``"1024"`` or 1024 are tokens, ``"0.2"`` or 0.2 a fraction of the prompt, ``"auto"`` is itself.

    Raises:
        ValueError: one sentence that names the flag and the fix.
    """
    refusal = ValueError(
        f"{flag(BUDGET_KEY)} {shown(value)} is not a budget: give a positive whole number of tokens up to {MAX_INT}, "
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
    # Numpy's numbers are Python's own, too, but no message carries them.
    if isinstance(value, int) and 0 < value <= MAX_INT:
        return int(value)
    if isinstance(value, float) and 0 < value <= 1:
        return float(value)
    raise refusal


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """``parse`` as a type of ``argparse``, which tells its users what a ``ValueError`` says."""

    def typed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed


def wishes_of(asked: Mapping[str, Any] | None) -> dict[str, Any]:
    """What in a mapping that others have keys in, too, is meant for this plugin, misspelt keys included."""
    return {key: value for key, value in (asked or {}).items() if _plain(key).startswith("kvevict")}


def _plain(key: Any) -> str:
    return str(key).replace("-", "").replace("_", "").lower()


def check_keys(asked: Mapping[str, Any], known: Sequence[str], who: str) -> None:
    """Refuses keys of ours that nobody reads.

    Raises:
        ValueError: one sentence that names the key and the known ones.
    """
    for key in wishes_of(asked):
        if key not in known:
            raise ValueError(f"{written(key)} is unknown: {who} may give {', '.join(known)}")


def parse_options(value: Any, name: str = flag(CONFIG_KEY)) -> dict[str, Any]:
    """Reads the policy's knobs: a mapping, or the JSON text of one; ``name`` is what messages call it.

    Raises:
        ValueError: one sentence that names the flag and the fix.
    """
    if value is None:
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            # Not only what is malformed: also thousands of digits, or of lists in each other.
            raise ValueError(
                f"{name} is not valid JSON ({error}): give an object such as '{{\"gamma\": 200}}'"
            ) from None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} must be a JSON object such as '{{\"gamma\": 200}}', not {shown(value)}")
    return dict(value)
