"""The requests that the scheduler half follows, and what holds for all of them."""

from dataclasses import dataclass, field
from functools import cached_property

from vllm.config import SchedulerConfig
from vllm.v1.request import Request

from cake_vllm.config import KVEvictionConfig
from cake_vllm.integration.engine import placeholders
from cake_vllm.integration.messages import Counts, Ranges


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
        keeps_prompt: whether cuts leave its prompt alone.
        cut_to: budgets of the cuts so far, tokens per layer, the last one last.
        left: what the last cut left of its prompt and of what it had generated, tokens per layer, and at which length.
        gave: generated tokens that it took, tokens per layer.
        seen: positions, half-open, whose queries the worker has, drafts included; see :mod:`.outputs`.
    """

    request: Request
    config: KVEvictionConfig | None
    first_computed: int | None = None
    by_head: bool | None = None
    num_pending: int = 0
    kept: Counts | None = None
    failed: bool = False
    prompt_len: int | None = None
    keeps_prompt: bool = False
    cut_to: list[int] = field(default_factory=list)
    left: tuple[int, int, int] | None = None
    gave: int = 0
    seen: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """Its id."""
        return self.request.request_id

    @cached_property
    def media(self) -> Ranges:
        """Where placeholders are that stay."""
        is_asked = self.config is not None and self.config.policy.protect.media
        return placeholders(self.request.mm_features) if is_asked else ()

    @property
    def num_media(self) -> int:
        """How many they are."""
        return sum(end - start for start, end in self.media)


@dataclass(frozen=True)
class Terms:
    """What holds for every request of an engine.

    Attributes:
        config: the engine's settings.
        limits: vLLM's of a step.
        max_model_len: the longest request, tokens.
        block_size: tokens.
        page_size: tokens of a page, in which private columns are dealt out.
        num_drafts: tokens of a step, at most, that are drafts.
        num_lookahead: positions behind a step's tokens that a model that drafts writes to, and rows have blocks for.
    """

    config: KVEvictionConfig
    limits: SchedulerConfig
    max_model_len: int
    block_size: int
    page_size: int
    num_drafts: int
    num_lookahead: int

    @property
    def is_late(self) -> bool:
        """Whether a step is planned before the drafts of the one before are verified."""
        return self.num_drafts > 0 and bool(self.limits.async_scheduling)

    @property
    def num_behind(self) -> int:
        """Positions behind the verified length, at most, that a row has blocks for."""
        return self.num_drafts * (1 + self.is_late) + self.num_lookahead

    def own(self, tracked: Tracked) -> KVEvictionConfig | None:
        """A request's settings, if they are not the engine's."""
        return tracked.config if tracked.config is not self.config else None

    def ends_with(self, request: Request, length: int) -> bool:
        """Whether the token after ``length`` is known to be the last: the request will not read its cache again."""
        num_output = length + 1 - request.num_prompt_tokens
        return num_output >= request.max_tokens or length + 1 >= self.max_model_len
