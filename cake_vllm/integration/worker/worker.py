"""The worker half: scores prompts as they are computed, moves what they keep, and redirects what attention reads.

Runs in every worker process and frees no block.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tp_group
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import KVCacheConfig

from cake_vllm.config import KVEvictionConfig
from cake_vllm.integration.messages import (
    Counts,
    Cut,
    Eviction,
    EvictionReport,
    Grant,
    Observation,
    Redirected,
    StepPlan,
)
from cake_vllm.integration.scheduler.spec import evictable_groups
from cake_vllm.integration.worker.attention import STEP, EvictingImpl, Rows, StepWork
from cake_vllm.integration.worker.dealing import Held, Reads, copy_blocks, keep_recent, move, read, redeal
from cake_vllm.integration.worker.gates import WorkerGates
from cake_vllm.integration.worker.graphs import MISPLACED, ReplayedRows, install_graphs
from cake_vllm.integration.worker.graphs import step as current_step
from cake_vllm.integration.worker.layers import EvictableLayer
from cake_vllm.integration.worker.watched import Batched, Watched
from cake_vllm.kernels import EvictedRows, Grid, to_device
from cake_vllm.policies import LayerInputs, LayerScore, PagedPrompt, Policy

logger = init_logger("vllm.cake_vllm.worker")


class EvictionWorker:
    """Per-worker state: watched requests and evicted rows."""

    def __init__(self, config: KVEvictionConfig, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig):
        self.config = config
        modules = vllm_config.compilation_config.static_forward_context
        groups = [kv_cache_config.kv_cache_groups[group_id] for group_id in evictable_groups(kv_cache_config)]
        self.block_size: int = groups[0].kv_cache_spec.block_size
        named = [(name, index) for index, group in enumerate(groups) for name in group.layer_names]
        named.sort(key=lambda found: extract_layer_index(found[0]))
        every = [EvictableLayer(name, modules[name], group, self.block_size) for name, group in named]
        self.layers = [layer for layer in every if not layer.impl.is_draft]
        #: Those of a model that drafts. They lie in the same blocks, and run after the target's.
        self.draft_layers = [layer for layer in every if layer.impl.is_draft]
        self._every_layer = [*self.layers, *self.draft_layers]
        for index, layer in enumerate(self._every_layer):
            layer.impl.layer_index = index
        if self.draft_layers and len(kv_cache_config.kv_cache_groups) > 1:
            raise RuntimeError("--kv-eviction needs a draft model whose layers are in the target's only KV cache group")
        for layer in self.draft_layers:
            layer.impl.work_of_pass = self._work_of_pass
        speculative = vllm_config.speculative_config
        # A model that is no head of the target is given the sampled token beside the step's.
        self._more_drafted = int(speculative is not None and speculative.uses_draft_model())
        self.group, self.stage = get_tp_group(), get_pp_group().rank_in_group
        self.gates = WorkerGates(config.policy, vllm_config.model_config, self.layers, self.group)
        install_graphs()
        most_captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self._most_rows = min(vllm_config.scheduler_config.max_num_seqs, most_captured)
        self._most_blocks = -(-vllm_config.model_config.max_model_len // self.block_size) + 1
        self._plan = StepPlan()
        self._watched: dict[str, Watched] = {}
        self._observations: list[Observation] = []
        self._cuts: tuple[Cut, ...] = ()
        self._held: dict[str, Held] = {}
        # What takes effect at the end of the step.
        self._unsettled: list[Callable[[], None]] = []
        #: What evicted prompts keep of their full blocks, for tests: by request id and layer, the positions of each
        #: head; ``None`` for a layer that keeps everything.
        self.trace: dict[str, list[list[torch.Tensor] | None]] | None = None
        #: What they were chosen by, if they are traced: by request id and layer, ``[Hkv, S - w]``.
        self.trace_ranks: dict[str, dict[int, torch.Tensor]] = {}
        #: What was done to them, if they are traced: by request id.
        self.trace_evictions: dict[str, Eviction] = {}
        #: Shown a layer's index, what its policy looked at, and its scores, whenever a prompt is judged.
        self.on_judged: Callable[[int, LayerInputs, LayerScore], None] | None = None

    @cached_property
    def grid(self) -> Grid:
        """The global view of the target's layers."""
        return self._every_grid.part(slice(len(self.layers)))

    @cached_property
    def _every_grid(self) -> Grid:
        """Made when it is first needed, for the caches are allocated after this object."""
        every = self._every_layer
        return Grid.of([layer.module.kv_cache for layer in every], [layer.group for layer in every])

    @cached_property
    def _rows(self) -> dict[bool, EvictedRows]:
        return {by_head: EvictedRows(self._every_grid, by_head) for by_head in (False, True)}

    def begin(self, plan: StepPlan, attn_metadata: dict[str, Any] | None) -> None:
        """Prepares a step: called after the metadata was built and before the first layer runs.

        Hangs this step's work on the metadata of the evictable layers, if there is any.

        Raises:
            RuntimeError: if a row that was evicted is not found; it would read blocks that are not its own any more.
        """
        self._settle()
        self._plan = plan
        for req_id in plan.released:
            self._watched.pop(req_id, None)
            self._held.pop(req_id, None)
            for rows in self._rows.values():
                rows.discard(req_id)
        self._cuts = plan.cuts
        if plan.grown:
            for rows in self._rows.values():
                rows.append(plan.grown)
        if not attn_metadata or not (plan.observations or plan.redirected):
            return
        # Layers of a group share one.
        metadata = [attn_metadata[layer.name] for layer in self._every_layer]
        first = self._first(metadata)
        tails = self._tails(first)
        redirected, index, stock_lens = self._redirect(plan.redirected, first, tails)
        observe = None
        if plan.observations:
            observe = partial(self._observe, self._find(plan.observations, metadata, tails))
            self._observations.extend(plan.observations)
        stock: dict[int, Any] = {}
        for layer, of_layer in zip(self._every_layer, metadata, strict=True):
            if id(of_layer) in stock:
                continue
            stock[id(of_layer)] = of_layer if not redirected else None
            if stock_lens is not None:
                stock[id(of_layer)] = layer.impl.with_lengths(layer.module, of_layer, stock_lens)
            setattr(of_layer, STEP, StepWork(self.grid, stock[id(of_layer)], redirected, index, observe))

    def evicted(self, plan: StepPlan, known: Iterable[str]) -> set[str]:
        """Those of the ``known`` requests whose rows are redirected in a step that is being set up."""
        return {name for name in known for rows in self._rows.values() if name in rows}.difference(plan.released)

    def replay(self, attn_metadata: dict[str, Any]) -> None:
        """Fills the buffers that a captured step reads; called before it runs, with metadata like :meth:`begin`'s."""
        if not current_step.replays:
            return
        ((by_head, count),) = self._plan.redirected.items()
        first = self._first([attn_metadata[layer.name] for layer in self._every_layer])
        slots = self._slots(by_head, count, self._tails(first))
        self._replayed.fill(self._rows[by_head], slots, first.seq_lens, self.block_size)

    def can_replay(self, plan: StepPlan) -> bool:
        """Whether a decode step with these rows can run as it was captured."""
        by_head = self._replayed.by_head
        growth = max((len(of_groups[0]) for of_groups in plan.grown.values()), default=0)
        fits = self._rows[by_head].width + growth <= self._replayed.tables.shape[2]
        return not plan.observations and set(plan.redirected) == {by_head} and fits

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Every decode step that runs meanwhile reads the buffers that :meth:`replay` fills."""
        EvictingImpl.captured_step = self._captured_step
        try:
            yield
        finally:
            EvictingImpl.captured_step = None

    @cached_property
    def _replayed(self) -> ReplayedRows:
        by_head = self.config.policy.selection != "layer"
        num_heads = self.grid.num_heads if by_head else 1
        shape = self._every_grid.num_layers, self._most_rows, num_heads, self._most_blocks
        return ReplayedRows(by_head, *shape, self.grid.pages.device)

    def _captured_step(self, metadata: Any) -> StepWork:
        rows, num_rows = self._replayed, len(metadata.seq_lens)
        num_owners = num_rows * rows.num_heads
        stock = self.layers[0].impl.with_lengths(self.layers[0].module, metadata, rows.stock_lens[:num_rows])
        tables, lengths = rows.tables[:, :num_owners], rows.lengths[:, :num_owners]
        evicted = Rows(rows.by_head, tables, lengths, rows.starts[: num_owners + 1], num_owners, 1)
        return StepWork(self.grid, stock, [evicted], None, None, rows.is_here[:num_rows])

    def _work_of_pass(self, metadata: Any) -> StepWork | None:
        """A pass of the model that drafts: rows that were evicted before this step read pages of their own.

        Its first pass has the step's tokens, each later one a token for each row; their metadata is not shown to a
        connector, and may be one object for all of them. A pass's forward context is its own.
        """
        if not self._plan.redirected:
            return None
        known = get_forward_context().additional_kwargs
        if STEP not in known:
            more = self._more_drafted if metadata.max_query_len > 1 else 0
            expected = {
                by_head: Redirected(count.num_rows, count.num_tokens + more * count.num_rows, count.longest + more)
                if metadata.max_query_len > 1
                else Redirected(count.num_rows, count.num_rows, 1)
                for by_head, count in self._plan.redirected.items()
            }
            redirected, index, stock_lens = self._redirect(expected, metadata, self._tails(metadata))
            layer = self.draft_layers[0]
            stock = None if stock_lens is None else layer.impl.with_lengths(layer.module, metadata, stock_lens)
            known[STEP] = StepWork(self._every_grid, stock, redirected, index, None)
        return known[STEP]

    def _first(self, metadata: Sequence[Any]) -> Any:
        """The metadata that tells requests apart, that of the first group."""
        every = zip(self._every_layer, metadata, strict=True)
        return next(of_layer for layer, of_layer in every if layer.group == 0)

    def _tails(self, metadata: Any) -> torch.Tensor:
        """``[R]`` blocks that rows end in."""
        last = ((metadata.seq_lens - 1).clamp(min=0) // self.block_size).long()
        # Rows that only pad the batch have no length; nobody's row ends in block 0.
        tails = metadata.block_table.gather(1, last.unsqueeze(1)).squeeze(1)
        return tails.masked_fill(metadata.seq_lens == 0, 0)

    def finish(self) -> EvictionReport | None:
        """Evicts the requests that were granted it in this step: called after the last layer."""
        observations, self._observations = self._observations, []
        evictions = {
            what.req_id: self._evict(what, what.grant, self._watched[what.req_id])
            for what in observations
            if what.grant is not None
        }
        for cut in self._cuts:
            evictions[cut.req_id] = self._evict(cut, cut.grant, self._recall(cut))
        self._cuts = ()
        for what in observations:
            if what.is_last:
                del self._watched[what.req_id]
        return EvictionReport({self.stage: evictions}) if evictions else None

    def end(self) -> None:
        """The step is over, drafts included: what was evicted is read from now on in its new place.

        Draft layers run after the target's and, on runner V1, after :meth:`finish`: until here they write to the rows
        and read what was there when the step began.
        """
        self._settle()
        self._plan, current_step.plan, current_step.runner = StepPlan(), None, None

    def _settle(self) -> None:
        for take_effect in self._unsettled:
            take_effect()
        self._unsettled.clear()

    def _redirect(
        self, expected: Mapping[bool, Redirected], metadata: Any, tails: torch.Tensor
    ) -> tuple[list[Rows], tuple[torch.Tensor, torch.Tensor] | None, torch.Tensor | None]:
        """The evicted rows of the batch, where their queries are (see :class:`StepWork`), and ``[R]`` lengths for the
        stock call, ``None`` if nothing is left for it.
        """
        seq_lens, starts = metadata.seq_lens, metadata.query_start_loc
        found, places, elsewhere = [], [], torch.zeros_like(seq_lens, dtype=torch.bool)
        for by_head, count in expected.items():
            slots = self._slots(by_head, count, tails)
            is_here = slots > 0
            elsewhere |= is_here
            rows, place = self._sequences(by_head, count, slots, is_here, seq_lens, starts)
            found.append(rows)
            places += [place] if place is not None else []
        index = None
        if places:
            token, head = torch.cat(places, dim=1)
            index = token, head
        if not found or sum(count.num_rows for count in expected.values()) == len(seq_lens):
            return found, index, None
        num_new = (starts[1:] - starts[:-1])[: len(seq_lens)]
        return found, index, torch.where(elsewhere, num_new, seq_lens).to(seq_lens.dtype)

    def _slots(self, by_head: bool, count: Redirected, tails: torch.Tensor) -> torch.Tensor:
        """``[R]`` slots of the batch's rows of one kind, 0 for the others; there are as many as the scheduler says."""
        slots = self._rows[by_head].find(tails)
        torch._assert_async((slots > 0).sum() == count.num_rows, MISPLACED)
        return slots

    def _sequences(
        self,
        by_head: bool,
        count: Redirected,
        slots: torch.Tensor,
        is_here: torch.Tensor,
        seq_lens: torch.Tensor,
        starts: torch.Tensor,
    ) -> tuple[Rows, torch.Tensor | None]:
        """Rows of one kind, and ``[2, N]`` tokens and heads of their queries, ``None`` if they are all, in order."""
        device, num_heads = slots.device, self.grid.num_heads
        split = num_heads if by_head else 1
        is_all = count.num_rows == len(seq_lens)
        row = (~is_here).int().argsort(stable=True)[: count.num_rows]
        tables, num_dropped = self._rows[by_head].select(slots[row])
        lengths = (seq_lens[row].view(1, -1, 1) - num_dropped * self.block_size).flatten(1)
        first, num_queries = starts[row], count.num_tokens * split
        token, head = first.unsqueeze(1), torch.arange(num_heads, device=device)
        if count.longest == 1:
            query_start_loc = torch.arange(num_queries + 1, dtype=starts.dtype, device=device)
        else:
            num_new = (starts[row + 1] - first).repeat_interleave(split)
            ends = num_new.cumsum(0)
            query_start_loc = torch.nn.functional.pad(ends, (1, 0)).to(starts.dtype)
            if by_head or not is_all:
                sequence = torch.arange(len(num_new), device=device).repeat_interleave(num_new, output_size=num_queries)
                before = (ends - num_new - first.repeat_interleave(split))[sequence]
                token = (torch.arange(num_queries, device=device) - before).unsqueeze(1)
                if by_head:
                    head = (sequence % split).unsqueeze(1)
        rows = Rows(by_head, tables, lengths.to(seq_lens.dtype), query_start_loc, num_queries, count.longest)
        if is_all and (count.longest == 1 or not by_head):
            return rows, None
        return rows, torch.stack(torch.broadcast_tensors(token.long(), head)).flatten(1)

    def _find(self, observations: Sequence[Observation], metadata: Sequence[Any], tails: torch.Tensor) -> list[Batched]:
        asked = to_device([what.tail_block for what in observations], tails.dtype, tails.device)
        matches = tails == asked.unsqueeze(1)
        torch._assert_async((matches.sum(dim=1) == 1).all(), "requests are not where the scheduler put them")
        place = matches.int().argmax(dim=1, keepdim=True)
        ends = metadata[0].query_start_loc[1:][place]
        every = zip(self._every_layer, metadata, strict=True)
        tables = {layer.group: of_layer.block_table for layer, of_layer in every}
        rows = [tables[group].index_select(0, place.squeeze(1)) for group in sorted(tables)]
        batched = []
        for index, (what, end) in enumerate(zip(observations, ends, strict=True)):
            batched.append(Batched(what, end))
            watched = self._watched.setdefault(what.req_id, Watched())
            watched.rows = [of_group[index] for of_group in rows]
            watched.num_rejected = max(watched.length - (what.end - what.num_tokens), 0)
            watched.length = what.end + what.num_drafts
        return batched

    def _observe(self, batched: Sequence[Batched], layer_index: int, query: torch.Tensor) -> None:
        for place in batched:
            watched = self._watched[place.what.req_id]
            if watched.error is None:
                try:
                    self._look(layer_index, place, watched, query)
                except Exception as error:
                    watched.error = error

    def _look(self, layer_index: int, place: Batched, watched: Watched, query: torch.Tensor) -> None:
        what, grant, config = place.what, place.what.grant, place.what.config or self.config
        policy, num_queries, layer = config.policy, config.policy.num_queries, self.layers[layer_index]
        count = num_queries + what.num_drafts
        recent = layer.restore_queries(place.recent(query, count))
        if layer_index in watched.queries and len(recent) < count:
            earlier = watched.queries.pop(layer_index)
            recent = torch.cat([earlier[: len(earlier) - watched.num_rejected], recent])
            recent = recent[max(len(recent) - count, 0) :]
        if not what.is_last:
            watched.queries[layer_index] = recent
        if not what.is_noted:
            watched.notes.pop(layer_index, None)
            if grant is None:
                return
        recent = recent[: len(recent) - what.num_drafts]
        held = self._held.get(what.req_id)
        reads = read(self.grid, layer_index, held, watched.rows, what.end, self.block_size)
        if what.is_noted:
            self._note(policy, layer_index, place, watched, query, reads)
        if grant is None:
            return
        watched.reads[layer_index] = reads
        if grant.divides:
            watched.scores[layer_index] = self._judge(policy, layer_index, recent, reads, grant.budget, watched)
            return
        most = -(-grant.budget // self.block_size)
        heads = range(self.grid.num_heads)
        targets = held.of_layer(layer_index, held.dealt).tolist() if held else [most]
        targets = [targets[head % len(targets)] for head in heads]
        num_pages = [reads.table.shape[1] - missing for missing in reads.missing]
        if all(count <= target for count, target in zip(num_pages, targets, strict=True)):
            everything = torch.arange(reads.length, device=reads.table.device)
            chosen = [everything[missing * self.block_size :] for missing in reads.missing]
        elif config.decode == "cake":
            inputs = self._inputs(policy, layer_index, layer.restore_queries(place.recent(query, 1)), reads)
            count = targets[0] * self.block_size - policy.protected
            chosen = list(policy.trim(inputs, count).sort(dim=-1).values)
        elif len(recent) < num_queries:
            return
        else:
            kept = [min(count, target) for count, target in zip(num_pages, targets, strict=True)]
            counts = [count * self.block_size - policy.protected for count in kept]
            chosen = policy.rescore(self._inputs(policy, layer_index, recent, reads), counts)
        watched.chosen[layer_index] = chosen

    def _judge(
        self, policy: Policy, layer_index: int, queries: torch.Tensor, reads: Reads, budget: int, watched: Watched
    ) -> LayerScore:
        """A prompt's scores in one layer, as its budget is divided."""
        inputs = self._inputs(policy, layer_index, queries, reads)
        inputs = replace(inputs, budget=budget, notes=watched.notes.get(layer_index))
        score = policy.judge(inputs)
        if self.on_judged is not None:
            self.on_judged(layer_index, inputs, score)
        return score

    def _note(
        self, policy: Policy, layer_index: int, place: Batched, watched: Watched, query: torch.Tensor, reads: Reads
    ) -> None:
        what = place.what
        positions = policy.noted(what.end - what.num_tokens, what.end)
        back = reads.length - what.end
        places = range(positions.start + back, positions.stop + back, positions.step)
        queries = self.layers[layer_index].restore_queries(place.at(query, positions))
        inputs = self._inputs(None, layer_index, queries, reads)
        watched.notes[layer_index] = policy.note(inputs, places, watched.notes.get(layer_index))

    def _inputs(self, policy: Policy | None, layer_index: int, queries: torch.Tensor, reads: Reads) -> LayerInputs:
        """What a policy may look at; without one, queries and keys."""
        layer, valid = self.layers[layer_index], reads.valid(self.block_size)

        def there(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if valid is None else tensor.masked_fill_(~valid.unsqueeze(-1), 0)

        cache, table, length = self.grid.cache, reads.table, reads.length
        return LayerInputs(
            queries.transpose(0, 1),
            there(layer.read_keys(cache, table, length)),
            layer.impl.scale,
            layer.soft_cap,
            there(layer.read_values(cache, table, length)) if policy and policy.needs_values else None,
            layer.output_weight if policy and policy.needs_output_weight else None,
            layer_index,
            valid=valid,
            gate=self.gates.of(policy, layer_index) if policy else None,
        )

    def _recall(self, cut: Cut) -> Watched:
        """What a request that is cut reads, and what its prompt is worth: judged at the first time."""
        watched, held, grid = self._watched.setdefault(cut.req_id, Watched()), self._held.get(cut.req_id), self.grid
        policy = (cut.config or self.config).policy
        watched.rows = [to_device(blocks, torch.int64, grid.pages.device) for blocks in cut.row]
        try:
            for index in range(len(self.layers)):
                watched.reads[index] = read(grid, index, held, watched.rows, cut.end, self.block_size)
            if watched.worth is None:
                assert cut.grant.prompt_len is not None
                scores, heads = [], self.layers[0].impl.num_heads
                none = torch.empty(0, heads, self.layers[0].impl.head_size, device=grid.pages.device)
                for index, reads in watched.reads.items():
                    prompt = replace(reads, length=cut.grant.prompt_len)
                    queries, budget = (
                        watched.queries.get(index, none),
                        cut.grant.budget - cut.grant.num_generated(cut.end),
                    )
                    scores.append(self._judge(policy, index, queries, prompt, budget, watched))
                watched.remember(scores)
        except Exception as error:
            watched.error = error
        return watched

    def _evict(self, what: Observation | Cut, grant: Grant, watched: Watched) -> Eviction:
        """Moves what a request keeps, or leaves it with what it reads if its policy raises."""
        config, held, num_blocks = what.config or self.config, self._held.get(what.req_id), what.end // self.block_size
        each = self.grid.num_heads if grant.by_head else 1
        protected = config.policy.protected + grant.num_generated(what.end)
        indices = range(len(self.layers))
        counts = held.counts if held else ((grant.budget - protected,) * each,) * len(self.layers)
        new, moved = None, []
        self._share_failures(watched)
        try:
            if watched.error is not None:
                raise watched.error
            if grant.divides:
                counts = self._divide(config, what.end, grant, watched)
            if len(watched.chosen) == len(self.layers):
                chosen = [watched.chosen[index] for index in indices]
                new, last = self._deal(config, num_blocks, grant, held, chosen, counts)
                reads = [watched.reads[index] for index in indices]
                for owners in move(self.grid, self.layers[0].layout, reads, chosen, new, last):
                    moved += owners
        except Exception as error:
            watched.error = error
            logger.warning_once(
                "the eviction policy %r raised %s: %s; requests it fails on keep what they hold",
                config.policy_name,
                type(error).__name__,
                error,
            )
        is_traded = new is not None and watched.error is None
        drafted, copy = self._draft(held, new if is_traded else None, grant, watched.rows, num_blocks)
        if is_traded:
            assert new is not None
            self._held[what.req_id] = new = replace(new, drafted=drafted)
            pages, used = new.pages, new.used
            for index, notes in watched.notes.items():
                watched.notes[index] = _gather(notes, chosen[index], reads[index].length, self.block_size)
            if self.trace is not None and grant.divides:
                self.trace[what.req_id] = [
                    _unless_all(chosen[index], reads[index], self.block_size) for index in indices
                ]
                self.trace_ranks[what.req_id] = watched.ranks.copy()
        else:
            pages, used = self._as_it_is(what, grant, watched, new, moved)
        self._unsettled.append(partial(self._store, what.req_id, grant, pages, used, num_blocks, drafted, copy))
        watched.chosen.clear()
        watched.ranks.clear()
        watched.scores.clear()
        watched.reads.clear()
        kept = used * self.block_size + what.end % self.block_size
        eviction = Eviction(
            grant.epoch,
            grant.by_head,
            new.num_columns if new else 0,
            is_traded,
            tuple(map(tuple, kept.reshape(-1, each).tolist())),
            tuple(tuple(count + protected for count in layer) for layer in counts),
            failed=watched.error is not None,
        )
        if self.trace is not None and grant.divides:
            self.trace_evictions[what.req_id] = eviction
        return eviction

    def _divide(self, config: KVEvictionConfig, end: int, grant: Grant, watched: Watched) -> Counts:
        """Divides the budget among the owners and chooses what each keeps.

        Layers compete over all tensor-parallel ranks, which add up their heads' statistics; heads inside a rank.
        """
        policy, by_head = config.policy, config.policy.selection != "layer"
        # What was generated since the prompt's end stays.
        num_new = grant.num_generated(end)
        budget, protected = grant.budget - num_new, policy.protected + num_new
        if config.is_elastic and watched.worth is None:
            watched.remember([watched.scores[index] for index in range(len(self.layers))])
        worth = watched.worth
        scores = worth.scores if worth else [watched.scores[index] for index in range(len(self.layers))]
        if not by_head and self.group.world_size > 1 and scores[0].terms.numel():
            terms = self.group.all_reduce(torch.stack([score.terms for score in scores]))
            scores = [replace(score, terms=of_layer) for score, of_layer in zip(scores, terms, strict=True)]
        scores = list(policy.settle(scores, budget))
        given = policy.head_budgets(scores, end - num_new, budget)
        counts = []
        for index, (score, of_layer) in enumerate(zip(scores, given, strict=True)):
            reads = watched.reads[index]
            cached, missing = (
                PagedPrompt(reads.length, protected, self.block_size),
                reads.missing_tokens(self.block_size),
            )
            of_layer = [
                min(count, reads.length - absent - protected) for count, absent in zip(of_layer, missing, strict=True)
            ]
            judged = end - num_new if worth else reads.length
            ranks = policy.ranks(score, judged, min(1.0, budget / judged), of_layer)
            if worth:
                ranks = worth.in_cache(index, ranks, missing)
            if self.trace is not None:
                watched.ranks[index] = ranks
            chosen = cached.positions(ranks, [cached.pages(count) for count in of_layer])
            if worth:
                worth.keep(index, chosen, cached, missing)
            watched.chosen[index] = chosen
            counts.append(tuple(of_layer) if by_head else (of_layer[0],))
        return tuple(counts)

    def _deal(
        self,
        config: KVEvictionConfig,
        num_blocks: int,
        grant: Grant,
        held: Held | None,
        chosen: Sequence[Sequence[torch.Tensor]],
        counts: Counts,
    ) -> tuple[Held, np.ndarray]:
        """The pages that owners shall have, and those who have to be moved last."""
        each, size = len(counts[0]), self.block_size
        used = np.array([len(head) // size for layer in chosen for head in layer[:each]])
        if held is not None and not grant.divides:
            return replace(held, used=used, start=num_blocks), np.zeros_like(used, dtype=bool)
        needs = used
        if config.decode != "off":
            # All that they will ever need: whenever a block has been filled, each takes it in or gives one up.
            needs = np.maximum(used, (np.ravel(counts) + config.policy.protected + size - 1) // size)
        pages, last, num_columns = redeal(self.grid, held, grant.columns, grant.by_head, needs)
        return Held(grant.by_head, num_blocks, pages, needs, used, num_columns, counts), last

    def _as_it_is(
        self, what: Observation | Cut, grant: Grant, watched: Watched, new: Held | None, moved: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """What a request reads whose eviction did not come to its end: some owners may have moved, the others have not.

        Returns:
            ``[n, W]`` int64 pages in place of all full blocks, and ``[n]`` int64, how many of them each owner reads.
        """
        held, done = self._held.get(what.req_id), set(moved)
        rows: list[list[int]] = []
        for index in range(len(self.layers)):
            reads = read(self.grid, index, held, watched.rows, what.end, self.block_size)
            full = reads.table[:, : reads.length // self.block_size].tolist()
            heads = [pages[missing:] for pages, missing in zip(full, reads.missing, strict=True)]
            rows += heads if grant.by_head else [[page // self.grid.num_heads for page in heads[0]]]
        if new is not None:
            rows = [
                new.pages[owner, : new.used[owner]].tolist() if owner in done else pages
                for owner, pages in enumerate(rows)
            ]
        used = np.array([len(pages) for pages in rows])
        return np.array([pages + [0] * (used.max() - len(pages)) for pages in rows]), used

    def _draft(
        self, held: Held | None, new: Held | None, grant: Grant, rows: Sequence[torch.Tensor], num_blocks: int
    ) -> tuple[tuple[int, ...], Callable[[], None] | None]:
        """Blocks whose pages draft layers shall read in place of all full ones, and what copies their pages there.

        Nothing that they read changes what is served, so no policy is asked. What they hold has no owner beside them:
        the pages in private columns are theirs.
        """
        if not self.draft_layers:
            return (), None
        before = held.drafted if held else ()
        row = rows[0][held.start if held else 0 : num_blocks]
        if new is None:
            return (*before, *row.tolist()), None
        drafted, sources, targets = keep_recent(before, len(row), grant.columns[0][: new.num_columns])
        ids = partial(to_device, dtype=torch.int64, device=self.grid.pages.device)
        blocks = torch.cat([ids(before), row.long()])[ids(sources)]
        return drafted, partial(copy_blocks, self._draft_grid, blocks, ids(targets))

    @cached_property
    def _draft_grid(self) -> Grid:
        return self._every_grid.part(slice(len(self.layers), None))

    def _store(
        self,
        req_id: str,
        grant: Grant,
        pages: np.ndarray,
        used: np.ndarray,
        start: int,
        drafted: Sequence[int],
        copy: Callable[[], None] | None,
    ) -> None:
        """From now on a request reads these pages, and its draft layers those of ``drafted``, which ``copy`` fills."""
        if copy is not None:
            copy()
        if self.draft_layers:
            theirs = self._draft_grid.homes([drafted], grant.by_head).T
            width = max(pages.shape[1], theirs.shape[1])
            pages = np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in (pages, theirs)])
            used = np.concatenate([used, np.full(len(theirs), len(drafted))])
        self._rows[grant.by_head].store(req_id, pages, used, start, grant.tail)

    def _share_failures(self, watched: Watched) -> None:
        """A policy that raised on one tensor-parallel rank has raised on all of them, or they would wait for it."""
        if self.group.world_size > 1:
            # As floats, which hold them exactly: not every backend adds integers.
            failed = torch.tensor([float(watched.error is not None)], device=self.grid.pages.device)
            if self.group.all_reduce(failed).item():
                watched.error = watched.error or RuntimeError("it raised on another rank")


def _gather(tokens: torch.Tensor, chosen: Sequence[torch.Tensor], length: int, block_size: int) -> torch.Tensor:
    """What is left of ``[Hkv, length, ...]``, aligned at the end, zeros before shorter heads.

    Args:
        tokens: of what the heads of a layer read.
        chosen: for each head, what it keeps of its full blocks.
        length: of what they read.
        block_size: of which the last may be partial and stays.
    """
    tail = tokens[:, length // block_size * block_size :]
    longest = max(map(len, chosen))
    left = tokens.new_zeros(len(tokens), longest, *tokens.shape[2:])
    for head, positions in enumerate(chosen):
        left[head, longest - len(positions) :] = tokens[head, positions]
    return torch.cat([left, tail], dim=1)


def _unless_all(chosen: list[torch.Tensor], reads: Reads, block_size: int) -> list[torch.Tensor] | None:
    full = reads.length // block_size * block_size
    return None if all(len(head) == full for head in chosen) else chosen
