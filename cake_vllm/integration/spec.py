"""A KV cache spec per layer, so that every evictable layer becomes a KV cache group of its own."""

from dataclasses import dataclass
from typing import Self

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from cake_vllm.integration.cache_manager import EvictingManager, ExactSlidingWindowManager
from cake_vllm.integration.coordinator import customize, install_coordinator

# vLLM fills an empty registry only: registering first would leave its own specs without managers.
register_all_kvcache_specs(None)
# Every process that makes block managers for these specs has to import them first.
install_coordinator()


@register_kv_cache_spec(manager_class=ExactSlidingWindowManager)
@dataclass(frozen=True, kw_only=True)
class ExactSlidingWindowSpec(SlidingWindowSpec):
    """A sliding window beside evictable layers: what it computes of an evicted request is not cached either."""


@register_kv_cache_spec(manager_class=EvictingManager)
@dataclass(frozen=True, kw_only=True)
class EvictableSpec(FullAttentionSpec):
    """Full attention whose layer shares its block table with no other layer.

    Attributes:
        layer_index: rank of the layer among the evictable ones of its worker, in model order.
        num_queries: last queries of a prompt that must be computed for its eviction, whatever the prefix cache has.
        never_evicted_len: prompts up to this length need none, tokens.
        max_request_tokens: what the layer holds of a request at most, in the mean over layers; ``None``: everything.
    """

    layer_index: int
    num_queries: int = 0
    never_evicted_len: int = 0
    max_request_tokens: int | None = None

    @property
    def max_request_blocks(self) -> int | None:
        """:attr:`max_request_tokens` in blocks: what is kept is rounded up, and the last block is a partial one."""
        if self.max_request_tokens is None:
            return None
        return -(-self.max_request_tokens // self.block_size) + 2

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """What one request of the model's length needs at most; vLLM asks when it sizes the pool."""
        everything = super().max_memory_usage_bytes(vllm_config)
        blocks = self.max_request_blocks
        return everything if blocks is None else min(everything, blocks * self.page_size_bytes)

    def customize_coordinator(self, coordinator: KVCacheCoordinator) -> KVCacheCoordinator:
        """Called by a vLLM with ``patches/customize_coordinator.patch``; see there."""
        return customize(coordinator)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Merges specs of one layer; specs of different layers refuse, which is what keeps groups apart."""
        assert all(spec == specs[0] for spec in specs), "evictable layers never share a KV cache group"
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Only with itself: vLLM would otherwise put all layers into one group."""
        return all(spec == self for spec in kv_cache_specs.values())


def evictable_groups(kv_cache_config: KVCacheConfig) -> list[int]:
    """Group ids of the evictable layers, in model order.

    Raises:
        RuntimeError: if there is none; the engine would serve without eviction.
    """
    index: dict[int, int] = {}
    for group_id, group in enumerate(kv_cache_config.kv_cache_groups):
        if isinstance(group.kv_cache_spec, EvictableSpec):
            index[group.kv_cache_spec.layer_index] = group_id
    assert list(index) == sorted(index), "prefix lookup counts on groups in model order"
    if not index:
        raise RuntimeError(
            "--kv-eviction found no layer to evict from: this model has no full-attention layer, or vLLM chose an "
            "attention backend other than CPU_ATTN, FLASH_ATTN and TRITON_ATTN (set --attention-backend)"
        )
    return list(index.values())
