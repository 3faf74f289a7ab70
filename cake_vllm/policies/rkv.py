"""R-KV."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from cake_vllm.policies.base import LayerInputs, LayerScore, Policy
from cake_vllm.policies.scores import attention_logits, finite, require_fraction, require_odd, require_window

#: Rows of similarities that are looked at together.
AT_ONCE = 512


@dataclass(frozen=True)
class RKV(Policy):
    """Tokens that are attended to stay, and of those that say the same again the last.

    Paper: Cai et al., "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models", arXiv 2505.24133; numbers as
    in the official ``rkv/compression/r1_kv.py`` and ``rkv/utils.py``. Importance is the window's mean attention on what
    lies before it, by the largest logit of a group's heads, and the largest of ``pool_kernel`` neighbours. Redundancy
    is the softmax over a key's mean cosine similarity with all others; before the mean each key forgives the last one
    that is similar to it. The score is ``mix * importance - (1 - mix) * redundancy``.

    It is a method for what is generated, which it evicts by default. Scoring takes time in the square of what a head
    holds: as long as the budget is small that is little, a prompt of tens of thousands of tokens is another matter.

    Deviation: a model's sinks (:attr:`LayerInputs.sinks`) take part in the softmax, a group's by its largest.

    Attributes:
        window: number of last tokens whose queries judge, and which always stay.
        pool_kernel: width of the maximum over neighbours, odd.
        mix: share of importance, in [0, 1].
        similar: cosine above which a key is forgiven.
    """

    decodes: ClassVar[tuple[str, ...]] = ("window", "off")

    window: int = 8
    pool_kernel: int = 7
    mix: float = 0.07
    similar: float = 0.5

    def __post_init__(self) -> None:
        require_window(self.window)
        require_odd("pool_kernel", self.pool_kernel)
        require_fraction("mix", self.mix)
        require_fraction("similar", self.similar)

    def score(self, inputs: LayerInputs) -> LayerScore:
        """See :meth:`Policy.score`."""
        importance = torch.cat(list(self._importance(inputs)))
        redundancy = torch.stack([self._redundancy(inputs, head) for head in range(len(inputs.keys))])
        score = self.mix * importance - (1 - self.mix) * redundancy[:, : importance.shape[1]]
        return LayerScore(finite(score), torch.empty(0))

    def _importance(self, inputs: LayerInputs) -> Iterator[torch.Tensor]:
        """``[1, N]`` float32 of each KV head."""
        groups, length = inputs.queries.unflatten(0, (len(inputs.keys), -1)), inputs.keys.shape[1] - self.window
        for head, (queries, keys) in enumerate(zip(groups, inputs.keys, strict=True)):
            logits = attention_logits(queries[None], keys[None, :length], inputs.scale, inputs.logits_soft_cap)
            largest = logits[0].amax(dim=0)
            if inputs.valid is not None:
                largest = largest.masked_fill(~inputs.valid[head, :length], float("-inf"))
            if inputs.sinks is not None:
                sink = inputs.sinks.unflatten(0, (len(inputs.keys), -1))[head].float().amax()
                largest = torch.cat([largest, sink.expand(self.window, 1)], dim=1)
            weights = largest.softmax(dim=-1)[:, :length].mean(dim=0, keepdim=True)
            yield F.max_pool1d(weights, self.pool_kernel, stride=1, padding=self.pool_kernel // 2)

    def _redundancy(self, inputs: LayerInputs, head: int) -> torch.Tensor:
        """``[S]`` float32 of a KV head."""
        # What is not there is zero, and similar to nothing.
        keys = inputs.keys[head].float()
        keys = keys / (torch.linalg.vector_norm(keys, dim=-1, keepdim=True) + 1e-8)
        length = len(keys)
        place, total = torch.arange(length, device=keys.device), torch.zeros(length, device=keys.device)
        for start in range(0, length, AT_ONCE):
            own = place[start : start + AT_ONCE].unsqueeze(1)
            similarity = (keys[start : start + AT_ONCE] @ keys.T).scatter_(1, own, 0)
            # Where none is, the first, as there.
            last = (place * (similarity > self.similar)).amax(dim=1, keepdim=True)
            total += similarity.scatter_(1, last, 0).sum(dim=0)
        if inputs.valid is None:
            return (total / length).softmax(dim=0)
        there = inputs.valid[head]
        return (total / there.sum()).masked_fill(~there, float("-inf")).softmax(dim=0)
