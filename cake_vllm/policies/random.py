"""Random eviction."""

from dataclasses import dataclass

import torch

from cake_vllm.policies.base import LayerInputs, LayerScore, Policy


@dataclass(frozen=True)
class Random(Policy):
    """Positions stay by lot, each head's by its own: a floor for evaluations.

    Attributes:
        seed: with the layer and the prompt's length it decides everything.
        recent: number of last tokens that always stay, as in "Random Attention", arXiv 2609.03430, for what is
            generated.
    """

    seed: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        if self.recent < 0:
            raise ValueError(f"recent must be at least 0, not {self.recent}")

    @property
    def protected(self) -> int:
        """The last tokens."""
        return self.recent

    def score(self, inputs: LayerInputs) -> LayerScore:
        """See :meth:`Policy.score`."""
        num_kv_heads, prompt_len, _ = inputs.keys.shape
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * inputs.layer_index + prompt_len)
        lots = torch.rand(num_kv_heads, prompt_len, generator=generator)[:, : prompt_len - self.recent]
        return LayerScore(lots.to(inputs.keys.device), torch.empty(0))
