"""The scheduler half: decides when a request is evicted, grants pages for it, and frees what the worker gave up.

Runs in the scheduler's process and touches no KV tensor.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm.config import SchedulerConfig
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from cake_vllm.config import AUTO, REPORT_KEY, KVEvictionConfig
from cake_vllm.integration.cache_manager import (
    EvictingManager,
    ExactPrefixManager,
    ExactSlidingWindowManager,
    interleave,
    num_shared,
)
from cake_vllm.integration.messages import Eviction, Grant, Observation, StepPlan
from cake_vllm.integration.reports import report
from cake_vllm.integration.spec import evictable_groups
from cake_vllm.metrics import EvictionStats
from cake_vllm.policies import PagedPrompt, Policy
from cake_vllm.policies.base import total_tokens

logger = init_logger("vllm.cake_vllm.scheduler")


@dataclass
class Tracked:
    """A request since it was last started from its first token.

    Attributes:
        config: its settings, its own or the engine's; ``None``: it is not to be evicted.
        first_computed: position of the first token that was not taken from the prefix cache; ``None`` before it ran.
        is_decoding: whether its prompt is behind it.
        is_evicted: whether the worker redirects its rows.
        wanted: tokens that each layer was given, once the worker has told; all of them the budget before that.
        kept: tokens that each layer held after the last eviction.
        failed: whether the policy raised; the request keeps what it has from then on.
    """

    request: Request
    config: KVEvictionConfig | None
    first_computed: int | None = None
    is_decoding: bool = False
    is_evicted: bool = False
    wanted: tuple[int, ...] | None = None
    kept: tuple[int, ...] | None = None
    failed: bool = False


@dataclass(frozen=True)
class Pending:
    """An eviction that the worker has not reported yet.

    Attributes:
        length: logical length of the request after the step, tokens.
        is_prompt_end: whether its prompt ended with the step.
        in_place: whether they were too few to copy to.
    """

    request_id: str
    length: int
    is_prompt_end: bool
    grant: Grant
    in_place: bool


class EvictionScheduler:
    """Follows every request from its first chunk to its last token.

    A request is *prefilling* until its last chunk is scheduled. Then its prompt is evicted, with progressive prefill
    after every chunk that leaves more than the budget; if it is short, it is left alone. While it decodes it may have
    to give back a block whenever it has filled one. Preemption puts it back to the start: it will compute its prompt
    and its tokens again and be evicted at that length.
    """

    def __init__(
        self, config: KVEvictionConfig, kv_cache_config: KVCacheConfig, limits: SchedulerConfig, max_model_len: int
    ):
        self.config = config
        self.limits = limits
        self.max_model_len = max_model_len
        self.groups = evictable_groups(kv_cache_config)
        self.block_size = kv_cache_config.kv_cache_groups[self.groups[0]].kv_cache_spec.block_size
        self.stats = EvictionStats.empty()
        #: Reports that were asked for and travel with the requests' next outputs, by request id.
        self.news: dict[str, dict[str, Any]] = {}
        self._tracked: dict[str, Tracked] = {}
        self._epochs = itertools.count(1)
        # Evictions under way, by epoch.
        self._pending: dict[int, Pending] = {}
        # Blocks that the next step may need before this one's evictions are reported.
        self._reserved = 0

    def bind(self, manager: KVCacheManager) -> None:
        """Takes hold of the block managers."""
        every = manager.coordinator.single_type_managers
        self._managers: list[EvictingManager] = [every[group] for group in self.groups]  # type: ignore[misc]
        # The first layer enters blocks into the prefix cache for all evictable ones.
        windows = (group for group in every if isinstance(group, ExactSlidingWindowManager))
        self._exact: list[ExactPrefixManager] = [self._managers[0], *windows]
        self._pool = manager.block_pool

    def add(self, request: Request) -> None:
        """A request has arrived. What it asks for was checked in the front end."""
        config = self.config.for_request(_asked(request), self.max_model_len)
        self._tracked[request.request_id] = Tracked(request, config)
        if config is None or config is self.config:
            return
        if (
            config.policy.num_queries > self.config.policy.num_queries
            or config.never_evicted_len() < self.config.never_evicted_len()
        ):
            # Prefix lookup leaves what the engine's settings need to be computed, and this one needs more.
            request.skip_reading_prefix_cache = True

    def remove(self, request_id: str) -> dict[str, Any] | None:
        """A request has finished or was aborted; its pages leave with its block rows.

        Returns what was kept of it, if it asked.
        """
        tracked = self._tracked.pop(request_id, None)
        if tracked is None:
            return None
        self._forget_pending(request_id)
        self.news.pop(request_id, None)
        return report(tracked.config, tracked.kept) if _wants_report(tracked.request) else None

    def plan(self, output: SchedulerOutput) -> StepPlan:
        """What the worker has to know for the step that ``output`` describes."""
        preempted = output.preempted_req_ids or ()
        for request_id in preempted:
            tracked = self._tracked[request_id]
            self._tracked[request_id] = Tracked(tracked.request, tracked.config)
            self._forget_pending(request_id)
        self._reserved = self._next_blocks(output) if self.limits.async_scheduling else 0
        observations, evicted = [], {}
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            tracked = self._tracked[request_id]
            end = tracked.request.num_computed_tokens + num_tokens
            if tracked.is_evicted:
                evicted[self._tail_block(request_id, end)] = request_id
            config = tracked.config
            if config is None or tracked.failed:
                continue
            if tracked.is_decoding and -end % self.block_size >= config.num_watched:
                continue
            observe = self._observe_decoding if tracked.is_decoding else self._observe_prompt
            if observation := observe(tracked, config, end):
                observations.append(observation)
        return StepPlan(tuple(output.finished_req_ids | set(preempted)), tuple(observations), evicted)

    def finish(self, evictions: Iterable[tuple[str, Eviction]]) -> None:
        """Frees what the worker reports as given up. Reports for requests that left meanwhile are void."""
        for request_id, eviction in evictions:
            pending = self._pending.pop(eviction.epoch, None)
            if pending is None:
                continue
            tracked = self._tracked[request_id]
            if eviction.failed:
                tracked.failed = True
            else:
                tracked.wanted = eviction.wanted
            tracked.kept = eviction.kept
            if _wants_report(tracked.request):
                self.news[request_id] = report(tracked.config, tracked.kept)
            num_blocks = self._free(request_id, pending, eviction)
            self.stats.record(eviction, num_blocks, self.block_size, pending.is_prompt_end, pending.in_place)
            logger.debug(
                "evicted request %s at %d tokens%s: layers keep %s tokens, %s pages",
                request_id,
                pending.length,
                " in place" if pending.in_place else "",
                eviction.kept,
                eviction.pages,
            )

    def _next_blocks(self, output: SchedulerOutput) -> int:
        """How many blocks the requests of this step need at most to go on in the next one."""
        num_tokens = sum(
            max(request.num_tokens - request.num_computed_tokens - output.num_scheduled_tokens[request.request_id], 1)
            for request in (self._tracked[request_id].request for request_id in output.num_scheduled_tokens)
        )
        num_tokens = min(num_tokens, self.limits.max_num_batched_tokens)
        num_blocks = num_tokens // self.block_size + len(output.num_scheduled_tokens)
        return num_blocks * len(self._managers)

    def _budget(self, config: KVEvictionConfig, prompt_len: int) -> int:
        """Tokens per layer for a request with a prompt of this length."""
        if config.budget != AUTO:
            return config.tokens(prompt_len, 0)
        capacity = self._pool.num_gpu_blocks // len(self._managers) * self.block_size
        sharing = min(len(self._tracked), self.limits.max_num_seqs)
        if sharing > 1 or config.is_progressive:
            # Room for one prompt in prefill, whoever's it is; the rest is divided.
            prefill = max(tracked.request.num_tokens for tracked in self._tracked.values())
            if config.is_progressive:
                prefill = min(prefill, 2 * self.limits.max_num_batched_tokens)
            capacity = max(capacity - prefill, 0) // sharing
        return config.tokens(prompt_len, capacity)

    def _observe_prompt(self, tracked: Tracked, config: KVEvictionConfig, end: int) -> Observation | None:
        request, policy = tracked.request, config.policy
        if tracked.first_computed is None:
            tracked.first_computed = request.num_computed_tokens
        prompt_len = request.num_tokens
        is_last = end >= prompt_len
        if is_last:
            tracked.is_decoding = True
            prompt_len = end
        budget = self._budget(config, prompt_len)
        is_rescored = config.num_rescoring > 0
        if not (is_rescored or policy.is_evicted(prompt_len, budget)):
            return None
        # Without the whole window the scores would be others: served in full.
        is_whole = end - tracked.first_computed >= policy.num_queries
        grant = None
        if is_whole and (is_last or config.is_progressive) and policy.is_evicted(end, budget):
            grant = self._grant(tracked, policy, end, budget, divides=True)
        if grant is None and end <= prompt_len - policy.num_queries and not config.is_progressive:
            return None
        return self._observation(tracked, end, grant, is_last and not is_rescored)

    def _observe_decoding(self, tracked: Tracked, config: KVEvictionConfig, end: int) -> Observation | None:
        budget = self._budget(config, tracked.request.num_prompt_tokens)
        num_blocks, num_pages = -(-end // self.block_size), -(-budget // self.block_size)
        if not (tracked.is_evicted or num_blocks > num_pages):
            return None
        # Right after its prompt an eviction may not be reported yet: the next block will do.
        is_known = tracked.wanted is not None or not tracked.is_evicted
        can_cut = is_known and end % self.block_size == 0
        grant = self._grant(tracked, config.policy, end, budget, divides=False) if can_cut else None
        return self._observation(tracked, end, grant, is_last=not config.num_rescoring)

    def _observation(self, tracked: Tracked, end: int, grant: Grant | None, is_last: bool) -> Observation:
        request_id = tracked.request.request_id
        own = tracked.config if tracked.config is not self.config else None
        num_tokens = end - tracked.request.num_computed_tokens
        return Observation(request_id, end, num_tokens, self._tail_block(request_id, end), grant, is_last, own)

    def _grant(self, tracked: Tracked, policy: Policy, end: int, budget: int, divides: bool) -> Grant:
        request_id, num_blocks = tracked.request.request_id, end // self.block_size
        cut = self._managers[0].cut(request_id)
        whole = [layer for layer, pages in enumerate(cut.pages) if pages is None]
        if not divides:
            # Layers that are within what they were given stay as they are.
            wanted = tracked.wanted or (budget,) * len(self._managers)
            targets = {layer: -(-wanted[layer] // self.block_size) for layer in whole}
            whole = [layer for layer in whole if targets[layer] < num_blocks]
            num_pages = sum(targets[layer] for layer in whole)
        else:
            # Policies may round a layer's share up by one.
            most = total_tokens(budget, policy.protected, len(self._managers)) + len(self._managers)
            num_pages = PagedPrompt(end, policy.protected, self.block_size).max_pages(most, len(whole))
        first_own, num_free = num_blocks, self._pool.get_num_free_blocks()
        in_place = num_pages + self._reserved > num_free
        if in_place:
            rows = [cut.rows[layer][:num_blocks] for layer in whole]
            first_own = max(map(num_shared, rows), default=0)
            # Nobody may hit what is about to be overwritten.
            self._pool.evict_blocks({block.block_id for block in interleave([row[first_own:] for row in rows])})
            num_pages = min(num_pages, len(whole) * first_own, num_free)
        lent = self._pool.get_new_blocks(num_pages)
        cut.lent += lent
        if not tracked.is_evicted:
            tracked.is_evicted = True
            for group in self._exact:
                group.exact_len[request_id] = end
        grant = Grant(next(self._epochs), budget, divides, tuple(block.block_id for block in lent), first_own)
        is_prompt_end = divides and tracked.is_decoding
        self._pending[grant.epoch] = Pending(request_id, end, is_prompt_end, grant, in_place and bool(whole))
        return grant

    def _free(self, request_id: str, pending: Pending, eviction: Eviction) -> int:
        """Frees what the layers gave up and what they did not take of the pages that were lent.

        Returns how many blocks fewer the request has now than before the eviction.
        """
        cut, num_blocks = self._managers[0].cuts[request_id], pending.length // self.block_size
        given_up, unused = cut.shrink(pending.grant, eviction.pages, num_blocks, self._pool.null_block)
        self._pool.free_blocks([*unused, *reversed(given_up)])
        return len(given_up) - (len(pending.grant.lent) - len(unused))

    def _tail_block(self, request_id: str, end: int) -> int:
        """Id of the block that position ``end - 1`` lies in, in the first layer."""
        return self._managers[0].req_to_blocks[request_id][(end - 1) // self.block_size].block_id

    def _forget_pending(self, request_id: str) -> None:
        void = [epoch for epoch, pending in self._pending.items() if pending.request_id == request_id]
        for epoch in void:
            del self._pending[epoch]


def _asked(request: Request) -> dict[str, Any] | None:
    return request.sampling_params.extra_args if request.sampling_params else None


def _wants_report(request: Request) -> bool:
    return bool((_asked(request) or {}).get(REPORT_KEY))
