"""Eviction policies by name. A policy is imported when it is first asked for."""

import dataclasses
import functools
import importlib
import importlib.metadata
from collections.abc import Mapping, Sequence
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


@functools.cache
def third_party_policies() -> Mapping[str, str]:
    """Policies of other distributions: entry points of the group ``cake_vllm.policies``, by name.

    Raises:
        ValueError: if one has the name of a policy of this package.
    """
    found = {entry.name: entry.value for entry in importlib.metadata.entry_points(group="cake_vllm.policies")}
    for name in found.keys() & _POLICIES.keys():
        raise ValueError(f"the policy name {name!r} of {found[name]} is taken by {_POLICIES[name]}")
    return found


def policy_names() -> tuple[str, ...]:
    """Names of all policies, sorted."""
    return tuple(sorted({*_POLICIES, *third_party_policies()}))


def policy_class(name: str) -> type[Policy]:
    """The class of policy ``name``.

    Raises:
        ValueError: if there is none; the message lists the names.
    """
    path = _POLICIES.get(name) or third_party_policies().get(name)
    if path is None:
        raise ValueError(f"unknown eviction policy {name!r}; choose one of {', '.join(policy_names())}")
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def knobs(name: str) -> dict[str, dataclasses.Field]:
    """The knobs of policy ``name``: its dataclass fields by name."""
    return {field.name: field for field in dataclasses.fields(policy_class(name))}  # type: ignore[arg-type]


def create_policy(name: str, options: Mapping[str, Any], beside: Sequence[str] = ()) -> Policy:
    """Builds policy ``name`` with ``options`` as its knobs.

    Args:
        name: a registered policy.
        options: values of its knobs.
        beside: keys that the caller takes where knobs are given; named with them if ``options`` has an unknown one.

    Raises:
        ValueError: for an unknown name, an unknown knob or a value the policy refuses.
    """
    known = knobs(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"unknown key {unknown[0]!r} for policy {name!r}; known keys: {', '.join(sorted([*known, *beside]))}"
        )
    for key, value in options.items():
        _check_type(key, value, known[key].type)
    return policy_class(name)(**options)


def _check_type(key: str, value: Any, wanted: Any) -> None:
    accepted: tuple[type, ...] = (int, float) if wanted is float else (wanted,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
        raise ValueError(f"{key} must be of type {wanted.__name__}, not {value!r}")
