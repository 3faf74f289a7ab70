"""The worker half: scores prompts as they are computed, compacts their pages, and redirects what attention reads.

Runs in every worker process and frees no block.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig

from cake_vllm.config import KVEvictionConfig
from cake_vllm.integration.attention import STEP, EvictingImpl
from cake_vllm.integration.messages import Eviction, EvictionReport, Grant, PromptChunk, StepPlan, Trim
from cake_vllm.integration.projections import output_projection
from cake_vllm.integration.spec import evictable_groups
from cake_vllm.kernels import BlockLayout, EvictedRows
from cake_vllm.policies import LayerInputs, LayerScore, PagedPrompt


@dataclass
class Prompt:
    """A prompt in progress.

    Attributes:
        queries: by layer, the last queries computed so far, as many as the policy needs: ``[n, Hq, D]``.
        scores: by layer, once the last chunk has passed it.
        blocks: by layer, the blocks of the prompt's row: ``[ceil(S / B)]`` int64.
    """

    queries: dict[int, torch.Tensor] = field(default_factory=dict)
    scores: dict[int, LayerScore] = field(default_factory=dict)
    blocks: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Batched:
    """Where a prompt's chunk or a trimmed request lies in the batch: row ``row``, query tokens ``[first, last)``."""

    what: PromptChunk | Trim
    row: int
    first: int
    last: int


@dataclass
class Held:
    """What an evicted request holds in place of its full blocks, by layer; see :mod:`cake_vllm.kernels.rows`.

    Attributes:
        pages: private pages.
        start: first block of the logical row that is still read.
        counts: candidates that the policy gave the layer.
    """

    pages: list[list[int]]
    start: list[int]
    counts: list[int]


@dataclass
class Trimming:
    """A trim in progress: by layer, the row's blocks and the positions in them to keep, where the layer is over."""

    trim: Trim
    chosen: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


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
        answer, _ = projection(units)
        offset, _ = projection(torch.zeros_like(units[:1]))
        return (answer - offset).T.contiguous()


class EvictionWorker:
    """Per-worker state: prompts in progress and evicted rows."""

    def __init__(self, config: KVEvictionConfig, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig):
        self.policy = config.policy
        modules = vllm_config.compilation_config.static_forward_context
        self.layers: list[EvictableLayer] = []
        for group_id in evictable_groups(kv_cache_config):
            group = kv_cache_config.kv_cache_groups[group_id]
            (name,) = group.layer_names
            self.layers.append(EvictableLayer(name, modules[name], group.kv_cache_spec.block_size))
        self.block_size = self.layers[0].block_size
        self._prompts: dict[str, Prompt] = {}
        self._granted: list[tuple[PromptChunk, Grant]] = []
        self._held: dict[str, Held] = {}
        self._trimmings: dict[str, Trimming] = {}
        self._rows: EvictedRows | None = None
        #: Kept positions of evicted prompts, for tests: ``{request id: [positions of each layer]}``.
        self.trace: dict[str, list[torch.Tensor | None]] | None = None

    def begin(self, plan: StepPlan, attn_metadata: dict[str, Any] | None) -> None:
        """Prepares a step: called after the metadata was built and before the first layer runs.

        Replaces the metadata of the evictable layers in ``attn_metadata`` where this step needs it.
        """
        for req_id in plan.released:
            self._prompts.pop(req_id, None)
            self._held.pop(req_id, None)
            if self._rows is not None:
                self._rows.discard(req_id)
        if not attn_metadata or not (plan.chunks or plan.trims or plan.evicted):
            return
        metadata = [attn_metadata[layer.name] for layer in self.layers]
        seq_lens = metadata[0].seq_lens
        tails = ((seq_lens - 1).clamp(min=0) // self.block_size).long()
        row_of_tail = {
            tail: row for row, tail in enumerate(metadata[0].block_table.gather(1, tails[:, None])[:, 0].tolist())
        }
        slots = torch.zeros(len(seq_lens), dtype=torch.int64)
        for tail, req_id in plan.evicted.items():
            slots[row_of_tail[tail]] = self._evicted_slot(req_id)
        if slots.any():
            self._redirect(metadata, seq_lens, slots.to(seq_lens.device))
        batched = []
        if plan.chunks or plan.trims:
            query_start = metadata[0].query_start_loc.tolist()
            work: list[PromptChunk | Trim] = [*plan.chunks, *plan.trims]
            for what in work:
                row = row_of_tail[what.tail_block]
                batched.append(Batched(what, row, query_start[row], query_start[row + 1]))
                if isinstance(what, Trim):
                    self._trimmings[what.req_id] = Trimming(what)
                    continue
                self._prompts.setdefault(what.req_id, Prompt())
                if what.grant is not None:
                    self._granted.append((what, what.grant))
        for index, (layer, changed) in enumerate(zip(self.layers, metadata, strict=True)):
            attn_metadata[layer.name] = changed
            if batched:
                setattr(changed, STEP, LayerStep(self._observe, index, batched, changed.block_table))

    def finish(self) -> EvictionReport | None:
        """Compacts the prompts that were granted pages in this step: called after the last layer."""
        granted, self._granted = self._granted, []
        trimmings, self._trimmings = self._trimmings, {}
        evictions = {chunk.req_id: self._evict(chunk, grant) for chunk, grant in granted}
        evictions |= {req_id: self._trim(trimming) for req_id, trimming in trimmings.items()}
        return EvictionReport(evictions) if evictions else None

    def _evicted_slot(self, req_id: str) -> int:
        slot = self._rows.slot(req_id) if self._rows is not None else 0
        assert slot, f"request {req_id} was never evicted here"
        return slot

    def _redirect(self, metadata: list[Any], seq_lens: torch.Tensor, slots: torch.Tensor) -> None:
        assert self._rows is not None
        width = -(-int(metadata[0].max_seq_len) // self.block_size)
        tables = torch.stack([layer.block_table[:, :width] for layer in metadata])
        tables, lengths = self._rows.compose(tables, seq_lens, slots)
        for index, layer in enumerate(self.layers):
            metadata[index] = layer.impl.with_rows(layer.module, metadata[index], tables[index], lengths[index])

    def _observe(
        self, layer_index: int, batched: list[Batched], query: torch.Tensor, block_table: torch.Tensor
    ) -> None:
        for place in batched:
            if isinstance(place.what, Trim):
                self._observe_trim(layer_index, place, place.what, query, block_table)
            else:
                self._observe_chunk(layer_index, place, place.what, query, block_table)

    def _observe_chunk(
        self, layer_index: int, place: Batched, chunk: PromptChunk, query: torch.Tensor, block_table: torch.Tensor
    ) -> None:
        num_queries = self.policy.num_queries
        prompt = self._prompts[chunk.req_id]
        recent = query[max(place.first, place.last - num_queries) : place.last]
        if layer_index in prompt.queries:
            recent = torch.cat([prompt.queries[layer_index], recent])[-num_queries:]
        if chunk.grant is None:
            prompt.queries[layer_index] = recent.clone()
            return
        blocks = block_table[place.row, : -(-chunk.end // self.block_size)].long()
        prompt.blocks[layer_index] = blocks
        prompt.scores[layer_index] = self.policy.score(self._inputs(layer_index, recent, blocks, chunk.end))

    def _observe_trim(
        self, layer_index: int, place: Batched, trim: Trim, query: torch.Tensor, block_table: torch.Tensor
    ) -> None:
        layer, policy, held = self.layers[layer_index], self.policy, self._held.get(trim.req_id)
        count = held.counts[layer_index] if held else trim.budget - policy.protected
        num_pages = -(-(count + policy.protected) // self.block_size)
        num_blocks = trim.end // self.block_size
        if held:
            num_blocks += len(held.pages[layer_index]) - held.start[layer_index]
        if num_blocks <= num_pages:
            return
        blocks = block_table[place.row, :num_blocks].long()
        keys = layer.layout.read_keys(layer.cache, blocks, num_blocks * self.block_size)
        current = query[place.last - 1 : place.last].transpose(0, 1)
        count = num_pages * self.block_size - policy.protected
        chosen = policy.trim(current, keys, count, layer.impl.scale, layer.soft_cap).sort(dim=-1).values
        self._trimmings[trim.req_id].chosen[layer_index] = blocks, chosen

    def _inputs(self, layer_index: int, queries: torch.Tensor, blocks: torch.Tensor, prompt_len: int) -> LayerInputs:
        layer, policy = self.layers[layer_index], self.policy
        return LayerInputs(
            queries.transpose(0, 1),
            layer.layout.read_keys(layer.cache, blocks, prompt_len),
            layer.impl.scale,
            layer.soft_cap,
            layer.layout.read_values(layer.cache, blocks, prompt_len) if policy.needs_values else None,
            layer.output_weight if policy.needs_output_weight else None,
            layer_index,
        )

    def _evict(self, chunk: PromptChunk, grant: Grant) -> Eviction:
        prompt = self._prompts.pop(chunk.req_id)
        num_layers = len(self.layers)
        scores = [prompt.scores[layer] for layer in range(num_layers)]
        counts = self.policy.budgets(scores, chunk.end, grant.budget)
        paged = PagedPrompt(chunk.end, self.policy.protected, self.block_size)
        bag = list(grant.pages) if grant.pages is not None else None
        held = Held([], [], counts)
        kept: list[int] = []
        trace: list[torch.Tensor | None] = []
        for index, (layer, count) in enumerate(zip(self.layers, counts, strict=True)):
            num_pages = paged.pages(count)
            if num_pages == paged.full_blocks:
                held.pages.append([])
                held.start.append(0)
                kept.append(chunk.end)
                trace.append(None)
                continue
            blocks = prompt.blocks[index]
            if bag is None:
                pages = blocks[:num_pages].tolist()
            else:
                pages, bag = bag[:num_pages], bag[num_pages:]
            ranks = self.policy.rank(scores[index], chunk.end, min(1.0, grant.budget / chunk.end))
            positions = paged.positions(ranks, num_pages)
            layer.layout.compact(layer.cache, blocks, positions, torch.tensor(pages, device=blocks.device))
            held.pages.append(pages)
            held.start.append(paged.full_blocks)
            kept.append(paged.kept_len(num_pages))
            trace.append(positions)
        if self.trace is not None:
            self.trace[chunk.req_id] = trace
        self._hold(chunk.req_id, held)
        return Eviction(
            grant.epoch,
            tuple(len(pages) if start else None for pages, start in zip(held.pages, held.start, strict=True)),
            tuple(kept),
            tuple(count + self.policy.protected for count in counts),
        )

    def _trim(self, trimming: Trimming) -> Eviction:
        trim, num_layers = trimming.trim, len(self.layers)
        num_blocks = trim.end // self.block_size
        held = self._held.get(trim.req_id)
        if held is None:
            counts = [trim.budget - self.policy.protected] * num_layers
            held = Held([[] for _ in range(num_layers)], [0] * num_layers, counts)
        for index, (blocks, chosen) in trimming.chosen.items():
            layer = self.layers[index]
            pages = blocks[: chosen.shape[1] // self.block_size]
            layer.layout.compact(layer.cache, blocks, chosen, pages)
            held.pages[index], held.start[index] = pages.tolist(), num_blocks
        self._hold(trim.req_id, held)
        sizes = [len(pages) + num_blocks - start for pages, start in zip(held.pages, held.start, strict=True)]
        return Eviction(
            trim.epoch,
            tuple(len(held.pages[index]) if index in trimming.chosen else None for index in range(num_layers)),
            tuple(blocks * self.block_size for blocks in sizes),
            tuple(count + self.policy.protected for count in held.counts),
        )

    def _hold(self, req_id: str, held: Held) -> None:
        if self._rows is None:
            self._rows = EvictedRows(len(self.layers), self.block_size, self.layers[0].module.kv_cache.device)
        self._held[req_id] = held
        self._rows.discard(req_id)
        self._rows.store(req_id, held.pages, held.start)
