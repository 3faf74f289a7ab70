"""ReST-KV."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cake_vllm.policies.base import LayerInputs, LayerScore, Policy
from cake_vllm.policies.scores import (
    finite,
    projected_values,
    projections,
    require_fraction,
    require_odd,
    require_window,
    window_attention,
)


@dataclass(frozen=True)
class ReSTKV(Policy):
    """Entries without which the layer's output could be reconstructed worst stay, smoothed over queries and positions.

    Paper: An et al., "ReST-KV: Robust KV Cache Eviction with Layer-wise Output Reconstruction and Spatial-Temporal
    Smoothing", arXiv 2605.08840 (ICLR 2026); code: an-yongqi/rest-kv with the arguments of its scripts. The attention
    ``a`` of a query head is an exponential moving average over the window's queries, from the first to the last. A
    position is worth ``a / (1 - a) * ||W_O (o - v)||_2``, ``o`` being what the averaged attention makes of the prefix.
    That is averaged over positions, those beyond the ends counting as the outermost: where the positions that half of
    the window attends to most lie ``scale`` or more before or behind those of the other half, over a wider and
    shifted range.

    Deviations: the query heads of a group keep the same, by the mean of their scores, where the official code keeps a
    copy of keys and values for each; and heads whose attention stands still to the last digit are not shifted by one.

    Attributes:
        window: number of last prompt tokens whose queries judge, and which always stay.
        pool_kernel: least width of the pooling over positions, odd.
        alpha: weight of the newer query in the moving average.
        scale: positions of drift for one position of shift.
    """

    needs_values = True
    needs_output_weight = True

    window: int = 32
    pool_kernel: int = 5
    alpha: float = 0.3
    scale: int = 2000

    def __post_init__(self) -> None:
        require_window(self.window, at_least=2)
        require_odd("pool_kernel", self.pool_kernel)
        require_fraction("alpha", self.alpha)
        if self.scale < 1:
            raise ValueError(f"scale must be at least 1, not {self.scale}")

    def score(self, inputs: LayerInputs) -> LayerScore:
        """See :meth:`Policy.score`."""
        assert inputs.values is not None, "the policy says that it needs values"
        prefix_len = inputs.keys.shape[1] - self.window
        age = torch.arange(self.window - 1, -1, -1, device=inputs.keys.device)
        weights = self.alpha * (1 - self.alpha) ** age
        weights[0] = (1 - self.alpha) ** (self.window - 1)
        averages, drifts = [], []
        for attention in window_attention(inputs):
            averages.append(torch.einsum("ngws,w->ngs", attention[..., :prefix_len], weights))
            drifts.append(self._drift(attention, inputs.budget))
        average = torch.cat(averages)
        outputs = average @ inputs.values[:, :prefix_len].float()
        projected = torch.einsum("ngd,ngcd->ngc", outputs, projections(inputs)).unsqueeze(2)
        changes = [torch.linalg.vector_norm(values - projected, dim=-1) for values in projected_values(inputs)]
        worth = average / (1 - average) * torch.cat(changes, dim=-1)[..., :prefix_len]
        return LayerScore(finite(self._smooth(worth, torch.cat(drifts)).mean(dim=1)), torch.empty(0))

    def _drift(self, attention: torch.Tensor, budget: float | None) -> torch.Tensor:
        """``[n, G]`` float64, by how many positions attention moves to the front within the window."""
        num_heads, group, _, prompt_len = attention.shape
        if budget is None or prompt_len <= self.scale:
            return torch.zeros(num_heads, group, dtype=torch.float64, device=attention.device)
        count = min(max(int(budget) - self.window, 1), prompt_len)
        places = attention.topk(count, dim=-1, sorted=False).indices.sum(dim=-1)
        half, rest = self.window // 2, self.window - self.window // 2
        # In whole numbers up to the division: next to a multiple of the scale rounding would decide.
        drift = places[..., :half].sum(dim=-1) * rest - places[..., half:].sum(dim=-1) * half
        return drift.double() / (count * half * rest)

    def _smooth(self, worth: torch.Tensor, drifts: torch.Tensor) -> torch.Tensor:
        """``[Hkv, G, N]``, each query head's averaged over its own range."""
        shifts = (drifts / self.scale).trunc().long()
        smoothed = torch.empty_like(worth)
        for shift in shifts.unique().tolist():
            kernel = max(self.pool_kernel, 2 * abs(shift) + 1)
            padded = F.pad(worth[shifts == shift], (kernel // 2 - shift, kernel // 2 + shift), mode="replicate")
            smoothed[shifts == shift] = F.avg_pool1d(padded, kernel, stride=1)
        return smoothed
