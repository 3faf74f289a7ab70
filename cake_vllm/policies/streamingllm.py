"""StreamingLLM."""

from dataclasses import dataclass

import torch

from cake_vllm.policies.base import LayerInputs, LayerScore, Policy


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """The first few tokens (attention sinks) and the most recent ones stay, whatever the prompt says.

    Paper: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453.

    Attributes:
        n_sink: number of first tokens that stay.
    """

    n_sink: int = 4

    def __post_init__(self) -> None:
        if self.n_sink < 0:
            raise ValueError(f"n_sink must be at least 0, not {self.n_sink}")

    @property
    def floor(self) -> int:
        """The sinks, and recent tokens."""
        return self.n_sink + 32

    def score(self, inputs: LayerInputs) -> LayerScore:
        """See :meth:`Policy.score`: later is better, and the sinks are best."""
        num_kv_heads, prompt_len, _ = inputs.keys.shape
        worth = torch.arange(prompt_len, dtype=torch.float32, device=inputs.keys.device)
        worth[: self.n_sink] = prompt_len
        return LayerScore(worth.expand(num_kv_heads, -1), torch.empty(0))
