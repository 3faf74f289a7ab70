"""From a policy's counts to whole pages: which positions stay when memory is given back in pages.

The last ``t`` of a prompt's ``S`` tokens lie in a partial block that goes on filling during decoding and therefore
stays as it is. Only the full blocks ``[0, full_len)`` are compacted, into ``pages`` whole pages of ``p`` positions,
which are blocks or parts of them:

    position     0 ........................ S - w ....... full_len ........ S
                 | prefix of the full blocks | window part | partial block |
    what stays   | pages * p - window part best of these   | all           |

``pages`` is the smallest number that holds everything the policy chose, so the policy's set always survives and the
rest of the last page is filled with the next best positions: rounded up, never down.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cake_vllm.policies.scores import heads_at_once


@dataclass(frozen=True)
class PagedPrompt:
    """The block arithmetic of one prompt.

    Attributes:
        prompt_len: ``S``, tokens.
        window: ``w``, last positions that always stay, tokens; ``0 <= w <= S``.
        page_size: ``p``, tokens in a page.
        tail: ``t``, tokens in the partial block; ``S - t`` is a multiple of ``p``.
    """

    prompt_len: int
    window: int
    page_size: int
    tail: int

    @property
    def full_len(self) -> int:
        """Positions in full blocks."""
        return self.prompt_len - self.tail

    @property
    def full_pages(self) -> int:
        """Pages that these fill."""
        return self.full_len // self.page_size

    @property
    def window_in_full_blocks(self) -> int:
        """Positions of the window that lie in full blocks."""
        return max(0, self.full_len - (self.prompt_len - self.window))

    def pages(self, count: int) -> int:
        """Whole pages that hold ``count`` prefix positions beside the window, at most :attr:`full_pages`."""
        needed = -(-(count + self.window_in_full_blocks) // self.page_size)
        return min(needed, self.full_pages)

    def kept_len(self, pages: int) -> int:
        """Tokens that a layer holds after it was compacted into ``pages`` pages."""
        return pages * self.page_size + self.tail

    def positions(self, ranks: torch.Tensor, pages: Sequence[int]) -> list[torch.Tensor]:
        """Positions of the full blocks that stay in each KV head.

        Args:
            ranks: ``[Hkv, S - w]``, from :meth:`Policy.ranks`.
            pages: for each head, from :meth:`pages`.

        Returns:
            For each head ``[pages * p]`` int64, ascending. The positions of the partial block, ``[full_len, S)``,
            stay beside them.
        """
        in_window = self.window_in_full_blocks
        first, counts = self.full_len - in_window, [max(count * self.page_size - in_window, 0) for count in pages]
        # On CPUs a head is sorted as far as it goes; elsewhere all as far as the longest, at once.
        at_once = heads_at_once(ranks.device, first)
        window = torch.arange(first, self.full_len, device=ranks.device)
        chosen = []
        for start in range(0, len(counts), at_once):
            some = slice(start, start + at_once)
            best = self._best(ranks[some, :first], counts[some])
            for head, count, num_pages in zip(best, counts[some], pages[some], strict=True):
                chosen.append(torch.cat([head[:count], window]) if num_pages else head[:0])
        return chosen

    def _best(self, ranks: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """``[n, max(counts)]`` int64, the best of each of ``n`` heads, ascending; behind its own, of no meaning."""
        most, is_uneven = max(counts), min(counts) < max(counts)
        best = ranks.topk(most, dim=-1, sorted=is_uneven).indices
        if is_uneven:
            # Heads of fewer pages: what they have too many of goes to the end, beyond all positions.
            place = torch.arange(most, device=best.device)
            limits = torch.tensor(counts).to(best.device, non_blocking=True)
            best = best.masked_fill(place >= limits.unsqueeze(1), self.prompt_len)
        return best.sort(dim=-1).values
