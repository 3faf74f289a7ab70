"""Random eviction."""

from dataclasses import dataclass

import torch

from cake_vllm.policies.base import LayerInputs, LayerScore, Policy


@dataclass(frozen=True)
class Random(Policy):
    """Positions stay by lot: a floor for evaluations.

    Attributes:
        seed: with the layer and the prompt's length it decides everything.
    """

    seed: int = 0

    def score(self, inputs: LayerInputs) -> LayerScore:
        """See :meth:`Policy.score`."""
        num_kv_heads, prompt_len, _ = inputs.keys.shape
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * inputs.layer_index + prompt_len)
        lots = torch.rand(num_kv_heads, prompt_len, generator=generator)
        return LayerScore(lots.to(inputs.keys.device), torch.empty(0))
