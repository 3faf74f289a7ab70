"""Ada-KV."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cake_vllm.policies.base import LayerScore
from cake_vllm.policies.scores import require_fraction
from cake_vllm.policies.snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV's scores; the heads of a layer compete for its budget, each with a guaranteed share.

    Paper: Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM
    Inference", arXiv 2407.11550; as kvpress computes it.

    Attributes:
        alpha: share of the mean budget that every head gets, window included.
    """

    selection = "heads"

    alpha: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction("alpha", self.alpha)

    def head_budgets(self, scores: Sequence[LayerScore], prompt_len: int, budget: float) -> list[list[int]]:
        """See :meth:`Policy.head_budgets`."""
        count = min(int(budget), prompt_len)
        ranks = [self.ranks(score, prompt_len, budget / prompt_len) for score in scores]
        heads = [adaptive_head_budgets(layer, count, self.window, self.alpha) for layer in ranks]
        return torch.stack(heads).tolist()


def adaptive_head_budgets(indicator: torch.Tensor, count: int, window: int, alpha: float) -> torch.Tensor:
    """``[Hkv]`` int64 candidates per head when ``count`` tokens a head, windows included, go to the best of all heads.

    Args:
        indicator: ``[Hkv, S - w]``.
        count: mean tokens per head, window included.
        window: tokens that every head keeps anyway.
        alpha: share of ``count`` that every head is sure of.
    """
    num_heads, num_candidates = indicator.shape
    guaranteed = min(max(int(count * alpha) - window, 0), num_candidates)
    raised = indicator.clone()
    raised.scatter_(1, indicator.topk(guaranteed, dim=-1).indices, torch.finfo(raised.dtype).max)
    chosen = raised.flatten().topk(num_heads * max(count - window, 0)).indices // num_candidates
    return torch.bincount(chosen, minlength=num_heads)
