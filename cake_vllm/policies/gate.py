"""Gates."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from cake_vllm.policies.base import LayerInputs, LayerScore, Policy, Protect
from cake_vllm.policies.defensivekv import best_of_all
from cake_vllm.policies.scores import finite, heads_at_once, inherited, prefix_attention, require_window

#: As in :class:`cake_vllm.policies.echo.Echo`.
POOL_KERNEL, HALF_LIFE = 5, 12.0


@dataclass(frozen=True)
class Gate(Policy):
    """Entries that the model would need to say its context again stay, as far as one can tell by the entry itself.

    Of this project. KVzip (arXiv 2505.23416) lets a model repeat its context and keeps what the repetition attends to:
    what serves to say a text again serves for any question about it. KVzap (arXiv 2601.07891) learns the answer from
    hidden states. The cached key and value suffice: for each layer and KV head a linear map of their features
    (:func:`cake_vllm.policies.entries.features`) to the logarithm of KVzip's score, made once for a model by
    ``cake-vllm calibrate``. So an entry's worth depends on nothing but the entry: on no query, no chunk, no position.

    What the window's queries ask for comes on top: ``exp(min(gate, 0)) * (1 + evidence * seen / mean(seen))``, with
    ``seen`` the largest attention of the window, passed on to successors as :mod:`cake_vllm.policies.echo` has it.

    Attributes:
        window: number of last tokens which always stay, and whose queries judge beside the gates.
        evidence: weight of these queries; 0 for the gates alone, which look at no query.
        gates: the file that ``calibrate`` wrote; by default the one in its cache that fits the model.
        protect: the protected first positions pass nothing on; by default the attention sinks.
    """

    needs_values = True
    needs_gate = True
    selection = "all"

    window: int = 32
    evidence: float = 1.0
    gates: str = ""
    protect: Protect = field(default=Protect(first=4), kw_only=True)

    def __post_init__(self) -> None:
        require_window(self.window)
        if not 0 <= self.evidence < float("inf"):
            raise ValueError(f"evidence must be a number of at least 0, not {self.evidence}")

    @property
    def num_queries(self) -> int:
        """The window's, if they count."""
        return self.window if self.evidence else 0

    def score(self, inputs: LayerInputs) -> LayerScore:
        """See :meth:`Policy.score`."""
        assert inputs.gate is not None, "the policy says that it needs a gate"
        assert inputs.values is not None, "the policy says that it needs values"
        keys, values = inputs.keys[:, : -self.window], inputs.values[:, : -self.window]
        at_once = heads_at_once(keys.device, keys[0].numel() + values[0].numel())
        starts = range(0, len(keys), at_once)
        parts = zip(starts, keys.split(at_once), values.split(at_once), strict=True)
        rows = [inputs.gate.heads(slice(first, first + at_once))(*part) for first, *part in parts]
        worth = torch.cat(rows).clamp_(max=0).exp_()
        if self.evidence:
            worth *= 1 + self.evidence * self._seen(inputs)
        return LayerScore(finite(worth), torch.empty(0))

    def _seen(self, inputs: LayerInputs) -> torch.Tensor:
        """``[Hkv, C]``, what the window looks at, in units of its head's mean."""
        peak = torch.cat([weights.amax(dim=(1, 2)) for weights in prefix_attention(inputs)])
        seen = inherited(peak, POOL_KERNEL, HALF_LIFE, self.protect.first, inputs.valid)
        if inputs.valid is None:
            return seen / seen.mean(dim=-1, keepdim=True).clamp(min=1e-12)
        there = inputs.valid[:, : seen.shape[1]]
        mean = (seen * there).sum(dim=-1, keepdim=True) / there.sum(dim=-1, keepdim=True)
        return seen / mean.clamp(min=1e-12)

    def head_budgets(self, scores: Sequence[LayerScore], prompt_len: int, budget: float) -> list[list[int]]:
        """See :meth:`Policy.head_budgets`: the best of all layers and heads."""
        ranks = [self.ranks(score, prompt_len, min(1.0, budget / prompt_len)) for score in scores]
        return best_of_all(ranks, budget, self.protected)
