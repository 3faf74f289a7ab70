"""CAKE: Cascading and Adaptive KV cache Eviction with layer preferences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from cake_vllm.policies.base import LayerInputs, LayerScore, Policy, total_tokens
from cake_vllm.policies.budgets import cascade, kept_after, proportional, settle
from cake_vllm.policies.scores import (
    SINKS,
    attention,
    average_pool,
    echoed,
    finite,
    prefix_attention,
    require_echo,
    require_odd,
    require_window,
)

#: Temperatures ``(tau1, tau2)`` of the official repository, by model and by the cache size they were tuned for.
PRESETS: Mapping[str, tuple[float, float]] = {
    "llama3.1-8b@1024": (1.6, 0.4),
    "mistral-0.3-7b@1024": (0.8, 0.5),
    "qwen2.5-7b@1024": (1.5, 0.6),
    "llama2-7b@1024": (1.9, 1.8),
    "llama2-13b@1024": (0.5, 0.4),
    "llama3.1-8b@128": (1.6, 0.6),
    "mistral-0.3-7b@128": (1.0, 0.8),
    "qwen2.5-7b@128": (0.4, 0.6),
    "llama2-7b@128": (0.9, 2.3),
    "llama2-13b@128": (1.8, 2.0),
}


@dataclass(frozen=True)
class Cake(Policy):
    """Layers with wide and shifting attention keep more; tokens with high or volatile attention stay.

    Paper: Qin et al., "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences", arXiv 2503.12491
    (ICLR 2025); code: antgroup/cakekv. A layer's preference is ``H ** (1 / tau1) * V ** (1 / tau2)``: ``H`` the
    entropy of the window's attention on the prefix, ``V`` its variance over the window's queries, both summed over
    heads. The layers share ``(budget - window) * L`` tokens in proportion; with ``cascade`` the division is redone
    after every layer of the prefill over the layers seen so far. Inside a layer a position is worth
    ``mean + gamma * variance`` of the attention it gets from the window.

    Deviation: sums and powers run in float32 and float64 whatever the model's dtype; the official code casts the
    attention back to half precision first.

    Attributes:
        window: number of last prompt tokens whose queries judge, and which always stay.
        gamma: weight of the variance in the indicator.
        tau1: temperature of the entropy.
        tau2: temperature of the variance.
        pool_kernel: width of the average pooling over positions, odd.
        cascade: redivide after each layer (official default), or once at the end.
        echo: half-life in positions with which successors inherit a position's worth (:func:`echoed`); 0 as published.
    """

    decodes = ("cake", "off", "window")

    window: int = 32
    gamma: float = 200.0
    tau1: float = 1.0
    tau2: float = 1.0
    pool_kernel: int = 5
    cascade: bool = True
    echo: float = 0.0

    def __post_init__(self) -> None:
        require_window(self.window, at_least=2)
        require_odd("pool_kernel", self.pool_kernel)
        require_echo(self.echo)
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(f"gamma must be a finite number of at least 0, not {self.gamma}")
        for name in ("tau1", "tau2"):
            tau = getattr(self, name)
            if not (math.isfinite(tau) and tau >= 0.1):
                raise ValueError(f"{name} must be a finite number of at least 0.1, not {tau}")

    def is_evicted(self, prompt_len: int, budget: int) -> bool:
        """The official code lets a prompt grow by the window before it evicts."""
        return prompt_len > budget + self.window

    def score(self, inputs: LayerInputs) -> LayerScore:
        """See :meth:`Policy.score`; ``terms`` are ``(H, V)``."""
        rows = []
        terms = torch.zeros(2, device=inputs.keys.device)
        for weights in prefix_attention(inputs):
            terms[0] -= (weights + 1e-10).log_().mul_(weights).sum()
            mean = weights.mean(dim=2)
            # Two passes: torch.var_mean along this axis is ten times slower on CPUs. In place: fresh memory is slow.
            variance = weights.sub_(mean.unsqueeze(2)).square_().sum(dim=2) / (self.window - 1)
            terms[1] += variance.sum()
            rows.append((mean + self.gamma * variance).mean(dim=1))
        terms = torch.nan_to_num(terms, nan=0.0, posinf=0.0, neginf=0.0)
        pooled = average_pool(torch.cat(rows), self.pool_kernel)
        return LayerScore(finite(echoed(pooled, self.echo, inputs.valid, SINKS + self.pool_kernel // 2)), terms)

    def preferences(self, scores: Sequence[LayerScore]) -> list[float]:
        """Preference of each layer; float64."""
        terms = torch.stack([score.terms for score in scores]).tolist()
        return [
            max(entropy, 0.0) ** (1 / self.tau1) * max(variance, 0.0) ** (1 / self.tau2) for entropy, variance in terms
        ]

    def budgets(self, scores: Sequence[LayerScore], prompt_len: int, budget: float) -> list[int]:
        """See :meth:`Policy.budgets`."""
        cap = prompt_len - self.window
        total = total_tokens(budget, self.window, len(scores))
        preferences = self.preferences(scores)
        if self.cascade:
            return kept_after(cascade(preferences, total, cap), cap)
        return [min(count, cap) for count in settle(proportional(preferences, total), total, cap)]

    def trim(self, inputs: LayerInputs, count: int) -> torch.Tensor:
        """See :meth:`Policy.trim` (official decode stage).

        Only the current query judges; there is no variance and no history. Scores are pooled in *cache order*,
        which after an eviction is not the order of positions. The indices come in the official cache order: the
        best by descending score, then the last ``w``.

        In the paged engine this runs once per block instead of once per token: when a layer holds one full block
        more than its budget needs, it gives one back; and the cache stays in ascending order.
        """
        best = self.trim_ranks(inputs, count).topk(count, dim=-1).indices
        num_heads, num_cached, _ = inputs.keys.shape
        last = torch.arange(num_cached - self.window, num_cached, device=best.device)
        return torch.cat([best, last.expand(num_heads, -1)], dim=1)

    def trim_ranks(self, inputs: LayerInputs, count: int) -> torch.Tensor:
        """``[Hkv, N - w]`` float32 by which :meth:`trim` chooses ``count`` of the ``N`` cached entries."""
        num_cached = inputs.keys.shape[1]
        weights = torch.cat(list(attention(inputs, range(num_cached - 1, num_cached))))[:, :, 0, : -self.window]
        pooled = average_pool(weights, self.pool_kernel).mean(dim=1)
        ranks = finite(echoed(pooled, self.echo, None, SINKS + self.pool_kernel // 2))
        return self.raise_spans(ranks, inputs, count + self.window)


@dataclass(frozen=True)
class CakeUniform(Cake):
    """CAKE's indicator with the same budget for every layer: what its layer preferences are worth (an ablation)."""

    def budgets(self, scores: Sequence[LayerScore], prompt_len: int, budget: float) -> list[int]:
        """See :meth:`Policy.budgets`."""
        return Policy.budgets(self, scores, prompt_len, budget)


@dataclass(frozen=True)
class CakeMean(Cake):
    """CAKE's budgets with the mean attention as indicator: what its variance term is worth (an ablation)."""

    gamma: float = 0.0
