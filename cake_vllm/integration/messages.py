"""What the scheduler half and the worker half tell each other, once per engine step."""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from cake_vllm.config import KVEvictionConfig


@dataclass(frozen=True)
class Grant:
    """Leave to evict a request at the end of this step.

    A layer that was cut before holds pages of its own and is compacted in its last ones. One that still reads the
    blocks of its row, which other requests may share, is copied out to lent pages. If the pool is short of these,
    the layer is compacted in the last of its own blocks, and lent pages fill in only for blocks that it shares.

    Attributes:
        epoch: number of this eviction, unique in the engine; a report for another epoch is stale.
        budget: mean tokens per layer, window included.
        divides: whether the budget is divided among the layers anew, as for a prompt; a decoding request's layers
            go back to what they were given, all of them to ``budget`` if its prompt was not evicted.
        lent: pages to deal out to the layers in order.
        num_shared: leading blocks of the row that must not be written to; all of them if there is enough to copy to.
    """

    epoch: int
    budget: int
    divides: bool
    lent: tuple[int, ...]
    num_shared: int

    def num_copied(self, num_pages: int, num_held: int, is_cut: bool) -> int:
        """How many of a layer's ``num_pages`` new pages are lent ones, the first of them.

        Args:
            num_pages: pages that the layer needs.
            num_held: full blocks that it reads now.
            is_cut: whether these are its own.
        """
        return 0 if is_cut else max(num_pages - max(num_held - self.num_shared, 0), 0)


@dataclass(frozen=True)
class Observation:
    """A scheduled request that the worker has to look at: its queries are kept, and with a grant it is evicted.

    Attributes:
        end: logical length after this step.
        num_tokens: of them, computed in this step.
        tail_block: id of the block that position ``end - 1`` lies in, in the first evictable layer. No other
            request's row ends in it, so it tells which row of the batch this is.
        grant: see :class:`Grant`.
        is_last: whether its queries may be forgotten after this step.
        config: its own settings, if they are not the engine's.
    """

    req_id: str
    end: int
    num_tokens: int
    tail_block: int
    grant: Grant | None = None
    is_last: bool = True
    config: KVEvictionConfig | None = None


@dataclass
class StepPlan(KVConnectorMetadata):
    """Scheduler to worker.

    Attributes:
        released: requests that finished or were preempted; what the worker knows of them is void.
        observations: requests to look at in this step.
        evicted: ``{tail block: request id}`` of scheduled requests that were evicted in an earlier step.
    """

    released: tuple[str, ...] = ()
    observations: tuple[Observation, ...] = ()
    evicted: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Eviction:
    """What the worker did for one :class:`Grant`.

    Attributes:
        pages: pages that each layer now holds in place of all full blocks; ``None`` where nothing changed.
        kept: tokens that each layer still holds per KV head.
        wanted: tokens that the policy chose for each layer per KV head, before rounding up to whole blocks.
        postponed: layers that could not be cut because there were no pages to write to.
        failed: whether the policy raised; layers with ``pages`` of ``None`` then hold what they held.
    """

    epoch: int
    pages: tuple[int | None, ...]
    kept: tuple[int, ...]
    wanted: tuple[int, ...]
    postponed: int = 0
    failed: bool = False


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
