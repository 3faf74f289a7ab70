"""One layer's attention of evicted requests against other implementations on the same kept tokens."""

import importlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from latency import Engine

#: ``(queries [N, H, D], keys, values: N of [Hkv, n, D], scale)`` to a call without arguments that gives ``[N, H, D]``.
Reference = Callable[[torch.Tensor, list[torch.Tensor], list[torch.Tensor], float], Callable[[], torch.Tensor]]


def by_torch(
    queries: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], scale: float
) -> Callable[[], torch.Tensor]:
    """In float32, one sequence after the other."""

    def call() -> torch.Tensor:
        found = []
        for query, key, value in zip(queries, keys, values, strict=True):
            grouped = query.float().view(len(key), -1, query.shape[-1])
            found.append(((grouped @ key.float().mT * scale).softmax(dim=-1) @ value.float()).flatten(0, 1))
        return torch.stack(found)

    return call


def by_flash_attn(
    queries: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], scale: float
) -> Callable[[], torch.Tensor]:
    """``flash_attn_varlen_func`` of the package flash-attn."""
    function = importlib.import_module("flash_attn").flash_attn_varlen_func
    lengths = [key.shape[1] for key in keys]
    key, value = (torch.cat(part, dim=1).transpose(0, 1).contiguous() for part in (keys, values))
    starts = torch.tensor([0, *lengths], device=queries.device).cumsum(0, dtype=torch.int32)
    ones = torch.arange(len(queries) + 1, dtype=torch.int32, device=queries.device)
    return lambda: function(queries, key, value, ones, starts, 1, max(lengths), softmax_scale=scale)


def by_xformers(
    queries: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], scale: float
) -> Callable[[], torch.Tensor]:
    """``memory_efficient_attention`` of the package xformers, with a block-diagonal mask."""
    fmha = importlib.import_module("xformers.ops.fmha")
    bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens([1] * len(queries), [key.shape[1] for key in keys])
    group = queries.shape[1] // len(keys[0])
    key, value = (
        torch.cat(part, dim=1).transpose(0, 1).repeat_interleave(group, dim=1).unsqueeze(0) for part in (keys, values)
    )
    asked = queries.unsqueeze(0)
    return lambda: fmha.memory_efficient_attention(asked, key, value, attn_bias=bias, scale=scale)[0]


REFERENCES: dict[str, Reference] = {"torch": by_torch, "flash-attn": by_flash_attn, "xformers": by_xformers}


class Compared(Engine):
    """An engine whose first layer's attention is done again by others, in a step where all rows were evicted."""

    def compare(self, prompts: list[list[int]], policy: str, repeats: int) -> dict[str, Any]:
        """Seconds of ours and theirs, and the largest difference, by reference; a sentence where it is missing."""
        from cake_vllm.integration.worker.attention import EvictingImpl

        found: dict[str, Any] = {}
        attend = EvictingImpl._attend

        def attending(impl: Any, step: Any, layer: Any, *tensors: Any) -> None:
            attend(impl, step, layer, *tensors)
            if not found and impl.layer_index == 0 and step.index is None:
                ours = partial(attend, impl, step, layer, *tensors)
                found.update(self._references(ours, impl, step, layer, tensors, repeats))

        self.start(prompts, 40, policy)
        EvictingImpl._attend = attending
        try:
            while not found:
                assert self.engine.has_unfinished_requests(), "no step had evicted rows only"
                self.engine.step()
        finally:
            EvictingImpl._attend = attend
        self.stop()
        return found

    def _references(
        self, ours: Callable[[], None], impl: Any, step: Any, layer: Any, tensors: Any, repeats: int
    ) -> dict[str, Any]:
        (rows,), output = step.redirected, tensors[-1]
        grid, layout = step.grid, impl.block_layout(layer, step.grid.page_size)
        table, lengths = rows.tables[0].long(), rows.lengths[0].tolist()
        heads = table.unsqueeze(1) if rows.by_head else torch.stack([grid.heads_of(pages) for pages in table])
        keys, values = (
            [read(grid.cache, pages, length) for pages, length in zip(heads, lengths, strict=True)]
            for read in (layout.read_keys, layout.read_values)
        )
        queries = tensors[0].reshape(len(lengths), -1, tensors[0].shape[-1])
        results: dict[str, Any] = {}
        for name, reference in REFERENCES.items():
            try:
                theirs = reference(queries, keys, values, impl.scale)
            except ModuleNotFoundError:
                results[name] = f"{name} is not installed: pip install --no-build-isolation 'cake-vllm[reference]'"
                continue
            difference = (theirs().float() - output.reshape(queries.shape).float()).abs().max()
            seconds = {"ours": clock(ours, repeats), "theirs": clock(theirs, repeats)}
            results[name] = {"difference": float(difference), **seconds}
        return results


def clock(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each repetition, to the end of the device's work."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]
