"""TriAttention."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from cake_vllm.policies.base import LayerInputs, LayerScore, Policy
from cake_vllm.policies.entries import Rotation
from cake_vllm.policies.scores import finite, heads_at_once, require_window


@dataclass(frozen=True)
class TriAttention(Policy):
    """Keys stay that a head's usual query would attend to, from many distances in the future.

    Paper: Mao et al., "TriAttention: Efficient Long Reasoning with Trigonometric KV Compression", arXiv 2604.04921,
    section 4, equations 6 to 13; numbers as in the official ``triattention/methods/pruning_utils.py``
    (``score_keys_for_round``), choices as in ``triattention.py`` beside it (``_select_per_layer_perhead_independent``).
    Before the rotary embedding turns them, queries of a head lie around a centre. With pairs of channels as complex
    numbers, ``q`` a head's queries and ``k`` a key that lies ``d`` positions before the next token, the key scores

        mean over ahead in 1, 2, 4, ..., reach:  sum over pairs:  |E q| |k| cos(speed * (d + ahead) + arg(E q) - arg(k))
        plus                                     sum over pairs:  (E |q| - |E q|) |k|

    These are standardised over all positions, for each query head, and a key counts by the largest of its group.

    It is a method for what is generated, which it evicts by default. As published prompts stay and the rest is scored
    once in 128 tokens: ``{"protect": {"prompt": true}, "every": 128}``.

    Deviations: means are over the window's queries, where the authors take other text's, from a file that is made of a
    model; their plugin for vLLM keeps the last 128 tokens, their code for papers none. Channels that are not turned add
    their products with ``E q``. Queries are taken to stand one behind the other, also where pictures have positions of
    more than one axis. Official noise of 1e-6 against ties is left out.

    Attributes:
        window: number of last tokens whose queries are averaged, and which always stay.
        reach: the farthest future position that is looked from, tokens.
    """

    needs_rotation = True
    decodes: ClassVar[tuple[str, ...]] = ("window", "off")

    window: int = 32
    reach: int = 65536

    def __post_init__(self) -> None:
        require_window(self.window)
        if self.reach < 1:
            raise ValueError(f"reach must be at least 1, not {self.reach}")

    def score(self, inputs: LayerInputs) -> LayerScore:
        """See :meth:`Policy.score`."""
        assert inputs.rotation is not None, "the policy says that it needs the rotation"
        rotation, num_kv_heads = inputs.rotation, len(inputs.keys)
        future, spread = (part.unflatten(0, (num_kv_heads, -1)) for part in self._usual(inputs.queries, rotation))
        at_once = heads_at_once(inputs.keys.device, inputs.keys[0].numel())
        worth = []
        for first in range(0, num_kv_heads, at_once):
            some = slice(first, first + at_once)
            keys = inputs.keys[some].float()
            scores = future[some] @ keys.mT + spread[some] @ rotation.norms(keys).mT
            worth.append(_standardized(scores, None if inputs.valid is None else inputs.valid[some]).amax(dim=1))
        return LayerScore(finite(torch.cat(worth)[:, : -self.window]), torch.empty(0))

    def _usual(self, queries: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """What a head's usual query is: ``[Hq, D]``, its centre at future positions, in the mean, as only angles differ
        there; and ``[Hq, size / 2]``, by how much norms of pairs exceed the centre's.
        """
        # As if all stood where the next token will.
        steps = torch.arange(queries.shape[1], 0, -1, device=queries.device)
        queries = rotation.turned(queries, steps)
        centre = queries.mean(dim=1)
        spread = rotation.norms(queries).mean(dim=1) - rotation.norms(centre)
        ahead = 2 ** torch.arange(self.reach.bit_length(), device=queries.device)
        return rotation.turned(centre.unsqueeze(1).expand(-1, len(ahead), -1), ahead).mean(dim=1), spread


def _standardized(scores: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """``[n, G, S]`` scores by their distance from each query head's mean over what is there, in standard deviations."""
    if valid is None:
        deviation, mean = torch.std_mean(scores, dim=-1, correction=0, keepdim=True)
    else:
        there, count = valid.unsqueeze(1), valid.sum(dim=-1)[:, None, None]
        mean = (scores * there).sum(dim=-1, keepdim=True) / count
        deviation = ((scores - mean).square() * there).sum(dim=-1, keepdim=True).div(count).sqrt()
    return (scores - mean) / deviation.clamp(min=1e-6)
