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


def num_swapped(run: Run, reference: Run) -> int:
    """How many positions one of the runs kept and the other did not, all heads together.

    Raises:
        AssertionError: if their ranks differ by more than :data:`RANK_BOUND`, between positions or between runs.
    """
    assert [layer is None for layer in run.kept] == [layer is None for layer in reference.kept]
    count = 0
    for index, (ours, theirs) in enumerate(zip(run.kept, reference.kept, strict=True)):
        for head in range(len(ours)) if ours is not None else ():
            swapped = sorted(set(ours[head].tolist()) ^ set(theirs[head].tolist()))
            if swapped:
                worth = torch.cat([of[index][head][swapped] for of in (run.ranks, reference.ranks)])
                spread = float((worth.max() - worth.min()) / worth.abs().max())
                assert spread <= RANK_BOUND, f"layer {index}, head {head}: {swapped} differ by {spread:.1e}"
            count += len(swapped)
    return count


def assert_same(run: Run, reference: Run) -> None:
    """The same positions and tokens, up to ties."""
    bound = SWAPPED_GAP_BOUND if num_swapped(run, reference) else GAP_BOUND
    assert same_tokens(run.tokens, (reference.tokens, reference.gaps), bound)
