"""DefensiveKV and Layer-DefensiveKV."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from cake_vllm.policies.base import LayerInputs, LayerScore, Policy
from cake_vllm.policies.parsing import shown
from cake_vllm.policies.scores import (
    SINKS,
    average_pool,
    echoed,
    finite,
    prefix_attention,
    projected_value_norms,
    require_echo,
    require_odd,
    require_window,
)


@dataclass(frozen=True)
class DefensiveKV(Policy):
    """The worst case over the window's queries instead of the mean: a token that mattered once stays.

    Paper: Feng et al., "Taming the Fragility of KV Cache Eviction in LLM Inference", arXiv 2510.13334;
    code: FFY0/DefensiveKV. The risk of a position is the largest pooled attention that any query of the window, in
    any head of the group, pays it, at least the mean risk of its head; times the size of its projected value. What
    holds most of the mean attention is protected beforehand. The heads of a layer compete for its budget.

    The official code has two slips, which the defaults reproduce and two options mend.

    Attributes:
        window: number of last prompt tokens whose queries judge.
        pool_kernel: width of the pooling over positions, odd.
        normalize_over: ``"heads"`` divides the values' size by its sum over the KV heads of a position, as the
            official code does; ``"positions"`` by its sum over the positions of a head, as the paper means.
        protect_window: keep the window in every head. In the official code its entries only share the layer's
            largest score, so that a flat layer can lose it under a budget that layers or heads compete for.
        echo: half-life in positions with which successors inherit a position's risk, before the mean risk is the
            least (:func:`echoed`); 0 as published.
    """

    needs_values = True
    needs_output_weight = True
    selection = "heads"

    window: int = 32
    pool_kernel: int = 5
    normalize_over: str = "heads"
    protect_window: bool = False
    echo: float = 0.0

    def __post_init__(self) -> None:
        require_window(self.window)
        require_odd("pool_kernel", self.pool_kernel)
        require_echo(self.echo)
        if self.normalize_over not in ("heads", "positions"):
            raise ValueError(f"normalize_over must be 'heads' or 'positions', not {shown(self.normalize_over)}")

    @property
    def protected(self) -> int:
        """The window, if it is asked for."""
        return self.window if self.protect_window else 0

    def score(self, inputs: LayerInputs) -> LayerScore:
        """See :meth:`Policy.score`.

        ``indicator`` is ``[Hkv, S - w]``; ``extra`` is the mean attention normalised over positions, of the same
        shape, and the mean mass on the last ``w`` prefix positions, a scalar.
        """
        return self.score_of(inputs, prefix_attention(inputs), projected_value_norms(inputs))

    def score_of(self, inputs: LayerInputs, attentions: Iterable[torch.Tensor], norms: torch.Tensor) -> LayerScore:
        """:meth:`score` from what it is made of: see :func:`prefix_attention` and :func:`projected_value_norms`."""
        risks, means, mass = [], [], []
        # Of heads that have kept different numbers of tokens, what is there; see LayerInputs.
        valid = None if inputs.valid is None else inputs.valid[:, : -self.window]
        for attention in attentions:
            there = None
            if valid is not None:
                there, valid = valid[: len(attention)], valid[len(attention) :]
            pooled = average_pool(attention, self.pool_kernel)
            if there is not None:
                pooled.mul_(there[:, None, None])
            pooled.mul_(attention.sum(dim=-1, keepdim=True) / pooled.sum(dim=-1, keepdim=True))
            risk = echoed(pooled.amax(dim=(1, 2)), self.echo, there, SINKS + self.pool_kernel // 2)
            mean = risk.mean(dim=-1, keepdim=True)
            if there is not None:
                mean = risk.sum(dim=-1, keepdim=True) / there.sum(dim=-1, keepdim=True)
            risks.append(risk.maximum(mean))
            mean = attention.mean(dim=(1, 2))
            means.append(mean / mean.sum(dim=-1, keepdim=True))
            # Taken after the window's columns are cut off, hence of the prefix's end: as the official code has it.
            mass.append(attention[..., -self.window :].sum(dim=-1).mean(dim=(1, 2)))
        norms = norms[:, : -self.window]
        norms = norms / norms.sum(dim=0 if self.normalize_over == "heads" else 1, keepdim=True)
        extra = (finite(torch.cat(means)), torch.cat(mass).mean())
        return LayerScore(finite(torch.cat(risks) * norms), torch.empty(0), extra)

    def rank(
        self, score: LayerScore, prompt_len: int, keep_ratio: float, counts: Sequence[int] | None = None
    ) -> torch.Tensor:
        """See :meth:`Policy.rank`: protected entries and the window share the layer's largest score."""
        mean, bias = score.extra
        prefix_len = score.indicator.shape[1]
        order = mean.sort(dim=-1, descending=True)
        crossed = order.values.cumsum(dim=-1) >= 0.9 - bias
        count = torch.where(crossed.any(dim=-1), crossed.int().argmax(dim=-1), prefix_len)
        most = int(prefix_len * keep_ratio - self.window)
        # A negative bound ends a slice from behind, as in the official code.
        count = count.clamp(max=most)
        count = torch.where(count < 0, count + prefix_len, count)
        is_protected = torch.zeros_like(score.indicator, dtype=torch.bool)
        place = torch.arange(prefix_len, device=mean.device)
        is_protected.scatter_(1, order.indices, place < count.unsqueeze(1))
        largest = score.indicator.max()
        ranks = torch.where(is_protected, largest, score.indicator)
        if self.protect_window:
            return ranks
        return torch.cat([ranks, largest.expand(len(ranks), self.window)], dim=1)

    def head_budgets(self, scores: Sequence[LayerScore], prompt_len: int, budget: float) -> list[list[int]]:
        """See :meth:`Policy.head_budgets`."""
        ranks = [self._rank_for(score, budget) for score in scores]
        return torch.stack([best_by_head(layer, self._candidates(layer, budget)) for layer in ranks]).tolist()

    def _rank_for(self, score: LayerScore, budget: float) -> torch.Tensor:
        length = score.indicator.shape[1] + self.window
        return self.ranks(score, length, budget / length)

    def _candidates(self, ranks: torch.Tensor, budget: float) -> int:
        """How many of one layer's candidates stay, over all heads."""
        num_heads = len(ranks)
        return min(max(int(budget * num_heads) - self.protected * num_heads, 0), ranks.numel())


@dataclass(frozen=True)
class LayerDefensiveKV(DefensiveKV):
    """DefensiveKV with one budget that all layers and heads compete for."""

    selection = "all"

    def head_budgets(self, scores: Sequence[LayerScore], prompt_len: int, budget: float) -> list[list[int]]:
        """See :meth:`Policy.head_budgets`: the best of all layers, scores compared as they are."""
        ranks = [self._rank_for(score, budget) for score in scores]
        return best_of_all(ranks, budget, self.protected)


def best_of_all(ranks: Sequence[torch.Tensor], budget: float, protected: int) -> list[list[int]]:
    """How many of each KV head's candidates are among the best of all layers and heads.

    Args:
        ranks: ``[Hkv, C]`` for each layer.
        budget: mean number of tokens that a head may keep.
        protected: of them, tokens that each keeps beside its candidates.
    """
    num_layers, num_heads = len(ranks), len(ranks[0])
    total = int(budget * num_heads * num_layers) - protected * num_heads * num_layers
    everything = torch.cat([layer.flatten() for layer in ranks])
    chosen = everything.topk(min(max(total, 0), len(everything)), sorted=False).indices
    ends = torch.tensor([layer.numel() for layer in ranks], device=chosen.device).cumsum(0)
    by_layer = torch.bincount(torch.bucketize(chosen, ends, right=True), minlength=num_layers).tolist()
    return torch.stack([best_by_head(*layer) for layer in zip(ranks, by_layer, strict=True)]).tolist()


def best_by_head(ranks: torch.Tensor, count: int) -> torch.Tensor:
    """``[Hkv]`` int64, how many of the ``count`` best entries of ``[Hkv, C]`` lie in each head."""
    chosen = ranks.flatten().topk(count, sorted=False).indices // ranks.shape[1]
    return torch.bincount(chosen, minlength=len(ranks))
