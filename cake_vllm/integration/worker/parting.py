"""What a cut keeps of a prompt and, where it gives, too, of what was generated: each by scores and a budget of its own.

The scheduler half says how many tokens each part keeps (:mod:`cake_vllm.integration.scheduler.outputs`). The prompt is
worth what its own window saw in it; what was generated, what the last queries before the cut see in it, among all that
there is. A head holds the parts one behind the other, and what was generated last stays:

    position   | prompt with gaps ... its window | generated, with gaps | recent |
    chosen     |        best by the prompt's     |  best by the last    |  all   |
               |        scores, and the window   |  queries             |        |

Pages are filled up with what is next in both parts, in proportion to what each was given.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from cake_vllm.integration.messages import Parts
from cake_vllm.integration.worker.dividing import Choice, settled
from cake_vllm.integration.worker.watched import Worth
from cake_vllm.policies import LayerScore, Policy, Protect, merged_ranks


def part(
    policy: Policy,
    scores: Sequence[LayerScore],
    choice: Choice,
    worth: Worth,
    parts: Parts,
    prompt_len: int,
    end: int,
    group: Any,
    is_traced: bool,
) -> None:
    """Divides both parts' budgets, and fills a choice in.

    Args:
        policy: of the request.
        scores: of all layers, over what they read; by the queries before the cut.
        choice: what it reads, of which the recent tokens stay; modified.
        worth: of its prompt, and what it holds.
        parts: tokens of each part.
        prompt_len: where the prompt ended, tokens.
        end: logical length, tokens.
        group: tensor-parallel ranks.
        is_traced: whether :attr:`Choice.ranks` is wanted.
    """
    by_head, window, num_heads = policy.selection != "layer", policy.protected, len(scores[0].indicator)
    positions = [worth.positions(layer, reads, end) for layer, reads in enumerate(choice.reads)]
    generated = [
        _generated(score, place, prompt_len, reads.length - parts.recent)
        for score, place, reads in zip(scores, positions, choice.reads, strict=True)
    ]
    # What is protected lies in prompts.
    plain, budget = replace(policy, protect=Protect()), parts.generated - parts.recent + window
    generated, given = settled(plain, generated, end, budget, group)
    stays = parts.prompt is None or parts.prompt >= prompt_len
    of_prompt: list[LayerScore] = []
    given_prompt = [[prompt_len - window] * num_heads] * len(scores)
    if not stays:
        assert parts.prompt is not None
        of_prompt, given_prompt = settled(policy, worth.scores, prompt_len, parts.prompt, group)
    chosen, counts = [], []
    for layer, (reads, place) in enumerate(zip(choice.reads, positions, strict=True)):
        most = [reads.length - missing - parts.recent for missing in reads.missing_tokens]
        in_prompt = [min(count, prompt_len - window) for count in given_prompt[layer]]
        ranks = torch.zeros(num_heads, prompt_len - window, device=place.device)
        if not stays:
            assert parts.prompt is not None
            ranks = policy.ranks(of_prompt[layer], prompt_len, min(1.0, parts.prompt / prompt_len), in_prompt)
        ranks = torch.nn.functional.pad(ranks, (0, window), value=float("inf"))
        behind = list(map(min, given[layer], most))
        ours = plain.ranks(generated[layer], reads.length, min(1.0, budget / reads.length), behind)
        both = [count + window for count in in_prompt]
        place = place[:, : reads.length - parts.recent]
        merged = merged_ranks(
            (ranks.gather(1, place.clamp(0, prompt_len - 1)), (place >= 0) & (place < prompt_len), both),
            (ours[:, : place.shape[1]], place >= prompt_len, behind),
        )
        of_layer = [min(sum(pair), limit) for pair, limit in zip(zip(both, behind, strict=True), most, strict=True)]
        chosen.append(choice.best(layer, merged, of_layer, is_traced))
        counts.append(tuple(of_layer) if by_head else (of_layer[0],))
    choice.chosen, choice.counts = chosen, tuple(counts)


def _generated(score: LayerScore, positions: torch.Tensor, prompt_len: int, end: int) -> LayerScore:
    """A layer's scores with nothing there but what was generated, up to its ``end``-th entry."""
    valid = positions >= prompt_len
    valid[:, end:] = False
    indicator = score.indicator.masked_fill(~valid[:, : score.indicator.shape[1]], float("-inf"))
    return replace(score, indicator=indicator, valid=valid, media=None)


def keep_positions(worth: Worth, choice: Choice, end: int) -> None:
    """What all layers hold from now on."""
    assert choice.chosen is not None
    for layer, (reads, chosen) in enumerate(zip(choice.reads, choice.chosen, strict=True)):
        places: list[torch.Tensor] = []
        for row, head in zip(worth.positions(layer, reads, end), chosen, strict=True):
            places.append(torch.cat([row[head], row[reads.full_len :]]))
        worth.places[layer] = places
