"""Loads the plugin into vLLMs that it does not fit: ``python misfits.py``; a line of JSON for each of them.

A vLLM that lacks something is this one with that taken away. Each is a fork of one process that has imported vLLM and
not yet the plugin (run it with ``VLLM_PLUGINS=""``).
"""

import contextlib
import io
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine import arg_utils
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends import registry
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import RequestState

import cake_vllm
from cake_vllm import policies

WITH = ["--model", "gpt2", "--kv-eviction", "cake"]
SETTINGS = {"kv_eviction": "cake"}


def without(owner: Any, name: str) -> Callable[[], None]:
    return lambda: delattr(owner, name)


def taken_flag() -> None:
    """A vLLM that has such a flag itself."""
    original = EngineArgs.add_cli_args

    def add_cli_args(parser: Any) -> Any:
        parser.add_argument("--kv-eviction", choices=["lru"])
        return original(parser)

    EngineArgs.add_cli_args = staticmethod(add_cli_args)


MISFITS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "a later version": lambda: setattr(vllm, "__version__", "0.40.0"),
    "a class that was renamed": without(sys.modules[InputProcessor.__module__], "InputProcessor"),
    "a method that was renamed": without(InputProcessor, "process_inputs"),
    "a method that moved to a parent": without(RequestState, "from_new_request"),
    "a module that is gone": lambda: sys.modules.update({registry.__name__: None}),
    "another registry": without(KVConnectorFactory, "_registry"),
    "other arguments": without(AsyncEngineArgs, "__init__"),
    "other classes of arguments": without(arg_utils, "AsyncEngineArgs"),
    "a module of the gate that is gone": lambda: sys.modules.update({"packaging.version": None}),
    "a flag of the same name": taken_flag,
    "a policy whose name is taken": lambda: setattr(
        policies, "third_party_policies", lambda: (_ for _ in ()).throw(ValueError("the policy name 'cake' is taken"))
    ),
}


def outcome(call: Callable[[], Any]) -> str:
    """``"ok"``, or the words of the error."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            call()
    except SystemExit:
        return errors.getvalue().strip().splitlines()[-1]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def parse(line: list[str]) -> EngineArgs:
    return EngineArgs.from_cli_args(EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(line))


def main() -> None:
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vllm.cake_vllm").addHandler(handler)
    # Far enough to tell that the plugin let it pass; a model is not needed.
    EngineArgs.create_engine_config = lambda self, *args, **kwargs: "configured"  # type: ignore[method-assign]
    for name, change in MISFITS.items():
        sys.stdout.flush()
        if os.fork():
            os.wait()
            continue
        change()
        told = {
            "name": name,
            "registers": outcome(cake_vllm.register),
            "unused": outcome(lambda: parse(["--model", "gpt2"]).create_engine_config()),
            "flag": outcome(lambda: parse(WITH).create_engine_config()),
            "settings": outcome(lambda: EngineArgs("gpt2", additional_config=SETTINGS).create_engine_config()),
            "warnings": warnings,
        }
        print("MISFIT " + json.dumps(told), flush=True)
        os._exit(0)


if __name__ == "__main__":
    main()
