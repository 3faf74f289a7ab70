"""When a request that decodes gives a block back: which step it is looked at in, and what its drafts must leave."""

from collections import defaultdict
from collections.abc import Iterator

from vllm.v1.core.sched.output import SchedulerOutput

from cake_vllm.config import KVEvictionConfig
from cake_vllm.integration.messages import MOST_OPEN, Observation
from cake_vllm.integration.scheduler.drafts import end_of, num_drafts, verified
from cake_vllm.integration.scheduler.grants import Grants
from cake_vllm.integration.scheduler.tracked import Terms, Tracked


class Decoding:
    """Requests past their prompt whose generated tokens are evicted.

    They are not gone through one by one: each is in the list of the step that may fill its block.

    A block that is given back ends with a token that is computed in a step without drafts, see :meth:`cut_drafts`; so
    what is evicted is what would be without any. Where drafts are verified a step late, no step can be made to end with
    a block: it is given back when it is verified, judged by the queries at its end, and what lies behind it stays.
    """

    def __init__(self, terms: Terms, grants: Grants):
        self._terms, self._grants = terms, grants
        # How far a request may be beyond the end of a block when this is given back; in tokens, drafts aside.
        self._most_behind = (MOST_OPEN - 1) * terms.num_drafts if terms.is_late else 0
        # How far it has to be beyond its prompt: with what is planned a step ahead, the step behind the prompt's
        # eviction does not know yet what this has left, now or when all is computed again.
        self._least_ahead = 2 if terms.limits.async_scheduling and not terms.num_drafts else 1
        self._step = 0
        # By number of the step, requests to look at by id; and by id, the number of that step.
        self._due: defaultdict[int, dict[str, Tracked]] = defaultdict(dict)
        self._due_at: dict[str, int] = {}

    def begin(self) -> None:
        """Another step of the engine is planned."""
        self._step += 1

    def observe(self, output: SchedulerOutput) -> Iterator[Observation | None]:
        """What the worker has to look at in this step."""
        for name, tracked in self._due.pop(self._step, {}).items():
            del self._due_at[name]
            yield self._observe(tracked, output)

    def next_due(self, name: str) -> Tracked | None:
        """A request, if it is to be looked at in the step that is planned next."""
        return self._due.get(self._step + 1, {}).get(name)

    def budget(self, tracked: Tracked, end: int, certain: int, drafts: int) -> int | None:
        """The budget to which a request goes back after a step; ``None`` if it gives nothing back.

        Args:
            tracked: it decodes.
            end: its logical length after the step, at most.
            certain: the same, at least.
            drafts: tokens behind ``end`` that are computed in the step.
        """
        config, terms = tracked.config, self._terms
        # Where drafts are verified a step late, a later step gives the same block back.
        if config is None or tracked.failed or tracked.num_pending or (drafts and not terms.is_late):
            return None
        if certain < self._due_end(tracked, config, end) or terms.ends_with(tracked.request, certain):
            return None
        return config.tokens(tracked.request.num_prompt_tokens, tracked.num_media)

    def _observe(self, tracked: Tracked, output: SchedulerOutput) -> Observation | None:
        request, config = tracked.request, tracked.config
        if config is None or tracked.failed:
            return None
        if tracked.name not in output.num_scheduled_tokens:
            self._put_down(tracked, 1)
            return None
        end, drafts = end_of(request, output), num_drafts(request, output)
        self.follow(tracked, end)
        certain = verified(request, output, self._terms.num_drafts)
        # Of tokens that are computed again, the last of a block may all be in one chunk.
        is_again = output.num_scheduled_tokens[tracked.name] - drafts > 1 and config.num_rescoring > 0
        if not is_again and end + drafts <= self._due_end(tracked, config, end) - config.num_watched:
            return None
        budget = self.budget(tracked, end, certain, drafts)
        grant = None if budget is None else self._grants.grant(tracked, budget, output)
        is_over = grant is not None or not self._terms.is_late
        return self._grants.observation(tracked, output, grant, is_last=is_over and not config.num_rescoring)

    def follow(self, tracked: Tracked, end: int) -> None:
        """Puts a request down for the first step in which it may come to the end of a block that is to be given back,
        if all of its drafts are accepted.

        Args:
            tracked: it decodes from the next step on.
            end: its logical length after this step, at most.
        """
        config = tracked.config
        assert config is not None
        missing = self._due_end(tracked, config, end + 1) - config.num_watched + 1 - end
        if tracked.request.num_tokens > end:
            # It starts again, and nobody knows how long the chunks are.
            missing = 1
        self._put_down(tracked, max(-(-missing // (1 + self._terms.num_drafts)), 1))

    def next_stop(self, tracked: Tracked, end: int) -> int:
        """The first length beyond ``end`` at which a request may give a block back, tokens."""
        assert tracked.config is not None
        return self._first_due(tracked, tracked.config, end + 1)

    def _put_down(self, tracked: Tracked, num_steps: int) -> None:
        step = self._due_at[tracked.name] = self._step + num_steps
        self._due[step][tracked.name] = tracked

    def forget(self, name: str) -> None:
        """A request has left, or starts again."""
        step = self._due_at.pop(name, None)
        if step is not None:
            del self._due[step][name]
            if not self._due[step]:
                del self._due[step]

    def cut_drafts(self, tracked: Tracked) -> None:
        """Leaves a request no drafts that would be computed together with the last token of a block that is to be
        given back: tokens before it are verified by then, and none is behind it.
        """
        request, config, size = tracked.request, tracked.config, self._terms.block_size
        if config is None or config.decode == "off" or tracked.failed:
            return
        num_blocks = -(-request.num_tokens // size)
        if num_blocks >= self._due_blocks(tracked, config):
            request.spec_token_ids = request.spec_token_ids[: max(num_blocks * size - 1 - request.num_tokens, 0)]

    def _due_end(self, tracked: Tracked, config: KVEvictionConfig, end: int) -> int:
        """The end of the next block that is to be given back, tokens; of a request that is ``end`` tokens long."""
        return self._first_due(tracked, config, end - self._most_behind)

    def _first_due(self, tracked: Tracked, config: KVEvictionConfig, end: int) -> int:
        """The end of the first block at or behind ``end`` that may be given back, tokens."""
        size, end = self._terms.block_size, max(end, tracked.request.num_prompt_tokens + self._least_ahead)
        return max(-(-end // size), self._due_blocks(tracked, config)) * size

    def _due_blocks(self, tracked: Tracked, config: KVEvictionConfig) -> int:
        """With so many full blocks a request gives back what is too much: a period beyond its budget or, once it was
        evicted, beyond those that were traded then.
        """
        size = self._terms.block_size
        if tracked.by_head is not None:
            held = self._grants.managers[0].cuts[tracked.name].num_traded
        else:
            held = -(-config.tokens(tracked.request.num_prompt_tokens, tracked.num_media) // size)
        return held + config.period(size)
