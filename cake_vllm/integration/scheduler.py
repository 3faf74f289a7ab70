"""The scheduler half: decides when a prompt is evicted, grants pages for it, and frees what the worker gave up.

Runs in the scheduler's process and touches no KV tensor.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from cake_vllm.config import AUTO, KVEvictionConfig
from cake_vllm.integration.cache_manager import EvictingManager
from cake_vllm.integration.messages import Eviction, Grant, PromptChunk, StepPlan, Trim
from cake_vllm.integration.spec import evictable_groups
from cake_vllm.metrics import EvictionStats
from cake_vllm.policies import PagedPrompt
from cake_vllm.policies.base import total_tokens

logger = init_logger("vllm.cake_vllm.scheduler")


@dataclass(frozen=True)
class Pending:
    """An eviction that the worker has not reported yet: of a prompt if it has a grant, else while decoding."""

    request_id: str
    length: int
    grant: Grant | None


class EvictionScheduler:
    """Follows every request from its first chunk to its last token.

    A request is *prefilling* until its last chunk is scheduled; then it is *evicted*, or, if its prompt is short,
    left alone. Preemption puts it back to the start: it will compute its prompt and its tokens again and be evicted
    at that length.
    """

    def __init__(self, config: KVEvictionConfig, kv_cache_config: KVCacheConfig, max_num_seqs: int):
        self.config = config
        self.max_num_seqs = max_num_seqs
        self.policy = config.policy
        self.groups = evictable_groups(kv_cache_config)
        self.block_size = kv_cache_config.kv_cache_groups[self.groups[0]].kv_cache_spec.block_size
        self.stats = EvictionStats.empty()
        self._requests: dict[str, Request] = {}
        self._past_prefill: set[str] = set()
        self._epochs = itertools.count(1)
        # Requests whose rows the worker redirects, from the step that evicts them on.
        self._evicted: set[str] = set()
        # Evictions under way, by epoch.
        self._pending: dict[int, Pending] = {}

    def bind(self, manager: KVCacheManager) -> None:
        """Takes hold of the block managers of the evictable layers."""
        managers = [manager.coordinator.single_type_managers[group] for group in self.groups]
        assert all(isinstance(layer, EvictingManager) for layer in managers)
        self._managers: list[EvictingManager] = managers  # type: ignore[assignment]
        self._pool = manager.block_pool

    def add(self, request: Request) -> None:
        """A request has arrived."""
        self._requests[request.request_id] = request

    def remove(self, request_id: str) -> None:
        """A request has finished or was aborted; its pages leave with its block rows."""
        self._requests.pop(request_id, None)
        self._restart(request_id)

    def plan(self, output: SchedulerOutput) -> StepPlan:
        """What the worker has to know for the step that ``output`` describes."""
        preempted = output.preempted_req_ids or ()
        for request_id in preempted:
            self._restart(request_id)
        chunks, trims, evicted = [], [], {}
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            request = self._requests[request_id]
            start = request.num_computed_tokens
            end = start + num_tokens
            if request_id in self._past_prefill:
                if request_id in self._evicted:
                    evicted[self._tail_block(request_id, end)] = request_id
                if trim := self._plan_trim(request, end):
                    trims.append(trim)
            elif chunk := self._plan_chunk(request, start, end):
                chunks.append(chunk)
        released = tuple(output.finished_req_ids | set(preempted))
        return StepPlan(released, tuple(chunks), tuple(trims), evicted)

    def finish(self, evictions: Iterable[tuple[str, Eviction]]) -> None:
        """Frees what the worker reports as given up. Reports for requests that left meanwhile are void."""
        for request_id, eviction in evictions:
            pending = self._pending.pop(eviction.epoch, None)
            if pending is None:
                continue
            length, grant = pending.length, pending.grant
            if grant is not None:
                self._free_prompt(request_id, grant, length // self.block_size, eviction)
                self.stats.record_prompt(length, self.block_size, eviction, in_place=grant.pages is None)
            else:
                freed = self._free_trimmed(request_id, length // self.block_size, eviction)
                self.stats.record_trim(freed, self.block_size)
            logger.debug(
                "evicted request %s at %d tokens%s: layers keep %s tokens, %s pages",
                request_id,
                length,
                " while decoding" if grant is None else " in place" if grant.pages is None else "",
                eviction.kept,
                eviction.pages,
            )

    def _budget(self, prompt_len: int) -> int:
        """Tokens per layer for a request with a prompt of this length."""
        if self.config.budget != AUTO:
            return self.config.tokens(prompt_len, 0)
        capacity = self._pool.num_gpu_blocks // len(self._managers) * self.block_size
        sharing = min(len(self._requests), self.max_num_seqs)
        if sharing > 1:
            # Room for one full prompt in prefill, whoever's it is; the rest is divided.
            longest = max(request.num_tokens for request in self._requests.values())
            capacity = max(capacity - longest, 0) // sharing
        return self.config.tokens(prompt_len, capacity)

    def _plan_chunk(self, request: Request, start: int, end: int) -> PromptChunk | None:
        request_id, prompt_len = request.request_id, request.num_tokens
        is_last = end >= prompt_len
        if is_last:
            self._past_prefill.add(request_id)
            prompt_len = end
        budget = self._budget(prompt_len)
        if not self.policy.is_evicted(prompt_len, budget):
            return None
        if not is_last and end <= prompt_len - self.policy.num_queries:
            return None
        grant = self._grant(request_id, budget, prompt_len) if is_last else None
        return PromptChunk(request_id, start, end, self._tail_block(request_id, end), grant)

    def _grant(self, request_id: str, budget: int, prompt_len: int) -> Grant:
        prompt = PagedPrompt(prompt_len, self.policy.protected, self.block_size)
        num_layers = len(self._managers)
        # Policies may round a layer's share up by one.
        most = total_tokens(budget, self.policy.protected, num_layers) + num_layers
        wanted = prompt.max_pages(most, num_layers)
        pages = None
        if wanted <= self._pool.get_num_free_blocks():
            # Until the worker has dealt them out, the first layer owns them all.
            bag = self._pool.get_new_blocks(wanted)
            self._managers[0].private_blocks[request_id] = bag
            pages = tuple(block.block_id for block in bag)
        grant = Grant(next(self._epochs), budget, pages)
        self._pending[grant.epoch] = Pending(request_id, prompt_len, grant)
        self._evicted.add(request_id)
        return grant

    def _plan_trim(self, request: Request, end: int) -> Trim | None:
        if not self.policy.trims or end % self.block_size:
            return None
        request_id = request.request_id
        budget = self._budget(request.num_prompt_tokens)
        if request_id not in self._evicted and end <= budget:
            return None
        trim = Trim(request_id, next(self._epochs), budget, end, self._tail_block(request_id, end))
        self._pending[trim.epoch] = Pending(request_id, end, None)
        self._evicted.add(request_id)
        return trim

    def _free_prompt(self, request_id: str, grant: Grant, num_blocks: int, eviction: Eviction) -> None:
        bag = self._managers[0].private_blocks.pop(request_id, [])
        for manager, pages in zip(self._managers, eviction.pages, strict=True):
            if pages is None:
                continue
            if grant.pages is None:
                manager.shrink(request_id, num_blocks, pages)
            else:
                manager.exchange(request_id, num_blocks, bag[:pages])
                bag = bag[pages:]
        self._pool.free_blocks(bag)

    def _free_trimmed(self, request_id: str, num_blocks: int, eviction: Eviction) -> int:
        """Frees what decoding gave back; how many blocks that was."""
        before = self._pool.get_num_free_blocks()
        for manager, pages in zip(self._managers, eviction.pages, strict=True):
            if pages is not None:
                manager.shrink(request_id, num_blocks, pages)
        return self._pool.get_num_free_blocks() - before

    def _tail_block(self, request_id: str, end: int) -> int:
        """Id of the block that position ``end - 1`` lies in, in the first layer."""
        return self._managers[0].req_to_blocks[request_id][(end - 1) // self.block_size].block_id

    def _restart(self, request_id: str) -> None:
        self._past_prefill.discard(request_id)
        if request_id in self._evicted:
            self._evicted.discard(request_id)
            void = [epoch for epoch, pending in self._pending.items() if pending.request_id == request_id]
            for epoch in void:
                del self._pending[epoch]
