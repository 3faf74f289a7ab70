"""The block manager while eviction is on, and the check that no block is lost."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    ChunkedLocalAttentionManager,
    FullAttentionManager,
    MambaManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.request import Request

from cake_vllm.integration.patching import wrap
from cake_vllm.integration.scheduler.promises import Promise, Promises, num_shared


class ExactPrefixManager(SingleTypeKVCacheManager):
    """Mixin: what was computed from an evicted cache never enters the prefix cache.

    Attributes:
        exact_len: by request, the length up to which its tokens were computed from everything before them.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.exact_len: dict[str, int] = {}

    def cache_blocks(self, request: Request, num_tokens: int, *args, **kwargs) -> None:
        """See the base class; called for every request in every step, mostly with nothing to enter.

        What is exact was entered in the step that computed it: blocks may be given back or rewritten since.
        """
        request_id = request.request_id
        if num_tokens > self.exact_len.get(request_id, num_tokens):
            return
        is_known = num_tokens // self.block_size <= self.num_cached_block.get(request_id, 0)
        if not (is_known and self.block_size == self.block_pool.hash_block_size):
            super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """See the base class."""
        self.exact_len.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


class ExactSlidingWindowManager(ExactPrefixManager, SlidingWindowManager):
    """A sliding-window layer beside evictable ones."""


class ExactChunkedManager(ExactPrefixManager, ChunkedLocalAttentionManager):
    """A layer beside them that attends within chunks."""


@dataclass
class Owned:
    """What a request that is or will be evicted has beside its row.

    Attributes:
        columns: private blocks, taken from the pool or from the row, and read in place of the row's first ones.
        num_traded: leading blocks of the row that they stand for; null blocks lie in their place.
    """

    columns: list[KVCacheBlock] = field(default_factory=list)
    num_traded: int = 0


class EvictingManager(ExactPrefixManager, FullAttentionManager):
    """Full attention whose requests may trade the full blocks of their row for fewer private ones.

    The logical row of a request keeps its length: blocks that were given back are null blocks in it, as under a
    sliding window. Its private columns are kept beside the row and leave with it, so that finish, abort and preemption
    return them without knowing of them.

    Attributes:
        cuts: by request that was evicted, what it has beside its row.
        promises: columns for evictions at the end of the step that vLLM is putting together.
        evicts_after: given a request's id and the first and the last token of a chunk, half-open: how many columns the
            eviction takes that comes after it, beside those that the request has, and how long the request is then.
            No columns if there is none.
        on_freed: told the id of a request whose blocks are freed: it has ended, or starts again.
    """

    def __init__(self, kv_cache_spec: Any, **kwargs):
        kwargs["max_admission_blocks_per_request"] = kv_cache_spec.max_request_blocks
        super().__init__(kv_cache_spec, **kwargs)
        self.cuts: dict[str, Owned] = {}
        self.promises = Promises(self.block_pool.get_new_blocks)
        self.evicts_after: Callable[[str, int, int], tuple[int, int]] = lambda *_: (0, 0)
        self.on_freed: Callable[[str], None] = lambda _: None
        # Of the request that vLLM is about to give blocks to: columns, the blocks of its row that are its own, and what
        # it hits.
        self._asked: tuple[int, slice, Sequence[KVCacheBlock]] = (0, slice(0), ())

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """See the base class; with what evictions at the end of the step have to find free."""
        num_blocks = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )
        missing, end = self.evicts_after(request_id, total_computed_tokens, num_tokens_main_model)
        own = slice(0)
        if missing:
            cut = self.cuts.get(request_id) or Owned()
            # What it hits will be read once more than it is now.
            shared = max(num_shared(self.req_to_blocks.get(request_id, ())), num_shared(new_computed_blocks, 0))
            own = slice(max(shared, cut.num_traded), end // self.block_size)
        self._asked = missing, own, new_computed_blocks
        return num_blocks + self.promises.num_short(missing, own.stop - (own.start or 0), new_computed_blocks)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """See the base class; called with what was asked for last, once there is room for it."""
        (missing, own, hits), self._asked = self._asked, (0, slice(0), ())
        new = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        if missing or hits:
            self.promises.make(request_id, Promise(missing, self.req_to_blocks[request_id][own]), hits)
        return new

    def trade(self, request_id: str, num_blocks: int, columns: Sequence[KVCacheBlock]) -> list[KVCacheBlock]:
        """Private columns for the row's first ``num_blocks`` blocks.

        Args:
            request_id: it has a :class:`Owned`.
            num_blocks: full blocks.
            columns: its private columns from now on, among those that it had and the blocks of its row.

        Returns:
            What it does not need any more, in the order in which it may be overwritten: private columns, which no one
            can hit, and the row from its end, so that the beginning of a prefix is there the longest.
        """
        row, cut = self.req_to_blocks[request_id], self.cuts[request_id]
        given_up = [*cut.columns, *reversed(row[cut.num_traded : num_blocks])]
        row[cut.num_traded : num_blocks] = [self._null_block] * (num_blocks - cut.num_traded)
        stay = {block.block_id for block in columns}
        cut.columns, cut.num_traded = list(columns), num_blocks
        return [block for block in given_up if block.block_id not in stay]

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """See the base class; freed from its end, the list gives up the private columns first."""
        row, cut = super().pop_blocks_for_free(request_id), self.cuts.pop(request_id, None)
        self.on_freed(request_id)
        if promise := self.promises.take(request_id):
            row = row + promise.lent
        return row if cut is None else [block for block in row if not block.is_null] + cut.columns

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """None: cascade attention would read the row and not what takes its place."""
        return 0


#: Attribute of a manager of states: by request, the length up to which it was computed from everything before.
_EXACT_LEN = "kv_eviction_exact_len"


def keep_states_exact(managers: Sequence[SingleTypeKVCacheManager], exact_len: Mapping[str, int]) -> None:
    """Lets no state enter the prefix cache that was computed from an evicted cache.

    A state is of all tokens before it, and the layers that keep one are not built with a spec that a plugin may change.

    Args:
        managers: of all groups of an engine.
        exact_len: see :class:`ExactPrefixManager`.
    """
    for manager in managers:
        if isinstance(manager, MambaManager):
            wrap(MambaManager, "cache_blocks", _cache_states)
            setattr(manager, _EXACT_LEN, exact_len)


def _cache_states(
    original: Callable[..., None], self: MambaManager, request: Request, num_tokens: int, *args: Any, **kwargs: Any
) -> None:
    # Not the states up to there once more: the last of them goes on in its block.
    if num_tokens <= getattr(self, _EXACT_LEN, {}).get(request.request_id, num_tokens):
        original(self, request, num_tokens, *args, **kwargs)


def check_integrity(manager: KVCacheManager, on_the_way: Iterable[KVCacheBlock] = ()) -> None:
    """Checks that every block of the pool is free or owned exactly as often as its reference count says.

    Args:
        manager: between two steps.
        on_the_way: blocks of requests that have left, which vLLM frees when a step that may write to them is over.

    Raises:
        AssertionError: naming the first block that is not.
    """
    owners = Counter(block.block_id for block in on_the_way)
    for group in manager.coordinator.single_type_managers:
        rows = list(group.req_to_blocks.values())
        if isinstance(group, EvictingManager):
            rows += [cut.columns for cut in group.cuts.values()]
        owners.update(block.block_id for row in rows for block in row if not block.is_null)
    pool = manager.block_pool
    for block in pool.blocks:
        if not block.is_null:
            assert block.ref_cnt == owners[block.block_id], (
                f"block {block.block_id} has {block.ref_cnt} references and {owners[block.block_id]} owners"
            )
    free = sum(block.ref_cnt == 0 and not block.is_null for block in pool.blocks)
    assert pool.get_num_free_blocks() == free, f"{free} blocks are unowned, {pool.get_num_free_blocks()} are free"
