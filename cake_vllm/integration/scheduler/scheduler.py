"""The scheduler half: decides when a request is evicted, lends it private columns, and frees what it gives up.

Runs in the scheduler's process and touches no KV tensor.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vllm.config import SchedulerConfig
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from cake_vllm.config import REPORT_KEY, KVEvictionConfig, for_request
from cake_vllm.integration.messages import Blocks, Counts, Cut, Eviction, Grant, Observation, Redirected, StepPlan
from cake_vllm.integration.metrics import EvictionStats
from cake_vllm.integration.reports import report
from cake_vllm.integration.scheduler.cache_manager import (
    EvictingManager,
    ExactPrefixManager,
    Owned,
    compute_at_least,
    num_shared,
)
from cake_vllm.integration.scheduler.elastic import Holding, highest_cap
from cake_vllm.integration.scheduler.spec import evictable_groups
from cake_vllm.kernels import columns_for

logger = init_logger("vllm.cake_vllm.scheduler")


@dataclass
class Tracked:
    """A request since it was last started from its first token.

    Attributes:
        config: its settings, its own or the engine's; ``None``: it is not to be evicted.
        first_computed: position of the first token that was not taken from the prefix cache; ``None`` before it ran.
        by_head: whether its owners are KV heads; ``None`` as long as the worker does not redirect its rows.
        num_pending: evictions that the worker has not reported yet.
        kept: tokens that each owner held after the last eviction.
        failed: whether the policy raised; the request keeps what it has from then on.
        prompt_len: length at which its prompt ended, tokens, if it can be cut when memory is short.
        cut_to: budgets of the cuts so far, tokens per layer, the last one last.
    """

    request: Request
    config: KVEvictionConfig | None
    first_computed: int | None = None
    by_head: bool | None = None
    num_pending: int = 0
    kept: Counts | None = None
    failed: bool = False
    prompt_len: int | None = None
    cut_to: list[int] = field(default_factory=list)

    @property
    def budget(self) -> int | None:
        """Of the last cut."""
        return self.cut_to[-1] if self.cut_to else None


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
    """

    tracked: Tracked
    length: int
    is_prompt_end: bool
    is_cut: bool
    columns: list[list[KVCacheBlock]]
    num_lent: int
    in_place: bool
    cut: Owned


class EvictionScheduler:
    """Follows every request from its first chunk to its last token.

    A request is *prefilling* until its last chunk is scheduled. Then its prompt is evicted, with progressive prefill
    after every chunk that leaves more than the budget; if that would free nothing, it is left alone. While it decodes
    it may have to give back a block whenever it has filled one. Preemption puts it back to the start: it will compute
    its prompt and its tokens again and be evicted at that length.

    Where budgets are elastic nothing is evicted as long as the pool has what the next step takes, for running requests
    and for the one that is admitted next. If it has not, requests that decode are cut (:mod:`.elastic`), with enough
    for some steps more; a prompt for which all of them would have to go to their floors waits instead.

    In a step that evicts nothing, requests are not gone through one by one: those in prefill are in a set of their own,
    and one that decodes is in the list of the step that may fill its block.

    Lengths here are those of verified tokens. A block that is given back ends with a token that is computed in a step
    without drafts, see :meth:`cut_drafts`; so what is evicted is what would be without any.
    """

    def __init__(
        self,
        config: KVEvictionConfig,
        kv_cache_config: KVCacheConfig,
        limits: SchedulerConfig,
        max_model_len: int,
        num_drafts: int,
        num_lookahead: int = 0,
    ):
        self.config = config
        self.limits = limits
        self.max_model_len = max_model_len
        self.num_drafts = num_drafts
        # Positions behind a step's tokens that a model that drafts writes to, and that rows have blocks for.
        self.num_lookahead = num_lookahead
        self.groups = evictable_groups(kv_cache_config)
        self.block_size = kv_cache_config.kv_cache_groups[self.groups[0]].kv_cache_spec.block_size
        self.stats = EvictionStats.empty()
        #: Reports that were asked for and travel with the requests' next outputs, by request id.
        self.news: dict[str, dict[str, Any]] = {}
        self._tracked: dict[str, Tracked] = {}
        self._prefilling: dict[str, Tracked] = {}
        # Requests that run no step yet, in the order in which vLLM will take them (by priority it looks itself).
        self._waiting: dict[str, Tracked] = {}
        # Requests that can be cut when memory is short.
        self._cuttable: dict[str, Tracked] = {}
        self._in_force = max_model_len, 0
        # Requests whose rows the worker redirects, by whether their owners are KV heads.
        self._redirected: dict[bool, set[str]] = {False: set(), True: set()}
        # By number of the step, decoding requests to look at.
        self._due: defaultdict[int, list[Tracked]] = defaultdict(list)
        self._step = 0
        self._epochs = itertools.count(1)
        # Evictions under way, by epoch.
        self._pending: dict[int, Pending] = {}

    def bind(self, manager: KVCacheManager) -> None:
        """Takes hold of the block managers."""
        every = manager.coordinator.single_type_managers
        self._managers: list[EvictingManager] = [every[group] for group in self.groups]  # type: ignore[misc]
        self._exact: list[ExactPrefixManager] = [group for group in every if isinstance(group, ExactPrefixManager)]
        self._pool, self._every = manager.block_pool, manager.coordinator

    def add(self, request: Request) -> None:
        """A request has arrived. What it asks for was checked in the front end."""
        config = for_request(self.config, _asked(request), self.max_model_len)
        if request.resumable and config is not None:
            logger.info_once("streaming input sessions are served without eviction: their prompts go on growing")
            config = None
        self._track(Tracked(request, config))
        if config is not None and config is not self.config:
            # Prefix lookup leaves what the engine's settings need to be computed; this one's may need more.
            compute_at_least(request, config.policy.num_queries, config.never_evicted_len())

    def remove(self, request_id: str) -> dict[str, Any] | None:
        """A request has finished or was aborted; its columns leave with its block rows.

        An eviction that is not reported yet will be counted all the same. Returns what was kept of it, if it asked.
        """
        tracked = self._forget(request_id)
        if tracked is None:
            return None
        self.news.pop(request_id, None)
        return _report(tracked)

    def plan(self, output: SchedulerOutput) -> StepPlan:
        """What the worker has to know for the step that ``output`` describes."""
        self._step += 1
        preempted = output.preempted_req_ids or ()
        for request_id in preempted:
            # It may be gone by now: vLLM names it one step after it was preempted by a reset.
            if tracked := self._forget(request_id):
                self._pending = {epoch: of for epoch, of in self._pending.items() if of.tracked is not tracked}
                self._track(Tracked(tracked.request, tracked.config))
                self._waiting = {request_id: self._waiting.pop(request_id), **self._waiting}
        started = (new.req_id for new in output.scheduled_new_reqs)
        for request_id in (*started, *output.scheduled_cached_reqs.resumed_req_ids):
            self._waiting.pop(request_id, None)
        if self.news:
            # What was not picked up by the last outputs of a request will not be.
            self.news = {name: news for name, news in self.news.items() if name in self._tracked}
        scheduled = output.num_scheduled_tokens
        redirected = {
            by_head: Redirected(len(new), sum(new), max(new))
            for by_head, names in self._redirected.items()
            if (new := [scheduled[name] for name in names if name in scheduled])
        }
        grown = self._grown(output) if redirected else {}
        observations = []
        for request_id in [name for name in self._prefilling if name in scheduled]:
            tracked = self._prefilling[request_id]
            assert tracked.config is not None
            observations.append(self._observe_prompt(tracked, tracked.config, output))
            if request_id not in self._prefilling and tracked.config.decode != "off":
                self._look_again(tracked, _end(tracked.request, output))
        for tracked in self._due.pop(self._step, ()):
            if self._tracked.get(tracked.request.request_id) is tracked:
                observations.append(self._observe_decoding(tracked, output))
        return StepPlan(
            tuple(output.finished_req_ids | set(preempted)),
            tuple(filter(None, observations)),
            tuple(self._cuts(output)) if self._cuttable and scheduled else (),
            grown,
            redirected,
        )

    def finish(self, evictions: Mapping[str, Eviction]) -> None:
        """Frees what the worker reports as given up. Of requests that left meanwhile there is nothing to free."""
        for request_id, eviction in evictions.items():
            pending = self._pending.pop(eviction.epoch, None)
            if pending is None:
                continue
            tracked = pending.tracked
            is_held = pending.cut is self._managers[0].cuts.get(request_id)
            if not is_held and self._tracked.get(request_id) is tracked:
                # Preempted by a reset: it starts again and will be evicted again.
                continue
            tracked.num_pending -= 1
            tracked.kept = eviction.kept
            if news := _report(tracked):
                self.news[request_id] = news
            if eviction.failed:
                tracked.failed = True
                self._prefilling.pop(request_id, None)
                self._cuttable.pop(request_id, None)
            num_freed = self._trade(request_id, pending, eviction) if eviction.is_traded and is_held else 0
            self.stats.record(
                eviction,
                num_freed,
                self.block_size,
                pending.in_place,
                pending.length if pending.is_prompt_end else None,
                pending.is_cut,
            )
            logger.debug(
                "evicted request %s at %d tokens%s: layers keep %s tokens, %d columns",
                request_id,
                pending.length,
                " in place" if pending.in_place else "",
                kept_tokens(eviction.kept),
                eviction.columns,
            )

    def _track(self, tracked: Tracked) -> None:
        request_id = tracked.request.request_id
        self._tracked[request_id] = self._waiting[request_id] = tracked
        if tracked.config is not None:
            self._prefilling[request_id] = tracked

    def _forget(self, request_id: str) -> Tracked | None:
        tracked = self._tracked.pop(request_id, None)
        for some in (self._prefilling, self._waiting, self._cuttable):
            some.pop(request_id, None)
        if tracked is not None and tracked.by_head is not None:
            self._redirected[tracked.by_head].discard(request_id)
        return tracked

    def _grown(self, output: SchedulerOutput) -> dict[str, Blocks]:
        """Blocks that redirected requests were given for this step."""
        cached = output.scheduled_cached_reqs
        given = [(name, ids) for name, ids in zip(cached.req_ids, cached.new_block_ids, strict=True) if ids is not None]
        return {
            name: tuple(tuple(ids[group]) for group in self.groups)
            for name, ids in given
            if name in self._redirected[False] or name in self._redirected[True]
        }

    def _next_blocks(self, output: SchedulerOutput) -> int:
        """Blocks that must be left, under asynchronous scheduling what this step's requests may take for the next."""
        if not self.limits.async_scheduling:
            return 0
        num_tokens = sum(
            max(request.num_tokens - _end(request, output), 1)
            for request in (self._tracked[request_id].request for request_id in output.num_scheduled_tokens)
        )
        num_tokens = min(num_tokens, self.limits.max_num_batched_tokens)
        return (num_tokens // self.block_size + len(output.num_scheduled_tokens)) * len(self._managers)

    def _observe_prompt(
        self, tracked: Tracked, config: KVEvictionConfig, output: SchedulerOutput
    ) -> Observation | None:
        request, policy = tracked.request, config.policy
        end = _end(request, output)
        if tracked.first_computed is None:
            tracked.first_computed = request.num_computed_tokens
        prompt_len = request.num_tokens
        is_last = end >= prompt_len
        if is_last:
            del self._prefilling[request.request_id]
            prompt_len = end
        if self._ends_with(request, prompt_len) and (is_last or not config.is_progressive):
            return None
        budget = config.tokens(prompt_len)
        least = config.least_tokens(prompt_len) if config.is_elastic else budget
        is_rescored = config.num_rescoring > 0
        if not (is_rescored or policy.is_evicted(prompt_len, least)):
            return None
        # Without the whole window the scores would be others: served in full.
        is_whole = end - tracked.first_computed >= policy.num_queries
        grant = None
        if is_whole and (is_last or config.is_progressive) and policy.is_evicted(end, budget):
            grant = self._grant(tracked, end, budget, output, is_prompt_end=is_last)
        # Verified a step late, drafts leave open how long a request is.
        is_late = self.num_drafts > 0 and self.limits.async_scheduling
        is_cuttable = config.is_elastic and is_whole and not is_late
        if is_last and is_cuttable:
            tracked.prompt_len = end
            self._cuttable[request.request_id] = tracked
        is_seen = config.is_progressive or policy.takes_notes or end > prompt_len - policy.num_queries
        if grant is None and not is_seen:
            return None
        observation = self._observation(tracked, end, output, grant, is_last and not (is_rescored or is_cuttable))
        return replace(observation, is_noted=policy.takes_notes)

    def _observe_decoding(self, tracked: Tracked, output: SchedulerOutput) -> Observation | None:
        request, config = tracked.request, tracked.config
        if config is None or tracked.failed:
            return None
        if request.request_id not in output.num_scheduled_tokens:
            self._due[self._step + 1].append(tracked)
            return None
        end, num_drafts = _end(request, output), _num_drafts(request, output)
        self._look_again(tracked, end)
        if -(end + num_drafts) % self.block_size >= config.num_watched or self._fits(tracked, config, end):
            return None
        # Right after its prompt an eviction may not be reported yet: the next block will do.
        can_cut = not (tracked.num_pending or num_drafts or end % self.block_size or self._ends_with(request, end))
        budget = config.tokens(request.num_prompt_tokens)
        grant = self._grant(tracked, end, budget, output) if can_cut else None
        return self._observation(tracked, end, output, grant, is_last=not config.num_rescoring)

    def cut_drafts(self, request: Request) -> None:
        """Leaves a decoding request no drafts that would be computed together with the last token of a block that is
        to be given back: tokens before it are verified by then, and none is behind it.
        """
        tracked, num_tokens, size = self._tracked.get(request.request_id), request.num_tokens, self.block_size
        if tracked is None or tracked.config is None or tracked.config.decode == "off" or tracked.failed:
            return
        end = -(-num_tokens // size) * size
        if not self._fits(tracked, tracked.config, end):
            request.spec_token_ids = request.spec_token_ids[: max(end - 1 - num_tokens, 0)]

    def _fits(self, tracked: Tracked, config: KVEvictionConfig, length: int) -> bool:
        """Whether a decoding request, not evicted so far, may be as long as that, in whole blocks."""
        budget, size = config.tokens(tracked.request.num_prompt_tokens), self.block_size
        return tracked.by_head is None and -(-length // size) <= -(-budget // size)

    def _ends_with(self, request: Request, length: int) -> bool:
        """Whether the token after ``length`` is known to be the last: the request will not read its cache again."""
        num_output = length + 1 - request.num_prompt_tokens
        return num_output >= request.max_tokens or length + 1 >= self.max_model_len

    def _look_again(self, tracked: Tracked, end: int) -> None:
        """Puts a decoding request down for the first step in which it may come to the end of a block that is to be
        given back, if all of its drafts are accepted.
        """
        config, size = tracked.config, self.block_size
        assert config is not None
        num_blocks = end // size + 1
        if tracked.by_head is None:
            num_blocks = max(num_blocks, -(-config.tokens(tracked.request.num_prompt_tokens) // size) + 1)
        missing = num_blocks * size - config.num_watched + 1 - end
        self._due[self._step + max(-(-missing // (1 + self.num_drafts)), 1)].append(tracked)

    def _observation(
        self, tracked: Tracked, end: int, output: SchedulerOutput, grant: Grant | None, is_last: bool
    ) -> Observation:
        request_id, num_drafts = tracked.request.request_id, _num_drafts(tracked.request, output)
        own = tracked.config if tracked.config is not self.config else None
        tail = self._managers[0].req_to_blocks[request_id][(end + num_drafts - 1) // self.block_size].block_id
        num_tokens = output.num_scheduled_tokens[request_id] - num_drafts
        return Observation(request_id, end, num_tokens, tail, grant, is_last, own, num_drafts=num_drafts)

    def _cuts(self, output: SchedulerOutput) -> list[Cut]:
        """The cuts that the next steps need; none as long as the pool has what the very next one takes."""
        size = self.block_size
        ends = {
            name: _end(tracked.request, output) for name, tracked in self._tracked.items() if name not in self._waiting
        }
        steps, soon, later = 2 if self.limits.async_scheduling else 1, 0, 0
        for name, end in ends.items():
            # Beside the prompt, what it may still generate.
            request = self._tracked[name].request
            rest, left = request.num_tokens - end, request.max_tokens - request.num_output_tokens
            near, far = (
                (min(rest, self.limits.max_num_batched_tokens), rest)
                if rest > 0
                else (steps * (1 + self.num_drafts), 2 * size)
            )
            end += self.num_lookahead
            soon += -(-(end + near) // size) - -(-end // size)
            later += -(-(end + min(far, max(rest, 0) + left)) // size) - -(-end // size)
        soon, later = (blocks * len(self._every.single_type_managers) for blocks in (soon, max(soon, later)))
        head = self._head_blocks(len(ends))
        free = self._pool.get_num_free_blocks()
        if soon + head <= free:
            return []
        givers = {
            name: self._holding(tracked, ends[name])
            for name, tracked in self._cuttable.items()
            if tracked.prompt_len != ends[name]
            and not tracked.num_pending
            and not self._ends_with(tracked.request, ends[name])
        }
        holdings, cap = list(givers.values()), None
        if head:
            caps = (highest_cap(holdings, short + head - free) for short in (later, soon))
            cap = next((cap for cap in caps if cap is not None), None)
            if cap is not None and all(cap <= holding.least for holding in holdings):
                cap = None
        if cap is None:
            if soon <= free:
                return []
            caps = (highest_cap(holdings, short - free) for short in (later, soon))
            cap = next((cap for cap in caps if cap is not None), 0)
        self.stats.data["preemptions_avoided"] += soon > free and highest_cap(holdings, soon - free) is not None
        return list(filter(None, (self._cut(name, ends[name], of, cap, output) for name, of in givers.items())))

    def _head_blocks(self, num_running: int) -> int:
        """Blocks that have to be free for the request that vLLM admits next; 0 if there is none."""
        if not self._waiting or num_running >= self.limits.max_num_seqs:
            return 0
        waiting = (tracked.request for tracked in self._waiting.values())
        if self.limits.policy == "priority":
            request = min(waiting, key=lambda request: (request.priority, request.arrival_time))
        else:
            request = next(waiting)
        hits, *_ = self._every.find_longest_cache_hit(request.block_hashes, request.num_tokens - 1)
        in_use = sum(block.ref_cnt > 0 for row in hits for block in row)
        return -(-request.num_tokens // self.block_size) * len(self._every.single_type_managers) - in_use

    def _holding(self, tracked: Tracked, end: int) -> Holding:
        """What a request could give; in blocks of all groups of evictable layers."""
        assert tracked.config is not None
        assert tracked.prompt_len is not None
        least = tracked.config.least_tokens(tracked.prompt_len) + end - tracked.prompt_len
        manager, request_id = self._managers[0], tracked.request.request_id
        row, cut = manager.req_to_blocks[request_id], manager.cuts.get(request_id) or Owned()
        held = len(row) - max(num_shared(row), cut.num_traded) + len(cut.columns)
        return Holding(held * len(self._managers), self._cut_blocks(least) * len(self._managers))

    def _cut_blocks(self, budget: int) -> int:
        """Blocks that a request holds at most once it is cut to ``budget`` tokens: columns, a partial block, and those
        that drafts are written to.
        """
        return columns_for(budget, self.block_size) + 1 + -(-self.num_lookahead // self.block_size)

    def _cut(self, request_id: str, end: int, holding: Holding, cap: int, output: SchedulerOutput) -> Cut | None:
        if not holding.given(cap):
            return None
        tracked = self._cuttable[request_id]
        blocks = max(cap, holding.least) // len(self._managers)
        budget = (blocks - self._cut_blocks(0)) * self.block_size
        grant = self._grant(tracked, end, budget, output, is_prompt_end=False, prompt_len=tracked.prompt_len)
        if grant is None:
            return None
        tracked.cut_to.append(grant.budget)
        own = tracked.config if tracked.config is not self.config else None
        row = _ids(manager.req_to_blocks[request_id][: -(-end // self.block_size)] for manager in self._managers)
        return Cut(request_id, end, row, grant, own)

    def _grant(
        self,
        tracked: Tracked,
        end: int,
        budget: int,
        output: SchedulerOutput,
        is_prompt_end: bool | None = None,
        prompt_len: int | None = None,
    ) -> Grant | None:
        """Leave to evict a request, and the columns for it.

        Args:
            tracked: the request.
            end: its logical length after the step.
            budget: mean tokens per layer.
            output: the step.
            is_prompt_end: ``None`` while it decodes, unless it is cut.
            prompt_len: of a request that is cut, see :class:`Grant`.

        Returns:
            ``None`` if nothing would be freed, or if neither the pool nor the request has blocks to write to.
        """
        config = tracked.config
        assert config is not None
        request_id, divides = tracked.request.request_id, is_prompt_end is not None
        num_blocks = end // self.block_size
        found = self._columns(tracked, num_blocks, budget, divides, output)
        if found is None:
            return None
        columns, num_lent, in_place = found
        if divides:
            # What fits in any case; less than was asked for only if the pool could not lend as much.
            budget = min(budget, (len(columns[0]) - 1) * self.block_size)
        if tracked.by_head is None:
            tracked.by_head = divides and config.policy.selection != "layer"
            self._redirected[tracked.by_head].add(request_id)
            for group in self._exact:
                group.exact_len[request_id] = end
        tail = _ids(manager.req_to_blocks[request_id][num_blocks:] for manager in self._managers)
        grant = Grant(next(self._epochs), budget, divides, tracked.by_head, _ids(columns), tail, prompt_len)
        tracked.num_pending += 1
        cut = self._managers[0].cuts[request_id]
        self._pending[grant.epoch] = Pending(
            tracked, end, bool(is_prompt_end), prompt_len is not None, columns, num_lent, in_place, cut
        )
        return grant

    def _columns(
        self, tracked: Tracked, num_blocks: int, budget: int, divides: bool, output: SchedulerOutput
    ) -> tuple[list[list[KVCacheBlock]], int, bool] | None:
        """The private columns of an eviction: those that the request has, new ones, or blocks of its own row.

        Returns:
            By group, as many for each; how many come from the pool, and whether some are blocks of the row.
        """
        request_id, size = tracked.request.request_id, self.block_size
        pending = [other for other in self._pending.values() if other.tracked is tracked]
        if pending:
            # What an eviction under way leaves is not known yet.
            return pending[-1].columns, 0, False
        cuts = [manager.cuts.get(request_id) or Owned() for manager in self._managers]
        num_held = len(cuts[0].columns)
        needed = columns_for(budget, size) if divides else num_held or -(-budget // size)
        if not num_held and needed >= num_blocks:
            return None
        missing = max(needed - num_held, 0)
        own: list[list[KVCacheBlock]] = [[] for _ in cuts]
        if missing * len(cuts) + (missing and self._next_blocks(output)) > self._pool.get_num_free_blocks():
            for blocks, manager, cut in zip(own, self._managers, cuts, strict=True):
                row = manager.req_to_blocks[request_id][:num_blocks]
                # The last of them: the beginning of a prefix can be hit as long as nobody else needs its blocks.
                blocks += row[max(num_shared(row), cut.num_traded) :][-missing:]
        counts = [missing - len(blocks) for blocks in own]
        if sum(counts) > self._pool.get_num_free_blocks():
            self.stats.data["postponed"] += 1
            return None
        # Nobody may hit what is about to be overwritten.
        self._pool.evict_blocks({block.block_id for blocks in own for block in blocks})
        lent = iter(self._pool.get_new_blocks(sum(counts)))
        columns = []
        for manager, cut, blocks, count in zip(self._managers, cuts, own, counts, strict=True):
            new = list(itertools.islice(lent, count))
            columns.append([*cut.columns, *blocks, *new])
            cut.columns = cut.columns + new
            manager.cuts[request_id] = cut
        return columns, sum(counts), any(own)

    def take_stats(self) -> EvictionStats | None:
        """What happened since the last call; ``None`` if nothing did."""
        budgets = [of.budget for of in self._cuttable.values() if of.budget is not None]
        at_floor = sum(_is_at_floor(tracked) for tracked in self._cuttable.values())
        in_force = min(budgets, default=self.max_model_len), at_floor
        if self.stats.is_empty() and in_force == self._in_force:
            return None
        stats, self.stats, self._in_force = self.stats, EvictionStats.empty(), in_force
        if self.config.is_elastic:
            stats.data["in_force"] = list(in_force)
        return stats

    def _trade(self, request_id: str, pending: Pending, eviction: Eviction) -> int:
        """Frees what the request gave up; returns by how many blocks fewer it holds now than before the grant, if any.

        With progressive prefill it may be none: a chunk that fills no block can move a page from one owner to another.
        """
        num_blocks = pending.length // self.block_size
        # A later eviction, already planned, may use any of the columns.
        num_columns = None if pending.tracked.num_pending else eviction.columns
        freed = []
        for manager, columns in zip(self._managers, pending.columns, strict=True):
            freed += manager.trade(request_id, num_blocks, columns[:num_columns])
        self._pool.free_blocks(freed)
        return max(len(freed) - pending.num_lent, 0)


def _num_drafts(request: Request, output: SchedulerOutput) -> int:
    """How many of the tokens that a request computes in a step may be rejected."""
    return len(output.scheduled_spec_decode_tokens.get(request.request_id, ()))


def _end(request: Request, output: SchedulerOutput) -> int:
    """Logical length of a request after a step, drafts aside."""
    num_tokens = output.num_scheduled_tokens.get(request.request_id, 0)
    return request.num_computed_tokens + num_tokens - _num_drafts(request, output)


def _is_at_floor(tracked: Tracked) -> bool:
    assert tracked.config is not None
    assert tracked.prompt_len is not None
    num_output = tracked.request.num_tokens - tracked.prompt_len
    return tracked.budget is not None and tracked.budget - num_output <= tracked.config.least_tokens(tracked.prompt_len)


def kept_tokens(kept: Counts | None) -> list[int | list[int]] | None:
    """As people read it: a number for each layer, or one for each KV head where heads may differ."""
    return None if kept is None else [layer[0] if len(layer) == 1 else list(layer) for layer in kept]


def _ids(rows: Iterable[Iterable[KVCacheBlock]]) -> Blocks:
    return tuple(tuple(block.block_id for block in row) for row in rows)


def _report(tracked: Tracked) -> dict[str, Any] | None:
    """What a request gets to hear, if it asked."""
    if not (_asked(tracked.request) or {}).get(REPORT_KEY):
        return None
    return report(tracked.config, kept_tokens(tracked.kept), tracked.cut_to)


def _asked(request: Request) -> dict[str, Any] | None:
    return request.sampling_params.extra_args if request.sampling_params else None
