"""Leave to evict: lends requests private columns, waits for the worker's report, and frees what they gave up."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput

from cake_vllm.integration.messages import Blocks, Counts, Eviction, Grant, Observation, Redirected
from cake_vllm.integration.metrics import EvictionStats
from cake_vllm.integration.scheduler.cache_manager import (
    EvictingManager,
    ExactPrefixManager,
    Owned,
    keep_states_exact,
)
from cake_vllm.integration.scheduler.drafts import end_of, num_drafts, verified
from cake_vllm.integration.scheduler.outputs import num_taken
from cake_vllm.integration.scheduler.promises import Promise, num_shared
from cake_vllm.integration.scheduler.tracked import Terms, Tracked
from cake_vllm.kernels import budget_for, columns_for

logger = init_logger("vllm.cake_vllm.scheduler")


@dataclass(frozen=True)
class Pending:
    """An eviction that the worker has not reported yet.

    Attributes:
        tracked: the request as it was when the eviction was granted; if it was preempted since, it is another object.
        length: logical length of the request after the step, tokens.
        is_prompt_end: whether its prompt ended with the step.
        is_cut: whether it is because memory is short.
        columns: by group, what the grant names.
        num_lent: how many of these, over all groups, came from the pool with this grant.
        in_place: whether some of them are blocks of its row.
        cut: what the request had beside its row in the first group; if its blocks were freed since, it is gone.
        given: blocks that it is to free because memory is short.
    """

    tracked: Tracked
    length: int
    is_prompt_end: bool
    is_cut: bool
    columns: list[list[KVCacheBlock]]
    num_lent: int
    in_place: bool
    cut: Owned
    given: int


class Grants:
    """The evictions that are under way, and the requests that have private columns by them.

    Attributes:
        stats: what happened since somebody took them.
        managers: of the groups of evictable layers.
    """

    def __init__(self, terms: Terms, manager: KVCacheManager, groups: list[int], tracked: Mapping[str, Tracked]):
        every = manager.coordinator.single_type_managers
        self.stats = EvictionStats.empty()
        self.managers: list[EvictingManager] = [every[group] for group in groups]  # type: ignore[misc]
        self._terms, self._groups, self._pool, self._tracked = terms, groups, manager.block_pool, tracked
        self._num_groups = len(every)
        self._exact: list[ExactPrefixManager] = [group for group in every if isinstance(group, ExactPrefixManager)]
        keep_states_exact(every, self.managers[0].exact_len)
        # Requests whose rows the worker redirects, by whether their owners are KV heads.
        self._redirected: dict[bool, set[str]] = {False: set(), True: set()}
        self._epochs = itertools.count(1)
        # Evictions under way, by epoch.
        self._pending: dict[int, Pending] = {}

    def redirected(self, scheduled: Mapping[str, int]) -> dict[bool, Redirected]:
        """Rows of a step that were evicted in an earlier one; ``scheduled`` are its tokens by request id."""
        return {
            by_head: Redirected(len(new), sum(new), max(new))
            for by_head, names in self._redirected.items()
            if (new := [scheduled[name] for name in names if name in scheduled])
        }

    def grown(self, output: SchedulerOutput) -> dict[str, Blocks]:
        """Blocks that redirected requests were given for a step."""
        cached = output.scheduled_cached_reqs
        given = [(name, ids) for name, ids in zip(cached.req_ids, cached.new_block_ids, strict=True) if ids is not None]
        return {
            name: tuple(tuple(ids[group]) for group in self._groups)
            for name, ids in given
            if name in self._redirected[False] or name in self._redirected[True]
        }

    def observation(
        self, tracked: Tracked, output: SchedulerOutput, grant: Grant | None, is_last: bool, is_noted: bool = False
    ) -> Observation:
        """What the worker is told of a scheduled request; see :class:`Observation`."""
        name, size, drafts = tracked.name, self._terms.block_size, num_drafts(tracked.request, output)
        most, end = end_of(tracked.request, output), verified(tracked.request, output, self._terms.num_drafts)
        row = self.managers[0].req_to_blocks[name][(end + drafts - 1) // size : (most + drafts - 1) // size + 1]
        if grant is not None and not grant.divides:
            end -= end % size
        num_tokens, own = output.num_scheduled_tokens[name] - drafts, self._terms.own(tracked)
        tails = tuple(block.block_id for block in row)
        return Observation(name, end, num_tokens, tails, grant, is_last, own, is_noted, drafts, most - end)

    def grant(
        self,
        tracked: Tracked,
        budget: int,
        output: SchedulerOutput,
        is_prompt_end: bool | None = None,
        prompt_len: int | None = None,
        given: int = 0,
    ) -> Grant | None:
        """Leave to evict a request, and the columns for it.

        Args:
            tracked: the request.
            budget: mean tokens per layer.
            output: the step, at whose end it is evicted.
            is_prompt_end: ``None`` while it decodes, unless it is cut.
            prompt_len: of a request that is cut, see :class:`Grant`.
            given: blocks that it then frees.

        Returns:
            ``None`` if nothing would be freed or, of a cut, if neither the pool nor the request has blocks to write to.
        """
        assert tracked.config is not None
        name, divides = tracked.name, is_prompt_end is not None
        end = verified(tracked.request, output, self._terms.num_drafts)
        num_blocks = end // self._terms.block_size
        missing = self.num_missing(tracked, end, budget, divides)
        found = None if missing is None else self._columns(tracked, num_blocks, missing, output, prompt_len is not None)
        if found is None:
            return None
        columns, num_lent, in_place = found
        if divides:
            # What fits in any case; less than was asked for only if the pool could not lend as much.
            budget = min(budget, budget_for(len(columns[0]), self._terms.block_size, self._terms.page_size))
        if tracked.by_head is None:
            tracked.by_head = divides and tracked.config.policy.selection != "layer"
            self._redirected[tracked.by_head].add(name)
            for group in self._exact:
                group.exact_len[name] = end
        tail = ids(manager.req_to_blocks[name][num_blocks:] for manager in self.managers)
        epoch, by_head = next(self._epochs), tracked.by_head
        grant = Grant(epoch, budget, divides, by_head, ids(columns), tail, prompt_len, tracked.media)
        tracked.num_pending += 1
        cut = self.managers[0].cuts[name]
        self._pending[grant.epoch] = Pending(
            tracked, end, bool(is_prompt_end), prompt_len is not None, columns, num_lent, in_place, cut, given
        )
        return grant

    def num_missing(self, tracked: Tracked, end: int, budget: int, divides: bool) -> int | None:
        """How many private columns an eviction takes in each group beside those that the request has.

        Args:
            tracked: the request.
            end: its length after the step, tokens.
            budget: mean tokens per layer.
            divides: see :class:`Grant`.

        Returns:
            ``None`` if the eviction would free nothing.
        """
        if self._under_way(tracked):
            # What it leaves is not known yet.
            return 0
        size, cut = self._terms.block_size, self.managers[0].cuts.get(tracked.name) or Owned()
        num_held = len(cut.columns)
        needed = columns_for(budget, size, self._terms.page_size) if divides else num_held or -(-budget // size)
        return None if not num_held and needed >= end // size else max(needed - num_held, 0)

    def _under_way(self, tracked: Tracked) -> Pending | None:
        """The last eviction of a request that is not reported yet."""
        if not tracked.num_pending:
            return None
        return next(other for other in reversed(self._pending.values()) if other.tracked is tracked)

    def _columns(
        self, tracked: Tracked, num_blocks: int, missing: int, output: SchedulerOutput, is_cut: bool
    ) -> tuple[list[list[KVCacheBlock]], int, bool] | None:
        """The private columns of an eviction: those that the request has, new ones, or blocks of its own row.

        Returns:
            By group, as many for each; how many come from the pool, and whether some are blocks of the row. ``None`` if
            there are too few for a cut. Others were promised theirs; were that wrong, one request would keep what it
            has, which is counted as a failure.
        """
        name = tracked.name
        if pending := self._under_way(tracked):
            return pending.columns, 0, False
        cuts = [manager.cuts.get(name) or Owned() for manager in self.managers]
        promises = [
            manager.promises.take(name) or _unpromised(manager.req_to_blocks[name][:num_blocks], cut, missing)
            for manager, cut in zip(self.managers, cuts, strict=True)
        ]
        rests = [max(missing - len(promise.lent), 0) for promise in promises]
        own: list[list[KVCacheBlock]] = [[] for _ in promises]
        if any(rests) and sum(rests) + self._next_blocks(output) > self._pool.get_num_free_blocks():
            # The last of them: the beginning of a prefix can be hit as long as nobody else needs its blocks.
            own = [promise.own[-rest:] if rest else [] for promise, rest in zip(promises, rests, strict=True)]
        counts = [rest - len(blocks) for rest, blocks in zip(rests, own, strict=True)]
        if sum(counts) > self._pool.get_num_free_blocks():
            self._pool.free_blocks([block for promise in promises for block in promise.lent])
            if not is_cut:
                self.stats.data["failures"] += 1
            return None
        # Nobody may hit what is about to be overwritten.
        self._pool.evict_blocks({block.block_id for blocks in own for block in blocks})
        more = iter(self._pool.get_new_blocks(sum(counts)))
        columns = []
        for manager, cut, promise, blocks, count in zip(self.managers, cuts, promises, own, counts, strict=True):
            new = [*promise.lent, *itertools.islice(more, count)]
            columns.append([*cut.columns, *blocks, *new])
            cut.columns = cut.columns + new
            manager.cuts[name] = cut
        num_lent = sum(counts) + sum(len(promise.lent) for promise in promises)
        return columns, num_lent, any(own)

    def _next_blocks(self, output: SchedulerOutput) -> int:
        """Blocks that must be left, under asynchronous scheduling what this step's requests may take for the next."""
        limits = self._terms.limits
        if not limits.async_scheduling:
            return 0
        requests = [self._tracked[name].request for name in output.num_scheduled_tokens]
        num_tokens = sum(max(request.num_tokens - end_of(request, output), 1) for request in requests)
        num_tokens = min(num_tokens, limits.max_num_batched_tokens)
        return (num_tokens // self._terms.block_size + len(requests)) * self._num_groups

    @property
    def coming(self) -> int:
        """Blocks that cuts under way will free, of requests whose blocks were not freed since."""
        held = self.managers[0].cuts
        return sum(of.given for of in self._pending.values() if of.cut is held.get(of.tracked.name))

    def give_back(self) -> None:
        """No more evictions in this step but cuts."""
        for manager in self.managers:
            self._pool.free_blocks(manager.promises.take_rest())

    def settle(self, name: str, eviction: Eviction) -> Tracked | None:
        """Frees what a request gave up by the worker's report; of one that left meanwhile there is nothing to free.

        Returns:
            The request as it was when the eviction was granted; ``None`` if that is void.
        """
        pending = self._pending.pop(eviction.epoch, None)
        if pending is None:
            return None
        tracked = pending.tracked
        is_held = pending.cut is self.managers[0].cuts.get(name)
        tracked.num_pending -= 1
        tracked.kept = eviction.kept
        tracked.failed |= eviction.failed
        num_freed = self._trade(name, pending, eviction) if eviction.is_traded and is_held else 0
        prompt_len = pending.length if pending.is_prompt_end else None
        size, in_place = self._terms.block_size, pending.in_place
        taken = 0
        if eviction.is_traded and not pending.is_prompt_end:
            taken = num_taken(tracked, pending.is_cut, fmean(map(fmean, eviction.kept)), pending.length)
        self.stats.record(eviction, num_freed, size, in_place, prompt_len, pending.is_cut, taken)
        logger.debug(
            "evicted request %s at %d tokens%s: layers keep %s tokens, %d columns",
            name,
            pending.length,
            " in place" if in_place else "",
            kept_tokens(eviction.kept),
            eviction.columns,
        )
        return tracked

    def _trade(self, name: str, pending: Pending, eviction: Eviction) -> int:
        """Frees what the request gave up; returns by how many blocks fewer it holds now than before the grant, if any.

        With progressive prefill it may be none: a chunk that fills no block can move a page from one owner to another.
        """
        num_blocks = pending.length // self._terms.block_size
        # A later eviction, already planned, may use any of the columns.
        num_columns = None if pending.tracked.num_pending else eviction.columns
        freed = []
        for manager, columns in zip(self.managers, pending.columns, strict=True):
            freed += manager.trade(name, num_blocks, columns[:num_columns])
        self._pool.free_blocks(freed)
        return max(len(freed) - pending.num_lent, 0)

    def release(self, tracked: Tracked) -> None:
        """A request has left; what is not reported yet will be counted all the same."""
        if tracked.by_head is not None:
            self._redirected[tracked.by_head].discard(tracked.name)

    def void(self, tracked: Tracked) -> None:
        """A request starts again: nothing of it is under way any more."""
        self.release(tracked)
        self._pending = {epoch: of for epoch, of in self._pending.items() if of.tracked is not tracked}


def _unpromised(row: list[KVCacheBlock], cut: Owned, missing: int) -> Promise:
    """What a cut may write to, whose place is not known before the step is planned."""
    return Promise(missing, row[max(num_shared(row), cut.num_traded) :])


def ids(rows: Iterable[Iterable[KVCacheBlock]]) -> Blocks:
    """By group, the blocks of rows as messages name them."""
    return tuple(tuple(block.block_id for block in row) for row in rows)


def kept_tokens(kept: Counts | None) -> list[int | list[int]] | None:
    """As people read it: a number for each layer, or one for each KV head where heads may differ."""
    return None if kept is None else [layer[0] if len(layer) == 1 else list(layer) for layer in kept]
