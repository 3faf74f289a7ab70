"""Who gives memory when it is short, and how much.

One rule for all requests: the highest *cap* under which what is short is freed. Who holds more than the cap is cut to
it, who holds less loses nothing, and nobody goes below its floor:

    blocks   |  ##                         held
             |  ##      ##
      cap  - |--##------##------##---      what is above the cap goes back to the pool
             |  ##  ##  ##      ##
             |  ##  ##  ##  ##  ##
             +--------------------- requests

Of all ways to free as much, this one leaves the request that keeps the least as much as it can have, then the next one,
and so on (max-min fairness). Long prompts give first, which have the most to give, and nobody's share depends on when
it came.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Holding:
    """What a request could give.

    Attributes:
        held: blocks that nobody shares with it.
        least: blocks that it is left with in any case.
    """

    held: int
    least: int

    def given(self, cap: int) -> int:
        """Blocks that go back to the pool under a cap, blocks."""
        return max(self.held - max(cap, self.least), 0)


def highest_cap(holdings: Sequence[Holding], short: int) -> int | None:
    """The highest cap, in blocks, under which ``short`` blocks are given; ``None`` if the floors leave too few."""
    if sum(holding.given(0) for holding in holdings) < short:
        return None
    low, high = 0, max((holding.held for holding in holdings), default=0)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(holding.given(middle) for holding in holdings) >= short:
            low = middle
        else:
            high = middle - 1
    return low
