"""From a policy's counts to whole pages: which positions stay when memory is given back in blocks.

A prompt of ``S`` tokens fills ``S // B`` blocks of ``B`` positions; its last ``S % B`` tokens lie in a partial block
that goes on filling during decoding and therefore stays as it is. Only the full blocks ``[0, full_len)`` are
compacted, into ``pages`` whole ones:

    position     0 ........................ S - w ....... full_len ........ S
                 | prefix of the full blocks | window part | partial block |
    what stays   | pages * B - window part best of these   | all           |

``pages`` is the smallest number that holds everything the policy chose, so the policy's set always survives and the
rest of the last page is filled with the next best positions: rounded up, never down.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PagedPrompt:
    """The block arithmetic of one prompt.

    Attributes:
        prompt_len: ``S``, tokens.
        window: ``w``, last positions that always stay, tokens; ``0 <= w <= S``.
        block_size: ``B``, tokens in a block.
    """

    prompt_len: int
    window: int
    block_size: int

    @property
    def full_blocks(self) -> int:
        """Blocks that the prompt fills completely."""
        return self.prompt_len // self.block_size

    @property
    def full_len(self) -> int:
        """Positions in full blocks."""
        return self.full_blocks * self.block_size

    @property
    def window_in_full_blocks(self) -> int:
        """Positions of the window that lie in full blocks."""
        return max(0, self.full_len - (self.prompt_len - self.window))

    def pages(self, count: int) -> int:
        """Whole blocks that hold ``count`` prefix positions beside the window, at most :attr:`full_blocks`."""
        needed = -(-(count + self.window_in_full_blocks) // self.block_size)
        return min(needed, self.full_blocks)

    def max_pages(self, total: int, num_layers: int) -> int:
        """Upper bound of the pages that ``num_layers`` layers need for ``total`` prefix positions together."""
        slack = num_layers * (self.window_in_full_blocks + self.block_size - 1)
        return min((total + slack) // self.block_size, num_layers * self.full_blocks)

    def kept_len(self, pages: int) -> int:
        """Tokens that a layer holds after it was compacted into ``pages`` blocks."""
        return pages * self.block_size + self.prompt_len - self.full_len

    def positions(self, ranks: torch.Tensor, pages: int) -> torch.Tensor:
        """Positions of the full blocks that stay.

        Args:
            ranks: ``[Hkv, S - w]``, from :meth:`Policy.rank`.
            pages: from :meth:`pages`.

        Returns:
            ``[Hkv, pages * B]`` int64, ascending along the last axis. The positions of the partial block,
            ``[full_len, S)``, stay beside them.
        """
        in_window = self.window_in_full_blocks
        candidates = ranks[:, : self.full_len - in_window]
        best = candidates.topk(pages * self.block_size - in_window, dim=-1).indices.sort(dim=-1).values
        window = torch.arange(self.full_len - in_window, self.full_len, device=best.device)
        return torch.cat([best, window.expand(len(best), -1)], dim=-1)
