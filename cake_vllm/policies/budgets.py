"""How a total of tokens is divided among layers (CAKE, arXiv 2503.12491, section 4.2; antgroup/cakekv)."""

from collections.abc import Sequence


def proportional(preferences: Sequence[float], total: int) -> list[float]:
    """``total`` divided in proportion to ``preferences``; equally where they are all zero."""
    whole = sum(preferences)
    if whole <= 0:
        return [total / len(preferences)] * len(preferences)
    return [preference / whole * total for preference in preferences]


def settle(shares: Sequence[float], total: int, cap: int) -> list[int]:
    """Truncates ``shares`` to counts, cuts them at ``cap`` and gives what was cut to the layers below it.

    The excess is shared equally among the layers below ``cap``, its remainder one by one to the first of them; the
    same then happens to what truncation lost. As in the official code a share that lands above ``cap`` here is
    *not* redistributed again: the caller clips it and that part of the total is lost.

    Args:
        shares: one float per layer, summing to ``total``.
        total: what the counts should sum to.
        cap: no layer can hold more.
    """
    counts = [int(share) for share in shares]
    excess = sum(max(count - cap, 0) for count in counts)
    counts = [min(count, cap) for count in counts]
    counts = _share_out(counts, excess, cap)
    missing = total - sum(counts)
    if missing >= 0:
        return _share_out(counts, missing, cap)
    return _take_back(counts, -missing)


def cascade(preferences: Sequence[float], total: int, cap: int) -> list[list[int]]:
    """Budgets after each layer of the prefill, the full ``total`` divided among the layers seen so far.

    Returns:
        Stage ``i`` is a list of ``i + 1`` settled counts, not yet clipped to ``cap``; the last stage is the division
        without cascading.
    """
    stages = []
    for seen in range(1, len(preferences) + 1):
        known = preferences[:seen]
        stages.append(settle(proportional(known, total), total, cap))
    return stages


def kept_after(stages: Sequence[Sequence[int]], cap: int) -> list[int]:
    """What each layer holds when it was cut at every stage since its own: evicted tokens do not come back.

    Budgets are not monotone over the stages (shared excess can raise a small layer), so this is a running minimum.
    """
    num_layers = len(stages[-1])
    return [min(min(stage[layer], cap) for stage in stages[layer:]) for layer in range(num_layers)]


def _share_out(counts: list[int], amount: int, cap: int) -> list[int]:
    takers = [layer for layer, count in enumerate(counts) if count < cap]
    if amount <= 0 or not takers:
        return counts
    each, rest = divmod(amount, len(takers))
    counts = list(counts)
    for rank, layer in enumerate(takers):
        counts[layer] += each + (rank < rest)
    return counts


def _take_back(counts: list[int], amount: int) -> list[int]:
    givers = [layer for layer, count in enumerate(counts) if count > 1]
    if not givers:
        return counts
    each, rest = divmod(amount, len(givers))
    counts = list(counts)
    for rank, layer in enumerate(givers):
        counts[layer] -= each + (rank < rest)
    return counts
