"""Eviction policies by name. A policy is imported when it is first asked for."""

import functools
import importlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

from cake_vllm.policies.base import LayerInputs, LayerScore, Policy, Protect
from cake_vllm.policies.paging import PagedPrompt
from cake_vllm.policies.parsing import parse_knob, parts_of, shown
from cake_vllm.policies.parts import merged_ranks

__all__ = [
    "LayerInputs",
    "LayerScore",
    "PagedPrompt",
    "Policy",
    "Protect",
    "create_policy",
    "knobs",
    "merged_ranks",
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
    "rkv": "cake_vllm.policies.rkv:RKV",
    "snapkv": "cake_vllm.policies.snapkv:SnapKV",
    "streamingllm": "cake_vllm.policies.streamingllm:StreamingLLM",
    "tova": "cake_vllm.policies.tova:TOVA",
    "triattention": "cake_vllm.policies.triattention:TriAttention",
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


def knobs(name: str) -> dict[str, Any]:
    """The knobs of policy ``name``, its dataclass fields: types by name."""
    return parts_of(policy_class(name))


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
    for key in options:
        if key not in known:
            raise ValueError(
                f"unknown key {shown(key)} for policy {name!r}; known keys: {', '.join(sorted([*known, *beside]))}"
            )
    given = {key: parse_knob(key, value, known[key]) for key, value in options.items()}
    try:
        return policy_class(name)(**given)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"policy {name!r} cannot be made of {shown(given)}: {type(error).__name__}: {error}"
        ) from error
