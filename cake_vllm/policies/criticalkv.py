"""CriticalKV, alone and on top of Ada-KV."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cake_vllm.policies.adakv import adaptive_head_budgets
from cake_vllm.policies.base import LayerInputs, LayerScore
from cake_vllm.policies.scores import finite, projected_value_norms, require_fraction
from cake_vllm.policies.snapkv import SnapKV


@dataclass(frozen=True)
class CriticalKV(SnapKV):
    """Half of the budget by attention, the other half by attention times the size of the projected value.

    Paper: Feng et al., "Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective",
    arXiv 2502.03805; on SnapKV's scores, as kvpress computes it.

    Attributes:
        epsilon: added to the attention before the product.
        first_stage_ratio: share of the budget that goes by attention alone.
        protect_window: keep the window whatever the second stage says. False is what kvpress does: window entries
            that the first stage has no room for compete like any other, with the largest attention.
    """

    needs_values = True
    needs_output_weight = True

    epsilon: float = 1e-4
    first_stage_ratio: float = 0.5
    protect_window: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction("first_stage_ratio", self.first_stage_ratio)
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon must be at least 0, not {self.epsilon}")

    @property
    def protected(self) -> int:
        """The window, if it is asked for."""
        return self.window if self.protect_window else 0

    def score(self, inputs: LayerInputs) -> LayerScore:
        """See :meth:`Policy.score`; the window's indicator is above all others, ``extra`` is the values' size."""
        prefix = super().score(inputs).indicator
        window = (prefix.max() + 1).expand(len(prefix), self.window)
        return LayerScore(torch.cat([prefix, window], dim=1), torch.empty(0), (projected_value_norms(inputs),))

    def rank(
        self, score: LayerScore, prompt_len: int, keep_ratio: float, counts: Sequence[int] | None = None
    ) -> torch.Tensor:
        """See :meth:`Policy.rank`."""
        first = int(keep_ratio * prompt_len * self.first_stage_ratio)
        ranks = self._second_stage(score)
        ranks.scatter_(1, score.indicator.topk(first, dim=-1).indices, torch.finfo(ranks.dtype).max)
        return ranks[:, : prompt_len - self.protected]

    def _second_stage(self, score: LayerScore) -> torch.Tensor:
        return finite((score.indicator + self.epsilon) * score.extra[0])


@dataclass(frozen=True)
class CriticalAdaKV(CriticalKV):
    """Ada-KV's budgets per head, and CriticalKV's two stages inside each head.

    Attributes:
        alpha: see :class:`cake_vllm.policies.adakv.AdaKV`.
    """

    selection = "heads"

    alpha: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction("alpha", self.alpha)

    def head_budgets(self, scores: Sequence[LayerScore], prompt_len: int, budget: float) -> list[list[int]]:
        """See :meth:`Policy.head_budgets`."""
        count = min(int(budget), prompt_len)
        prefix_len = prompt_len - self.window
        room = self.window - self.protected
        prefixes = [self.raise_spans(score.indicator[:, :prefix_len], score, budget) for score in scores]
        heads = [adaptive_head_budgets(prefix, count, self.window, self.alpha) for prefix in prefixes]
        return (torch.stack(heads) + room).tolist()

    def rank(
        self, score: LayerScore, prompt_len: int, keep_ratio: float, counts: Sequence[int] | None = None
    ) -> torch.Tensor:
        """See :meth:`Policy.rank`; the first stage is a share of each head's own budget."""
        if counts is None:
            return super().rank(score, prompt_len, keep_ratio)
        ranks = self._second_stage(score)
        for head, (base, count) in enumerate(zip(score.indicator, counts, strict=True)):
            first = int((count + self.protected) * self.first_stage_ratio)
            ranks[head, base.topk(first).indices] = torch.finfo(ranks.dtype).max
        return ranks[:, : prompt_len - self.protected]
