"""Eviction policies by name. A policy is imported when it is first asked for."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from cake_vllm.policies.base import LayerInputs, LayerScore, Policy
from cake_vllm.policies.paging import PagedPrompt

__all__ = [
    "LayerInputs",
    "LayerScore",
    "PagedPrompt",
    "Policy",
    "create_policy",
    "knobs",
    "policy_names",
    "register_policy",
]

_POLICIES: dict[str, str] = {
    "adakv": "cake_vllm.policies.adakv:AdaKV",
    "cake": "cake_vllm.policies.cake:Cake",
    "cake-mean": "cake_vllm.policies.cake:CakeMean",
    "cake-uniform": "cake_vllm.policies.cake:CakeUniform",
    "criticaladakv": "cake_vllm.policies.criticalkv:CriticalAdaKV",
    "criticalkv": "cake_vllm.policies.criticalkv:CriticalKV",
    "defensivekv": "cake_vllm.policies.defensivekv:DefensiveKV",
    "keydiff": "cake_vllm.policies.keydiff:KeyDiff",
    "knorm": "cake_vllm.policies.knorm:KNorm",
    "layer-defensivekv": "cake_vllm.policies.defensivekv:LayerDefensiveKV",
    "pyramidkv": "cake_vllm.policies.pyramidkv:PyramidKV",
    "random": "cake_vllm.policies.random:Random",
    "snapkv": "cake_vllm.policies.snapkv:SnapKV",
    "streamingllm": "cake_vllm.policies.streamingllm:StreamingLLM",
    "tova": "cake_vllm.policies.tova:TOVA",
}


def register_policy(name: str, path: str) -> None:
    """Makes ``--kv-eviction name`` mean the class at ``path`` (``module:Class``).

    Raises:
        ValueError: if ``name`` is taken.
    """
    if name in _POLICIES:
        raise ValueError(f"eviction policy {name!r} is already registered as {_POLICIES[name]}")
    _POLICIES[name] = path


def policy_names() -> tuple[str, ...]:
    """Names of all registered policies, sorted."""
    return tuple(sorted(_POLICIES))


def policy_class(name: str) -> type[Policy]:
    """The class registered as ``name``.

    Raises:
        ValueError: if there is none; the message lists the names.
    """
    if name not in _POLICIES:
        raise ValueError(f"unknown eviction policy {name!r}; choose one of {', '.join(policy_names())}")
    module, _, attribute = _POLICIES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def knobs(name: str) -> dict[str, dataclasses.Field]:
    """The knobs of policy ``name``: its dataclass fields by name."""
    return {field.name: field for field in dataclasses.fields(policy_class(name))}  # type: ignore[arg-type]


def create_policy(name: str, options: Mapping[str, Any]) -> Policy:
    """Builds policy ``name`` with ``options`` as its knobs.

    Raises:
        ValueError: for an unknown name, an unknown knob or a value the policy refuses.
    """
    known = knobs(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r} for policy {name!r}; known keys: {', '.join(sorted(known))}")
    for key, value in options.items():
        _check_type(key, value, known[key].type)
    return policy_class(name)(**options)


def _check_type(key: str, value: Any, wanted: Any) -> None:
    accepted: tuple[type, ...] = (int, float) if wanted is float else (wanted,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
        raise ValueError(f"{key} must be of type {wanted.__name__}, not {value!r}")
