"""The command ``cake-vllm``: what to know before serving, what was kept of a prompt, and how gates are made."""

import argparse
import os
import sys
from collections.abc import Sequence

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
        # Of vLLM's errors, pydantic's come with lines of context.
        print(f"cake-vllm: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
