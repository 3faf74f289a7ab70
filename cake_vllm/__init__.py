"""KV-cache eviction for stock vLLM: ``vllm serve MODEL --kv-eviction cake``.

vLLM imports this module in every process, whether or not eviction is used. It therefore imports nothing of vLLM itself:
a plugin module that fails to import is logged and skipped, and vLLM would then serve without eviction.
"""

import functools
import logging
from typing import Any

__version__ = "0.2.0"

#: vLLM releases that this version was tested with: ``MIN_VLLM <= version < BELOW_VLLM``.
MIN_VLLM = "0.32"
BELOW_VLLM = "0.34"


@functools.cache
def register() -> None:
    """Entry point of ``vllm.general_plugins``. On a vLLM that it does not fit it warns and stands aside."""
    try:
        from cake_vllm.integration.front.gate import enter
    except Exception as error:
        # Without the gate there are no flags: vLLM itself refuses them.
        logging.getLogger("vllm.cake_vllm").warning(
            "cake_vllm stands aside, --kv-eviction cannot be used with this vLLM: %s: %s", type(error).__name__, error
        )
    else:
        enter()


def __getattr__(name: str) -> Any:
    """``from cake_vllm import LLM`` is vLLM's own class, with the plugin loaded before its arguments are read."""
    if name == "LLM":
        register()
        from vllm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
