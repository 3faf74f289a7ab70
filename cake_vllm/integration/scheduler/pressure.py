"""What happens when memory is short: how much the next steps need, and the cuts by which requests give it.

Where budgets are elastic nothing is evicted as long as the pool has what the next step takes, for running requests and
for the one that is admitted next. If it has not, requests that decode are cut (:mod:`.elastic`), with enough for some
steps more; a prompt for which all of them would have to go to their floors waits instead. Those that would give of
what they have generated are looked at some steps before (:mod:`.outputs`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.request import Request, RequestStatus

from cake_vllm.integration.messages import Cut, Observation, Parts
from cake_vllm.integration.scheduler import outputs
from cake_vllm.integration.scheduler.cache_manager import Owned, num_shared
from cake_vllm.integration.scheduler.drafts import end_of, verified
from cake_vllm.integration.scheduler.elastic import Holding, highest_cap
from cake_vllm.integration.scheduler.grants import Grants, ids
from cake_vllm.integration.scheduler.tracked import Terms, Tracked
from cake_vllm.kernels import budget_for, columns_for


class Pressure:
    """The requests that can be cut, and who of them gives."""

    def __init__(self, terms: Terms, manager: KVCacheManager, grants: Grants, tracked: Mapping[str, Tracked]):
        self._terms, self._grants, self._tracked = terms, grants, tracked
        self._manager, self._every, self._pool = manager, manager.coordinator, manager.block_pool
        # How many groups have blocks of so many tokens, and keep states or not.
        self._kinds = Counter((of.block_size, isinstance(of, MambaManager)) for of in self._every.single_type_managers)
        self._cuttable: dict[str, Tracked] = {}
        # What vLLM would admit in this step, and how many of its tokens are in the prefix cache.
        self._head: tuple[Request, int] | None = None

    def asked(self, request: Request, num_hits: int) -> None:
        """vLLM is about to take a request from its queue, ``num_hits`` tokens of which are in the prefix cache.

        Whatever lets it pass over others, or closes the queue, is behind it: what is short, if it is not
        :meth:`admitted` in this step, is memory, and nobody behind it is asked for.
        """
        self._head = request, num_hits

    def admitted(self) -> None:
        """There was room for it."""
        self._head = None

    def follow(self, tracked: Tracked, end: int, is_judged: bool) -> None:
        """A request's prompt has ended, and from the next step on it can be cut.

        Args:
            tracked: its budget is elastic.
            end: its length, tokens.
            is_judged: whether its prompt can be; if not, it gives of what it generates alone.
        """
        config = tracked.config
        assert config is not None
        if is_judged or config.cuts_outputs:
            tracked.keeps_prompt = not is_judged
            # Of one that starts again, what it had generated is no prompt that stays.
            stays = config.policy.protect.prompt
            tracked.prompt_len = tracked.request.num_prompt_tokens if stays else end
            self._cuttable[tracked.name] = tracked

    def forget(self, name: str) -> None:
        """A request cannot be cut any more."""
        self._cuttable.pop(name, None)

    def in_force(self) -> tuple[int, int]:
        """The smallest budget to which a request was cut (the longest request if none was), and how many are at their
        floors.
        """
        cut = [of for of in self._cuttable.values() if of.cut_to]
        smallest = min((of.cut_to[-1] for of in cut), default=self._terms.max_model_len)
        return smallest, sum(map(self._is_at_floor, cut))

    def _is_at_floor(self, tracked: Tracked) -> bool:
        """Whether a cut now would free nothing of what is not shared: that of the last one, and blocks filled since."""
        assert tracked.config is not None
        assert tracked.left is not None
        terms, (_, _, at) = self._terms, tracked.left
        length = tracked.request.num_computed_tokens
        since = -(-(length + terms.num_behind) // terms.block_size) - at // terms.block_size
        held = columns_for(tracked.cut_to[-1], terms.block_size, terms.page_size) + since
        return held <= self._cut_blocks(outputs.least(tracked, length, tracked.config.cuts_outputs).total)

    def observe(self, output: SchedulerOutput) -> Iterator[Observation]:
        """Looks at requests that may have to give of what they have generated before a window's queries are over."""
        terms, found = self._terms, []
        for tracked in self._cuttable.values():
            end = end_of(tracked.request, output)
            if tracked.name in output.num_scheduled_tokens and outputs.is_looked_for(tracked):
                assert tracked.config is not None
                assert tracked.prompt_len is not None
                ahead = end + tracked.config.policy.num_queries + terms.block_size
                is_long = ahead > tracked.prompt_len + tracked.config.recent_tokens
                if is_long and tracked.prompt_len != end and not terms.ends_with(tracked.request, end):
                    found.append((tracked, end, ahead))
        if not found:
            return
        _, _, needed = self._needs(output, max(ahead - end for _, end, ahead in found))
        head = self._blocks_to_admit(*self._head) if self._head else 0
        short = needed + head - self._pool.get_num_free_blocks() - self._grants.coming
        if short <= 0:
            return
        holdings = [self._holding_of(tracked, ahead, gives=True) for tracked, _, ahead in found]
        cap = highest_cap(holdings, short) or 0
        for (tracked, _, _), holding in zip(found, holdings, strict=True):
            if outputs.is_seen(tracked) or holding.given(cap):
                outputs.see(tracked, output)
                yield replace(self._grants.observation(tracked, output, None, is_last=False), is_generated=True)

    def cuts(self, output: SchedulerOutput) -> tuple[Cut, ...]:
        """The cuts that the next steps need; none as long as the pool has what the very next one takes."""
        refused, self._head = self._head, None
        if not (self._cuttable and output.num_scheduled_tokens):
            return ()
        soon, later, _ = self._needs(output)
        head = self._blocks_to_admit(*refused) if refused else 0
        free = self._pool.get_num_free_blocks() + self._grants.coming
        if soon + head <= free:
            return ()
        givers = [
            (tracked, self._holding(tracked, end))
            for tracked in self._cuttable.values()
            if tracked.prompt_len is not None
            and tracked.prompt_len < (end := verified(tracked.request, output, self._terms.num_drafts))
            and not tracked.num_pending
            and not self._terms.ends_with(tracked.request, end)
        ]
        holdings, cap = [holding for _, holding in givers], None
        if head:
            cap = _first_cap(holdings, later + head - free, soon + head - free)
            if cap is not None and all(cap <= holding.least for holding in holdings):
                cap = None
        if cap is None:
            if soon <= free:
                return ()
            cap = _first_cap(holdings, later - free, soon - free) or 0
        if soon > free and highest_cap(holdings, soon - free) is not None:
            self._grants.stats.data["preemptions_avoided"] += 1
        cuts = (self._cut(tracked, holding, cap, output) for tracked, holding in givers)
        return tuple(filter(None, cuts))

    def _needs(self, output: SchedulerOutput, num_ahead: int = 0) -> tuple[int, int, int]:
        """Blocks that running requests take in the very next steps, in some steps more, and for so many tokens each."""
        terms, size, soon, later, ahead = self._terms, self._terms.block_size, 0, 0, 0
        steps = 2 if terms.limits.async_scheduling else 1
        for tracked in self._tracked.values():
            request = tracked.request
            if request.status != RequestStatus.RUNNING:
                continue
            end = end_of(request, output)
            # Beside the prompt, what it may still generate.
            rest, left = request.num_tokens - end, request.max_tokens - request.num_output_tokens
            near, far = (
                (min(rest, terms.limits.max_num_batched_tokens), rest)
                if rest > 0
                else (steps * (1 + terms.num_drafts), 2 * size)
            )
            end += terms.num_lookahead
            soon += self._growth(end, end + near)
            later += self._growth(end, end + min(far, max(rest, 0) + left))
            ahead += self._growth(end, end + max(rest, 0) + min(num_ahead, left))
        return soon, max(soon, later), max(soon, ahead)

    def _growth(self, start: int, end: int) -> int:
        """Blocks of all groups that a request takes when it grows from one length to another, tokens.

        Of states it takes one more at most: it has the last one, and gives those before back.
        """
        total = 0
        for (size, keeps_states), num_groups in self._kinds.items():
            new = -(-end // size) - -(-start // size)
            total += num_groups * (min(new, 1) if keeps_states else new)
        return total

    def _blocks_to_admit(self, request: Request, num_hits: int) -> int:
        """Blocks that have to be free for vLLM to admit a request, by its own count: those of its whole prompt, and
        columns if this is evicted at its end.
        """
        length, managers = request.num_tokens, self._every.single_type_managers
        rows: Sequence[Sequence[KVCacheBlock]] = [()] * len(managers)
        if num_hits:
            found, *_ = self._every.find_longest_cache_hit(request.block_hashes, length - 1)
            rows = [row[: num_hits // of.block_size] for row, of in zip(found, managers, strict=True)]
        num_blocks = self._every.get_num_blocks_to_allocate(
            request_id=request.request_id,
            num_tokens=min(length + self._terms.num_lookahead, self._terms.max_model_len),
            new_computed_blocks=tuple(rows),
            num_encoder_tokens=0,
            total_computed_tokens=num_hits,
            num_local_computed_tokens=num_hits,
            num_tokens_main_model=length,
            apply_admission_cap=True,
            prefill_end=max(request.num_prompt_tokens, length - 1),
        )
        return num_blocks + self._manager.watermark_blocks

    def _holding(self, tracked: Tracked, end: int) -> Holding:
        """What a request could give at the end of this step; in blocks of all groups of evictable layers."""
        return self._holding_of(tracked, end, outputs.can_give(tracked, end))

    def _holding_of(self, tracked: Tracked, length: int, gives: bool) -> Holding:
        """The same at a length, where what it has generated gives or not."""
        managers = self._grants.managers
        row, cut = managers[0].req_to_blocks[tracked.name], managers[0].cuts.get(tracked.name) or Owned()
        held = (len(row) - max(num_shared(row), cut.num_traded) + len(cut.columns)) * len(managers)
        if not gives and (tracked.keeps_prompt or outputs.has_given(tracked)):
            return Holding(held, held)
        return Holding(held, self._cut_blocks(outputs.least(tracked, length, gives).total) * len(managers))

    def _cut_blocks(self, budget: int) -> int:
        """Blocks that a request holds at most once it is cut to ``budget`` tokens: columns, a partial block, and those
        that drafts are written to.
        """
        return columns_for(budget, self._terms.block_size, self._terms.page_size) + self._blocks_behind()

    def _blocks_behind(self) -> int:
        return 1 + -(-self._terms.num_behind // self._terms.block_size)

    def _cut(self, tracked: Tracked, holding: Holding, cap: int, output: SchedulerOutput) -> Cut | None:
        given = holding.given(cap)
        if not given:
            return None
        managers, terms = self._grants.managers, self._terms
        num_columns = max(cap, holding.least) // len(managers) - self._blocks_behind()
        budget = budget_for(num_columns, terms.block_size, terms.page_size)
        grant = self._grants.grant(
            tracked, budget, output, is_prompt_end=False, prompt_len=tracked.prompt_len, given=given
        )
        if grant is None:
            return None
        tracked.cut_to.append(grant.budget)
        end = verified(tracked.request, output, terms.num_drafts)
        grant = replace(grant, parts=self._parts(tracked, end, grant.budget))
        row = ids(manager.req_to_blocks[tracked.name][: -(-end // terms.block_size)] for manager in managers)
        return Cut(tracked.name, end, row, grant, terms.own(tracked))

    def _parts(self, tracked: Tracked, end: int, budget: int) -> Parts | None:
        """How a request that is cut divides its budget, if what it has generated gives; remembers what it has left."""
        gives, has = outputs.can_give(tracked, end), outputs.held(tracked, end)
        left = outputs.divide(has, outputs.least(tracked, end, gives), budget)
        is_whole = left.generated == has.generated and not outputs.has_given(tracked)
        tracked.left, tracked.gave = (left.prompt, left.generated, end), has.generated - left.generated
        if is_whole:
            return None
        assert tracked.config is not None
        return Parts(None if tracked.keeps_prompt else left.prompt, left.generated, tracked.config.recent_tokens)


def _first_cap(holdings: Sequence[Holding], *shorts: int) -> int | None:
    """The highest cap that frees the first amount, or the next one where the floors leave too little for that."""
    caps = (highest_cap(holdings, short) for short in shorts)
    return next((cap for cap in caps if cap is not None), None)
