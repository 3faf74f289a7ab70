"""``CPU_ATTN`` with eviction."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, CPUAttentionMetadata
from vllm.v1.worker.block_table import MultiGroupBlockTable, SlotMappingMode

from cake_vllm.integration.attention import EvictingBackend, EvictingImpl
from cake_vllm.integration.patching import wrap
from cake_vllm.kernels import BlockLayout


class EvictingCPUImpl(EvictingImpl, CPUAttentionBackendImpl):
    """CPU attention that shows its keys to the worker half."""

    def block_layout(self, layer: Any, block_size: int) -> BlockLayout:
        """Asks the kernel that writes the cache; see :func:`probe_block_layout`."""
        return probe_block_layout(block_size, self.head_size, layer.kv_cache.dtype, layer.isa)

    def flat_cache(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """``[num_blocks, Hkv, 2 * B * D]``: keys in the first half, values in the second."""
        return kv_cache.flatten(2)

    def with_rows(
        self, layer: Any, metadata: CPUAttentionMetadata, block_table: torch.Tensor, seq_lens: torch.Tensor
    ) -> CPUAttentionMetadata:
        """See the base class; the kernel's work division depends on the lengths and is planned again."""
        plan = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            seq_lens=seq_lens,
            dtype=layer.dtype,
            query_start_loc=metadata.query_start_loc,
            causal=metadata.causal,
            sliding_window_size=self.sliding_window,
            isa=layer.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            dynamic_causal=metadata.dynamic_causal,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        return replace(metadata, block_table=block_table, seq_lens=seq_lens, scheduler_metadata=plan)


class EvictingCPUBackend(EvictingBackend, CPUAttentionBackend):  # type: ignore[misc]
    """Takes the place of ``CPU_ATTN``; without eviction it is the stock backend."""

    stock_impl = CPUAttentionBackendImpl
    evicting_impl = EvictingCPUImpl

    @classmethod
    def get_impl_cls(cls) -> type[Any]:
        """See the base class."""
        impl = super().get_impl_cls()
        if impl is cls.evicting_impl:
            wrap(MultiGroupBlockTable, "compute_slot_mapping", _compute_slot_mapping)
        return impl


def _compute_slot_mapping(
    original: Callable[..., None],
    self: MultiGroupBlockTable,
    num_reqs: int,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Calls the CPU kernel for each group; vLLM's way through a launcher of GPU kernels takes ten times as long."""
    for table in self.block_tables:
        if table.slot_mapping_mode != SlotMappingMode.TOKEN_TO_KV_SLOT:
            continue
        torch.ops._C.compute_slot_mapping_kernel_impl(
            query_start_loc, positions, table.block_table.gpu, table.slot_mapping.gpu, table.block_size
        )


@lru_cache
def probe_block_layout(block_size: int, head_size: int, dtype: torch.dtype, isa: str) -> BlockLayout:
    """Finds out where the CPU kernels put each element, by letting them write one block of known numbers.

    The order differs by instruction set (keys transposed; pairs of channels side by side for AMX; …). Numbers are
    written in digits of base 128, which every float type holds exactly.
    """
    num_elements = block_size * head_size
    number = torch.arange(num_elements).view(block_size, 1, head_size)
    found = torch.zeros(2, num_elements, dtype=torch.int64)
    for power in (1, 128, 128**2):
        cache = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype)
        keys, values = cache.chunk(2, dim=2)
        digit = (number // power % 128).to(dtype)
        slots = torch.arange(block_size)
        ops.cpu_attn_reshape_and_cache(digit, digit, keys, values, slots, isa, 1.0, 1.0, "auto")
        found += power * cache.view(2, num_elements).long()
    place = found.argsort(dim=1).view(2, block_size, head_size)
    assert torch.equal(found.sort(dim=1).values, torch.arange(num_elements).expand(2, -1)), (
        f"the CPU kernels ({isa}, {dtype}, block size {block_size}) do not store keys and values as plain elements"
    )
    return BlockLayout(key_index=place[0], value_index=place[1] + num_elements)
