"""TOVA."""

from dataclasses import dataclass

import torch

from cake_vllm.policies.base import LayerInputs, LayerScore, Policy
from cake_vllm.policies.scores import finite, prefix_attention


@dataclass(frozen=True)
class TOVA(Policy):
    """Tokens that the very last query attends to stay, the same ones in all heads.

    Paper: Oren et al., "Transformers are Multi-State RNNs", arXiv 2401.06104; as kvpress computes it.
    """

    @property
    def num_queries(self) -> int:
        """The last query only."""
        return 1

    @property
    def protected(self) -> int:
        """The last token itself."""
        return 1

    def score(self, inputs: LayerInputs) -> LayerScore:
        """See :meth:`Policy.score`."""
        mean = torch.cat(list(prefix_attention(inputs))).mean(dim=(0, 1, 2))
        return LayerScore(finite(mean).expand(len(inputs.keys), -1), torch.empty(0))
