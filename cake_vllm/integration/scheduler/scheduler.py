"""The scheduler half: follows every request, and decides when it is evicted.

Runs in the scheduler's process and touches no KV tensor.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from vllm.config import SchedulerConfig
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from cake_vllm.config import REPORT_KEY, KVEvictionConfig, for_request
from cake_vllm.integration.messages import Eviction, Observation, StepPlan
from cake_vllm.integration.metrics import EvictionStats
from cake_vllm.integration.reports import report
from cake_vllm.integration.scheduler.again import hit_at_most, install_stops
from cake_vllm.integration.scheduler.decoding import Decoding
from cake_vllm.integration.scheduler.drafts import certain, end_of
from cake_vllm.integration.scheduler.grants import Grants, kept_tokens
from cake_vllm.integration.scheduler.outputs import num_left
from cake_vllm.integration.scheduler.pressure import Pressure
from cake_vllm.integration.scheduler.spec import evictable_groups
from cake_vllm.integration.scheduler.tracked import Terms, Tracked

logger = init_logger("vllm.cake_vllm.scheduler")


class EvictionScheduler:
    """Follows every request from its first chunk to its last token.

    A request is *prefilling* until its last chunk is scheduled. Then its prompt is evicted, with progressive prefill
    after every chunk that leaves more than the budget; if that would free nothing, it is left alone. While it decodes
    it may have to give back a block whenever it has filled one (:mod:`.decoding`), and where budgets are elastic it may
    be cut when memory is short (:mod:`.pressure`). Preemption puts it back to the start, and it is evicted as it was
    (:mod:`.again`).

    In a step that evicts nothing, requests are not gone through one by one.
    Lengths here are those of verified tokens.
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
        self._groups = evictable_groups(kv_cache_config)
        spec: Any = kv_cache_config.kv_cache_groups[self._groups[0]].kv_cache_spec
        sizes = spec.block_size, spec.page_size
        # Before a chunk.
        self._most_held = config.max_request_tokens(max_model_len, 0)
        self._terms = Terms(config, limits, max_model_len, *sizes, num_drafts, num_lookahead)
        #: Reports that were asked for and travel with the requests' next outputs, by request id.
        self.news: dict[str, dict[str, Any]] = {}
        self._tracked: dict[str, Tracked] = {}
        self._prefilling: dict[str, Tracked] = {}
        self._in_force = max_model_len, 0

    def bind(self, manager: KVCacheManager) -> None:
        """Takes hold of the block managers."""
        self._grants = Grants(self._terms, manager, self._groups, self._tracked)
        self._decoding = Decoding(self._terms, self._grants)
        self._pressure = Pressure(self._terms, manager, self._grants, self._tracked)
        for of_group in self._grants.managers:
            of_group.evicts_after = self._evicts_after
        self._grants.managers[0].on_freed = self._start_again
        install_stops()
        #: vLLM is about to admit a request, and has done so: see :class:`Pressure`.
        self.asked, self.admitted = self._pressure.asked, self._pressure.admitted

    def add(self, request: Request) -> None:
        """A request has arrived. What it asks for was checked in the front end."""
        config = for_request(self.config, _asked(request), self._terms.max_model_len)
        if request.resumable and config is not None:
            logger.info_once("streaming input sessions are served without eviction: their prompts go on growing")
            config = None
        config = config and config.beside(request.num_prompt_tokens)
        tracked = Tracked(request, config)
        self._track(tracked)
        hit_at_most(request, self._most_hits(tracked))

    def most_hits(self, request: Request) -> int:
        """How many of a request's tokens may come from a cache outside.

        Its last queries are to be computed, as after a hit in the prefix cache; and where requests never hold
        everything, it cannot hold more than that.
        """
        tracked = self._tracked.get(request.request_id)
        most = min(request.num_tokens, self._most_hits(tracked)) if tracked else request.num_tokens
        return min(most, self._most_held or most)

    def _most_hits(self, tracked: Tracked) -> int:
        """How many of a request's tokens may come from a cache: not the queries by which it is evicted first."""
        config, prompt_len = tracked.config, tracked.request.num_prompt_tokens
        if config is None:
            return self._terms.max_model_len
        if prompt_len > config.never_evicted_len():
            return max(prompt_len - max(config.policy.num_queries, 1), 0)
        # While it decodes it may be evicted from its prompt's end on, to which a chunk has to come.
        return self._terms.max_model_len if config.decode == "off" else prompt_len - 1

    def chunk(self, request: Request, start: int, num_tokens: int) -> int:
        """How many tokens a request may compute in a step, of which more than one are known, drafts aside; at most
        ``num_tokens``, from ``start`` on. None until the report of its last eviction is there.
        """
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.config is None or tracked.failed:
            return num_tokens
        if start < request.num_prompt_tokens:
            return min(num_tokens, request.num_prompt_tokens - start)
        if tracked.config.decode == "off":
            return num_tokens
        return 0 if tracked.num_pending else min(num_tokens, self._decoding.next_stop(tracked, start) - start)

    def plan(self, output: SchedulerOutput) -> StepPlan:
        """What the worker has to know for the step that ``output`` describes."""
        self._decoding.begin()
        redirected = self._grants.redirected(output.num_scheduled_tokens)
        grown = self._grants.grown(output) if redirected else {}
        observations = (
            *self._observe_prompts(output),
            *self._decoding.observe(output),
            *self._pressure.observe(output),
        )
        self._grants.give_back()
        return StepPlan(
            released=tuple(output.finished_req_ids | (output.preempted_req_ids or set())),
            observations=tuple(filter(None, observations)),
            cuts=self._pressure.cuts(output),
            grown=grown,
            redirected=redirected,
        )

    def finish(self, evictions: Mapping[str, Eviction]) -> None:
        """The worker reports what it evicted."""
        for name, eviction in evictions.items():
            tracked = self._grants.settle(name, eviction)
            if tracked is None:
                continue
            if news := _report(tracked):
                self.news[name] = news
            if tracked.failed:
                self._prefilling.pop(name, None)
                self._pressure.forget(name)

    def took(self, seconds: float) -> None:
        """The worker reports how long the evictions of a step took, if there are any to tell of."""
        if seconds:
            self._grants.stats.data["seconds"].append(seconds)

    def remove(self, name: str) -> dict[str, Any] | None:
        """A request has finished or was aborted; its columns leave with its block rows.

        Returns what was kept of it, if it asked.
        """
        tracked = self._forget(name)
        if tracked is not None:
            self._grants.stats.data["kept_generated_tokens"] += num_left(tracked)
        self.news.pop(name, None)
        return _report(tracked) if tracked else None

    def forget_news(self) -> None:
        """What a request's last output has not picked up will not be."""
        if self.news:
            self.news = {name: news for name, news in self.news.items() if name in self._tracked}

    def cut_drafts(self, request: Request) -> None:
        """See :class:`Decoding`."""
        if tracked := self._tracked.get(request.request_id):
            self._decoding.cut_drafts(tracked)

    def take_stats(self) -> EvictionStats | None:
        """What happened since the last call; ``None`` if nothing did."""
        stats, in_force = self._grants.stats, self._pressure.in_force()
        if stats.is_empty() and in_force == self._in_force:
            return None
        self._grants.stats, self._in_force = EvictionStats.empty(), in_force
        if self.config.is_elastic:
            stats.data["in_force"] = list(in_force)
        return stats

    def _track(self, tracked: Tracked) -> None:
        self._tracked[tracked.name] = tracked
        if tracked.config is not None:
            self._prefilling[tracked.name] = tracked

    def _forget(self, name: str) -> Tracked | None:
        tracked = self._tracked.pop(name, None)
        if tracked is not None:
            self._prefilling.pop(name, None)
            self._decoding.forget(name)
            self._pressure.forget(name)
            self._grants.release(tracked)
        return tracked

    def _start_again(self, name: str) -> None:
        """The blocks of a request were freed; one that has ended is not followed any more."""
        if tracked := self._forget(name):
            self._grants.void(tracked)
            self._track(Tracked(tracked.request, tracked.config))

    def _observe_prompts(self, output: SchedulerOutput) -> Iterator[Observation | None]:
        for name in [name for name in self._prefilling if name in output.num_scheduled_tokens]:
            tracked = self._prefilling[name]
            assert tracked.config is not None
            yield self._observe_prompt(tracked, tracked.config, output)
            if name not in self._prefilling and tracked.config.decode != "off":
                self._decoding.follow(tracked, end_of(tracked.request, output))

    def _evicts_after(self, name: str, start: int, end: int) -> tuple[int, int]:
        """Answers :class:`EvictingManager` while vLLM schedules a chunk, of which drafts are a part."""
        if tracked := self._prefilling.get(name):
            end = min(end, tracked.request.num_prompt_tokens)
            budget = self._prompt_budget(tracked, start, end)
        elif tracked := self._decoding.next_due(name):
            request = tracked.request
            num_drafts = max(end - request.num_tokens - request.num_output_placeholders, 0)
            most, end = end - num_drafts, certain(request, end - num_drafts, True, self._terms.num_drafts)
            budget = self._decoding.budget(tracked, most, end, num_drafts)
        else:
            return 0, end
        if tracked is None or budget is None:
            return 0, end
        return self._grants.num_missing(tracked, end, budget, name in self._prefilling) or 0, end

    def _prompt_budget(self, tracked: Tracked, start: int, end: int) -> int | None:
        """The budget under which a prompt is evicted after the chunk ``[start, end)``; ``None`` if it is not."""
        config, request = tracked.config, tracked.request
        assert config is not None
        prompt_len = request.num_prompt_tokens
        is_last = end >= prompt_len
        if self._terms.ends_with(request, prompt_len) if is_last else not config.is_progressive:
            return None
        budget = config.tokens(prompt_len, tracked.num_media)
        first = start if tracked.first_computed is None else tracked.first_computed
        # Without the whole window the scores would be others: served in full.
        is_whole = end - first >= config.policy.num_queries
        return budget if is_whole and config.policy.is_evicted(min(end, prompt_len), budget) else None

    def _observe_prompt(
        self, tracked: Tracked, config: KVEvictionConfig, output: SchedulerOutput
    ) -> Observation | None:
        request, policy, terms = tracked.request, config.policy, self._terms
        start, end = request.num_computed_tokens, end_of(request, output)
        if tracked.first_computed is None:
            tracked.first_computed = start
        prompt_len = request.num_prompt_tokens
        is_last = end >= prompt_len
        if is_last:
            del self._prefilling[tracked.name]
        if terms.ends_with(request, prompt_len) and (is_last or not config.is_progressive):
            return None
        budget = self._prompt_budget(tracked, start, end)
        least = config.least_tokens if config.is_elastic else config.tokens
        is_rescored = config.num_rescoring > 0
        is_evicted = policy.is_evicted(prompt_len, least(prompt_len, tracked.num_media))
        is_whole = end - tracked.first_computed >= policy.num_queries
        if is_last and config.is_elastic:
            self._pressure.follow(tracked, end, is_whole and is_evicted)
        if not (is_rescored or is_evicted):
            return None
        grant = None if budget is None else self._grants.grant(tracked, budget, output, is_prompt_end=is_last)
        is_cuttable = config.is_elastic and is_whole
        is_seen = config.is_progressive or policy.takes_notes or end > prompt_len - policy.num_queries
        if grant is None and not is_seen:
            return None
        is_last = is_last and not (is_rescored or is_cuttable)
        return self._grants.observation(tracked, output, grant, is_last, policy.takes_notes)


def _report(tracked: Tracked) -> dict[str, Any] | None:
    """What a request gets to hear, if it asked."""
    if not (_asked(tracked.request) or {}).get(REPORT_KEY):
        return None
    return report(tracked.config, kept_tokens(tracked.kept), tracked.cut_to)


def _asked(request: Request) -> dict[str, Any] | None:
    return request.sampling_params.extra_args if request.sampling_params else None
