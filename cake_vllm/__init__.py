"""KV-cache eviction for stock vLLM: ``vllm serve MODEL --kv-eviction cake``.

vLLM imports this module in every process, whether or not eviction is used. It therefore imports nothing itself: a
plugin module that fails to import is logged and skipped, and vLLM would then serve without eviction.
"""

from typing import Any

__version__ = "0.1.0"

#: vLLM releases that this version was tested with: ``MIN_VLLM <= version < BELOW_VLLM``.
MIN_VLLM = "0.32"
BELOW_VLLM = "0.33"


def register() -> None:
    """Entry point of ``vllm.general_plugins``. Repeatable; raises if it cannot do its work."""
    from cake_vllm.integration.front.plugin import install

    install()


def __getattr__(name: str) -> Any:
    """``from cake_vllm import LLM`` is vLLM's own class, with the plugin loaded before its arguments are read."""
    if name == "LLM":
        register()
        from vllm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
