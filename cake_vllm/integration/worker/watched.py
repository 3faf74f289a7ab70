"""What the worker half remembers of a request: between its steps, and between the layers of one."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from cake_vllm.integration.messages import Observation, Ranges
from cake_vllm.integration.worker.attention import select_rows
from cake_vllm.integration.worker.dealing import Reads
from cake_vllm.integration.worker.recent import Recent
from cake_vllm.kernels import to_device
from cake_vllm.policies import LayerScore, PagedPrompt


class Worth:
    """What the positions of a prompt are worth, kept for whenever memory is short; in half precision.

    Every cut chooses among all positions by the same scores, as far as they are still there: cut in several steps, a
    request keeps what it would keep if it were cut at once.

    Attributes:
        places: by layer, for each KV head the ``[n]`` ascending positions of the candidates that it holds; none before
            the first cut, when it holds them all.
    """

    def __init__(self, scores: Sequence[LayerScore]):
        self._scores = [_cast(score, torch.bfloat16) for score in scores]
        self.places: dict[int, list[torch.Tensor]] = {}

    @property
    def scores(self) -> list[LayerScore]:
        """Of all layers, over the whole prompt."""
        return [_cast(score, torch.float32) for score in self._scores]

    def in_cache(self, layer: int, ranks: torch.Tensor, missing: Sequence[int]) -> torch.Tensor:
        """``[Hkv, C]`` ranks of positions as ranks of what a layer holds, where ``missing`` entries are not there."""
        if layer not in self.places:
            return ranks
        rows = [row[place] for row, place in zip(ranks, self.places[layer], strict=True)]
        return torch.stack(
            [torch.nn.functional.pad(row, (n, 0), value=float("-inf")) for row, n in zip(rows, missing, strict=True)]
        )

    def keep(self, layer: int, chosen: Sequence[torch.Tensor], cached: PagedPrompt, missing: Sequence[int]) -> None:
        """What a layer holds from now on: of what it held, for each head the ``chosen`` entries of full blocks."""
        num_candidates = cached.prompt_len - cached.window
        rest = torch.arange(cached.full_len, max(num_candidates, cached.full_len), device=chosen[0].device)
        places = [torch.cat([head[head < num_candidates], rest]) - n for head, n in zip(chosen, missing, strict=True)]
        if layer in self.places:
            places = [before[head] for before, head in zip(self.places[layer], places, strict=True)]
        self.places[layer] = places


def _cast(score: LayerScore, dtype: torch.dtype) -> LayerScore:
    return replace(score, indicator=score.indicator.to(dtype), extra=tuple(tensor.to(dtype) for tensor in score.extra))


@dataclass
class Watched:
    """What is remembered of a request between its steps or, beside queries and worth, between the layers of one.

    Attributes:
        queries: by layer, the last queries computed so far, as many as the policy needs and those of drafts behind
            them.
        first: position from which on these are whole.
        length: logical length that they go up to at most.
        notes: by layer, the policy's notes on its prompt, one for each token that it holds: ``[Hkv, S, ...]``.
        media: by layer, which of the tokens that it holds are placeholders that stay: ``[Hkv, S]`` bool.
        rows: ``[groups][C]`` slices of its logical row in this step.
        reads: by layer, what it reads, if the request is to be evicted.
        scores: by layer, if the budget is to be divided.
        chosen: by layer, for each KV head the positions to keep, whole pages of them.
        error: what the policy raised.
        worth: of its prompt, once it was cut; in place of queries and notes.
    """

    queries: dict[int, Recent] = field(default_factory=dict)
    first: int = 0
    length: int = 0
    notes: dict[int, torch.Tensor] = field(default_factory=dict)
    media: dict[int, torch.Tensor] = field(default_factory=dict)
    rows: list[torch.Tensor] = field(default_factory=list)
    reads: dict[int, Reads] = field(default_factory=dict)
    scores: dict[int, LayerScore] = field(default_factory=dict)
    chosen: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    error: Exception | None = None
    worth: Worth | None = None

    def remember(self, scores: Sequence[LayerScore]) -> None:
        """What the prompt is worth, instead of what that was found by."""
        self.worth = Worth(scores)
        self.queries.clear()
        self.notes.clear()
        self.media.clear()

    def reach(self, what: Observation) -> None:
        """It is looked at in this step: whether queries are missing between those so far and this step's."""
        end = what.end + what.num_open
        if self.length < end - what.num_tokens:
            self.first = end - what.num_tokens
        self.length = end + what.num_drafts

    def mark(self, layer: int, reads: Reads, end: int, media: Ranges) -> None:
        """Finds placeholders among what a layer reads of a request that is ``end`` tokens long."""
        known = self.media.get(layer)
        num_new = reads.length - (0 if known is None else known.shape[1])
        marks = [False] * num_new
        for start, stop in media:
            # What was not there at the last eviction is there whole.
            first, behind = (min(max(place - end + num_new, 0), num_new) for place in (start, stop))
            marks[first:behind] = [True] * (behind - first)
        new = to_device(marks, torch.bool, reads.table.device).expand(len(reads.table), -1)
        self.media[layer] = new if known is None else torch.cat([known, new], dim=1)


@dataclass(frozen=True)
class Batched:
    """Where an observed request lies in the batch; on the device, so that nothing has to wait for it.

    Attributes:
        end: ``[1]``, behind its last query token.
        length: ``[1]``, its logical length after the step, drafts included.
        size: how many of the last queries are remembered.
    """

    what: Observation
    end: torch.Tensor
    length: torch.Tensor
    size: int

    def recent(self, query: torch.Tensor) -> torch.Tensor:
        """Its last queries of a step's ``[num_tokens, Hq, D]``, as many as are remembered, or all if there are fewer;
        those of drafts come last.
        """
        return select_rows(query, self.end + self._back)

    @cached_property
    def places(self) -> torch.Tensor:
        """``[n]``, where :class:`Recent` has these."""
        return (self.length + self._back) % self.size

    @cached_property
    def _back(self) -> torch.Tensor:
        count = min(self.size, self.what.num_tokens + self.what.num_drafts)
        return torch.arange(-count, 0, device=self.end.device)

    def at(self, query: torch.Tensor, positions: range) -> torch.Tensor:
        """Its queries at some positions of a prompt that are computed in this step."""
        ahead = positions.step * torch.arange(len(positions), device=query.device)
        behind = self.what.end + self.what.num_drafts - positions.start
        return select_rows(query, self.end - behind + ahead)
