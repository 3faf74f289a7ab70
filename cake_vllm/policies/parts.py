"""A choice among entries of several parts, each with scores and a budget of its own."""

import torch


def merged_ranks(*parts: tuple[torch.Tensor, torch.Tensor, list[int]]) -> torch.Tensor:
    """Ranks by which the best of each part come before all others, and what is next in proportion to these.

    The ``i``-th best entry of a part that was given ``n`` has the rank ``-(i + 1/2) / n``: those that it was given lie
    above -1, the others below, and if a few more are chosen, a part of twice the budget gives twice as many.

    Args:
        parts: scores ``[Hkv, C]``, the higher the better; where the part's entries are among them, ``[Hkv, C]`` bool;
            and how many each head is given.

    Returns:
        ``[Hkv, C]`` float64, minus infinity for entries of no part.
    """
    first, _, _ = parts[0]
    merged = torch.full(first.shape, float("-inf"), dtype=torch.float64, device=first.device)
    for scores, is_here, counts in parts:
        # Entries that are worth nothing are there all the same.
        worth = scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~is_here, float("-inf"))
        order = worth.argsort(dim=-1, descending=True, stable=True)
        rank = torch.arange(order.shape[1], device=order.device, dtype=torch.float64).expand_as(order)
        place = torch.empty_like(merged).scatter_(1, order, rank)
        given = (
            torch.tensor(counts, dtype=torch.float64).clamp_(min=0.5).to(first.device, non_blocking=True).unsqueeze(1)
        )
        merged = torch.where(is_here, -(place + 0.5) / given, merged)
    return merged
