"""The command ``cake-vllm``: what to know before serving, what was kept of a prompt, and how gates are made."""

import argparse
import os
import sys
from collections.abc import Sequence

from pydantic import ValidationError

from cake_vllm import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit status."""
    # vLLM reads these when it is imported. Its engine runs in this process, where tools can look into it.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from cake_vllm.tools import calibrate, inspect, plan

    parser = argparse.ArgumentParser("cake-vllm", description="Tools beside vLLM with KV cache eviction.")
    parser.add_argument("--version", action="version", version=f"cake-vllm {__version__}")
    commands = parser.add_subparsers(title="subcommands", required=True, metavar="{plan,inspect,calibrate}")
    for tool in (plan, inspect, calibrate):
        tool.add_command(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"cake-vllm: error: {sentence(error)}", file=sys.stderr)
        return 1
    return 0


def sentence(error: Exception) -> str:
    """What an error says, without the page that pydantic makes of vLLM's."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_context=False)[0]
    said = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ").partition("\n")[0]
    return f"--{str(first['loc'][0]).replace('_', '-')}: {said}" if first["loc"] else said


if __name__ == "__main__":
    sys.exit(main())
