"""What the scheduler half and the worker half tell each other, once per engine step."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiKVConnectorMetadata

from cake_vllm.config import KVEvictionConfig

#: Half-open, of positions in a prompt.
Ranges = tuple[tuple[int, int], ...]
#: Block ids by group of evictable layers; one group unless sliding-window layers make vLLM split them.
Blocks = tuple[tuple[int, ...], ...]


#: How far the queries that a request is judged by may lie behind its last one: so many times the drafts of a step. If
#: all are accepted, that is those of the step, those of the one before, and those of two more with which a block ended.
MOST_OPEN = 4


@dataclass(frozen=True)
class Parts:
    """How a cut divides a budget where what was generated gives, too; mean tokens per layer.

    Attributes:
        prompt: of the prompt, its window included; ``None``: it stays whole, and nobody judges it.
        generated: of what was generated since.
        recent: of that, the last tokens, which stay in any case.
    """

    prompt: int | None
    generated: int
    recent: int


@dataclass(frozen=True)
class Grant:
    """Leave to evict a request at the end of this step.

    Attributes:
        epoch: number of this eviction, unique in the engine; a report for another epoch is stale.
        budget: mean tokens per layer, window included.
        divides: whether the budget is divided anew, as for a prompt; a decoding request's owners go back to what they
            were given, all of them to ``budget`` if its prompt was not evicted.
        prompt_len: length at which the prompt ended, tokens; what was generated since then stays, unless there are
            :attr:`parts`. ``None`` while the prompt is computed, and where the budget is not divided.
        by_head: whether its owners are KV heads; the same for all grants of a request.
        columns: ``[groups][P]``, all private columns that the request may use from now on. Some may still be blocks of
            its row, which are then rewritten in place.
        tail: ``[groups][n]``, blocks of its row behind what is full at the end of the step.
        media: placeholders that stay.
        parts: of the budget, where what was generated gives, too.
    """

    epoch: int
    budget: int
    divides: bool
    by_head: bool
    columns: Blocks
    tail: Blocks
    prompt_len: int | None = None
    media: Ranges = ()
    parts: Parts | None = None

    def num_generated(self, end: int) -> int:
        """Tokens generated since the prompt's end, up to ``end``, that stay; 0 where there is no such end."""
        return 0 if self.prompt_len is None else end - self.prompt_len


@dataclass(frozen=True)
class Observation:
    """A scheduled request that the worker has to look at: its queries are kept, and with a grant it is evicted.

    Attributes:
        end: logical length up to which it is looked at: after this step, drafts aside. Where drafts are verified a step
            late, what is certain of that or, of what is evicted, its full blocks.
        num_tokens: computed in this step, drafts aside.
        tails: ids of the blocks that the row may end in, drafts included, in the first group; one unless drafts are
            verified a step late. No other request's row ends in any of them, so they tell which row of the batch this
            is.
        grant: see :class:`Grant`.
        is_last: whether its queries may be forgotten after this step.
        config: its own settings, if they are not the engine's.
        is_noted: whether it is a chunk of a prompt whose policy takes notes.
        is_generated: whether its queries are of what it generates, and kept beside those of its prompt.
        num_drafts: tokens that are computed in this step behind those, and may turn out to be rejected.
        num_open: by how many tokens it may be longer than ``end`` before these.
    """

    req_id: str
    end: int
    num_tokens: int
    tails: tuple[int, ...]
    grant: Grant | None = None
    is_last: bool = True
    config: KVEvictionConfig | None = None
    is_noted: bool = False
    num_drafts: int = 0
    num_open: int = 0
    is_generated: bool = False


@dataclass(frozen=True)
class Cut:
    """A request that is to be evicted at the end of the step because memory is short, whether it is scheduled or not.

    Attributes:
        end: logical length after this step.
        row: ``[groups][C]``, all blocks of its row up to there; 0 where they were given back.
        grant: see :class:`Grant`.
        config: its own settings, if they are not the engine's.
    """

    req_id: str
    end: int
    row: Blocks
    grant: Grant
    config: KVEvictionConfig | None = None


@dataclass(frozen=True)
class Redirected:
    """Rows of this step that were evicted in an earlier one and have owners of one kind.

    Attributes:
        num_rows: how many there must be.
        num_tokens: new tokens in all of them.
        longest: new tokens in the one with the most.
    """

    num_rows: int
    num_tokens: int
    longest: int


@dataclass
class StepPlan(KVConnectorMetadata):
    """Scheduler to worker.

    Attributes:
        released: requests that finished or were preempted; what the worker knows of them is void.
        observations: requests to look at in this step.
        cuts: requests to evict because memory is short.
        grown: blocks that evicted requests got for this step.
        redirected: by whether the owners are KV heads.
    """

    released: tuple[str, ...] = ()
    observations: tuple[Observation, ...] = ()
    cuts: tuple[Cut, ...] = ()
    grown: Mapping[str, Blocks] = field(default_factory=dict)
    redirected: Mapping[bool, Redirected] = field(default_factory=dict)


def plan_of(metadata: KVConnectorMetadata | None) -> StepPlan | None:
    """Ours, in what vLLM carries for the connectors of an engine; ``None`` where there is none."""
    parts = metadata.metadata if isinstance(metadata, MultiKVConnectorMetadata) else (metadata,)
    return next((part for part in parts if isinstance(part, StepPlan)), None)


#: Tokens by layer and KV head; one number for a layer whose heads are alike.
Counts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Eviction:
    """What the worker did for one :class:`Grant`.

    Attributes:
        columns: how many of the granted columns, the first of them, are in use.
        is_traded: whether they stand for all full blocks of the row, which may then go; else the request reads what it
            read before, blocks of the row included.
        kept: tokens that each owner holds.
        wanted: tokens that the policy gave it, before rounding up to whole pages.
        failed: whether the policy raised.
    """

    epoch: int
    by_head: bool
    columns: int
    is_traded: bool
    kept: Counts
    wanted: Counts
    failed: bool = False

    def beside(self, other: "Eviction") -> "Eviction":
        """Joined with that of another tensor-parallel rank, which has other heads of the same layers."""
        if not self.by_head:
            return self._joined(other, self.kept, self.wanted)
        kept = tuple(ours + theirs for ours, theirs in zip(self.kept, other.kept, strict=True))
        wanted = tuple(ours + theirs for ours, theirs in zip(self.wanted, other.wanted, strict=True))
        return self._joined(other, kept, wanted)

    def before(self, other: "Eviction") -> "Eviction":
        """Joined with that of the next pipeline stage, which has other layers."""
        return self._joined(other, self.kept + other.kept, self.wanted + other.wanted)

    def _joined(self, other: "Eviction", kept: Counts, wanted: Counts) -> "Eviction":
        return replace(
            self,
            # What one of them uses must stay, and what one of them still reads.
            columns=max(self.columns, other.columns),
            is_traded=self.is_traded and other.is_traded,
            kept=kept,
            wanted=wanted,
            failed=self.failed or other.failed,
        )


@dataclass
class EvictionReport(KVConnectorWorkerMetadata):
    """Worker to scheduler.

    Attributes:
        stages: the evictions of one step, by pipeline stage and request id.
        seconds: that a step with evictions took for them, of the worker that took longest; it is this step or, where
            the device is not waited for, an earlier one. 0: there is none to tell of.
    """

    stages: dict[int, dict[str, Eviction]]
    seconds: float = 0.0

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Joins the reports of two workers."""
        assert isinstance(other, EvictionReport)
        stages = dict(self.stages)
        for stage, theirs in other.stages.items():
            ours = stages.get(stage)
            stages[stage] = {name: ours[name].beside(of_rank) for name, of_rank in theirs.items()} if ours else theirs
        return EvictionReport(stages, max(self.seconds, other.seconds))

    def evictions(self) -> dict[str, Eviction]:
        """By request id, of all layers and heads."""
        first, *rest = (self.stages[stage] for stage in sorted(self.stages))
        return {
            name: reduce(Eviction.before, (of_stage[name] for of_stage in rest), part) for name, part in first.items()
        }
