"""Key norms."""

from dataclasses import dataclass

import torch

from cake_vllm.policies.base import LayerInputs, LayerScore, Policy
from cake_vllm.policies.scores import finite


@dataclass(frozen=True)
class KNorm(Policy):
    """Keys of small L2 norm stay; they draw attention. No query is looked at and no window is kept.

    Paper: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv 2406.11430.
    """

    def score(self, inputs: LayerInputs) -> LayerScore:
        """See :meth:`Policy.score`."""
        return LayerScore(finite(-inputs.keys.float().norm(dim=-1)), torch.empty(0))
