"""Eviction beside vLLM's KV offloading: both connectors run, and neither sees what the other is in the middle of.

What the lower tier holds is exact, and named by the prompt's hashes; what the GPU holds of an evicted request is
neither. Between the two:

    a store reads blocks of an evicted request       they are given back once it has run             worker
    columns are lent that a store still reads        vLLM is told that they are somebody else's      scheduler
    its row changes, and more would be stored        nothing more is stored of it                    scheduler
    a hit covers the queries that rank its keys      no more than lies before them is looked up      scheduler
"""

import math
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector, MultiKVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingConnectorMetadata, TransferJob
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.kv_offload.base import GPULoadStoreSpec
from vllm.v1.request import Request

from cake_vllm.integration.connector import KVEvictionConnector
from cake_vllm.integration.messages import Cut, Grant, Observation, StepPlan, plan_of
from cake_vllm.integration.scheduler.scheduler import EvictionScheduler
from cake_vllm.integration.worker.worker import EvictionWorker


class KVEvictionBesideConnector(MultiConnector):
    """vLLM's own way to run two connectors, ours first, with what they have to know of each other."""

    is_alone = False

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        super().__init__(vllm_config, role, kv_cache_config)
        ours, theirs = self._connectors
        assert isinstance(ours, KVEvictionConnector)
        assert isinstance(theirs, OffloadingConnector)
        self._ours, self._theirs = ours, theirs
        if role == KVConnectorRole.SCHEDULER:
            # What it knows of requests; looked up now, so that another vLLM ends here and not under load.
            self._states = theirs.scheduler._req_status
            groups = theirs.scheduler.config.kv_group_configs
            #: Whether a hit needs what lies before its end: of windows and states the tier has no more than that.
            self._ends_matter = any(of.sliding_window_size_in_chunks is not None for of in groups)
            #: Hits of requests that are evicted end at multiples of so many tokens.
            self._unit = math.lcm(*(of.tokens_per_chunk if self._ends_matter else of.tokens_per_block for of in groups))
        #: By request of which nothing more is stored, how many tokens would have been.
        self._bounds: dict[str, int | None] = {}
        #: Stores that this worker was told of and has not reported; those of this step that are still to be begun; and
        #: those of evicted requests that have to run before the step ends.
        self._stores: dict[int, TransferJob] = {}
        self._unbegun: dict[int, TransferJob] = {}
        self._left: set[int] = set()

    @property
    def scheduler(self) -> EvictionScheduler:
        """The half of the plugin that lives with the scheduler."""
        return self._ours.scheduler

    @property
    def worker(self) -> EvictionWorker:
        """The half that lives with the worker."""
        return self._ours.worker

    # Scheduler side

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """As much as the lower tier has, and the queries by which the prompt is evicted may leave.

        It is not asked for more: where layers have windows or states, a hit cannot be shortened once it is found.
        """
        self._ours.get_num_new_matched_tokens(request, num_computed_tokens)
        most = self.scheduler.most_hits(request)
        if most < request.num_tokens:
            most -= most % self._unit
        most -= num_computed_tokens
        # Of such layers vLLM leaves a token to be computed, wherever the hit has to end.
        found, is_async = self._theirs.scheduler.get_num_new_matched_tokens(
            request, num_computed_tokens, most + self._ends_matter
        )
        if found is None:
            # It is passed over for a transfer, and not for want of memory.
            self.scheduler.admitted()
            return None, False
        found = min(found, most)
        if found <= 0:
            return 0, False
        self._requests_to_connector[request.request_id] = self._connectors.index(self._theirs)
        return found, is_async

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> MultiKVConnectorMetadata:
        """Ours plans first: what it evicts at the end of the step was stored, as it is still exact, with the step."""
        for name in scheduler_output.preempted_req_ids or ():
            if name in self._bounds:
                # It starts again, exact.
                self._states[name].max_offload_tokens = self._bounds.pop(name)
        plan = self._ours.build_connector_meta(scheduler_output)
        assert isinstance(plan, StepPlan)
        grants = _grants(plan)
        self._lend(grants)
        metadata = MultiKVConnectorMetadata((plan, self._theirs.build_connector_meta(scheduler_output)))
        for name in grants:
            if name not in self._bounds and name in self._states:
                # Its row is not what they were told any more.
                self._bounds[name] = self._states[name].max_offload_tokens
                self._states[name].max_offload_tokens = 0
        return metadata

    def _lend(self, grants: dict[str, Grant]) -> None:
        """Columns are in no row: vLLM does not see that they are written to. It waits for stores that read such blocks,
        and takes them for what they are no more, blocks of a window that has moved on.
        """
        for grant in grants.values():
            for columns in grant.columns:
                self._theirs.scheduler._current_batch_allocated_block_ids.update(columns)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As the parent's; a request that was evicted stays unstored to its end."""
        self._bounds.pop(request.request_id, None)
        return super().request_finished_all_groups(request, block_ids)

    # Worker side

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """As the parent's, and remembers what is going to be read."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, MultiKVConnectorMetadata)
        theirs = connector_metadata.metadata[1]
        assert isinstance(theirs, OffloadingConnectorMetadata)
        self._unbegun = theirs.store_jobs
        self._stores.update(theirs.store_jobs)

    def wait_for_save(self) -> None:
        """The step's stores may begin. With drafts runner V1 says so after it has asked for the report."""
        super().wait_for_save()
        self._unbegun = {}
        self._wait_for(self._left)
        self._left = set()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Evicts what the step finished, once nobody reads the blocks that are rewritten or given back."""
        metadata = self._get_connector_metadata()
        grants = _grants(plan_of(metadata))
        jobs = {job for job, of in self._stores.items() if of.req_id in grants}
        # Draft layers that run after this still write what such a store reads. It is waited for when they have; nothing
        # is given back before the step ends, and what is rewritten before that cannot wait.
        self._left = {job for job in jobs & self._unbegun.keys() if not self._is_rewritten(self._unbegun[job], grants)}
        self._wait_for(jobs - self._left)
        reports: Any = super().build_connector_worker_meta()
        if reports is not None and reports.metadata[1] is not None:
            for job in reports.metadata[1].completed_jobs:
                self._stores.pop(job, None)
        return reports

    def _wait_for(self, jobs: set[int]) -> None:
        """Does what vLLM does before blocks of a preempted request are written to."""
        if jobs:
            self._theirs.handle_preemptions(OffloadingConnectorMetadata({}, self._unbegun, jobs))

    @staticmethod
    def _is_rewritten(job: TransferJob, grants: dict[str, Grant]) -> bool:
        """Whether the eviction of its request writes to blocks that a store reads."""
        assert isinstance(job.src_spec, GPULoadStoreSpec)
        blocks = job.src_spec.block_ids.tolist()
        return any(not set(columns).isdisjoint(blocks) for columns in grants[job.req_id].columns)


def _grants(plan: StepPlan | None) -> dict[str, Grant]:
    """By request, the evictions at the end of a step."""
    assert plan is not None
    granted: tuple[Observation | Cut, ...] = (*plan.observations, *plan.cuts)
    return {what.req_id: what.grant for what in granted if what.grant is not None}
