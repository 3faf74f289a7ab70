"""SnapKV."""

from dataclasses import dataclass

import torch

from cake_vllm.policies.base import LayerInputs, LayerScore, Policy
from cake_vllm.policies.scores import (
    SINKS,
    average_pool,
    echoed,
    finite,
    prefix_attention,
    require_echo,
    require_odd,
    require_window,
)


@dataclass(frozen=True)
class SnapKV(Policy):
    """Tokens that the end of the prompt attends to on average stay, with their neighbours; every layer alike.

    Paper: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469. As kvpress
    computes it: mean over the window's queries, average pooling per query head, mean over the group.

    Attributes:
        window: number of last prompt tokens whose queries judge, and which always stay.
        pool_kernel: width of the pooling over positions, odd.
        echo: half-life in positions with which successors inherit attention (:func:`echoed`); 0 as published.
    """

    window: int = 32
    pool_kernel: int = 5
    echo: float = 0.0

    def __post_init__(self) -> None:
        require_window(self.window)
        require_odd("pool_kernel", self.pool_kernel)
        require_echo(self.echo)

    def score(self, inputs: LayerInputs) -> LayerScore:
        """See :meth:`Policy.score`."""
        rows = [
            average_pool(attention.mean(dim=2), self.pool_kernel).mean(dim=1) for attention in prefix_attention(inputs)
        ]
        pooled = echoed(torch.cat(rows), self.echo, inputs.valid, SINKS + self.pool_kernel // 2)
        return LayerScore(finite(pooled), torch.empty(0))
