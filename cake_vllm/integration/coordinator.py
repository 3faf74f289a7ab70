"""One block manager answers for all evictable layers.

vLLM asks the manager of every KV cache group for every request at every step. Evictable layers are groups of their
own, but their logical rows have one length: whether a request needs a block, or has blocks to enter into the prefix
cache, is the same in all of them. The first layer is asked, and the answer is multiplied; only where blocks change
hands, once in a block's worth of steps, the layers are gone through. The prefix cache knows the first layer's blocks,
which lead to those of the others at the same positions. (No hook of vLLM reaches the coordinator: see
``patches/README.md``.)
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.core import kv_cache_manager
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator, KVCacheCoordinator
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request

from cake_vllm.integration.cache_manager import EvictingManager
from cake_vllm.integration.patching import wrap


class LayerwiseCoordinator(KVCacheCoordinator):
    """Mixin for vLLM's coordinators; put it first among the bases."""

    @functools.cached_property
    def _layers(self) -> list[EvictingManager]:
        return [manager for manager in self.single_type_managers if isinstance(manager, EvictingManager)]

    @functools.cached_property
    def _others(self) -> list[SingleTypeKVCacheManager]:
        return [manager for manager in self.single_type_managers if not isinstance(manager, EvictingManager)]

    @functools.cached_property
    def _no_blocks(self) -> tuple[Sequence[KVCacheBlock], ...]:
        return tuple(() for _ in self.single_type_managers)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: tuple[Sequence[KVCacheBlock], ...],
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        """See the base class. A new request may hit blocks that are free in one layer and in use in another."""
        first = self._layers[0]
        if self._others or new_computed_blocks[0]:
            kwargs["apply_admission_cap"] = apply_admission_cap
            return super().get_num_blocks_to_allocate(request_id, num_tokens, new_computed_blocks, *args, **kwargs)
        needed = -(-num_tokens // first.block_size)
        if apply_admission_cap and first.max_admission_blocks_per_request is not None:
            needed = min(needed, first.max_admission_blocks_per_request)
        return max(needed - len(first.req_to_blocks.get(request_id, ())), 0) * len(self._layers)

    def allocate_new_blocks(  # type: ignore[override]
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> tuple[Sequence[KVCacheBlock], ...]:
        """See the base class; one call to the pool for all layers."""
        layers, first = self._layers, self._layers[0]
        if self._others or first.records_new_block_ids or request_id in first._partial_hit_reqs:
            return super().allocate_new_blocks(request_id, num_tokens, *args, **kwargs)
        count = -(-num_tokens // first.block_size) - len(first.req_to_blocks[request_id])
        if count <= 0:
            return self._no_blocks
        blocks = self.block_pool.get_new_blocks(count * len(layers))
        # While decoding it is one block for each.
        rows = [[b] for b in blocks] if count == 1 else [blocks[index :: len(layers)] for index in range(len(layers))]
        for layer, row in zip(layers, rows, strict=True):
            layer.req_to_blocks[request_id].extend(row)
        return tuple(rows)

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """See the base class; nothing to do until another block is full, and then the first layer does it."""
        first = self._layers[0]
        if self._others:
            super().cache_blocks(request, num_computed_tokens)
        elif first.enable_caching:
            num_full_blocks = first.num_exact(request.request_id, num_computed_tokens) // first.block_size
            if first.num_cached_block.get(request.request_id, 0) < num_full_blocks:
                first.cache_blocks(request, num_computed_tokens, replay_boundaries=())

    def find_longest_cache_hit(
        self, block_hashes: list[BlockHash], max_cache_hit_length: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], int, int]:
        """See the base class, which knows the first layer's blocks only; hits that are not whole are forgotten."""
        first = self._layers[0]
        while True:
            answer = super().find_longest_cache_hit(block_hashes, max_cache_hit_length)  # type: ignore[safe-super]
            hits = answer[0]
            found = hits[first.kv_cache_group_id]
            if broken := {block.block_id for block in found if not first.is_whole(block)}:
                self.block_pool.evict_blocks(broken)
                continue
            columns = [first.columns[block.block_id] for block in found]
            for index, layer in enumerate(self._layers[1:]):
                hits[layer.kv_cache_group_id].extend(column[index] for column in columns)
            return answer

    def remove_skipped_blocks(self, *args: Any, **kwargs: Any) -> None:
        """See the base class; full attention skips nothing."""
        for manager in self._others:
            manager.remove_skipped_blocks(*args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """See the base class; the first layer gives the blocks of all."""
        blocks = self._layers[0].pop_blocks_for_free(request_id)
        for manager in self._others:
            blocks.extend(manager.pop_blocks_for_free(request_id))
        return blocks

    def free(self, request_id: str) -> None:
        """See the base class."""
        self._layers[0].free(request_id)
        for manager in self._others:
            manager.free(request_id)


def customize(coordinator: KVCacheCoordinator) -> KVCacheCoordinator:
    """Introduces evictable layers to each other, and gives their complete coordinator the methods above. Repeatable."""
    has_layers = any(isinstance(manager, EvictingManager) for manager in coordinator.single_type_managers)
    if has_layers and not isinstance(coordinator, LayerwiseCoordinator):
        coordinator.__class__ = _layerwise(type(coordinator))
        assert isinstance(coordinator, LayerwiseCoordinator)
        for layer in coordinator._layers:
            layer.layers = coordinator._layers
        if isinstance(coordinator, HybridKVCacheCoordinator):
            others = {layer.kv_cache_group_id for layer in coordinator._layers[1:]}
            coordinator.attention_groups = [
                group for group in coordinator.attention_groups if others.isdisjoint(group.group_ids)
            ]
    return coordinator


def install_coordinator() -> None:
    """Has every coordinator customized, by vLLM itself if it is patched to do so. Repeatable."""
    if not hasattr(KVCacheSpec, "customize_coordinator"):
        wrap(kv_cache_manager, "get_kv_cache_coordinator", _get_kv_cache_coordinator)


def _get_kv_cache_coordinator(original: Callable[..., KVCacheCoordinator], *args: Any, **kwargs: Any) -> Any:
    return customize(original(*args, **kwargs))


@functools.cache
def _layerwise(base: type[KVCacheCoordinator]) -> type[KVCacheCoordinator]:
    return type(f"Layerwise{base.__name__}", (LayerwiseCoordinator, base), {})
