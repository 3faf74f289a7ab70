"""KeyDiff."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cake_vllm.policies.base import LayerInputs, LayerScore, Policy
from cake_vllm.policies.scores import finite


@dataclass(frozen=True)
class KeyDiff(Policy):
    """Keys that point away from the mean key stay. No query is looked at and no window is kept.

    Paper: Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference",
    arXiv 2504.15364. The anchor is the mean of the normalised keys, per head.
    """

    def score(self, inputs: LayerInputs) -> LayerScore:
        """See :meth:`Policy.score`."""
        keys = inputs.keys.float()
        anchor = F.normalize(keys, dim=-1).mean(dim=1, keepdim=True)
        return LayerScore(finite(-F.cosine_similarity(keys, anchor, dim=-1)), torch.empty(0))
