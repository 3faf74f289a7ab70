"""The KV cache spec of evictable layers: vLLM's own, with a block manager of ours and what that has to know."""

from dataclasses import dataclass
from typing import Self

from vllm.config import VllmConfig
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from cake_vllm.integration.engine import BACKENDS
from cake_vllm.integration.scheduler.cache_manager import (
    EvictingManager,
    ExactChunkedManager,
    ExactSlidingWindowManager,
)
from cake_vllm.kernels import page_of

# vLLM fills an empty registry only: registering first would leave its own specs without managers.
register_all_kvcache_specs(None)


@register_kv_cache_spec(manager_class=ExactSlidingWindowManager, uniform_type_base_spec=SlidingWindowSpec)
@dataclass(frozen=True, kw_only=True)
class ExactSlidingWindowSpec(SlidingWindowSpec):
    """A sliding window beside evictable layers: what it computes of an evicted request is not cached either."""


@register_kv_cache_spec(manager_class=ExactChunkedManager, uniform_type_base_spec=ChunkedLocalAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class ExactChunkedSpec(ChunkedLocalAttentionSpec):
    """The same of layers that attend within chunks of a request."""


@register_kv_cache_spec(manager_class=EvictingManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class EvictableSpec(FullAttentionSpec):
    """Full attention whose requests may trade the full blocks of their row for private columns.

    Attributes:
        max_request_tokens: what a layer holds of a request at most, in the mean; ``None``: everything.
        kernel_block_size: tokens of the smallest block that the layer's kernels take.
    """

    max_request_tokens: int | None = None
    kernel_block_size: int = 1

    @property
    def page_size(self) -> int:
        """Tokens of a page, in which private columns are dealt out: vLLM cuts its blocks for the kernels."""
        return page_of(self.block_size, self.kernel_block_size)

    @property
    def max_request_blocks(self) -> int | None:
        """:attr:`max_request_tokens` in blocks: columns are rounded up twice, and the last block is a partial one."""
        if self.max_request_tokens is None:
            return None
        return -(-self.max_request_tokens // self.block_size) + 3

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """What one request of the model's length needs at most; vLLM asks when it sizes the pool."""
        everything = super().max_memory_usage_bytes(vllm_config)
        blocks = self.max_request_blocks
        return everything if blocks is None else min(everything, blocks * self.page_size_bytes)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Merges the specs of a group's layers, which are equal; vLLM's own forgets fields that it does not know."""
        assert all(spec == specs[0] for spec in specs), "evictable layers of one group have one spec"
        return specs[0]


@register_kv_cache_spec(manager_class=EvictingManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class EvictableLatentSpec(EvictableSpec, MLAAttentionSpec):
    """The same of latent attention, which keeps one vector of a token for all heads."""

    # There are no values beside it; the spec of full attention, which comes first, would say that they are keys' size.
    head_size_v: int = 0


def evictable_groups(kv_cache_config: KVCacheConfig) -> list[int]:
    """Ids of the groups of evictable layers; several where vLLM splits them beside sliding-window layers.

    Raises:
        RuntimeError: if there is none; the engine would serve without eviction.
    """
    groups = enumerate(kv_cache_config.kv_cache_groups)
    found = [group_id for group_id, group in groups if isinstance(group.kv_cache_spec, EvictableSpec)]
    if not found:
        raise RuntimeError(
            "--kv-eviction found no layer to evict from: this model has no full-attention layer, its layers have "
            f"KV caches of different shapes, or vLLM chose an attention backend other than {', '.join(BACKENDS)} "
            "(set --attention-backend)"
        )
    return found
