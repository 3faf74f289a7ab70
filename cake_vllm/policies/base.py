"""The contract of an eviction policy: score, budget, keep.

Three pure steps. They take and return plain tensors and integers, know no model and no engine, and never change
their inputs:

    score   window queries and keys of one layer   ->  LayerScore
    budget  the terms of all layers                ->  tokens to keep per layer, beside the window
    keep    scores and a count                     ->  positions per KV head

Symbols used in every docstring: ``L`` layers, ``Hq`` query heads, ``Hkv`` KV heads (query head ``h`` reads KV head
``h // (Hq // Hkv)``), ``D`` head size, ``S`` prompt length, ``w`` window. Positions are 0-based; the *window* is
``[S - w, S)`` and is always kept, the *prefix* is ``[0, S - w)``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerScore:
    """What a layer's keys are worth, and what the layer tells the budget step.

    Attributes:
        indicator: ``[Hkv, S - w]`` float32, finite; the higher, the more a prefix position deserves to stay.
        terms: ``[T]`` float32; statistics of the layer that are *sums over query heads*, so that ranks which hold
            different heads of one layer add theirs up before the budget step.
    """

    indicator: torch.Tensor
    terms: torch.Tensor


class Policy(ABC):
    """An eviction policy; implementations are frozen dataclasses whose fields are the knobs of the paper."""

    window: int

    @abstractmethod
    def score(
        self, queries: torch.Tensor, keys: torch.Tensor, scale: float, logits_soft_cap: float = 0.0
    ) -> LayerScore:
        """Scores the prefix of one layer.

        Args:
            queries: ``[Hq, w, D]``, any float dtype: the post-RoPE queries of positions ``[S - w, S)``.
            keys: ``[Hkv, S, D]``, any float dtype: the post-RoPE keys of the whole prompt, ``S > w``.
            scale: factor on the logits ``q . k``, usually ``D ** -0.5``.
            logits_soft_cap: if positive, logits pass through ``cap * tanh(logits / cap)`` as the model's own do.
        """

    @abstractmethod
    def budgets(self, terms: torch.Tensor, prompt_len: int, budget: int) -> list[int]:
        """Divides the tokens among the layers.

        Args:
            terms: ``[L, T]`` float32, one row of :attr:`LayerScore.terms` per layer, in model order.
            prompt_len: ``S``.
            budget: mean number of tokens that a layer may keep, the window included; ``budget >= w``.

        Returns:
            ``L`` counts ``n`` of prefix positions to keep in each KV head of a layer, ``0 <= n <= S - w``.
        """

    def is_evicted(self, prompt_len: int, budget: int) -> bool:
        """Whether a prompt of ``prompt_len`` tokens loses any under ``budget``."""
        return prompt_len > budget + self.window

    def keep(self, score: LayerScore, count: int) -> torch.Tensor:
        """Positions that stay: the ``count`` best of the prefix, and the window.

        Returns:
            ``[Hkv, count + w]`` int64, ascending along the last axis.
        """
        indicator = score.indicator
        num_kv_heads, prefix_len = indicator.shape
        best = indicator.topk(count, dim=-1).indices.sort(dim=-1).values
        window = torch.arange(prefix_len, prefix_len + self.window, device=indicator.device)
        return torch.cat([best, window.expand(num_kv_heads, -1)], dim=-1)


def total_tokens(budget: int, window: int, num_layers: int) -> int:
    """Prefix tokens that all layers together may keep under a mean ``budget`` per layer, windows aside."""
    return (budget - window) * num_layers


def as_counts(values: Sequence[float]) -> list[int]:
    """Truncates towards zero, as the reference implementations do."""
    return [int(value) for value in values]
