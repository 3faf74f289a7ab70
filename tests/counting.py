"""What a piece of code asks of the device, counted on any device: launches, new memory, and waits for an answer.

And what the scheduler's process holds of requests.
"""

import gc
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {"tolist", "item", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__", "masked_select"}

#: Kernels that are being executed by a reference in torch, whose own operations are nobody's.
_inside = 0


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a reference count as one launch, of its name."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        global _inside
        for mode in Operations.active:
            mode.launches[function.__name__] += 1
        _inside += 1
        try:
            return function(*args, **kwargs)
        finally:
            _inside -= 1

    return run


class Waits(TorchFunctionMode):
    """Counts calls that would wait for a device."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen[func.__name__] += func.__name__ in WAITS and not _inside
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Counts operations that a device would run, by name, and the bytes of the tensors that they make.

    Views are neither; an uninitialized tensor is memory and no launch. An operation that torch composes of others
    behind the dispatcher counts as one.
    """

    active: list["Operations"] = []  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.num_bytes = 0

    def __enter__(self):
        self.active.append(self)
        return super().__enter__()

    def __exit__(self, *error):
        self.active.remove(self)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _inside:
            return func(*args, **(kwargs or {}))
        with self:
            # In inference mode what is made of other operations comes here as a whole.
            results = func.decompose(*args, **(kwargs or {}))
        if results is not NotImplemented:
            return results
        results = func(*args, **(kwargs or {}))
        returned = func._schema.returns
        name = func.overloadpacket.__name__
        aliases = returned[0].alias_info if returned else None
        if name == "_unsafe_view" or (aliases is not None and not aliases.is_write):
            return results
        if "empty" not in name:
            self.launches[name] += 1
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        for leaf in tree_leaves(results):
            if torch.is_tensor(leaf) and leaf.untyped_storage()._cdata not in given:
                self.num_bytes += leaf.untyped_storage().nbytes()
        return results


#: Classes whose objects belong to requests: vLLM's own, and those of the scheduler half.
OF_REQUESTS = ("vllm.v1.request.Request", "tracked.Tracked", "grants.Pending", "cache_manager.Owned")


def living() -> Counter[str]:
    """How many objects of requests are alive in this process, by class."""
    gc.collect()
    names = (f"{type(thing).__module__}.{type(thing).__qualname__}" for thing in gc.get_objects())
    return Counter(name for name in names if name.endswith(OF_REQUESTS))


class Census:
    """An extension of vLLM's worker: a server whose engine and worker share a process tells what lives there."""

    def living(self) -> dict[str, int]:
        return dict(living())
