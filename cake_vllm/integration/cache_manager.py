"""The block managers while eviction is on, and the check that no page is lost."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain, zip_longest
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

from cake_vllm.integration.messages import Grant


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


class Cut:
    """What a request that was evicted has beside its rows.

    Attributes:
        rows: by layer, the logical row.
        pages: by layer, the request's own pages, which it reads first; ``None`` where nothing was cut.
        num_traded: by layer, leading blocks of the row that these stand for; null blocks lie in their place.
        lent: pages that were granted and not yet dealt out, oldest grant first.
    """

    def __init__(self, rows: list[list[KVCacheBlock]]):
        self.rows = rows
        self.pages: list[list[KVCacheBlock] | None] = [None] * len(rows)
        self.num_traded = [0] * len(rows)
        self.lent: list[KVCacheBlock] = []
        # What the last call of `shrink` was told, and the layers that it cut.
        self._last: tuple[Sequence[int | None], int] = ((), 0)
        self._last_cut: list[tuple[int, list[KVCacheBlock], list[KVCacheBlock]]] = []

    def shrink(
        self, grant: Grant, pages: Sequence[int | None], num_blocks: int, null_block: KVCacheBlock
    ) -> tuple[list[KVCacheBlock], list[KVCacheBlock]]:
        """Replaces what the layers read by fewer pages: first lent ones, then the last of what they read before.

        Nothing is copied that stays: with 80 layers, touching every page of a request is what costs time here.

        Args:
            grant: the oldest that was not dealt out.
            pages: how many of them each layer has then; ``None`` where nothing changes.
            num_blocks: how many blocks of its row, from the beginning, they stand for.
            null_block: what comes into the row.

        Returns:
            What the layers give up, beginnings of rows first, and what is left of the lent pages.
        """
        lent = self.lent[: len(grant.lent)]
        del self.lent[: len(grant.lent)]
        last, self._last = self._last, (pages, num_blocks)
        if last == (pages, num_blocks - 1):
            return self._take_turns(num_blocks - 1, null_block), lent
        self._last_cut.clear()
        given_up, num_dealt = [], 0
        for layer, num_pages in enumerate(pages):
            if num_pages is None:
                continue
            row, held, start = self.rows[layer], self.pages[layer], self.num_traded[layer]
            is_cut = held is not None
            held = self.pages[layer] = held or []
            held += row[start:num_blocks]
            row[start:num_blocks] = [null_block] * (num_blocks - start)
            self.num_traded[layer] = num_blocks
            num_copied = grant.num_copied(num_pages, len(held), is_cut)
            num_given_up = len(held) - (num_pages - num_copied)
            given_up.append(held[:num_given_up])
            held[:num_given_up] = lent[num_dealt : num_dealt + num_copied]
            num_dealt += num_copied
            self._last_cut.append((layer, row, held))
        return interleave(given_up), lent[num_dealt:]

    def _take_turns(self, filled: int, null_block: KVCacheBlock) -> list[KVCacheBlock]:
        """The usual case of decoding: in every layer that was cut, the block just filled for the oldest page."""
        given_up = []
        for layer, row, held in self._last_cut:
            held.append(row[filled])
            given_up.append(held.pop(0))
            row[filled] = null_block
            self.num_traded[layer] = filled + 1
        return given_up


class EvictingManager(ExactPrefixManager, FullAttentionManager):
    """Full attention whose requests may trade the full blocks of their row for fewer pages of their own.

    The logical row of a request keeps its length: blocks that were given back are null blocks in it, as under a
    sliding window. Its own pages are kept beside the row and leave with it, so that finish, abort and preemption
    return them without knowing of them.

    Attributes:
        cuts: by request that was evicted, what it has beside its rows; in the first layer only.
        columns: by a block of the first layer that was entered into the prefix cache, the blocks of the other layers
            at its positions; in the first layer only.
        layers: the managers of all evictable layers, this one included.
    """

    def __init__(self, kv_cache_spec: Any, **kwargs):
        most = kv_cache_spec.max_request_blocks
        super().__init__(kv_cache_spec, max_admission_blocks_per_request=most, **kwargs)
        self.cuts: dict[str, Cut] = {}
        self.columns: dict[int, Sequence[KVCacheBlock]] = {}
        self.layers: Sequence[EvictingManager] = [self]

    def cache_blocks(self, request: Request, num_tokens: int, *args, **kwargs) -> None:
        """See the base class; the first layer enters its blocks, and they stand for those of the others.

        The others get the very object that is the first one's hash. A pool takes a block's hash away when it hands
        the block out, so a column is whole as long as all its blocks have that object.
        """
        if self is not self.layers[0]:
            return
        request_id = request.request_id
        start = self.num_cached_block.get(request_id, 0)
        super().cache_blocks(request, num_tokens, *args, **kwargs)
        end = self.num_cached_block.get(request_id, 0)
        if start == end:
            return
        for first, *others in zip(*(layer.req_to_blocks[request_id][start:end] for layer in self.layers), strict=True):
            assert first.block_hash is not None
            for block in others:
                block.set_block_hash(first.block_hash, first.block_hash_num_tokens)
            self.columns[first.block_id] = others
        if len(self.columns) * len(self.layers) > 2 * self.block_pool.num_gpu_blocks:
            blocks = self.block_pool.blocks
            self.columns = {key: others for key, others in self.columns.items() if self.is_whole(blocks[key])}

    def is_whole(self, first: KVCacheBlock) -> bool:
        """Whether no block in the column of this block of the first layer was handed out again."""
        block_hash, others = first.block_hash, self.columns.get(first.block_id)
        if block_hash is None or others is None:
            return False
        return all(other.block_hash is block_hash for other in others)

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

        The first layer is asked for all of them, and with all but the last token of the prompt, which is how it knows
        where the window begins.
        """
        if max_length + 1 > kv_cache_spec.never_evicted_len:
            max_length = max(max_length + 1 - kv_cache_spec.num_queries, 0)
        return super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, *args, **kwargs
        )

    def cut(self, request_id: str) -> Cut:
        """What the request has beside its rows; asked of the first layer, when the request is evicted."""
        if request_id not in self.cuts:
            self.cuts[request_id] = Cut([layer.req_to_blocks[request_id] for layer in self.layers])
        return self.cuts[request_id]

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """See the base class; gives the blocks of all evictable layers at once.

        Freed from its end, the list gives up the pages that no one can hit and then the row's tails, layer by layer:
        a prefix is hit as far as all layers have it.
        """
        rows = [super(EvictingManager, layer).pop_blocks_for_free(request_id) for layer in self.layers]
        cut = self.cuts.pop(request_id, None)
        if cut is None:
            return interleave(rows)
        start = min(cut.num_traded)
        return interleave([row[start:] for row in rows]) + list(chain(cut.lent, *filter(None, cut.pages)))

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """None: cascade attention would read the row and not what takes its place."""
        return 0


def num_shared(row: Sequence[KVCacheBlock]) -> int:
    """How many leading blocks of a row other requests may read too."""
    return next((index for index in range(len(row), 0, -1) if row[index - 1].ref_cnt > 1), 0)


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
            rows += [row for cut in group.cuts.values() for row in (cut.lent, *filter(None, cut.pages))]
        owners.update(block.block_id for row in rows for block in row if not block.is_null)
    pool = manager.block_pool
    for block in pool.blocks:
        if not block.is_null:
            assert block.ref_cnt == owners[block.block_id], (
                f"block {block.block_id} has {block.ref_cnt} references and {owners[block.block_id]} owners"
            )
    free = sum(block.ref_cnt == 0 and not block.is_null for block in pool.blocks)
    assert pool.get_num_free_blocks() == free, f"{free} blocks are unowned, {pool.get_num_free_blocks()} are free"
