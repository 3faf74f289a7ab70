"""A policy of somebody else's; the documentation shows it."""

from dataclasses import dataclass

import torch

from cake_vllm.policies import LayerInputs, LayerScore, Policy


@dataclass(frozen=True)
class ValueNorm(Policy):
    """Positions with large values stay, and the last few."""

    needs_values = True

    window: int = 16

    @property
    def num_queries(self) -> int:
        return 0

    def score(self, inputs: LayerInputs) -> LayerScore:
        norms = inputs.values.float().norm(dim=-1)
        return LayerScore(norms[:, : -self.window], torch.empty(0))
