"""CAKE: Cascading and Adaptive KV cache Eviction with layer preferences."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cake_vllm.policies.base import LayerScore, Policy, total_tokens
from cake_vllm.policies.budgets import cascade, kept_after, proportional, settle
from cake_vllm.policies.scores import average_pool, prefix_attention

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
    """

    window: int = 32
    gamma: float = 200.0
    tau1: float = 1.0
    tau2: float = 1.0
    pool_kernel: int = 5
    cascade: bool = True

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"window must be at least 2 (a variance needs two queries), not {self.window}")
        if self.pool_kernel < 1 or self.pool_kernel % 2 == 0:
            raise ValueError(f"pool_kernel must be a positive odd number, not {self.pool_kernel}")
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(f"gamma must be a finite number of at least 0, not {self.gamma}")
        for name in ("tau1", "tau2"):
            tau = getattr(self, name)
            if not (math.isfinite(tau) and tau >= 0.1):
                raise ValueError(f"{name} must be a finite number of at least 0.1, not {tau}")

    def score(
        self, queries: torch.Tensor, keys: torch.Tensor, scale: float, logits_soft_cap: float = 0.0
    ) -> LayerScore:
        """See :meth:`Policy.score`; ``terms`` are ``(H, V)``."""
        rows = []
        terms = torch.zeros(2, device=keys.device)
        for attention in prefix_attention(queries, keys, scale, logits_soft_cap):
            mean = attention.mean(dim=1)
            # Two passes: torch.var_mean along this axis is ten times slower on CPUs.
            variance = (attention - mean.unsqueeze(1)).square_().sum(dim=1) / (self.window - 1)
            terms[0] -= torch.sum(attention * torch.log(attention + 1e-10))
            terms[1] += variance.sum()
            rows.append(average_pool(mean + self.gamma * variance, self.pool_kernel).mean(dim=0))
        indicator = torch.nan_to_num(torch.stack(rows), nan=0.0)
        return LayerScore(indicator, torch.nan_to_num(terms, nan=0.0, posinf=0.0, neginf=0.0))

    def preferences(self, terms: torch.Tensor) -> list[float]:
        """Preference of each layer from ``[L, 2]`` terms; float64."""
        return [
            max(entropy, 0.0) ** (1 / self.tau1) * max(variance, 0.0) ** (1 / self.tau2)
            for entropy, variance in terms.tolist()
        ]

    def budgets(self, terms: torch.Tensor, prompt_len: int, budget: int) -> list[int]:
        """See :meth:`Policy.budgets`."""
        cap = prompt_len - self.window
        total = total_tokens(budget, self.window, len(terms))
        preferences = self.preferences(terms)
        if self.cascade:
            return kept_after(cascade(preferences, total, cap), cap)
        return [min(count, cap) for count in settle(proportional(preferences, total), total, cap)]
