"""The block managers while eviction is on, and the check that no page is lost."""

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.request import Request


class ExactPrefixManager(SingleTypeKVCacheManager):
    """Mixin: what was computed from an evicted cache never enters the prefix cache.

    Attributes:
        exact_len: by request, the length up to which its tokens were computed from everything before them.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.exact_len: dict[str, int] = {}

    def cache_blocks(self, request: Request, num_tokens: int, *args, **kwargs) -> None:
        """See the base class."""
        super().cache_blocks(request, self.num_exact(request.request_id, num_tokens), *args, **kwargs)

    def num_exact(self, request_id: str, num_tokens: int) -> int:
        """How many of a request's first ``num_tokens`` may enter the prefix cache."""
        return min(num_tokens, self.exact_len.get(request_id, num_tokens))

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """See the base class."""
        self.exact_len.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


class ExactSlidingWindowManager(ExactPrefixManager, SlidingWindowManager):
    """A sliding-window layer beside evictable ones."""


class EvictingManager(ExactPrefixManager, FullAttentionManager):
    """Full attention whose requests may trade the full blocks of their row for fewer pages of their own.

    The logical row of a request keeps its length: blocks that were given back are null blocks in it, as under a
    sliding window. Private pages are owned beside the row and leave with it, so that finish, abort and preemption
    return them without knowing of them.

    Attributes:
        private_blocks: by request that was cut in this layer, its pages.
        lent_blocks: by request, pages that were granted to it and not yet dealt out; in the first layer only.
        layers: the managers of all evictable layers, this one included.
    """

    def __init__(self, kv_cache_spec: Any, **kwargs):
        most = kv_cache_spec.max_request_blocks
        super().__init__(kv_cache_spec, max_admission_blocks_per_request=most, **kwargs)
        self.private_blocks: dict[str, list[KVCacheBlock]] = {}
        self.lent_blocks: dict[str, list[KVCacheBlock]] = {}
        self.layers: Sequence[EvictingManager] = [self]

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: Any,
        *args,
        **kwargs,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """See the base class; a prompt that will be evicted computes at least the window's queries.

        The first layer is asked first and with all but the last token of the prompt, which is how it knows where
        the window begins; the others are asked for no more than it found.
        """
        if kv_cache_spec.layer_index == 0 and max_length + 1 > kv_cache_spec.never_evicted_len:
            max_length = max(max_length + 1 - kv_cache_spec.num_queries, 0)
        return super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, *args, **kwargs
        )

    def num_shared(self, request_id: str, num_blocks: int) -> int:
        """How many leading blocks of the row ``[0, num_blocks)`` other requests may read too."""
        row = self.req_to_blocks[request_id]
        return next((i for i in range(num_blocks, 0, -1) if row[i - 1].ref_cnt > 1), 0)

    def num_held(self, request_id: str, num_blocks: int) -> int:
        """How many full blocks the request reads here: its own pages and the row's blocks ``[0, num_blocks)``."""
        row = self.req_to_blocks[request_id][:num_blocks]
        return len(self.private_blocks.get(request_id, ())) + sum(not block.is_null for block in row)

    def shrink(self, request_id: str, num_blocks: int, lent: list[KVCacheBlock], num_own: int) -> list[KVCacheBlock]:
        """Replaces the request's pages and its row's blocks ``[0, num_blocks)``, and returns what is given up.

        What the request reads then is private: first ``lent``, then the last ``num_own`` of what it read before. The
        row has null blocks in its place.
        """
        row = self.req_to_blocks[request_id]
        held = self.private_blocks.get(request_id, []) + [block for block in row[:num_blocks] if not block.is_null]
        row[:num_blocks] = [self._null_block] * num_blocks
        given_up, own = held[: len(held) - num_own], held[len(held) - num_own :]
        self.private_blocks[request_id] = lent + own
        return given_up

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """See the base class; gives the blocks of all evictable layers at once.

        Freed from its end, the list gives up the pages that no one can hit and then the row's tails, layer by layer:
        a prefix is hit as far as all layers have it.
        """
        rows = [super(EvictingManager, layer).pop_blocks_for_free(request_id) for layer in self.layers]
        private = [block for layer in self.layers for block in layer.private_blocks.pop(request_id, [])]
        return interleave(rows) + private + self.lent_blocks.pop(request_id, [])

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """None: cascade attention would read the row and not what takes its place."""
        return 0


def interleave(rows: Sequence[Sequence[KVCacheBlock]]) -> list[KVCacheBlock]:
    """The first blocks of all rows, then their second ones, and so on; null blocks left out."""
    return [block for column in zip_longest(*rows) for block in column if block is not None and not block.is_null]


def check_integrity(manager: KVCacheManager) -> None:
    """Checks that every page of the pool is free or owned exactly as often as its reference count says.

    Raises:
        AssertionError: naming the first page that is not.
    """
    owners: Counter[int] = Counter()
    for group in manager.coordinator.single_type_managers:
        rows = list(group.req_to_blocks.values())
        if isinstance(group, EvictingManager):
            rows += [*group.private_blocks.values(), *group.lent_blocks.values()]
        owners.update(block.block_id for row in rows for block in row if not block.is_null)
    pool = manager.block_pool
    for block in pool.blocks:
        if not block.is_null:
            assert block.ref_cnt == owners[block.block_id], (
                f"block {block.block_id} has {block.ref_cnt} references and {owners[block.block_id]} owners"
            )
    free = sum(block.ref_cnt == 0 and not block.is_null for block in pool.blocks)
    assert pool.get_num_free_blocks() == free, f"{free} blocks are unowned, {pool.get_num_free_blocks()} are free"
