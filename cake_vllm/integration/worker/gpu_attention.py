"""``FLASH_ATTN`` and ``TRITON_ATTN`` with eviction, and their kin for values that are not as long as keys."""

from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl
from vllm.v1.attention.backends.flash_attn_diffkv import FlashAttentionDiffKVBackend, FlashAttentionDiffKVImpl
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl
from vllm.v1.attention.backends.triton_attn_diffkv import TritonAttentionDiffKVBackend, TritonAttentionDiffKVImpl
from vllm.v1.kv_cache_interface import KVCacheLayout

from cake_vllm.integration.worker.attention import EvictingBackend, EvictingImpl, Rows
from cake_vllm.kernels import BlockLayout

#: Where rows of a batch, or its queries, attend to a picture in both directions, by backend.
PICTURES = ("mm_prefix_range_tensor", "mm_prefix_query_range_tensor")


class HeadMajorImpl(EvictingImpl):
    """For caches of shape ``[num_blocks, Hkv, B, D + Dv]``, a slot's key and value side by side."""

    def block_layout(self, layer: Any, block_size: int) -> BlockLayout:
        """See the base class."""
        return side_by_side(block_size, self.head_size, layer.head_size_v, layer.kv_cache.device)

    def with_rows(self, layer: Any, metadata: Any, rows: Rows, table: torch.Tensor, seq_lens: torch.Tensor) -> Any:
        """See the base class."""
        # Evicted rows hold pictures that were read before: none of their queries looks ahead inside of one.
        ranges = {name: None for name in PICTURES if hasattr(metadata, name)}
        return replace(
            self.with_lengths(layer, metadata, seq_lens),
            **ranges,
            block_table=table,
            query_start_loc=rows.query_start_loc,
            num_actual_tokens=rows.num_queries,
            max_query_len=rows.longest,
            max_seq_len=table.shape[1] * layer.kv_cache.shape[2],
        )

    def with_lengths(self, layer: Any, metadata: Any, seq_lens: torch.Tensor) -> Any:
        """See the base class; a schedule computed ahead for other lengths is dropped, kernels then make their own."""
        return replace(metadata, seq_lens=seq_lens, scheduler_metadata=None)


class HeadMajorBackend(EvictingBackend):
    """Asks for a layout in which a KV head's part of a block is contiguous."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...] | None:
        """The head-major layout while eviction is on, else what the stock backend says."""
        return (KVCacheLayout.LBHNC,) if cls._spec_fields is not None else super().supported_kv_cache_layouts()  # type: ignore[misc]


class EvictingFlashImpl(HeadMajorImpl, FlashAttentionImpl):
    """FlashAttention that shows its keys to the worker half."""


class EvictingFlashBackend(HeadMajorBackend, FlashAttentionBackend):  # type: ignore[misc]
    """Takes the place of ``FLASH_ATTN``; without eviction it is the stock backend."""

    stock_impl = FlashAttentionImpl
    evicting_impl = EvictingFlashImpl


class EvictingTritonImpl(HeadMajorImpl, TritonAttentionImpl):
    """Triton attention that shows its keys to the worker half."""


class EvictingTritonBackend(HeadMajorBackend, TritonAttentionBackend):  # type: ignore[misc]
    """Takes the place of ``TRITON_ATTN``; without eviction it is the stock backend."""

    stock_impl = TritonAttentionImpl
    evicting_impl = EvictingTritonImpl


class UnequalBackend(HeadMajorBackend):
    """For values of another size than keys, which is a class attribute in vLLM."""

    stock_backend: ClassVar[Any]
    head_size_v: int

    @classmethod
    def set_head_size_v(cls, head_size_v: int) -> None:
        """Also of the stock class, which its implementation asks."""
        cls.head_size_v = cls.stock_backend.head_size_v = head_size_v


class EvictingFlashUnequalImpl(HeadMajorImpl, FlashAttentionDiffKVImpl):
    """The same of FlashAttention with values of another size."""


class EvictingFlashUnequalBackend(UnequalBackend, FlashAttentionDiffKVBackend):  # type: ignore[misc]
    """Takes the place of ``FLASH_ATTN_DIFFKV``; without eviction it is the stock backend."""

    stock_backend = FlashAttentionDiffKVBackend
    stock_impl = FlashAttentionDiffKVImpl
    evicting_impl = EvictingFlashUnequalImpl


class EvictingTritonUnequalImpl(HeadMajorImpl, TritonAttentionDiffKVImpl):
    """The same of Triton attention."""


class EvictingTritonUnequalBackend(UnequalBackend, TritonAttentionDiffKVBackend):  # type: ignore[misc]
    """Takes the place of ``TRITON_ATTN_DIFFKV``; without eviction it is the stock backend."""

    stock_backend = TritonAttentionDiffKVBackend
    stock_impl = TritonAttentionDiffKVImpl
    evicting_impl = EvictingTritonUnequalImpl


@lru_cache
def side_by_side(block_size: int, key_size: int, value_size: int, device: torch.device) -> BlockLayout:
    """Slot after slot, each its key and then its value."""
    size = key_size + value_size
    place = torch.arange(block_size * size, device=device).view(block_size, size)
    return BlockLayout(key_index=place[:, :key_size], value_index=place[:, key_size:])
