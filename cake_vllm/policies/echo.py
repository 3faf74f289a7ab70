"""Echo."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from cake_vllm.policies.base import LayerInputs, LayerScore, Policy, Protect, leading
from cake_vllm.policies.defensivekv import LayerDefensiveKV, best_of_all
from cake_vllm.policies.scores import (
    average_pool,
    better_ranks,
    echoed,
    finite,
    prefix_attention,
    projected_values,
    require_echo,
    require_odd,
    require_window,
)


@dataclass(frozen=True)
class Echo(Policy):
    """Spans that the window's attention leads into stay, and what Layer-DefensiveKV protects.

    Of this project. The window's queries show only where an answer starts: heads that retrieve or copy attend to a
    position now and to the ones behind it in the next steps. So a position is worth the largest attention that any
    query of the window, in any head of the group, pays it or, decayed, one of the 63 positions before it; at least the
    mean of its head; times its head's share of the size of the projected values at this position. What needs no echo
    is found by Layer-DefensiveKV's score as published. An entry counts by the better of its two ranks among all
    layers, heads and positions.

    Attributes:
        window: number of last prompt tokens whose queries judge, and which always stay.
        pool_kernel: width of the pooling over positions, odd.
        echo: positions after which an inherited worth is halved; 0 for none.
        protect: the protected first positions pass nothing on; by default the attention sinks.
    """

    needs_values = True
    needs_output_weight = True
    selection = "all"

    window: int = 32
    pool_kernel: int = 5
    echo: float = 12.0
    protect: Protect = field(default=Protect(first=4), kw_only=True)

    def __post_init__(self) -> None:
        require_window(self.window)
        require_odd("pool_kernel", self.pool_kernel)
        require_echo(self.echo)

    @property
    def _published(self) -> LayerDefensiveKV:
        return LayerDefensiveKV(self.window, self.pool_kernel)

    def score(self, inputs: LayerInputs) -> LayerScore:
        """See :meth:`Policy.score`; ``extra`` are indicator and extra of Layer-DefensiveKV's score."""
        peaks: list[torch.Tensor] = []

        def seen() -> Iterator[torch.Tensor]:
            for attention in prefix_attention(inputs):
                peaks.append(attention.amax(dim=(1, 2)))
                yield attention

        sums, largest = [], []
        for values in projected_values(inputs):
            largest.append(torch.linalg.vector_norm(values, dim=-1).amax(dim=1))
            sums.append(values.abs_().sum(dim=-1).mean(dim=1))
        published = self._published.score_of(inputs, seen(), torch.cat(sums, dim=-1))
        peak = torch.cat(peaks)
        peak.masked_fill_(leading(self.protect.first, peak, inputs.valid), 0)
        worth = echoed(average_pool(peak, self.pool_kernel), self.echo)
        mean = worth.mean(dim=-1, keepdim=True)
        if inputs.valid is not None:
            there = inputs.valid[:, : -self.window]
            mean = (worth * there).sum(dim=-1, keepdim=True) / there.sum(dim=-1, keepdim=True)
        norms = torch.cat(largest, dim=-1)[:, : -self.window]
        indicator = worth.maximum(mean) * (norms / norms.sum(dim=0))
        return LayerScore(finite(indicator), torch.empty(0), (published.indicator, *published.extra))

    def settle(self, scores: Sequence[LayerScore], budget: float) -> Sequence[LayerScore]:
        """See :meth:`Policy.settle`: the better of both ranks among all layers becomes the indicator."""
        published = []
        for score in scores:
            prefix_len = score.indicator.shape[1]
            length = prefix_len + self.window
            theirs = replace(score, indicator=score.extra[0], extra=score.extra[1:])
            published.append(self._published.ranks(theirs, length, min(1.0, budget / length))[:, :prefix_len])
        joined = better_ranks(published, [score.indicator for score in scores])
        return [replace(score, indicator=indicator) for score, indicator in zip(scores, joined, strict=True)]

    def head_budgets(self, scores: Sequence[LayerScore], prompt_len: int, budget: float) -> list[list[int]]:
        """See :meth:`Policy.head_budgets`: the best of all layers and heads."""
        ranks = [self.ranks(score, prompt_len, min(1.0, budget / prompt_len)) for score in scores]
        return best_of_all(ranks, budget, self.protected)
