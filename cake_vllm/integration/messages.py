"""What the scheduler half and the worker half tell each other, once per engine step."""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata


@dataclass(frozen=True)
class Grant:
    """Leave to evict a prompt at the end of this step.

    Attributes:
        epoch: number of this eviction, unique in the engine; a report for another epoch is stale.
        budget: mean tokens per layer, window included.
        pages: private pages to deal out to the layers in order; ``None``: each layer reuses its own first pages.
    """

    epoch: int
    budget: int
    pages: tuple[int, ...] | None


@dataclass(frozen=True)
class PromptChunk:
    """A step's part of a prompt that will be evicted: positions ``[start, end)``.

    Attributes:
        tail_block: id of the block that position ``end - 1`` lies in, in the first evictable layer. No other
            request's row ends in it, so it tells which row of the batch this is.
        grant: present in the last chunk only.
    """

    req_id: str
    start: int
    end: int
    tail_block: int
    grant: Grant | None = None


@dataclass(frozen=True)
class Trim:
    """A decoding request has filled a block: layers that are over their budget give one back, in place.

    Attributes:
        epoch: see :class:`Grant`.
        budget: mean tokens per layer, for a request whose prompt was not evicted.
        end: logical length after this step, a multiple of the block size.
        tail_block: see :class:`PromptChunk`.
    """

    req_id: str
    epoch: int
    budget: int
    end: int
    tail_block: int


@dataclass
class StepPlan(KVConnectorMetadata):
    """Scheduler to worker.

    Attributes:
        released: requests that finished or were preempted; what the worker knows of them is void.
        chunks: prompts in progress.
        trims: decoding requests that may have to give blocks back.
        evicted: ``{tail block: request id}`` of scheduled requests that were evicted in an earlier step.
    """

    released: tuple[str, ...] = ()
    chunks: tuple[PromptChunk, ...] = ()
    trims: tuple[Trim, ...] = ()
    evicted: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Eviction:
    """What the worker did for one :class:`Grant` or one :class:`Trim`.

    Attributes:
        pages: private pages that each layer now holds in place of all full blocks; ``None`` where nothing changed.
        kept: tokens that each layer still holds per KV head.
        wanted: tokens that the policy chose for each layer per KV head, before rounding up to whole blocks.
    """

    epoch: int
    pages: tuple[int | None, ...]
    kept: tuple[int, ...]
    wanted: tuple[int, ...]


@dataclass
class EvictionReport(KVConnectorWorkerMetadata):
    """Worker to scheduler: the evictions of one step by request id."""

    evictions: dict[str, Eviction]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Merges the reports of two ranks, which must have taken the same pages.

        Raises:
            RuntimeError: if they did not; memory that one rank still reads would be freed.
        """
        assert isinstance(other, EvictionReport)
        if self.evictions != other.evictions:
            raise RuntimeError("ranks disagree on what was evicted; this is a bug in cake_vllm")
        return self
