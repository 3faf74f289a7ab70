"""The block manager of one evictable layer, and the check that no page is lost."""

from collections import Counter, defaultdict

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager


class EvictingManager(FullAttentionManager):
    """Full attention whose requests may trade the full blocks of their prompt for fewer private pages.

    The logical row of a request keeps its length: blocks that were given back are null blocks in it, as under a
    sliding window. Private pages are owned beside the row and leave with it, so that finish, abort and preemption
    return them without knowing of them.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.private_blocks: defaultdict[str, list[KVCacheBlock]] = defaultdict(list)

    def exchange(self, request_id: str, num_blocks: int, pages: list[KVCacheBlock]) -> None:
        """Frees the row's blocks ``[0, num_blocks)``; private ``pages`` hold what is kept of them."""
        self.private_blocks[request_id] = pages
        self._remove_blocks_in_range(request_id, 0, num_blocks)

    def shrink(self, request_id: str, num_blocks: int, num_pages: int) -> None:
        """Keeps the first ``num_pages`` of the private pages and the row's blocks ``[0, num_blocks)``, frees the rest.

        What is kept becomes, or stays, private; the row has null blocks in its place.
        """
        row = self.req_to_blocks[request_id]
        held = self.private_blocks[request_id] + [block for block in row[:num_blocks] if not block.is_null]
        row[:num_blocks] = [self._null_block] * num_blocks
        self.private_blocks[request_id] = held[:num_pages]
        self.block_pool.free_blocks(reversed(held[num_pages:]))

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """See the base class; private pages come first, so that they are reused last."""
        return self.private_blocks.pop(request_id, []) + super().pop_blocks_for_free(request_id)


def check_integrity(manager: KVCacheManager) -> None:
    """Checks that every page of the pool is free or owned exactly as often as its reference count says.

    Raises:
        AssertionError: naming the first page that is not.
    """
    owners: Counter[int] = Counter()
    for group in manager.coordinator.single_type_managers:
        rows = list(group.req_to_blocks.values()) + list(getattr(group, "private_blocks", {}).values())
        owners.update(block.block_id for row in rows for block in row if not block.is_null)
    pool = manager.block_pool
    for block in pool.blocks:
        if not block.is_null:
            assert block.ref_cnt == owners[block.block_id], (
                f"block {block.block_id} has {block.ref_cnt} references and {owners[block.block_id]} owners"
            )
    free = sum(block.ref_cnt == 0 and not block.is_null for block in pool.blocks)
    assert pool.get_num_free_blocks() == free, f"{free} blocks are unowned, {pool.get_num_free_blocks()} are free"
