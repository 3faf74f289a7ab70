"""LagKV."""

from dataclasses import dataclass

import torch

from cake_vllm.policies.base import LayerInputs, LayerScore, Policy
from cake_vllm.policies.scores import finite


@dataclass(frozen=True)
class LagKV(Policy):
    """Entries that are unusual among the ones a lag later stay. No query is looked at.

    Paper: Liang et al., "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important",
    arXiv 2504.04704; as kvpress computes it. Behind the sinks the prompt is cut into chunks of ``lag`` positions. Each
    chunk's keys, and its values, are scaled by the smallest and the largest number that every channel has in the next
    chunk; an entry scores by the deviation over its channels, as a softmax over its chunk, and counts by its rank in
    the chunk. The sinks, the last whole chunk and what is behind it come before all others.

    Deviation: where the budget is less than that, kvpress leaves open what stays; here the sinks, and the last ones.

    Attributes:
        lag: positions in a chunk.
        n_sink: number of first tokens that come first.
    """

    needs_values = True

    lag: int = 128
    n_sink: int = 4

    def __post_init__(self) -> None:
        if self.lag < 1:
            raise ValueError(f"lag must be at least 1, not {self.lag}")
        if self.n_sink < 0:
            raise ValueError(f"n_sink must be at least 0, not {self.n_sink}")

    @property
    def floor(self) -> int:
        """The sinks, and others."""
        return self.n_sink + 32

    def score(self, inputs: LayerInputs) -> LayerScore:
        """See :meth:`Policy.score`; prompts of less than two chunks keep the sinks and their end."""
        assert inputs.values is not None, "the policy says that it needs values"
        num_kv_heads, prompt_len, _ = inputs.keys.shape
        place = torch.arange(prompt_len, dtype=torch.float32, device=inputs.keys.device)
        worth = (1 + place / prompt_len).repeat(num_kv_heads, 1)
        worth[:, : self.n_sink] = 3
        num_chunks = max(prompt_len - self.n_sink, 0) // self.lag
        if num_chunks > 1:
            behind = self.n_sink + num_chunks * self.lag
            keys, values = (self._deviation(part[:, self.n_sink : behind]) for part in (inputs.keys, inputs.values))
            ranks = (keys + values).argsort(dim=-1).argsort(dim=-1) / self.lag
            worth[:, self.n_sink : behind - self.lag] = ranks.flatten(1)
        return LayerScore(finite(worth), torch.empty(0))

    def _deviation(self, states: torch.Tensor) -> torch.Tensor:
        """``[Hkv, n - 1, lag]`` of ``n`` chunks, ``[Hkv, n * lag, D]``."""
        chunks = states.float().unflatten(1, (-1, self.lag))
        least, most = chunks[:, 1:].amin(dim=2, keepdim=True), chunks[:, 1:].amax(dim=2, keepdim=True)
        return ((chunks[:, :-1] - least) / (most - least)).std(dim=-1).softmax(dim=-1)
