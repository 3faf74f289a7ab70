"""Two runs of a request that were computed in other shapes (chunks, batches, programs): the same up to rounding.

Equal shapes agree exactly, on any machine, and are compared so elsewhere.
"""

from dataclasses import dataclass

import torch
from stock import same_tokens

#: Positions whose ranks differ by less, relative to the larger one, may change places. Float32 resolves 1.2e-7; what 20
#: layers of a model make of it was seen to be 1.3e-5. Ranks that are neighbours at the cut are some 1e-3 apart.
RANK_BOUND = 5e-5
#: Tokens may differ where the two best log probabilities are closer than this: after the same positions, and after
#: positions that changed places, which moves the logits by more than rounding does.
GAP_BOUND, SWAPPED_GAP_BOUND = 1e-3, 5e-2


@dataclass(frozen=True)
class Run:
    """What became of a request.

    Attributes:
        tokens: its greedy tokens.
        gaps: distance of the two best log probabilities at each of them.
        kept: by layer, the positions that each KV head kept; ``None`` for a layer that kept everything; empty if the
            request was not evicted.
        ranks: by layer, what they were chosen by, ``[Hkv, S - w]``.
    """

    tokens: list[int]
    gaps: list[float]
    kept: list[torch.Tensor | None]
    ranks: dict[int, torch.Tensor]


@dataclass(frozen=True)
class Served:
    """What a replay can follow.

    Attributes:
        tokens: greedy tokens.
        choices: by eviction, layer and KV head, the kept indices into what it read, ascending.
    """

    tokens: list[int]
    choices: list[list[list[torch.Tensor]]]


def assert_tie(ours: torch.Tensor, theirs: torch.Tensor, *ranks: torch.Tensor, bound: float = RANK_BOUND) -> int:
    """How many positions only one of two choices of a KV head has.

    Raises:
        AssertionError: if their ranks differ by more than ``bound``, among themselves or between runs.
    """
    swapped = sorted(set(ours.tolist()) ^ set(theirs.tolist()))
    if swapped:
        worth = torch.cat([of[swapped] for of in ranks])
        spread = float((worth.max() - worth.min()) / worth.abs().max())
        assert spread <= bound, f"{swapped} differ by {spread:.1e}"
    return len(swapped)


def num_swapped(run: Run, reference: Run, bound: float = RANK_BOUND) -> int:
    """How many positions one of the runs kept and the other did not, all heads together; see :func:`assert_tie`."""
    assert [layer is None for layer in run.kept] == [layer is None for layer in reference.kept]
    return sum(
        assert_tie(ours[head], theirs[head], run.ranks[index][head], reference.ranks[index][head], bound=bound)
        for index, (ours, theirs) in enumerate(zip(run.kept, reference.kept, strict=True))
        for head in range(len(ours) if ours is not None else 0)
    )


def assert_same(run: Run, reference: Run, rank_bound: float = RANK_BOUND, gap_bound: float = GAP_BOUND) -> None:
    """The same positions and tokens, up to ties."""
    bound = max(SWAPPED_GAP_BOUND, gap_bound) if num_swapped(run, reference, rank_bound) else gap_bound
    assert same_tokens(run.tokens, (reference.tokens, reference.gaps), bound)
