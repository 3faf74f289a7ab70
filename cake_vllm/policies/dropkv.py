"""DropKV."""

from dataclasses import dataclass

import torch

from cake_vllm.policies.base import LayerInputs, LayerScore, Policy
from cake_vllm.policies.scores import average_pool, finite, require_odd, require_window, window_attention

#: Added to what a weight leaves to the others, as the official code does.
EPSILON = 1e-6


@dataclass(frozen=True)
class DropKV(Policy):
    """Entries whose loss alone would move the window's attention outputs the most stay.

    Paper: Zhang et al., "DropKV: Decoupling Residual-Output Perturbation for Near-Optimal KV-Cache Eviction",
    NeurIPS 2026; code: AozhongZhang/DropKV. Without position ``j`` the output ``o`` of a query moves by
    ``p / (1 - p) * (o - v_j)``; the squares of that are summed over the window's queries, averaged over the group, and
    pooled over all positions, the window's own among them. Deviation: the official code subtracts as it stands, which
    leaves nothing but rounding of a weight near one; the largest weight of each query is computed otherwise here.

    Attributes:
        window: number of last prompt tokens whose queries judge, and which always stay.
        pool_kernel: width of the average pooling over positions, odd.
    """

    needs_values = True

    window: int = 8
    pool_kernel: int = 11

    def __post_init__(self) -> None:
        require_window(self.window)
        require_odd("pool_kernel", self.pool_kernel)

    def score(self, inputs: LayerInputs) -> LayerScore:
        """See :meth:`Policy.score`."""
        assert inputs.values is not None, "the policy says that it needs values"
        rows, first = [], 0
        for attention in window_attention(inputs):
            values = inputs.values[first : first + len(attention)].float()
            first += len(attention)
            group = attention.shape[1]
            # [n, G * w, S] and [n, G * w, D]
            weights = attention.flatten(1, 2)
            outputs = weights @ values
            # Of a weight near one `1 - p` and `o - v_j` are nothing but rounding. So for the largest one of each query
            # both come from the others: what these add up to, and their output less that much of `v_j`.
            largest, top = weights.max(dim=-1, keepdim=True)
            others = weights.scatter(2, top, 0)
            odds = (others / (1 - others + EPSILON)).square_()
            across = (outputs @ values.transpose(1, 2)).mul_(odds).sum(dim=1)
            own = odds.sum(dim=1) * values.square().sum(dim=-1)
            theirs = (outputs.square().sum(dim=-1).unsqueeze(1) @ odds).squeeze(1)
            moved = own - 2 * across + theirs
            rest, of_top = others.sum(dim=-1, keepdim=True), values.gather(1, top.expand(-1, -1, values.shape[-1]))
            if inputs.sinks is not None:
                rest = rest.maximum(1 - largest)
            shift = largest / (rest + EPSILON) * (others @ values - rest * of_top)
            moved.scatter_add_(1, top.squeeze(-1), shift.square().sum(dim=-1))
            rows.append(moved / group)
        pooled = average_pool(torch.cat(rows), self.pool_kernel)
        return LayerScore(finite(pooled[:, : -self.window]), torch.empty(0))
