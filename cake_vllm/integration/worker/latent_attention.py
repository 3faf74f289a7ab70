"""Multi-head latent attention (MLA) with eviction.

A layer keeps one vector of a token, its latent and behind it the turned channels of its key, and all query heads read
it: to a policy it is one KV head, of which the latent is the value. vLLM's layer calls two kernels: prompts as ordinary
heads, everything else as queries that were taken to the latent's space. Evicted rows take the second way, whatever
they compute: each of their queries is a sequence of one token, which any of the kernels takes.
"""

import importlib
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache, lru_cache, partial
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.attention.mla_attention import MLACommonDecodeMetadata, MLACommonMetadata

from cake_vllm.integration.engine import LATENT_BACKENDS
from cake_vllm.integration.patching import wrap
from cake_vllm.integration.worker.attention import EvictingBackend, RedirectedImpl, StepWork
from cake_vllm.kernels import BlockLayout

#: What kernels compute ahead from lengths, or keep beside them; without it they do so when they are called.
SCHEDULES = {
    "scheduler_metadata": None,
    "flattened_block_table": None,
    "flattened_seq_lens": None,
    "flattened_row_req": None,
    "query_len": 0,
}


class EvictingLatentImpl(RedirectedImpl):
    """Mixin for an ``MLAAttentionImpl``; put it first among the bases.

    Attributes:
        decode_metadata: the backend's own class.
    """

    decode_metadata: ClassVar[type[MLACommonDecodeMetadata]]
    kv_lora_rank: int
    head_size: int
    sinks = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        vllm_config = get_current_vllm_config_or_none()
        # For which kernels have set memory aside.
        self._most_rows = vllm_config.scheduler_config.max_num_seqs if vllm_config else 1
        wrap(MLAAttention, "forward_impl", _forward_impl)

    @staticmethod
    def refused(given: dict[str, Any]) -> list[tuple[bool, str]]:
        """See the base class."""
        has_window = given.get("sliding_window") is not None
        return [*RedirectedImpl.refused(given), (has_window, "latent attention with a sliding window")]

    def forward_layer(
        self,
        stock: Callable[..., torch.Tensor],
        query: torch.Tensor,
        latents: torch.Tensor,
        turned: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: Any,
        output: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """vLLM's forward of the layer, with rows that were evicted reading their own pages.

        The stock call covers all rows, as in :meth:`EvictingImpl.forward`; those that compute more than one token read
        blocks there that are not theirs any more, and what comes of it is overwritten.

        Args:
            stock: vLLM's.
            query: ``[T, Hq, D]``, not yet taken to the latents' space.
            latents: ``[T, rank]``, of the new tokens, which have been written.
            turned: ``[T, 1, R]``, the turned channels of their keys.
            kv_cache: ``[N, p, rank + R]``, the layer's.
            metadata: of the step.
            output: ``[T, Hq * V]``.
            kwargs: what else vLLM passes on.
        """
        step = self.work_of(metadata)
        ours = metadata if step is None else step.stock
        if ours is not None:
            stock(query, latents, turned, kv_cache, ours, output=output, **kwargs)
        if step is not None:
            if step.redirected:
                self._attend(step, stock, query, latents, turned, metadata, output)
            if step.observe is not None:
                step.observe(self.layer_index, query)
        return output

    def _attend(
        self,
        step: StepWork,
        stock: Callable[..., torch.Tensor],
        query: torch.Tensor,
        latents: torch.Tensor,
        turned: torch.Tensor,
        metadata: Any,
        output: torch.Tensor,
    ) -> None:
        place = None if step.index is None else step.index[0]
        asked = query if place is None else query[place]
        chosen = output if place is None and step.is_here is None else output.new_empty(len(asked), *output.shape[1:])
        pages, end = step.grid.pages.squeeze(1), 0
        for rows in step.redirected:
            start, end = end, end + rows.num_queries
            table, seq_lens = rows.tables[self.layer_index], rows.lengths[self.layer_index]
            if rows.longest > 1:
                # A sequence for each query, which sees what lies before the next.
                sequence, behind = rows.queries
                table, seq_lens = table[sequence], (seq_lens[sequence] - behind).to(seq_lens.dtype)
            for first in range(0, rows.num_queries, self._most_rows):
                part = slice(first, min(first + self._most_rows, rows.num_queries))
                there = slice(start + part.start, start + part.stop)
                own = self.with_queries(metadata, table[part], seq_lens[part])
                stock(asked[there], latents, turned, pages, own, chosen[there])
        if place is not None:
            output[place] = chosen
        elif step.is_here is not None:
            torch.where(step.is_here.unsqueeze(1), chosen, output, out=output)

    def block_layout(self, layer: Any, block_size: int) -> BlockLayout:
        """See the base class."""
        return latents_in_a_row(block_size, self.head_size, self.kv_lora_rank, layer.kv_cache.device)

    def with_queries(self, metadata: Any, table: torch.Tensor, seq_lens: torch.Tensor) -> Any:
        """A copy of ``metadata`` for sequences of one query that read ``table`` (``[n, C]``) up to ``seq_lens``."""
        count = len(seq_lens)
        starts = torch.arange(count + 1, dtype=torch.int32, device=seq_lens.device)
        given = {
            "block_table": table,
            "seq_lens": seq_lens,
            "dcp_tot_seq_lens": None,
            "query_start_loc": starts,
            "max_query_len": 1,
            "max_seq_len": metadata.max_seq_len,
        }
        names = {field.name for field in fields(self.decode_metadata)}
        decode = self.decode_metadata(**{name: value for name, value in given.items() if name in names})
        return replace(
            metadata,
            num_reqs=count,
            max_query_len=1,
            num_actual_tokens=count,
            query_start_loc=starts,
            num_decodes=count,
            num_decode_tokens=count,
            num_prefills=0,
            prefill=None,
            decode=decode,
        )

    def with_lengths(self, layer: Any, metadata: Any, seq_lens: torch.Tensor) -> Any:
        """See the base class; prompts are computed from what vLLM planned for them on the host."""
        decode = metadata.decode
        if decode is None:
            return metadata
        own = {name: value for name, value in SCHEDULES.items() if hasattr(decode, name)}
        found = replace(metadata, decode=replace(decode, seq_lens=seq_lens[: metadata.num_decodes], **own))
        found.seq_lens, found.block_table = seq_lens, metadata.block_table
        return found


def _forward_impl(original: Callable[..., torch.Tensor], layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    if not isinstance(layer.impl, EvictingLatentImpl):
        return original(layer, *args, **kwargs)
    return layer.impl.forward_layer(partial(original, layer), *args, **kwargs)


class DescribedBatch:
    """Mixin for a builder of metadata: says of all rows what vLLM's says of prompts and of the others apart."""

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> MLACommonMetadata:
        """vLLM's, with the lengths (``[R]``) and tables (``[R, C]``) of its rows."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        metadata.seq_lens = common_attn_metadata.seq_lens
        metadata.block_table = common_attn_metadata.block_table_tensor
        return metadata


class EvictingLatentBackend(EvictingBackend):
    """Mixin for an MLA backend; without eviction it is the stock one."""

    @classmethod
    def get_builder_cls(cls) -> type:
        """See :class:`DescribedBatch`."""
        stock = super().get_builder_cls()  # type: ignore[misc]
        return stock if cls._spec_fields is None else _described(stock)


@cache
def _described(builder: type) -> type:
    return type(f"Evicting{builder.__name__}", (DescribedBatch, builder), {})


@lru_cache
def latents_in_a_row(block_size: int, head_size: int, rank: int, device: torch.device) -> BlockLayout:
    """Slot after slot; of a key the first ``rank`` channels are the value."""
    place = torch.arange(block_size * head_size, device=device).view(block_size, head_size)
    return BlockLayout(key_index=place, value_index=place[:, :rank])


def evicting_latent_backend(name: str, stock: type, decode_metadata: type[MLACommonDecodeMetadata]) -> type:
    """The class that takes a stock MLA backend's place."""
    impl = stock.get_impl_cls()  # type: ignore[attr-defined]
    evicting = type(f"Evicting{impl.__name__}", (EvictingLatentImpl, impl), {"decode_metadata": decode_metadata})
    own = {"stock_impl": impl, "evicting_impl": evicting, "__module__": __name__, "__qualname__": name}
    return type(name, (EvictingLatentBackend, stock), own)


@cache
def _backend(name: str) -> type:
    path, backend, decode = LATENT_BACKENDS[name]
    module = importlib.import_module(f"vllm.v1.attention.backends.mla.{path}")
    return evicting_latent_backend(name, getattr(module, backend), getattr(module, decode, MLACommonDecodeMetadata))


def __getattr__(name: str) -> type:
    """Backends by vLLM's names for them, each made when it is asked for: some cannot be imported everywhere."""
    if name in LATENT_BACKENDS:
        return _backend(name)
    raise AttributeError(name)
