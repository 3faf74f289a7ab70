"""Columns that an eviction is sure to get: counted with the blocks of the chunk that it comes after.

An eviction writes to blocks from the pool or, where that has none to spare, to blocks of the request's row that nobody
else reads. So of its columns as many have to be free as the row has too few blocks of its own:

    row         shared | shared | own | own | own        4 columns: 1 from the pool at least, and 3 from
                                  `---------´            it or the row, which is decided when the step is planned

vLLM is told to find these with the chunk's blocks, and does what it does whenever memory is short: a request waits or,
if it runs, the last one is preempted. One that is alone shares nothing and needs none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm.v1.core.kv_cache_utils import KVCacheBlock


@dataclass
class Promise:
    """What the eviction of a request at the end of this step may write to, in one group.

    Attributes:
        missing: private columns that it takes beside those that the request has.
        own: full blocks of its row that nobody else reads.
        lent: blocks taken from the pool because these do not suffice.
    """

    missing: int
    own: list[KVCacheBlock] = field(default_factory=list)
    lent: list[KVCacheBlock] = field(default_factory=list)

    @property
    def short(self) -> int:
        """How many it lacks."""
        return max(self.missing - len(self.lent) - len(self.own), 0)

    def beside(self, others: Sequence[KVCacheBlock]) -> "Promise":
        """The same once somebody reads ``others``, too."""
        read = {block.block_id for block in others}
        first = next((index for index in range(len(self.own), 0, -1) if self.own[index - 1].block_id in read), 0)
        return Promise(self.missing, self.own[first:], self.lent)


class Promises:
    """Those of the step that vLLM is putting together, in one group; none between steps.

    Args:
        lend: takes so many blocks from the pool.
    """

    def __init__(self, lend: Callable[[int], list[KVCacheBlock]]):
        self._lend = lend
        self._made: dict[str, Promise] = {}

    def num_short(self, missing: int, num_own: int, hits: Sequence[KVCacheBlock]) -> int:
        """Blocks that have to be free beside those of a chunk, so that this promise and those before it can be kept.

        Args:
            missing: see :class:`Promise`; 0 if the chunk is followed by no eviction.
            num_own: blocks of its row that nobody else reads.
            hits: blocks of others that the request is going to read.
        """
        num_blocks = max(missing - num_own, 0)
        if hits and self._made:
            num_blocks += sum(promise.beside(hits).short for promise in self._made.values())
        return num_blocks

    def make(self, name: str, promise: Promise, hits: Sequence[KVCacheBlock]) -> None:
        """The chunk has its blocks: sees to it that this promise and those before it can be kept."""
        if hits:
            self._made = {other: made.beside(hits) for other, made in self._made.items()}
        if promise.missing:
            self._made[name] = promise
        for made in self._made.values() if hits else (promise,):
            if made.short:
                made.lent += self._lend(made.short)

    def take(self, name: str) -> Promise | None:
        """Keeps a promise, or lets go of it: what was lent is the caller's."""
        return self._made.pop(name, None)

    def take_rest(self) -> list[KVCacheBlock]:
        """The step is planned: what was lent for evictions that nobody asked for."""
        made, self._made = self._made, {}
        return [block for promise in made.values() for block in promise.lent]


def num_shared(row: Sequence[KVCacheBlock], most_readers: int = 1) -> int:
    """How many leading blocks of a row are read by more requests than that."""
    return next((index for index in range(len(row), 0, -1) if row[index - 1].ref_cnt > most_readers), 0)
