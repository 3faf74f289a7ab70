"""What the tools read on their command lines; what ``vllm serve`` takes too has its name and its form there."""

import argparse
import math
import re
from decimal import Decimal

from cake_vllm.config import (
    BUDGET_KEY,
    CONFIG_KEY,
    DEFAULT_BUDGET,
    POLICY_KEY,
    argument,
    flag,
    parse_budget,
    parse_options,
)
from cake_vllm.policies import policy_names
from cake_vllm.policies.parsing import MAX_INT, shown

#: vLLM's own.
UTILIZATION = 0.92


def add_eviction(parser: argparse.ArgumentParser, budgets: str, described: str) -> None:
    """Adds a method, its budget and its knobs, as ``vllm serve`` has them, and the model's dtype."""
    parser.add_argument(flag(POLICY_KEY), choices=policy_names(), default="cake", help="default: %(default)s")
    parser.add_argument(
        flag(BUDGET_KEY),
        type=argument(parse_budget),
        default=DEFAULT_BUDGET,
        metavar=budgets,
        help=f"{described} (default: %(default)s)",
    )
    parser.add_argument(
        flag(CONFIG_KEY),
        type=argument(parse_options),
        default={},
        metavar="JSON",
        help="the method's knobs, as of vllm serve",
    )
    parser.add_argument("--dtype", default="auto", help="as of vllm serve (default: %(default)s)")


def add_memory(parser: argparse.ArgumentParser) -> None:
    """Adds how much memory the tool's engine may take."""
    parser.add_argument(
        "--kv-cache-memory-bytes", type=amount, metavar="N", help="of the KV pool, such as 1G (default: vLLM's)"
    )
    parser.add_argument(
        "--gpu-memory-utilization",
        type=share,
        default=UTILIZATION,
        metavar="F",
        help="as of vllm serve (default: %(default)s)",
    )


def size(text: str) -> int:
    """Bytes of ``80``, ``80GiB``, ``79.6 GiB``, ``512MiB`` or ``80GB``.

    Raises:
        argparse.ArgumentTypeError: if it is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?)?", text.strip(), re.IGNORECASE)
    # Not more than 1 EiB of whatever.
    if not found or not 0 < float(found[1]) <= 2**60:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a size: give a number of GiB, or one such as 512MiB")
    number, unit, binary = found.groups()
    power = "KMGT".index((unit or "G").upper()) + 1
    return int(float(number) * (1024 if binary or not unit else 1000) ** power)


def positive(text: str) -> int:
    """A whole number above 0, of tokens or of what they are counted with; in vLLM's short form, too.

    Raises:
        argparse.ArgumentTypeError: if it is not.
    """
    return _whole(text, MAX_INT)


def amount(text: str) -> int:
    """Bytes as vLLM reads them: ``67108864``, ``64M`` for as many, ``64m`` for 64 million.

    Raises:
        argparse.ArgumentTypeError: if it is not a whole number of them above 0.
    """
    return _whole(text, 2**60)


def _whole(text: str, most: int) -> int:
    plain, binary = (
        re.fullmatch(form, text.strip()) for form in (r"(\d{1,20}(?:\.\d{1,20})?)([kmgt]?)", r"(\d{1,20})([KMGT])")
    )
    value = Decimal(0)
    if binary:
        value = Decimal(binary[1]) * 1024 ** ("KMGT".index(binary[2]) + 1)
    elif plain:
        value = Decimal(plain[1]) * 1000 ** ("kmgt".index(plain[2]) + 1 if plain[2] else 0)
    if value != int(value) or not 0 < value <= most:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not a whole number above 0 and up to {most}, nor one such as 32K or 32k"
        )
    return int(value)


def share(text: str) -> float:
    """A number above 0 and up to 1.

    Raises:
        argparse.ArgumentTypeError: if it is not.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number above 0 and up to 1")
    return value


def readable(memory: int) -> str:
    """A number of bytes as people read it."""
    unit = next((power for power in (3, 2, 1) if memory >= 1024**power), 0)
    return f"{memory / 1024**unit:.4g} {('bytes', 'KiB', 'MiB', 'GiB')[unit]}"
