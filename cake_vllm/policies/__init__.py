"""Eviction policies by name. A policy is imported when it is first asked for."""

import dataclasses
import functools
import importlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

from cake_vllm.policies.base import LayerInputs, LayerScore, Policy, Protect
from cake_vllm.policies.paging import PagedPrompt

__all__ = [
    "LayerInputs",
    "LayerScore",
    "PagedPrompt",
    "Policy",
    "Protect",
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
    "dropkv": "cake_vllm.policies.dropkv:DropKV",
    "echo": "cake_vllm.policies.echo:Echo",
    "gate": "cake_vllm.policies.gate:Gate",
    "keydiff": "cake_vllm.policies.keydiff:KeyDiff",
    "knorm": "cake_vllm.policies.knorm:KNorm",
    "kvzip": "cake_vllm.policies.kvzip:KVzip",
    "lagkv": "cake_vllm.policies.lagkv:LagKV",
    "layer-defensivekv": "cake_vllm.policies.defensivekv:LayerDefensiveKV",
    "pyramidkv": "cake_vllm.policies.pyramidkv:PyramidKV",
    "random": "cake_vllm.policies.random:Random",
    "restkv": "cake_vllm.policies.restkv:ReSTKV",
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
    return {field.name: field for field in dataclasses.fields(policy_class(name))}


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
    return policy_class(name)(**{key: _parse(key, value, known[key].type) for key, value in options.items()})


def _parse(key: str, value: Any, wanted: Any) -> Any:
    """A knob's value; of a knob with parts a mapping of these.

    Raises:
        ValueError: if it is of another type or has an unknown part.
    """
    if isinstance(wanted, type) and dataclasses.is_dataclass(wanted) and isinstance(value, Mapping):
        parts = {part.name: part.type for part in dataclasses.fields(wanted)}
        for name in value:
            if name not in parts:
                raise ValueError(f"unknown key {name!r} in {key}; known keys: {', '.join(sorted(parts))}")
        return wanted(**{name: _parse(f"{key}.{name}", part, parts[name]) for name, part in value.items()})
    accepted: tuple[type, ...] = (int, float) if wanted is float else (wanted,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
        name = "object" if dataclasses.is_dataclass(wanted) else wanted.__name__
        raise ValueError(f"{key} must be of type {name}, not {value!r}")
    return value
