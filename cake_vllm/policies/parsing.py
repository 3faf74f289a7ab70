"""What a knob may be set to: what settings can say, messages carry and float32 tensors be multiplied with."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

#: Whole numbers beyond it are no amount of tokens, and overflow where they meet others.
MAX_INT = 2**31 - 1
#: Float32 ends at 3.4e38: products of two such numbers can still be summed over heads and positions.
MAX_FLOAT = 1e15
#: Characters of a value that a message shows.
SHOWN = 80


def shown(value: Any) -> str:
    """A value in a message: its ``repr``, cut short; values that have none by their type."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        # A number of thousands of digits, or thousands of lists in each other.
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def written(key: Any) -> str:
    """A key in a message: as it is written, where that can be shown."""
    text = shown(key)
    return key if text == f"'{key}'" else text


def parts_of(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields by name."""
    types = typing.get_type_hints(cls)
    return {field.name: types[field.name] for field in dataclasses.fields(cls)}


def parse_knob(key: str, value: Any, wanted: Any) -> Any:
    """A knob's value; of a knob with parts a mapping of these. A whole number is a float where one is wanted.

    Raises:
        ValueError: one sentence with the key, if it is of another type, has an unknown part, or is a number that
            nothing can be computed with.
    """
    if isinstance(wanted, type) and dataclasses.is_dataclass(wanted) and isinstance(value, Mapping):
        parts = parts_of(wanted)
        for name in value:
            if name not in parts:
                raise ValueError(f"unknown key {shown(name)} in {key}; known keys: {', '.join(sorted(parts))}")
        return wanted(**{name: parse_knob(f"{key}.{name}", part, parts[name]) for name, part in value.items()})
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) <= MAX_FLOAT else math.inf
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        name = "object" if dataclasses.is_dataclass(wanted) else getattr(wanted, "__name__", wanted)
        raise ValueError(f"{key} must be of type {name}, not {shown(value)}")
    if isinstance(value, float) and not abs(value) <= MAX_FLOAT:
        raise ValueError(f"{key} must be a finite number, at most {MAX_FLOAT:g} in size, not {value}")
    if isinstance(value, int) and abs(value) > MAX_INT:
        raise ValueError(f"{key} must be a whole number, at most {MAX_INT} in size, not {shown(value)}")
    if isinstance(value, str) and not value.isprintable():
        raise ValueError(f"{key} must be printable text, not {shown(value)}")
    return value
