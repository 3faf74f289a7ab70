"""The one way in which this plugin changes a vLLM function at run time. See ``patches/README.md`` for the ledger."""

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm.logger import init_logger

logger = init_logger("vllm.cake_vllm.patching")

_MARK = "__cake_vllm_original__"


def wrap(owner: type | ModuleType, name: str, wrapper: Callable[..., Any]) -> None:
    """Replaces ``owner.name``, of a class or a module, by a function that calls ``wrapper(original, *args, **kwargs)``.

    Static and class methods stay what they are (a class method's ``original`` takes the class first). Wrapping the
    same attribute again does nothing, so that plugins may be loaded repeatedly.

    Raises:
        RuntimeError: if ``owner`` does not define ``name`` itself: this vLLM is not the one the wrapper was written
            for.
    """
    if name not in vars(owner):
        raise RuntimeError(f"{owner.__name__} has no {name} of its own to wrap: cake_vllm does not fit this vLLM")
    raw = inspect.getattr_static(owner, name)
    original = raw.__func__ if isinstance(raw, staticmethod | classmethod) else raw
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(replacement, _MARK, original)
    setattr(owner, name, type(raw)(replacement) if isinstance(raw, staticmethod | classmethod) else replacement)
    logger.debug("wrapped %s.%s", owner.__name__, name)
