"""What requests are watched for, and what their policies make of it: queries and notes, scores, and what stays."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from vllm.logger import init_logger

from cake_vllm.config import KVEvictionConfig
from cake_vllm.integration.messages import MOST_OPEN, Cut, Grant, Observation
from cake_vllm.integration.worker.dealing import Held, Reads, read
from cake_vllm.integration.worker.dividing import Choice, divide
from cake_vllm.integration.worker.gates import WorkerGates
from cake_vllm.integration.worker.layers import Batch, Layers
from cake_vllm.integration.worker.parting import keep_positions, part
from cake_vllm.integration.worker.watched import Batched, Watched
from cake_vllm.kernels import to_device
from cake_vllm.policies import LayerInputs, LayerScore, Policy

logger = init_logger("vllm.cake_vllm.worker")


class Judging:
    """Watches requests while they run, and chooses what they keep.

    Args:
        config: the engine's.
        layers: of this worker.
        gates: of these layers.
        held: by request that was evicted, what it reads in place of its first blocks.
        group: tensor-parallel ranks.
        num_drafts: of a request in one step, at most.
    """

    def __init__(
        self,
        config: KVEvictionConfig,
        layers: Layers,
        gates: WorkerGates,
        held: Mapping[str, Held],
        group: Any,
        num_drafts: int,
    ):
        self.config, self.layers, self.gates, self.held, self.group = config, layers, gates, held, group
        self._num_spare = MOST_OPEN * num_drafts
        self.watched: dict[str, Watched] = {}
        #: Whether choices tell what they were made by.
        self.is_traced = False
        #: Shown a layer's index, what its policy looked at, and its scores, whenever a prompt is judged.
        self.on_judged: Callable[[int, LayerInputs, LayerScore], None] | None = None

    def forget(self, req_id: str) -> None:
        """A request that finished, was preempted, or is not looked at any more."""
        self.watched.pop(req_id, None)

    def let_go(self, what: Observation) -> None:
        """A request whose queries are not needed any more; what stays of it while it decodes still is."""
        watched = self.watched.pop(what.req_id, None)
        if watched is not None and watched.media and (what.config or self.config).decode != "off":
            self.watched[what.req_id] = Watched(media=watched.media)

    def watch(self, observations: Sequence[Observation], batch: Batch) -> Callable[[int, torch.Tensor], None]:
        """Finds requests in a batch.

        Returns:
            What is to be shown each layer's index and queries ``[T, Hq, D]`` once the layer has run.

        Raises:
            RuntimeError: (from the device) if one is not where the scheduler put it.
        """
        place = batch.places([what.tails for what in observations])
        ends, lengths = batch.first.query_start_loc[1:][place], batch.first.seq_lens[place].long()
        rows = batch.rows(place.squeeze(1))
        batched = []
        for index, what in enumerate(observations):
            watched = self.watched.setdefault(what.req_id, Watched())
            watched.rows = [of_group[index] for of_group in rows]
            watched.reach(what)
            size = (what.config or self.config).policy.num_queries + self._num_spare
            batched.append(Batched(what, ends[index], lengths[index], size))
        return partial(self._observe, batched)

    def _observe(self, batched: Sequence[Batched], layer: int, query: torch.Tensor) -> None:
        for place in batched:
            watched = self.watched[place.what.req_id]
            if watched.error is None:
                try:
                    self._look(layer, place, watched, query)
                except Exception as error:
                    watched.error = error

    def _look(self, layer: int, place: Batched, watched: Watched, query: torch.Tensor) -> None:
        what, policy = place.what, (place.what.config or self.config).policy
        recent = watched.recent(layer, place, query, policy.num_queries, self.layers.target[layer].restore_queries)
        if what.is_generated:
            return
        if not what.is_noted:
            watched.notes.pop(layer, None)
            if what.grant is None:
                return
        reads = self._read(layer, what, watched)
        if what.is_noted:
            self._note(policy, layer, place, watched, query, reads)
        if what.grant is None:
            return
        watched.reads[layer] = reads
        if what.grant.media:
            watched.mark(layer, reads, what.end, what.grant.media)
        if what.grant.divides:
            watched.scores[layer] = self._judge(policy, layer, recent, reads, what.grant.budget, watched)
            return
        chosen = self._rescore(layer, what, recent, reads, watched.media.get(layer))
        if chosen is not None:
            watched.chosen[layer] = chosen

    def _rescore(
        self,
        layer: int,
        what: Observation,
        recent: torch.Tensor,
        reads: Reads,
        media: torch.Tensor | None,
    ) -> list[torch.Tensor] | None:
        """What a decoding request keeps in a layer, by head; ``None`` if too few queries are known to tell."""
        config, size = what.config or self.config, reads.page_size
        policy, held = config.policy, self.held.get(what.req_id)
        assert what.grant is not None
        targets = held.of_layer(layer, held.dealt).tolist() if held else [-(-what.grant.budget // size)]
        targets = [targets[head % len(targets)] for head in range(self.layers.grid.num_heads)]
        num_pages = [reads.table.shape[1] - missing for missing in reads.missing]
        if all(count <= target for count, target in zip(num_pages, targets, strict=True)):
            everything = torch.arange(reads.length, device=reads.table.device)
            return [everything[missing * size :] for missing in reads.missing]
        if config.decode == "cake":
            inputs = self._inputs(policy, layer, recent[-1:], reads, media)
            return list(policy.trim(inputs, targets[0] * size - policy.protected).sort(dim=-1).values)
        if len(recent) < policy.num_queries:
            return None
        counts = [min(pair) * size - policy.protected for pair in zip(num_pages, targets, strict=True)]
        return policy.rescore(self._inputs(policy, layer, recent, reads, media), counts)

    def _judge(
        self, policy: Policy, layer: int, queries: torch.Tensor, reads: Reads, budget: int, watched: Watched
    ) -> LayerScore:
        """A prompt's scores in one layer, as its budget is divided."""
        inputs = self._inputs(policy, layer, queries, reads, watched.media.get(layer))
        inputs = replace(inputs, budget=budget, notes=watched.notes.get(layer))
        score = policy.judge(inputs)
        if self.on_judged is not None:
            self.on_judged(layer, inputs, score)
        return score

    def _note(
        self, policy: Policy, layer: int, place: Batched, watched: Watched, query: torch.Tensor, reads: Reads
    ) -> None:
        what, of_layer = place.what, self.layers.target[layer]
        positions = policy.noted(what.end - what.num_tokens, what.end)
        back = reads.length - what.end
        places = range(positions.start + back, positions.stop + back, positions.step)
        queries = of_layer.restore_queries(place.at(query, positions))
        inputs = self._inputs(None, layer, queries, reads)
        watched.notes[layer] = policy.note(inputs, places, watched.notes.get(layer))

    def _inputs(
        self,
        policy: Policy | None,
        layer: int,
        queries: torch.Tensor,
        reads: Reads,
        media: torch.Tensor | None = None,
    ) -> LayerInputs:
        gate = self.gates.of(policy, layer) if policy else None
        inputs = self.layers.target[layer].inputs(self.layers.grid.cache, reads, queries, policy, gate)
        return replace(inputs, media=media)

    def _read(self, layer: int, what: Observation | Cut, watched: Watched) -> Reads:
        return read(self.layers.grid, layer, self.held.get(what.req_id), watched.rows, what.end)

    def recall(self, cut: Cut) -> None:
        """Finds what a request reads that is cut, and what its prompt is worth: judged at the first time.

        Where what it has generated gives, too, that is judged every time.
        """
        watched, grant, parts = self.watched.setdefault(cut.req_id, Watched()), cut.grant, cut.grant.parts
        policy, none = (cut.config or self.config).policy, self.layers.target[0].no_queries()
        grid = self.layers.grid
        watched.rows = [grid.slices(to_device(blocks, torch.int64, grid.pages.device)) for blocks in cut.row]
        try:
            for layer in range(len(self.layers.target)):
                watched.reads[layer] = self._read(layer, cut, watched)
            if watched.worth is None:
                assert grant.prompt_len is not None
                budget, scores = grant.budget - grant.num_generated(cut.end), []
                if parts:
                    budget = parts.prompt or 0
                for layer, reads in watched.reads.items() if budget else ():
                    prompt, known = replace(reads, length=grant.prompt_len), watched.queries.get(layer)
                    queries = none if known is None else known.last(policy.num_queries, grant.prompt_len)
                    if grant.media:
                        watched.mark(layer, prompt, grant.prompt_len, grant.media)
                    scores.append(self._judge(policy, layer, queries, prompt, budget, watched))
                watched.remember(scores)
            for layer, reads in watched.reads.items() if parts else ():
                queries = watched.last_queries(layer, count, cut.end) if (count := policy.num_queries) else none
                inputs = self._inputs(policy, layer, queries, reads)
                watched.scores[layer] = policy.judge(replace(inputs, budget=grant.budget))
        except Exception as error:
            watched.error = error

    def choose(self, what: Observation | Cut) -> Choice:
        """What a request keeps, once all layers have been looked at."""
        config, grant, watched = what.config or self.config, what.grant, self.watched[what.req_id]
        assert grant is not None
        num_layers, num_new = len(self.layers.target), grant.num_generated(what.end)
        reads = [
            watched.reads[layer] if layer in watched.reads else self._read(layer, what, watched)
            for layer in range(num_layers)
        ]
        choice = Choice(reads, grant.parts.recent if grant.parts else config.policy.protected + num_new)
        _share_failures(watched, self.group, self.layers.grid.pages.device)
        if watched.error is not None:
            choice.error = watched.error
        elif not grant.divides:
            if len(watched.chosen) == num_layers:
                choice.chosen = [watched.chosen[layer] for layer in range(num_layers)]
        else:
            try:
                _divide(config, what, grant, watched, choice, self.group, self.is_traced)
            except Exception as error:
                choice.error = error
        return choice

    def conclude(self, what: Observation | Cut, choice: Choice, is_traded: bool) -> None:
        """Follows what became of a choice, and forgets what only served to make it."""
        watched = self.watched[what.req_id]
        if choice.error is not None:
            watched.error = choice.error
            logger.warning_once(
                "the eviction policy %r raised %s: %s; requests it fails on keep what they hold\n%s",
                (what.config or self.config).policy_name,
                type(choice.error).__name__,
                choice.error,
                "".join(traceback.format_exception(choice.error)),
            )
        elif is_traded and choice.chosen is not None:
            for known in (watched.notes, watched.media):
                for layer, tokens in known.items():
                    known[layer] = _gather(tokens, choice.chosen[layer], choice.reads[layer].full_len)
            if what.grant is not None and what.grant.parts is not None:
                assert watched.worth is not None
                keep_positions(watched.worth, choice, what.end)
            elif watched.worth is not None:
                for layer, reads in enumerate(choice.reads):
                    cached = reads.paged(choice.num_kept)
                    watched.worth.keep(layer, choice.chosen[layer], cached, reads.missing_tokens)
        watched.chosen.clear()
        watched.scores.clear()
        watched.reads.clear()


def _gather(tokens: torch.Tensor, chosen: Sequence[torch.Tensor], full_len: int) -> torch.Tensor:
    """What is left of ``[Hkv, length, ...]``, aligned at the end, zeros before shorter heads.

    Args:
        tokens: of what the heads of a layer read.
        chosen: for each head, what it keeps of its full blocks.
        full_len: tokens in these; what lies behind them stays.
    """
    tail = tokens[:, full_len:]
    longest = max(map(len, chosen))
    left = tokens.new_zeros(len(tokens), longest, *tokens.shape[2:])
    for head, positions in enumerate(chosen):
        left[head, longest - len(positions) :] = tokens[head, positions]
    return torch.cat([left, tail], dim=1)


def _divide(
    config: KVEvictionConfig,
    what: Observation | Cut,
    grant: Grant,
    watched: Watched,
    choice: Choice,
    group: Any,
    is_traced: bool,
) -> None:
    """Fills a choice in by what was scored, or by what a prompt is worth that was scored before."""
    policy, scores = config.policy, [watched.scores[layer] for layer in sorted(watched.scores)]
    if config.is_elastic and watched.worth is None:
        watched.remember(scores)
    worth, num_new = watched.worth, grant.num_generated(what.end)
    if grant.parts is not None:
        assert worth is not None
        assert grant.prompt_len is not None
        part(policy, scores, choice, worth, grant.parts, grant.prompt_len, what.end, group, is_traced)
        return
    budget, prompt_len = grant.budget - num_new, what.end - num_new
    divide(policy, worth.scores if worth else scores, choice, budget, prompt_len, worth, group, is_traced)


def _share_failures(watched: Watched, group: Any, device: torch.device) -> None:
    """A policy that raised on one tensor-parallel rank has raised on all of them, or they would wait for it."""
    if group.world_size > 1:
        # As floats, which hold them exactly: not every backend adds integers.
        failed = torch.tensor([float(watched.error is not None)], device=device)
        if group.all_reduce(failed).item():
            watched.error = watched.error or RuntimeError("it raised on another rank")
