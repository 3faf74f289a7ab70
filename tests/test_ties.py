"""The comparison up to ties notices what is more than rounding."""

from dataclasses import replace

import pytest
import torch
from ties import GAP_BOUND, RANK_BOUND, SWAPPED_GAP_BOUND, Run, assert_same, num_swapped

RANKS = torch.tensor([[0.5, 0.2, 0.2 * (1 + RANK_BOUND / 2), 0.1]])
REFERENCE = Run([1, 2, 3], [1.0, 1.0, 1.0], [None, torch.tensor([[0, 2]])], {1: RANKS})
SWAPPED = replace(REFERENCE, kept=[None, torch.tensor([[0, 1]])])


def test_a_tie_may_be_decided_either_way():
    assert_same(REFERENCE, REFERENCE)
    assert num_swapped(REFERENCE, REFERENCE) == 0
    assert_same(SWAPPED, REFERENCE)
    assert num_swapped(SWAPPED, REFERENCE) == 2


@pytest.mark.parametrize(
    "run",
    [
        replace(REFERENCE, kept=[None, torch.tensor([[0, 3]])]),
        replace(SWAPPED, ranks={1: RANKS * (1 + 2 * RANK_BOUND)}),
        replace(REFERENCE, kept=[torch.tensor([[0, 2]]), torch.tensor([[0, 2]])]),
        replace(REFERENCE, kept=[]),
        replace(REFERENCE, tokens=[1, 2, 4]),
        replace(REFERENCE, tokens=[1, 2]),
    ],
    ids=["other position", "other ranks", "other layer", "not evicted", "other token", "fewer tokens"],
)
def test_what_is_no_tie_is_noticed(run):
    with pytest.raises((AssertionError, ValueError)):
        assert_same(run, REFERENCE)


def test_tokens_may_differ_where_two_are_as_likely():
    other = replace(REFERENCE, tokens=[1, 4, 5])
    for kept, bound in ((REFERENCE.kept, GAP_BOUND), (SWAPPED.kept, SWAPPED_GAP_BOUND)):
        run = replace(other, kept=kept)
        assert_same(run, replace(REFERENCE, gaps=[1.0, bound / 2, 1.0]))
        with pytest.raises(AssertionError):
            assert_same(run, replace(REFERENCE, gaps=[1.0, 2 * bound, 0.0]))
