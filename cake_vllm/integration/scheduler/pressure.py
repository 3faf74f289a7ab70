"""What happens when memory is short: how much the next steps need, and the cuts by which requests give it.

Where budgets are elastic nothing is evicted as long as the pool has what the next step takes, for running requests and
for the one that is admitted next. If it has not, requests that decode are cut (:mod:`.elastic`), with enough for some
steps more; a prompt for which all of them would have to go to their floors waits instead.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.request import Request, RequestStatus

from cake_vllm.integration.messages import Cut
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

    def follow(self, tracked: Tracked, prompt_len: int) -> None:
        """A request's prompt has ended, whole, and from the next step on it can be cut."""
        tracked.prompt_len = prompt_len
        self._cuttable[tracked.name] = tracked

    def forget(self, name: str) -> None:
        """A request cannot be cut any more."""
        self._cuttable.pop(name, None)

    def in_force(self) -> tuple[int, int]:
        """The smallest budget to which a request was cut (the longest request if none was), and how many are at their
        floors.
        """
        cut = [(of.cut_to[-1], of.floor(of.request.num_tokens)) for of in self._cuttable.values() if of.cut_to]
        smallest = min((budget for budget, _ in cut), default=self._terms.max_model_len)
        return smallest, sum(budget <= floor for budget, floor in cut)

    def cuts(self, output: SchedulerOutput) -> tuple[Cut, ...]:
        """The cuts that the next steps need; none as long as the pool has what the very next one takes."""
        refused, self._head = self._head, None
        if not (self._cuttable and output.num_scheduled_tokens):
            return ()
        soon, later = self._needs(output)
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

    def _needs(self, output: SchedulerOutput) -> tuple[int, int]:
        """Blocks that running requests take in the very next steps, and in some steps more."""
        terms, size, soon, later = self._terms, self._terms.block_size, 0, 0
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
        return soon, max(soon, later)

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
        """Blocks that have to be free for vLLM to admit a request."""
        in_use = 0
        if num_hits:
            hits, *_ = self._every.find_longest_cache_hit(request.block_hashes, request.num_tokens - 1)
            of_groups = zip(hits, self._every.single_type_managers, strict=True)
            in_use = sum(block.ref_cnt > 0 for row, of in of_groups for block in row[: num_hits // of.block_size])
        num_blocks = self._growth(0, request.num_tokens + self._terms.num_lookahead)
        return num_blocks - in_use + self._manager.watermark_blocks

    def _holding(self, tracked: Tracked, end: int) -> Holding:
        """What a request could give; in blocks of all groups of evictable layers."""
        managers = self._grants.managers
        row, cut = managers[0].req_to_blocks[tracked.name], managers[0].cuts.get(tracked.name) or Owned()
        held = len(row) - max(num_shared(row), cut.num_traded) + len(cut.columns)
        return Holding(held * len(managers), self._cut_blocks(tracked.floor(end)) * len(managers))

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
        row = ids(manager.req_to_blocks[tracked.name][: -(-end // terms.block_size)] for manager in managers)
        return Cut(tracked.name, end, row, grant, terms.own(tracked))


def _first_cap(holdings: Sequence[Holding], *shorts: int) -> int | None:
    """The highest cap that frees the first amount, or the next one where the floors leave too little for that."""
    caps = (highest_cap(holdings, short) for short in shorts)
    return next((cap for cap in caps if cap is not None), None)
