"""``CPU_ATTN`` with eviction."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, CPUAttentionMetadata

from cake_vllm.integration.patching import wrap
from cake_vllm.integration.worker.attention import EvictingBackend, EvictingImpl, Rows, is_quantized
from cake_vllm.kernels import BlockLayout


class EvictingCPUImpl(EvictingImpl, CPUAttentionBackendImpl):
    """CPU attention that shows its keys to the worker half."""

    @property
    def quantized_dtype(self) -> torch.dtype | None:
        """See the base class."""
        return cpu_quantized_dtype(self.kv_cache_dtype)

    def block_layout(self, layer: Any, block_size: int) -> BlockLayout:
        """Asks the kernel that writes the cache; see :func:`probe_block_layout`."""
        return probe_block_layout(block_size, self.head_size, layer.dtype, layer.isa, self.kv_cache_dtype)

    def with_rows(
        self, layer: Any, metadata: CPUAttentionMetadata, rows: Rows, table: torch.Tensor, seq_lens: torch.Tensor
    ) -> CPUAttentionMetadata:
        """See the base class."""
        return self._planned(
            layer,
            replace(
                metadata,
                block_table=table,
                seq_lens=seq_lens,
                query_start_loc=rows.query_start_loc,
                num_actual_tokens=rows.num_queries,
                max_query_len=rows.longest,
            ),
        )

    def with_lengths(self, layer: Any, metadata: CPUAttentionMetadata, seq_lens: torch.Tensor) -> CPUAttentionMetadata:
        """See the base class."""
        return self._planned(layer, replace(metadata, seq_lens=seq_lens))

    def _planned(self, layer: Any, metadata: CPUAttentionMetadata) -> CPUAttentionMetadata:
        """The kernel's work division depends on the lengths."""
        metadata.scheduler_metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(metadata.seq_lens),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            seq_lens=metadata.seq_lens,
            dtype=layer.dtype,
            query_start_loc=metadata.query_start_loc,
            causal=metadata.causal,
            sliding_window_size=self.sliding_window,
            isa=layer.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            dynamic_causal=metadata.dynamic_causal,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        return metadata


class EvictingCPUBackend(EvictingBackend, CPUAttentionBackend):  # type: ignore[misc]
    """Takes the place of ``CPU_ATTN``; without eviction it is the stock backend."""

    stock_impl = CPUAttentionBackendImpl
    evicting_impl = EvictingCPUImpl


def clear_whole_blocks() -> None:
    """Lets vLLM's CPU runner clear new blocks of attention beside states, and not pages that are numbered like them.

    Called by worker processes with eviction: without it vLLM never shows CPU kernels parts of a block.
    """
    # There is no such runner on other platforms.
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    wrap(CPUModelRunner, "_zero_block_ids", _zero_block_ids)


def _zero_block_ids(original: Callable[..., None], runner: Any, block_ids: list[int]) -> None:
    from cake_vllm.integration.scheduler.spec import EvictableSpec

    specs = [group.kv_cache_spec for group in runner.kv_cache_config.kv_cache_groups]
    # Layers of full attention have one spec.
    per_block = next((spec.block_size // spec.page_size for spec in specs if isinstance(spec, EvictableSpec)), 1)
    original(runner, [block * per_block + part for block in block_ids for part in range(per_block)])


def cpu_quantized_dtype(kv_cache_dtype: str) -> torch.dtype | None:
    """What CPU kernels store as bytes under vLLM's name for it; ``None``: nothing."""
    if not is_quantized(kv_cache_dtype):
        return None
    return torch.float8_e5m2 if kv_cache_dtype == "fp8_e5m2" else torch.float8_e4m3fn


@lru_cache
def probe_block_layout(
    block_size: int, head_size: int, dtype: torch.dtype, isa: str, kv_cache_dtype: str
) -> BlockLayout:
    """Finds out where the CPU kernels put each element, by letting them write one block of known numbers.

    The order differs by instruction set (keys transposed; pairs of channels side by side for AMX; …). Numbers are
    written in digits of base 8, which every float type holds exactly, those of eight bits included.

    Args:
        block_size: positions.
        head_size: ``D``.
        dtype: the model's.
        isa: vLLM's name of the kernels.
        kv_cache_dtype: vLLM's name of what they store.
    """
    num_elements, quantized = block_size * head_size, cpu_quantized_dtype(kv_cache_dtype)
    number = torch.arange(num_elements).view(block_size, 1, head_size)
    found = torch.zeros(2, num_elements, dtype=torch.int64)
    power = 1
    while power < num_elements:
        cache = torch.zeros(1, 1, 2 * block_size, head_size, dtype=torch.uint8 if quantized else dtype)
        keys, values = cache.chunk(2, dim=2)
        digit = (number // power % 8).to(dtype)
        slots = torch.arange(block_size)
        ops.cpu_attn_reshape_and_cache(digit, digit, keys, values, slots, isa, 1.0, 1.0, kv_cache_dtype)
        found += power * cache.view(quantized or dtype).view(2, num_elements).float().long()
        power *= 8
    place = found.argsort(dim=1).view(2, block_size, head_size)
    assert torch.equal(found.sort(dim=1).values, torch.arange(num_elements).expand(2, -1)), (
        f"the CPU kernels ({isa}, {dtype}, {kv_cache_dtype}, block size {block_size}) do not store keys and values as "
        "plain elements"
    )
    return BlockLayout(key_index=place[0], value_index=place[1] + num_elements)
