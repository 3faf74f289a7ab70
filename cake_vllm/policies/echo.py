"""Echo."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch

from cake_vllm.policies.base import LayerInputs, LayerScore, Policy, Protect
from cake_vllm.policies.defensivekv import LayerDefensiveKV, best_of_all
from cake_vllm.policies.scores import (
    better_ranks,
    finite,
    inherited,
    largest_attention,
    prefix_attention,
    projected_values,
    require_echo,
    require_odd,
    require_window,
)

#: Positions just before a query that every query looks at.
NEAR = 64


@dataclass(frozen=True)
class Echo(Policy):
    """Spans that the window's attention leads into stay, and what Layer-DefensiveKV protects.

    Of this project. The window's queries show only where an answer starts: heads that retrieve or copy attend to a
    position now and to the ones behind it in the next steps. So a position is worth the largest attention that any
    query of the window, in any head of the group, pays it or, decayed, one of the 63 positions before it; at least the
    mean of its head; times its head's share of the size of the projected values at this position. What needs no echo
    is found by Layer-DefensiveKV's score as published. An entry counts by the better of its two ranks among all
    layers, heads and positions.

    A question that is not in the window, in a later turn or, under progressive prefill, a later chunk, is not seen by
    it. The prompt's own queries partly know what will be looked for: with ``observe`` some of them judge like the
    window's, by what they pay positions further behind them than 64, and their ranking is the third.

    Attributes:
        window: number of last prompt tokens whose queries judge, and which always stay.
        pool_kernel: width of the pooling over positions, odd.
        echo: positions after which an inherited worth is halved; 0 for none.
        observe: every how many-th query of the whole prompt judges beside the window; 0 for none, which is the default
            but under progressive prefill (8).
        protect: the protected first positions pass nothing on; by default the attention sinks.
    """

    needs_values = True
    needs_output_weight = True
    selection = "all"
    when_progressive = MappingProxyType({"observe": 8})

    window: int = 32
    pool_kernel: int = 5
    echo: float = 12.0
    observe: int = 0
    protect: Protect = field(default=Protect(first=4), kw_only=True)

    def __post_init__(self) -> None:
        require_window(self.window)
        require_odd("pool_kernel", self.pool_kernel)
        require_echo(self.echo)
        if self.observe < 0:
            raise ValueError(f"observe must be at least 0, not {self.observe}")

    @property
    def _published(self) -> LayerDefensiveKV:
        return LayerDefensiveKV(self.window, self.pool_kernel)

    @property
    def takes_notes(self) -> bool:
        """If queries of the whole prompt are asked for."""
        return self.observe > 0

    def noted(self, start: int, end: int) -> range:
        """See :meth:`Policy.noted`: whatever the chunks, the multiples of :attr:`observe`."""
        return range(start + -start % self.observe, end, self.observe)

    def note(self, inputs: LayerInputs, places: range, notes: torch.Tensor | None) -> torch.Tensor:
        """See :meth:`Policy.note`: the largest attention of any query to what lies further behind it than 64."""
        return largest_attention(inputs, places, notes, NEAR)

    def score(self, inputs: LayerInputs) -> LayerScore:
        """See :meth:`Policy.score`; ``extra`` are Layer-DefensiveKV's indicator and extra, and the notes' worth."""
        peaks: list[torch.Tensor] = []

        def seen() -> Iterator[torch.Tensor]:
            for weights in prefix_attention(inputs):
                peaks.append(weights.amax(dim=(1, 2)))
                yield weights

        sums, largest = [], []
        for values in projected_values(inputs):
            largest.append(torch.linalg.vector_norm(values, dim=-1).amax(dim=1))
            sums.append(values.abs_().sum(dim=-1).mean(dim=1))
        published = self._published.score_of(inputs, seen(), torch.cat(sums, dim=-1))
        norms = torch.cat(largest, dim=-1)[:, : -self.window]
        shares = norms / norms.sum(dim=0)
        indicator = self._worth(torch.cat(peaks), inputs.valid) * shares
        extra = (published.indicator, *published.extra)
        if inputs.notes is not None:
            extra += (finite(self._worth(inputs.notes[:, : -self.window], inputs.valid) * shares),)
        return LayerScore(finite(indicator), torch.empty(0), extra)

    def _worth(self, peak: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """``[Hkv, N]`` of the largest attention to each position."""
        return inherited(peak, self.pool_kernel, self.echo, self.protect.first, valid)

    def settle(self, scores: Sequence[LayerScore], budget: float) -> Sequence[LayerScore]:
        """See :meth:`Policy.settle`: the best of the ranks among all layers becomes the indicator."""
        published = []
        for score in scores:
            prefix_len = score.indicator.shape[1]
            length = prefix_len + self.window
            theirs = replace(score, indicator=score.extra[0], extra=score.extra[1:3], media=None)
            published.append(self._published.ranks(theirs, length, min(1.0, budget / length))[:, :prefix_len])
        rankings = [published, [score.indicator for score in scores]]
        if len(scores[0].extra) > 3:
            rankings.append([score.extra[3] for score in scores])
        joined = better_ranks(*rankings)
        return [replace(score, indicator=indicator) for score, indicator in zip(scores, joined, strict=True)]

    def head_budgets(self, scores: Sequence[LayerScore], prompt_len: int, budget: float) -> list[list[int]]:
        """See :meth:`Policy.head_budgets`: the best of all layers and heads."""
        ranks = [self.ranks(score, prompt_len, min(1.0, budget / prompt_len)) for score in scores]
        return best_of_all(ranks, budget, self.protected)
