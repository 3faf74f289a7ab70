"""The contract of an eviction policy: score, budget, keep.

Pure steps. They take and return plain tensors and numbers, know no model and no engine, and never change their
inputs:

    note    queries of a chunk, where the policy asks for some, and keys  ->  notes, one for each key
    score   one layer's queries, keys and what else the policy asks for   ->  LayerScore
    settle  the scores of all layers, where one cannot be had alone       ->  the scores of all layers
    budget  the scores of all layers                                      ->  tokens to keep per layer and per KV head
    keep    a layer's scores and counts                                   ->  positions per KV head

Who competes with whom for the budget is a choice of its own, :attr:`Policy.selection`.

Symbols used in every docstring: ``L`` layers, ``Hq`` query heads, ``Hkv`` KV heads (query head ``h`` reads KV head
``h // G``, ``G = Hq // Hkv``), ``D`` head size, ``S`` prompt length, ``w`` window. Positions are 0-based. The last
:attr:`Policy.protected` positions always stay; *candidates* are the ``C`` positions before them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from cake_vllm.policies.entries import LinearGate, Rotation


@dataclass(frozen=True)
class LayerInputs:
    """What a policy may look at in one layer, once the whole prompt has been computed.

    Attributes:
        queries: ``[Hq, q, D]``, any float dtype: post-RoPE queries of the last ``q`` = :attr:`Policy.num_queries`
            positions.
        keys: ``[Hkv, S, D]``, any float dtype, post-RoPE; ``S > q``.
        scale: factor on the logits ``q . k``, usually ``D ** -0.5``.
        logits_soft_cap: if positive, logits pass through ``cap * tanh(logits / cap)`` as the model's own do.
        values: ``[Hkv, S, Dv]`` if :attr:`Policy.needs_values`; ``Dv`` is nearly always ``D``.
        output_weight: ``[hidden, Hq * Dv]``, the weight of the projection that follows attention, if
            :attr:`Policy.needs_output_weight`.
        layer_index: rank of the layer in model order.
        budget: mean number of tokens that a layer may keep, protected ones included; ``None`` if that is not known.
        notes: ``[Hkv, S, ...]``, what :meth:`Policy.note` made of the prompt; ``None`` if it saw none of it, and when a
            cache is scored again.
        valid: ``[Hkv, S]`` bool, or ``None`` if everything is there. Once heads have kept different numbers of tokens
            their keys are aligned at the end, and a head with fewer has nothing where this is false: zeros as keys and
            values, no attention (:func:`cake_vllm.policies.scores.prefix_attention` sees to that). Such positions are
            never kept; a policy has to look at this only if it takes statistics over positions.
        gate: of the layer's KV heads if :attr:`Policy.needs_gate`.
        rotation: of the layer's queries and keys if :attr:`Policy.needs_rotation`.
        sinks: ``[Hq]``, any float dtype, if the model's softmax runs over one learned logit of each query head beside
            those of the keys; ``None`` if it has none. Weights then add up to less than one.
        media: ``[Hkv, S]`` bool, placeholders that stay because :attr:`Protect.media` says so, or ``None``; no policy
            has to look at it.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    scale: float
    logits_soft_cap: float = 0.0
    values: torch.Tensor | None = None
    output_weight: torch.Tensor | None = None
    layer_index: int = 0
    budget: float | None = None
    notes: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    gate: LinearGate | None = None
    rotation: Rotation | None = None
    sinks: torch.Tensor | None = None
    media: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerScore:
    """What a layer's keys are worth, and what the layer tells the budget step.

    Attributes:
        indicator: ``[Hkv, N]`` float32, finite; the higher, the more a position deserves to stay. ``N`` is ``C``
            unless the policy overrides :meth:`Policy.rank`.
        terms: ``[T]`` float32; statistics of the layer that are *sums over query heads*, so that ranks which hold
            different heads of one layer add theirs up before the budget step.
        extra: whatever else the policy wants to see again in :meth:`Policy.rank`.
        valid: see :attr:`LayerInputs.valid`; set by :meth:`Policy.judge`.
        media: the same, of :attr:`LayerInputs.media`.
    """

    indicator: torch.Tensor
    terms: torch.Tensor
    extra: tuple[torch.Tensor, ...] = ()
    valid: torch.Tensor | None = None
    media: torch.Tensor | None = None


@dataclass(frozen=True)
class Protect:
    """Spans of a prompt that stay in every layer and KV head, whatever the policy says.

    Attributes:
        first: leading positions, such as a chat template's and a system prompt's.
        boundary: share of the budget, in [0, 0.5], for both ends of the prompt: half of it for leading positions
            (:attr:`first` among them), half for the last ones before the window.
        media: whether what stands for pictures, videos and sounds stays.
        prompt: whether the whole prompt stays; the budget then is for what is generated.
    """

    first: int = 0
    boundary: float = 0.0
    media: bool = False
    prompt: bool = False

    def __post_init__(self) -> None:
        if self.first < 0:
            raise ValueError(f"protect: first must be at least 0, not {self.first}")
        if not 0 <= self.boundary <= 0.5:
            raise ValueError(f"protect: boundary must be a share of the budget from 0 to 0.5, not {self.boundary}")

    def spans(self, budget: float) -> tuple[int, int]:
        """Leading positions, and last ones before the window, that stay under ``budget`` tokens."""
        # Budgets come back from shares of a length, hence the little more.
        half = int(self.boundary * budget / 2 + 1e-6)
        return max(self.first, half), half


@dataclass(frozen=True)
class Policy(ABC):
    """An eviction policy; implementations are frozen dataclasses whose fields are the knobs of the paper.

    Attributes:
        protect: spans that stay beside the last :attr:`protected` positions; they are part of the budget.
        needs_values: whether :meth:`score` reads :attr:`LayerInputs.values`.
        needs_output_weight: whether it reads :attr:`LayerInputs.output_weight`.
        needs_gate: whether it reads :attr:`LayerInputs.gate`, which ``cake-vllm calibrate`` makes of a model; the file
            is that of a knob ``gates``, or the one that fits the model.
        needs_rotation: whether it reads :attr:`LayerInputs.rotation`, which layers without a rotary embedding have not.
        selection: who competes for the budget. ``"layer"``: layers, and all heads of a layer keep as many tokens
            (:meth:`budgets`); ``"heads"``: the heads of a layer too; ``"all"``: all heads of all layers with each other
            (:meth:`head_budgets`). Memory is freed accordingly: by layer, or by KV head.
        decodes: the ways in which it can evict generated tokens, its default first: ``"off"`` lets a request grow by
            its output, ``"window"`` scores the cache again with the last queries (:meth:`rescore`), ``"cake"`` with
            the current one (:meth:`trim`).
        when_progressive: knobs that have other defaults where a prompt is evicted after every chunk, before its
            question is known.
    """

    needs_values = False
    needs_output_weight = False
    needs_gate = False
    needs_rotation = False
    selection: ClassVar[str] = "layer"
    decodes: ClassVar[tuple[str, ...]] = ("off", "window")
    when_progressive: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    protect: Protect = field(default=Protect(), kw_only=True)

    @property
    def num_queries(self) -> int:
        """How many of the last queries :meth:`score` reads; by default the window."""
        return getattr(self, "window", 0)

    @property
    def protected(self) -> int:
        """How many of the last positions always stay; by default the window."""
        return getattr(self, "window", 0)

    @property
    def window_size(self) -> int:
        """The end of a prompt that a budget must exceed: what is protected, and what the scores are taken from."""
        return max(self.protected, self.num_queries)

    @property
    def floor(self) -> int:
        """The smallest budget, tokens: one more than the window or, of methods that keep none, what is left to choose.

        A fraction of a short prompt never means less, so that no prompt loses everything.
        """
        return self.window_size + 1 if self.window_size > 1 else 32

    @property
    def least_budget(self) -> int:
        """:attr:`floor`, and what is protected beside it."""
        return self.floor + self.protect.first

    def least_with(self, num_media: int) -> int:
        """:attr:`least_budget`, in which besides so many placeholders and both ends of the prompt stay."""
        if not num_media:
            return self.least_budget
        return math.ceil((self.least_budget + num_media) / (1 - self.protect.boundary))

    def is_evicted(self, prompt_len: int, budget: int) -> bool:
        """Whether a prompt of ``prompt_len`` tokens loses any under ``budget``."""
        return prompt_len > max(budget, self.window_size)

    @property
    def takes_notes(self) -> bool:
        """Whether :meth:`note` is to see the prompt while it is computed; if not, that costs nothing."""
        return False

    def noted(self, start: int, end: int) -> range:
        """Positions in ``[start, end)``, a chunk of the prompt, whose queries :meth:`note` is to see."""
        return range(0)

    def note(self, inputs: LayerInputs, places: range, notes: torch.Tensor | None) -> torch.Tensor:
        """Takes note of a chunk in one layer, once it has been computed.

        Chunks come in order, without those that the prefix cache has. What is evicted between them is gone from the
        keys and the notes; what is left is in order, aligned at the end like the keys.

        Args:
            inputs: keys so far, ``[Hkv, S, D]``, and the queries of :meth:`noted`, ``[Hq, n, D]``, which may be none;
                neither values nor the output projection.
            places: of the ``n`` queries' own keys among the ``S``, causal.
            notes: what was noted so far, ``[Hkv, S - new, ...]``; ``None`` at first, whatever ``S`` is.

        Returns:
            ``[Hkv, S, ...]``, which the request keeps until its prompt ends.
        """
        raise NotImplementedError

    @abstractmethod
    def score(self, inputs: LayerInputs) -> LayerScore:
        """Scores the positions of one layer."""

    def settle(self, scores: Sequence[LayerScore], budget: float) -> Sequence[LayerScore]:
        """The scores that the following steps see; by default those of :meth:`score`.

        For policies whose order of a layer's positions depends on other layers. Both steps that follow, and
        :meth:`rescore`, which knows one layer only, see what this returns.

        Args:
            scores: of all layers, in model order.
            budget: mean number of tokens that a layer may keep, protected ones included.
        """
        return scores

    def budgets(self, scores: Sequence[LayerScore], prompt_len: int, budget: float) -> list[int]:
        """Divides the tokens among the layers; by default equally.

        Args:
            scores: of all layers, in model order.
            prompt_len: ``S``.
            budget: mean number of tokens that a layer may keep, protected ones included.

        Returns:
            ``L`` counts of candidates to keep in each KV head, each in ``[0, C]``.
        """
        return [min(int(budget), prompt_len) - self.protected] * len(scores)

    def head_budgets(self, scores: Sequence[LayerScore], prompt_len: int, budget: float) -> list[list[int]]:
        """The counts per layer and KV head; by default the layer's for each of its heads.

        Layers divide what protected spans leave, as if these were not there.
        """
        spans, media = sum(self.protect.spans(budget)), scores[0].media
        if media is not None:
            spans += int(media[:, : media.shape[1] - self.protected].sum(dim=1).max())
        spans = min(spans, max(int(budget) - self.protected, 0))
        counts = [spans + count for count in self.budgets(scores, prompt_len - spans, budget - spans)]
        return [[count] * len(score.indicator) for count, score in zip(counts, scores, strict=True)]

    def judge(self, inputs: LayerInputs) -> LayerScore:
        """:meth:`score`, with what is not there below everything that is."""
        score = replace(self.score(inputs), media=inputs.media)
        if inputs.valid is None:
            return score
        indicator = _mask(score.indicator, inputs.valid)
        return replace(score, indicator=indicator, valid=inputs.valid)

    def ranks(
        self, score: LayerScore, prompt_len: int, keep_ratio: float, counts: Sequence[int] | None = None
    ) -> torch.Tensor:
        """:meth:`rank`, with what is not there below everything that is, and protected spans above it."""
        ranks = self.rank(score, prompt_len, keep_ratio, counts)
        ranks = ranks if score.valid is None else _mask(ranks, score.valid)
        in_window = max(getattr(self, "window", 0) - self.protected, 0)
        return self.raise_spans(ranks, score, keep_ratio * prompt_len, in_window)

    def raise_spans(
        self, ranks: torch.Tensor, of: LayerScore | LayerInputs, budget: float, in_window: int = 0
    ) -> torch.Tensor:
        """Ranks with the protected spans above all others.

        Args:
            ranks: ``[Hkv, N]``.
            of: what they are made of: says what is there, and what stands for media.
            budget: mean number of tokens that a head may keep.
            in_window: how many of the ``N``, the last, lie in the window, where that competes too.
        """
        (first, last), valid = self.protect.spans(budget), of.valid
        if of.media is not None:
            ranks = ranks.masked_fill(of.media[:, : ranks.shape[1]], float("inf"))
        if first:
            ranks = ranks.masked_fill(leading(first, ranks, valid), float("inf"))
        if last:
            left = ranks.shape[1] - in_window - torch.arange(ranks.shape[1], device=ranks.device)
            is_last = (left > 0) & (left <= last)
            ranks = ranks.masked_fill(is_last if valid is None else is_last & valid[:, : ranks.shape[1]], float("inf"))
        return ranks

    def rank(
        self, score: LayerScore, prompt_len: int, keep_ratio: float, counts: Sequence[int] | None = None
    ) -> torch.Tensor:
        """``[Hkv, C]`` float32 by which positions are chosen; by default the indicator itself.

        Args:
            score: the layer's.
            prompt_len: ``S``.
            keep_ratio: the budget as a fraction of the prompt, for policies whose order depends on it.
            counts: candidates that each head was given, for policies whose order depends on that; ``None`` before the
                budget is divided.
        """
        return score.indicator

    def keep(self, score: LayerScore, counts: Sequence[int], prompt_len: int, keep_ratio: float) -> list[torch.Tensor]:
        """Positions that stay in each KV head: its ``count`` best candidates, and the protected positions.

        Args:
            score: the layer's.
            counts: one per KV head, from :meth:`head_budgets`.
            prompt_len: ``S``.
            keep_ratio: see :meth:`rank`.

        Returns:
            For each head ``[count + protected]`` int64, ascending.
        """
        ranks = self.ranks(score, prompt_len, keep_ratio, counts)
        tail = torch.arange(prompt_len - self.protected, prompt_len, device=ranks.device)
        return [
            torch.cat([row.topk(count).indices.sort().values, tail]) for row, count in zip(ranks, counts, strict=True)
        ]

    def rescore(self, inputs: LayerInputs, counts: Sequence[int]) -> list[torch.Tensor]:
        """What a layer keeps when its cache has outgrown its budget while decoding: its best, scored as a prompt.

        Args:
            inputs: keys and values in cache order, which is the order of positions with gaps; the queries are those
                of the last :attr:`num_queries` tokens, all of them still cached.
            counts: for each KV head, entries to keep beside the last :attr:`protected`, at most as many as it has.

        Returns:
            For each head ``[count + protected]`` int64 indices into the cache, ascending.
        """
        budget, num_cached = max(counts) + self.protected, inputs.keys.shape[1]
        (score,) = self.settle([self.judge(replace(inputs, budget=budget))], budget)
        return self.keep(score, counts, num_cached, budget / num_cached)

    def trim(self, inputs: LayerInputs, count: int) -> torch.Tensor:
        """As :meth:`rescore` with the current token's query alone, in any order; if ``"cake"`` is in :attr:`decodes`.

        Args:
            inputs: ``queries`` are ``[Hq, 1, D]``, the current token's; its key is the last.
            count: entries to keep in each head beside the last :attr:`protected`.

        Returns:
            ``[Hkv, count + protected]`` int64 indices into the cache.
        """
        raise NotImplementedError


def total_tokens(budget: float, window: int, num_layers: int) -> int:
    """Candidates that all layers together may keep under a mean ``budget`` per layer, windows aside."""
    return int((budget - window) * num_layers)


def leading(count: int, scores: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Where the first ``count`` positions of each head are in ``[Hkv, N]`` scores; ``valid`` as in the inputs.

    Returns:
        Bool, ``[N]``, or ``[Hkv, N]`` if heads begin at different places.
    """
    if valid is None:
        return torch.arange(scores.shape[1], device=scores.device) < count
    there = valid[:, : scores.shape[1]]
    return there & (there.cumsum(dim=1) <= count)


def _mask(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(~valid[:, : scores.shape[1]], float("-inf"))
