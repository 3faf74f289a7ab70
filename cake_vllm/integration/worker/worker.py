"""The worker half: scores prompts as they are computed, moves what they keep, and redirects what attention reads.

Runs in every worker process and frees no block. A step goes through three rooms:

    begin     reading   which rows were evicted before, and what they read       reading.py, captured.py
    layers    judging   queries and keys of requests that are looked at          judging.py, watched.py
    finish    judging   what they keep                                           dividing.py
              moving    pages for it, and the way there                          moving.py, dealing.py
    end       moving    from now on they read what was kept

What a step that evicts takes for it is told with a later one                    clock.py
"""

from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tp_group
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig

from cake_vllm.config import KVEvictionConfig
from cake_vllm.integration.messages import Cut, Eviction, EvictionReport, Observation, StepPlan
from cake_vllm.integration.worker.captured import CapturedSteps
from cake_vllm.integration.worker.clock import Clock
from cake_vllm.integration.worker.dividing import Choice
from cake_vllm.integration.worker.gates import WorkerGates
from cake_vllm.integration.worker.graphs import install_graphs
from cake_vllm.integration.worker.graphs import step as current_step
from cake_vllm.integration.worker.judging import Judging
from cake_vllm.integration.worker.layers import Batch, Layers
from cake_vllm.integration.worker.moving import Moving
from cake_vllm.integration.worker.projections import output_projection
from cake_vllm.integration.worker.reading import Reading
from cake_vllm.kernels import EvictedRows


class EvictionWorker:
    """One step after the other. Made once the KV caches are allocated, before the first step.

    Raises:
        RuntimeError: when it is made, if what vLLM allocated cannot be evicted from.
        ValueError: if the policy needs what a layer has not.
    """

    def __init__(self, config: KVEvictionConfig, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig):
        self.layers = layers = Layers.of(vllm_config, kv_cache_config)
        if config.policy.needs_output_weight:
            for layer in layers.target:
                output_projection(layer.module)
        if config.policy.needs_rotation:
            # Kept by the layers.
            _ = [layer.rotation for layer in layers.target]
        rows = {by_head: EvictedRows(layers.whole, by_head) for by_head in (False, True)}
        speculative = vllm_config.speculative_config
        # A model that is no head of the target is given the sampled token beside the step's.
        more_drafted = int(speculative is not None and speculative.uses_draft_model())
        self.reading = Reading(layers, rows, more_drafted)
        self.moving = Moving(config, layers, rows)
        gates = WorkerGates(config.policy, vllm_config.model_config, layers.target, get_tp_group())
        num_drafts = vllm_config.num_speculative_tokens
        self.judging = Judging(config, layers, gates, self.moving.held, get_tp_group(), num_drafts)
        most_captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        most_rows = min(vllm_config.scheduler_config.max_num_seqs, most_captured)
        most_pages = (-(-vllm_config.model_config.max_model_len // layers.grid.block_size) + 1) * layers.grid.per_block
        self.captured = CapturedSteps(layers, rows, config.policy.selection != "layer", most_rows, most_pages)
        self.clock = Clock.of(layers.grid.pages.device, vllm_config.max_concurrent_batches)
        self._stage = get_pp_group().rank_in_group
        self._plan = StepPlan()
        # Those whose layers ran, also where a step is planned while another one's report is still to come.
        self._observations: list[Observation] = []
        self._cuts: tuple[Cut, ...] = ()
        #: Told of every eviction, when it has been carried out.
        self.on_evicted: Callable[[Observation | Cut, Choice, Eviction], None] | None = None
        install_graphs()
        if current_platform.is_cpu() and kv_cache_config.needs_kv_cache_zeroing:
            from cake_vllm.integration.worker.cpu_attention import clear_whole_blocks

            clear_whole_blocks()

    def begin(self, plan: StepPlan, attn_metadata: dict[str, Any] | None) -> None:
        """Prepares a step: called after the metadata was built and before the first layer runs.

        Hangs this step's work on the metadata of the evictable layers, if there is any.

        Raises:
            RuntimeError: if a row that was evicted is not found; it would read blocks that are not its own any more.
        """
        self.moving.settle()
        self._plan, self._cuts = plan, plan.cuts
        for req_id in plan.released:
            self.judging.forget(req_id)
            self.moving.forget(req_id)
        self.reading.begin(plan)
        if not attn_metadata or not (plan.observations or plan.redirected):
            return
        batch = Batch(self.layers, attn_metadata)
        observe = self.judging.watch(plan.observations, batch) if plan.observations else None
        if observe is not None and any(what.grant for what in plan.observations):
            observe = self.clock.timed(observe)
        self.reading.redirect(batch, observe)
        self._observations.extend(plan.observations)

    def replay(self, attn_metadata: dict[str, Any]) -> None:
        """Fills the buffers that a captured step reads; called before it runs, with metadata like :meth:`begin`'s."""
        if current_step.replays:
            self.captured.fill(self._plan, Batch(self.layers, attn_metadata))

    def finish(self) -> EvictionReport | None:
        """Evicts the requests that were granted it in this step: called after the last layer."""
        observations, self._observations = self._observations, []
        cuts, self._cuts = self._cuts, ()
        granted: list[Observation | Cut] = [what for what in observations if what.grant is not None]
        evict = self.clock.timed(self._evict)
        evictions = {what.req_id: evict(what) for what in (*granted, *cuts)}
        for what in observations:
            if what.is_last:
                self.judging.let_go(what)
        seconds = self.clock.end_step()
        return EvictionReport({self._stage: evictions}, seconds) if evictions or seconds else None

    def end(self) -> None:
        """The step is over, drafts included.

        Draft layers run after the target's and, on runner V1, after :meth:`finish`: until here they write to the rows
        and read what was there when the step began.
        """
        self.moving.settle()
        self._plan = StepPlan()
        self.reading.expected = {}
        current_step.plan, current_step.runner = None, None

    def _evict(self, what: Observation | Cut) -> Eviction:
        if isinstance(what, Cut):
            self.judging.recall(what)
        choice = self.judging.choose(what)
        eviction = self.moving.evict(what, choice, self.judging.watched[what.req_id].rows)
        self.judging.conclude(what, choice, eviction.is_traded)
        if self.on_evicted is not None:
            self.on_evicted(what, choice, eviction)
        return eviction
