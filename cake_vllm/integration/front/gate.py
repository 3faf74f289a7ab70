"""The way in: the flags, and one check when an engine is configured. The rest is loaded only behind it.

A plugin that is installed but not used must never be why vLLM does not start. Where it does not fit, because the
version is not supported or something that it builds on is missing, it says so once and stands aside. It remembers why:
whoever asks for eviction then gets an error, never a server without eviction.
"""

import logging
import multiprocessing
from collections.abc import Callable
from typing import Any

import vllm
from packaging.version import Version
from vllm.engine.arg_utils import EngineArgs

from cake_vllm import BELOW_VLLM, MIN_VLLM
from cake_vllm.config import POLICY_KEY, KVEvictionConfig, flag
from cake_vllm.integration.patching import wrap

# Below the name "vllm", so that vLLM's logging configuration applies.
logger = logging.getLogger("vllm.cake_vllm")

#: The plugin's name as ``VLLM_PLUGINS`` has it.
PLUGIN = "cake_vllm"

_failure = ""


def enter() -> None:
    """Makes eviction available in this process. Repeatable, and never raises."""
    try:
        # First, so that whatever else fails, settings that ask for eviction are never ignored.
        wrap(EngineArgs, "create_engine_config", _create_engine_config)
        from cake_vllm.integration.front.args import install_args

        install_args(stand_aside)
        if not is_supported(vllm.__version__):
            stand_aside(f"it needs vLLM >= {MIN_VLLM} and < {BELOW_VLLM}")
            return
        from cake_vllm.integration.front.plugin import install

        install()
    except Exception as error:
        stand_aside(f"{type(error).__name__}: {error}; install vLLM >= {MIN_VLLM} and < {BELOW_VLLM} as released")


def stand_aside(why: str) -> None:
    """Takes the plugin out of service and says so, once among the processes of a server."""
    global _failure
    if not _failure and multiprocessing.parent_process() is None:
        logger.warning(
            "cake_vllm stands aside, %s cannot be used with vLLM %s: %s", flag(POLICY_KEY), vllm.__version__, why
        )
    _failure = _failure or why


def is_supported(version: str) -> bool:
    """Whether this plugin was tested with vLLM ``version``."""
    release = Version(Version(version).base_version)
    return Version(MIN_VLLM) <= release < Version(BELOW_VLLM)


def _create_engine_config(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    settings = getattr(self, "additional_config", None)
    config = KVEvictionConfig.from_settings(settings) if isinstance(settings, dict) else None
    if config is None:
        return original(self, *args, **kwargs)
    _refuse_vllm()
    from cake_vllm.integration.front.plugin import switch_on

    return switch_on(config, original, self, *args, **kwargs)


def _refuse_vllm() -> None:
    """Refuses to evict in a vLLM that does not fit, or some process of which would not load this plugin.

    Raises:
        ValueError: one sentence that says what to change.
    """
    if not is_supported(vllm.__version__):
        raise ValueError(
            f"{flag(POLICY_KEY)} needs vLLM >= {MIN_VLLM} and < {BELOW_VLLM}, and this is {vllm.__version__}: "
            "install a supported vLLM or another release of cake_vllm"
        )
    if _failure:
        raise ValueError(f"{flag(POLICY_KEY)} cannot be used with this vLLM {vllm.__version__}: {_failure}")
    from vllm import envs

    if envs.VLLM_PLUGINS is not None and PLUGIN not in envs.VLLM_PLUGINS:
        raise ValueError(f"VLLM_PLUGINS leaves out {PLUGIN}, which {flag(POLICY_KEY)} needs: add it to the list")
    if envs.VLLM_USE_RUST_FRONTEND:
        # It loads no plugins: requests would reach the engine unchecked.
        raise ValueError(f"{flag(POLICY_KEY)} does not work together with VLLM_USE_RUST_FRONTEND yet: unset it")
