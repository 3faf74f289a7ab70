"""The last queries of a request, by position."""

import torch


class Recent:
    """The last queries of a request in one layer, ``[R, Hq, D]``: that of position ``p`` lies at ``p % R``.

    Where drafts are verified a step late, nobody on the host knows which of the queries that a step computes are of
    tokens that stay. A position whose draft was rejected is computed again, and its query takes the other one's place:

        step      positions       afterwards, R = 8
        3 drafts  8  9 10 11      8  9 10 11 | 4  5  6  7       9, 10 and 11 are rejected
        3 drafts  9 10 11 12      8  9 10 11 | 12 5  6  7       the last of each position

    Args:
        size: ``R``.
        like: ``[n, Hq, D]``, of some queries.
    """

    def __init__(self, size: int, like: torch.Tensor):
        self._queries = like.new_zeros(size, *like.shape[1:])

    def __len__(self) -> int:
        return len(self._queries)

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return self._queries.nbytes

    def write(self, queries: torch.Tensor, places: torch.Tensor) -> None:
        """Remembers a step's queries, ``[n, Hq, D]`` with ``n <= R``, given their positions modulo ``R``, ``[n]``."""
        self._queries.index_copy_(0, places, queries)

    def last(self, count: int, end: int) -> torch.Tensor:
        """``[count, Hq, D]`` queries of the positions before ``end``, of which none is more than ``R`` behind the last
        that was written.
        """
        positions = torch.arange(end - count, end, device=self._queries.device)
        return self._queries.index_select(0, positions % len(self))
