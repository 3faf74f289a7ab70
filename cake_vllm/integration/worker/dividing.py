"""Dividing a request's budget among its owners: scores of all layers to positions that each head keeps."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cake_vllm.integration.messages import Counts
from cake_vllm.integration.worker.dealing import Reads
from cake_vllm.integration.worker.watched import Worth
from cake_vllm.policies import LayerScore, Policy


@dataclass
class Choice:
    """What a request keeps of what it reads.

    Attributes:
        reads: by layer.
        chosen: by layer, for each KV head the positions to keep, counted in what it reads; whole pages of them.
            ``None`` where nobody could choose: the request goes on reading what it reads.
        counts: candidates that the policy gave each owner; ``None``: as before, the budget was not divided.
        num_kept: last positions that the policy does not choose from; its window, and what was generated since.
        ranks: by layer, what positions were chosen by, if that is traced.
        error: what was raised.
    """

    reads: list[Reads]
    num_kept: int
    chosen: list[list[torch.Tensor]] | None = None
    counts: Counts | None = None
    ranks: dict[int, torch.Tensor] = field(default_factory=dict)
    error: Exception | None = None

    def best(self, layer: int, ranks: torch.Tensor, counts: list[int], is_traced: bool) -> list[torch.Tensor]:
        """The positions of a layer that stay, by head: whole pages of the best by ``[Hkv, C]`` ranks, for each head so
        many, and what stays in any case.
        """
        if is_traced:
            self.ranks[layer] = ranks
        cached = self.reads[layer].paged(self.num_kept)
        return cached.positions(ranks, [cached.pages(count) for count in counts])


def divide(
    policy: Policy,
    scores: Sequence[LayerScore],
    choice: Choice,
    budget: int,
    prompt_len: int,
    worth: Worth | None,
    group: Any,
    is_traced: bool,
) -> None:
    """Divides a budget, and fills a choice in.

    Layers compete over all tensor-parallel ranks, which add up their heads' statistics; heads inside a rank.

    Args:
        policy: of the request.
        scores: of all layers, over its prompt.
        choice: what it reads; modified.
        budget: mean tokens per layer, for the prompt.
        prompt_len: its logical length, tokens; what lies behind it stays.
        worth: where the scored positions are by now, if some were cut before; ``None``: all are there.
        group: tensor-parallel ranks.
        is_traced: whether :attr:`Choice.ranks` is wanted.
    """
    by_head = policy.selection != "layer"
    scores, given = settled(policy, scores, prompt_len, budget, group)
    chosen, counts = [], []
    for layer, (score, reads) in enumerate(zip(scores, choice.reads, strict=True)):
        missing = reads.missing_tokens
        most = [reads.length - absent - choice.num_kept for absent in missing]
        of_layer = list(map(min, given[layer], most))
        judged = prompt_len if worth else reads.length
        ranks = policy.ranks(score, judged, min(1.0, budget / judged), of_layer)
        if worth:
            ranks = worth.in_cache(layer, ranks, missing)
        chosen.append(choice.best(layer, ranks, of_layer, is_traced))
        counts.append(tuple(of_layer) if by_head else (of_layer[0],))
    choice.chosen, choice.counts = chosen, tuple(counts)


def settled(
    policy: Policy, scores: Sequence[LayerScore], length: int, budget: int, group: Any
) -> tuple[list[LayerScore], list[list[int]]]:
    """Scores of all layers as the choice sees them, and candidates for each layer and KV head; see :func:`divide`."""
    if policy.selection == "layer" and group.world_size > 1 and scores[0].terms.numel():
        terms = group.all_reduce(torch.stack([score.terms for score in scores]))
        scores = [replace(score, terms=of_layer) for score, of_layer in zip(scores, terms, strict=True)]
    scores = list(policy.settle(scores, budget))
    return scores, policy.head_budgets(scores, length, budget)
