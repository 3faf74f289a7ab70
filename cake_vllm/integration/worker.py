"""The worker half: scores prompts as they are computed, compacts their pages, and redirects what attention reads.

Runs in every worker process and frees no block.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig

from cake_vllm.config import KVEvictionConfig
from cake_vllm.integration.attention import STEP, EvictingImpl
from cake_vllm.integration.messages import Eviction, EvictionReport, Grant, Observation, StepPlan
from cake_vllm.integration.projections import output_projection
from cake_vllm.integration.spec import evictable_groups
from cake_vllm.kernels import BlockLayout, EvictedRows, to_device
from cake_vllm.policies import LayerInputs, LayerScore, PagedPrompt, Policy

logger = init_logger("vllm.cake_vllm.worker")


@dataclass
class Watched:
    """What is remembered of a request between its steps or, beside the queries, between the layers of one.

    Attributes:
        queries: by layer, the last queries computed so far, as many as the policy needs: ``[n, Hq, D]``.
        blocks: by layer, the blocks that it reads, the partial one included: ``[n]`` int64.
        scores: by layer, if the budget is to be divided.
        chosen: by layer, the cached positions to keep, if the layer is over what it was given.
        ranks: by layer, what they were chosen by, if that is traced.
        error: what the policy raised.
    """

    queries: dict[int, torch.Tensor] = field(default_factory=dict)
    blocks: dict[int, torch.Tensor] = field(default_factory=dict)
    scores: dict[int, LayerScore] = field(default_factory=dict)
    chosen: dict[int, torch.Tensor] = field(default_factory=dict)
    ranks: dict[int, torch.Tensor] = field(default_factory=dict)
    error: Exception | None = None


@dataclass(frozen=True)
class Batched:
    """Where an observed request lies in the batch; on the device, so that nothing has to wait for it.

    Attributes:
        row: ``[1]`` int64.
        end: ``[1]``, behind its last query token.
    """

    what: Observation
    row: torch.Tensor
    end: torch.Tensor

    def recent(self, query: torch.Tensor, count: int) -> torch.Tensor:
        """Its last ``count`` queries of a step's ``[num_tokens, Hq, D]``, or all if there are fewer."""
        count = min(count, self.what.num_tokens)
        return query.index_select(0, self.end - count + torch.arange(count, device=query.device))


@dataclass
class Held:
    """What an evicted request holds in place of its full blocks, by layer; see :mod:`cake_vllm.kernels.rows`.

    Attributes:
        pages: private pages.
        start: first block of the logical row that is still read; 0 in a layer that was never cut.
        counts: candidates that the policy gave the layer.
    """

    pages: list[list[int]]
    start: list[int]
    counts: list[int]

    def num_cached(self, layer: int, end: int, block_size: int) -> int:
        """Tokens that a layer holds at logical length ``end``."""
        return end - (self.start[layer] - len(self.pages[layer])) * block_size


@dataclass(frozen=True)
class LayerStep:
    """Hung on a layer's attention metadata for one step; called by the layer after its forward."""

    callback: Callable[[int, list[Batched], torch.Tensor, torch.Tensor], None]
    layer_index: int
    batched: list[Batched]
    block_table: torch.Tensor

    def observe(self, query: torch.Tensor) -> None:
        """``query`` is the step's ``[num_tokens, Hq, D]``, post-RoPE."""
        self.callback(self.layer_index, self.batched, query, self.block_table)


class EvictableLayer:
    """One attention layer: its module, its backend and its cache."""

    def __init__(self, name: str, module: Any, block_size: int):
        self.name = name
        self.module = module
        self.impl: EvictingImpl = module.impl
        self.block_size = block_size
        self.soft_cap = float(getattr(self.impl, "logits_soft_cap", 0) or 0)

    @property
    def cache(self) -> torch.Tensor:
        """``[num_blocks, Hkv, E]``, see :mod:`cake_vllm.kernels.pages`."""
        return self.impl.flat_cache(self.module.kv_cache)

    @property
    def layout(self) -> BlockLayout:
        """Order of the elements in a block."""
        return self.impl.block_layout(self.module, self.block_size)

    @cached_property
    def output_weight(self) -> torch.Tensor:
        """``[hidden, Hq * D]``, the weight of the projection behind the layer; kept once it was asked for.

        Read off the projection's answer to the unit vectors, because kernels may have repacked or quantized the
        weight itself.
        """
        projection = output_projection(self.module)
        size = projection.input_size_per_partition
        units = torch.eye(size, dtype=self.module.dtype, device=self.module.kv_cache.device)
        # Its method and not itself: this rank's part alone, without bias.
        return projection.quant_method.apply(projection, units, None).T.contiguous()


class EvictionWorker:
    """Per-worker state: watched requests and evicted rows."""

    def __init__(self, config: KVEvictionConfig, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig):
        self.config = config
        modules = vllm_config.compilation_config.static_forward_context
        self.layers: list[EvictableLayer] = []
        for group_id in evictable_groups(kv_cache_config):
            group = kv_cache_config.kv_cache_groups[group_id]
            (name,) = group.layer_names
            self.layers.append(EvictableLayer(name, modules[name], group.kv_cache_spec.block_size))
        self.block_size = self.layers[0].block_size
        self.group = get_tp_group()
        self._watched: dict[str, Watched] = {}
        self._observations: list[Observation] = []
        self._held: dict[str, Held] = {}
        #: Kept positions of evicted prompts, for tests: ``{request id: [positions of each layer]}``.
        self.trace: dict[str, list[torch.Tensor | None]] | None = None
        #: What they were chosen by, if they are traced: ``{request id: {layer: [Hkv, S - w]}}``.
        self.trace_ranks: dict[str, dict[int, torch.Tensor]] = {}

    @cached_property
    def _rows(self) -> EvictedRows:
        # Made when it is first needed: the caches are allocated after this object.
        return EvictedRows(len(self.layers), self.block_size, self.layers[0].module.kv_cache.device)

    def begin(self, plan: StepPlan, attn_metadata: dict[str, Any] | None) -> None:
        """Prepares a step: called after the metadata was built and before the first layer runs.

        Replaces the metadata of the evictable layers in ``attn_metadata`` where this step needs it.
        """
        for req_id in plan.released:
            self._watched.pop(req_id, None)
            self._held.pop(req_id, None)
            self._rows.discard(req_id)
        if not attn_metadata or not (plan.observations or plan.evicted):
            return
        metadata = [attn_metadata[layer.name] for layer in self.layers]
        seq_lens = metadata[0].seq_lens
        last = ((seq_lens - 1).clamp(min=0) // self.block_size).long()
        # [1, R]
        tails = metadata[0].block_table.gather(1, last[:, None]).T
        if plan.evicted:
            known = [(tail, self._rows.slot(req_id)) for tail, req_id in plan.evicted.items()]
            # [2, number of evicted rows, 1]
            of_tail, slot = to_device(known, torch.int64, tails.device).T.unsqueeze(-1)
            self._redirect(metadata, seq_lens, ((tails == of_tail) * slot).sum(dim=0))
        batched = []
        if plan.observations:
            asked = to_device([what.tail_block for what in plan.observations], torch.int32, tails.device)
            rows = (tails == asked[:, None]).int().argmax(dim=1, keepdim=True)
            ends = metadata[0].query_start_loc[1:][rows]
            for what, row, end in zip(plan.observations, rows, ends, strict=True):
                batched.append(Batched(what, row, end))
                self._watched.setdefault(what.req_id, Watched())
            self._observations.extend(plan.observations)
        for index, (layer, changed) in enumerate(zip(self.layers, metadata, strict=True)):
            attn_metadata[layer.name] = changed
            if batched:
                setattr(changed, STEP, LayerStep(self._observe, index, batched, changed.block_table))

    def finish(self) -> EvictionReport | None:
        """Compacts the requests that were granted it in this step: called after the last layer."""
        observations, self._observations = self._observations, []
        evictions = {
            what.req_id: self._evict(what, what.grant, self._watched[what.req_id])
            for what in observations
            if what.grant is not None
        }
        for what in observations:
            if what.is_last:
                del self._watched[what.req_id]
        return EvictionReport(evictions) if evictions else None

    def _redirect(self, metadata: list[Any], seq_lens: torch.Tensor, slots: torch.Tensor) -> None:
        width = -(-int(metadata[0].max_seq_len) // self.block_size)
        tables = torch.stack([layer.block_table[:, :width] for layer in metadata])
        tables, lengths = self._rows.compose(tables, seq_lens, slots)
        for index, layer in enumerate(self.layers):
            metadata[index] = layer.impl.with_rows(layer.module, metadata[index], tables[index], lengths[index])

    def _observe(
        self, layer_index: int, batched: list[Batched], query: torch.Tensor, block_table: torch.Tensor
    ) -> None:
        for place in batched:
            watched = self._watched[place.what.req_id]
            if watched.error is None:
                try:
                    self._look(layer_index, place, watched, query, block_table.index_select(0, place.row)[0])
                except Exception as error:
                    watched.error = error

    def _look(self, layer_index: int, place: Batched, watched: Watched, query: torch.Tensor, row: torch.Tensor) -> None:
        what, grant, config = place.what, place.what.grant, place.what.config or self.config
        policy, num_queries = config.policy, config.policy.num_queries
        recent = place.recent(query, num_queries)
        if layer_index in watched.queries:
            recent = torch.cat([watched.queries[layer_index], recent])
            recent = recent[max(len(recent) - num_queries, 0) :]
        if not what.is_last:
            watched.queries[layer_index] = recent
        if grant is None:
            return
        held = self._held.get(what.req_id)
        num_cached = held.num_cached(layer_index, what.end, self.block_size) if held else what.end
        blocks = row[: -(-num_cached // self.block_size)].long()
        if grant.divides:
            inputs = self._inputs(policy, layer_index, recent, blocks, num_cached)
            watched.scores[layer_index] = policy.score(inputs)
            watched.blocks[layer_index] = blocks
            return
        protected = policy.protected
        wanted = held.counts[layer_index] + protected if held else grant.budget
        num_pages = -(-wanted // self.block_size)
        if num_pages >= len(blocks):
            return
        count = num_pages * self.block_size - protected
        if config.decode == "cake":
            inputs = self._inputs(policy, layer_index, place.recent(query, 1), blocks, num_cached)
            chosen = policy.trim(inputs, count).sort(dim=-1).values
        elif len(recent) < num_queries:
            return
        else:
            chosen = policy.rescore(self._inputs(policy, layer_index, recent, blocks, num_cached), count)
        watched.chosen[layer_index], watched.blocks[layer_index] = chosen, blocks

    def _inputs(
        self, policy: Policy, layer_index: int, queries: torch.Tensor, blocks: torch.Tensor, length: int
    ) -> LayerInputs:
        layer = self.layers[layer_index]
        return LayerInputs(
            queries.transpose(0, 1),
            layer.layout.read_keys(layer.cache, blocks, length),
            layer.impl.scale,
            layer.soft_cap,
            layer.layout.read_values(layer.cache, blocks, length) if policy.needs_values else None,
            layer.output_weight if policy.needs_output_weight else None,
            layer_index,
        )

    def _evict(self, what: Observation, grant: Grant, watched: Watched) -> Eviction:
        num_layers, num_blocks = len(self.layers), what.end // self.block_size
        config = what.config or self.config
        protected = config.policy.protected
        held = self._held.get(what.req_id)
        if held is None:
            counts = [grant.budget - protected] * num_layers
            held = Held([[] for _ in range(num_layers)], [0] * num_layers, counts)
        cut: set[int] = set()
        lent, postponed = list(grant.lent), 0
        trace: list[torch.Tensor | None] = [None] * num_layers
        self._share_failures(watched)
        try:
            if watched.error is not None:
                raise watched.error
            if grant.divides:
                self._divide(config.policy, what.end, grant.budget, watched, held, trace)
            for index, chosen in watched.chosen.items():
                layer, blocks = self.layers[index], watched.blocks[index]
                num_pages = chosen.shape[1] // self.block_size
                own = blocks[: held.num_cached(index, what.end, self.block_size) // self.block_size]
                num_copied = grant.num_copied(num_pages, len(own), held.start[index] > 0)
                if num_copied > len(lent):
                    # Neither pages to copy to nor enough of its own: as soon as there are some, while decoding.
                    postponed += 1
                    trace[index] = None
                    continue
                copied = to_device(lent[:num_copied], torch.int64, blocks.device)
                pages = torch.cat([copied, own[len(own) - (num_pages - num_copied) :]])
                layer.layout.compact(layer.cache, blocks, chosen, pages)
                # Ids of its own blocks are on the device alone.
                held.pages[index] = lent[:num_copied] if num_copied == num_pages else pages.tolist()
                held.start[index] = num_blocks
                del lent[:num_copied]
                cut.add(index)
        except Exception as error:
            watched.error = error
            logger.warning_once(
                "the eviction policy %r raised %s: %s; requests it fails on keep what they hold",
                config.policy_name,
                type(error).__name__,
                error,
            )
        if cut or watched.error is None:
            self._hold(what.req_id, held)
        if self.trace is not None and grant.divides:
            self.trace[what.req_id] = trace
            self.trace_ranks[what.req_id] = watched.ranks.copy()
        watched.chosen.clear()
        watched.ranks.clear()
        watched.scores.clear()
        watched.blocks.clear()
        return Eviction(
            grant.epoch,
            tuple(len(held.pages[index]) if index in cut else None for index in range(num_layers)),
            tuple(held.num_cached(index, what.end, self.block_size) for index in range(num_layers)),
            tuple(count + protected for count in held.counts),
            postponed=postponed,
            failed=watched.error is not None,
        )

    def _divide(
        self,
        policy: Policy,
        end: int,
        budget: int,
        watched: Watched,
        held: Held,
        trace: list[torch.Tensor | None],
    ) -> None:
        """Divides the budget among the layers and chooses what each keeps."""
        scores = [watched.scores[index] for index in range(len(self.layers))]
        if self.group.world_size > 1 and scores[0].terms.numel():
            terms = self.group.all_reduce(torch.stack([score.terms for score in scores]))
            scores = [replace(score, terms=of_layer) for score, of_layer in zip(scores, terms, strict=True)]
        counts = policy.budgets(scores, end, budget)
        if self.group.world_size > 1:
            # Where heads compete, ranks come to different counts: their mean, rounded up.
            total = self._sum_over_ranks(counts)
            counts = [math.ceil(count / self.group.world_size) for count in total]
        for index, (score, count) in enumerate(zip(scores, counts, strict=True)):
            num_cached = held.num_cached(index, end, self.block_size)
            held.counts[index] = count = min(count, num_cached - policy.protected)
            cached = PagedPrompt(num_cached, policy.protected, self.block_size)
            num_pages = cached.pages(count)
            if num_pages < cached.full_blocks:
                ranks = policy.rank(score, num_cached, min(1.0, budget / num_cached))
                if self.trace is not None:
                    watched.ranks[index] = ranks
                trace[index] = watched.chosen[index] = cached.positions(ranks, num_pages)

    def _share_failures(self, watched: Watched) -> None:
        """A policy that raised on one tensor-parallel rank has raised on all of them."""
        if self.group.world_size > 1 and self._sum_over_ranks([watched.error is not None]) != [0]:
            watched.error = watched.error or RuntimeError("it raised on another rank")

    def _sum_over_ranks(self, numbers: Sequence[int]) -> list[int]:
        # As floats, which hold them exactly: not every backend adds integers.
        device = self.layers[0].module.kv_cache.device
        total = self.group.all_reduce(torch.tensor(numbers, dtype=torch.float32, device=device))
        return [int(number) for number in total.tolist()]

    def _hold(self, req_id: str, held: Held) -> None:
        self._held[req_id] = held
        self._rows.discard(req_id)
        self._rows.store(req_id, held.pages, held.start)
