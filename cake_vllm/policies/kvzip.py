"""KVzip."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cake_vllm.policies.base import LayerInputs, LayerScore, Policy
from cake_vllm.policies.defensivekv import best_of_all
from cake_vllm.policies.scores import finite, largest_attention, prefix_attention, require_window


@dataclass(frozen=True)
class KVzip(Policy):
    """What a repetition of the context attends to stays, for any question that comes later.

    Paper: Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", arXiv 2505.23416. An
    entry is worth the largest attention that any query of the repetition, in any head of its group, pays it, and all
    heads of all layers compete. The paper computes the repetition beside the request; here the prompt carries it:
    context, an instruction to repeat it, the context again, and at the end, within the window, what is asked. What lies
    between the context and the window judges and goes first. The attention is the model's own, over the whole prompt;
    the paper's is over the context and the part of the repetition at hand.

    Attributes:
        window: number of last prompt tokens which always stay.
        context: tokens of the prompt that are repeated behind them. 0 if none are: the window's queries then judge.
    """

    # The score does not need them; whoever learns from it needs the whole entries.
    needs_values = True
    selection = "all"

    window: int = 32
    context: int = 0

    def __post_init__(self) -> None:
        require_window(self.window)
        if self.context < 0:
            raise ValueError(f"context must be a number of tokens of at least 0, not {self.context}")

    @property
    def takes_notes(self) -> bool:
        """If it knows where the repetition begins."""
        return self.context > 0

    def noted(self, start: int, end: int) -> range:
        """See :meth:`Policy.noted`: all behind the context."""
        return range(min(max(start, self.context), end), end)

    def note(self, inputs: LayerInputs, places: range, notes: torch.Tensor | None) -> torch.Tensor:
        """See :meth:`Policy.note`: the largest attention so far, and -1 for what lies behind the context."""
        peak = largest_attention(inputs, places, notes)
        if notes is not None:
            peak[:, : notes.shape[1]].masked_fill_(notes < 0, -1)
        if places:
            peak[:, places.start :] = -1
        return peak

    def score(self, inputs: LayerInputs) -> LayerScore:
        """See :meth:`Policy.score`."""
        if inputs.notes is None:
            peak = torch.cat([weights.amax(dim=(1, 2)) for weights in prefix_attention(inputs)])
        else:
            peak = inputs.notes[:, : -self.window]
        return LayerScore(finite(peak), torch.empty(0))

    def head_budgets(self, scores: Sequence[LayerScore], prompt_len: int, budget: float) -> list[list[int]]:
        """See :meth:`Policy.head_budgets`: the best of all layers and heads."""
        ranks = [self.ranks(score, prompt_len, min(1.0, budget / prompt_len)) for score in scores]
        return best_of_all(ranks, budget, self.protected)
