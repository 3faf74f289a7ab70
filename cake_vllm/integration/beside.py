"""Eviction beside vLLM's KV offloading: both connectors run, and neither sees what the other is in the middle of.

What the lower tier holds is exact, and named by the prompt's hashes; what the GPU holds of an evicted request is
neither. Between the two:

    a store reads blocks of an evicted request       the step that evicts it waits for the store     worker
    its row changes, and more would be stored        nothing more is stored of it                    scheduler
    a hit covers the queries that rank its keys      the hit ends before them                        scheduler
"""

from collections.abc import Iterator
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
from cake_vllm.integration.messages import Cut, Grant, Observation, plan_of
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
        #: By request of which nothing more is stored, how many tokens would have been.
        self._bounds: dict[str, int | None] = {}
        #: Stores that this worker was told of and has not reported.
        self._stores: dict[int, TransferJob] = {}

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
        """As much as the lower tier has, and the queries by which the prompt is evicted may leave."""
        found, is_async = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if found is None:
            # It is passed over for a transfer, and not for want of memory.
            self.scheduler.admitted()
            return None, False
        found = min(found, self.scheduler.most_hits(request) - num_computed_tokens)
        return (found, is_async) if found > 0 else (0, False)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> MultiKVConnectorMetadata:
        """Ours plans first: what it evicts at the end of the step was stored, as it is still exact, with the step."""
        for name in scheduler_output.preempted_req_ids or ():
            if name in self._bounds:
                # It starts again, exact.
                self._states[name].max_offload_tokens = self._bounds.pop(name)
        metadata = super().build_connector_meta(scheduler_output)
        for name in _grants(metadata):
            if name not in self._bounds and name in self._states:
                # Its row is not what they were told any more.
                self._bounds[name] = self._states[name].max_offload_tokens
                self._states[name].max_offload_tokens = 0
        return metadata

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
        self._stores.update(theirs.store_jobs)

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Evicts what the step finished, once nobody reads the blocks that are rewritten or given back."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, MultiKVConnectorMetadata)
        if jobs := set(self._in_the_way(_grants(metadata))):
            # What it does before blocks of a preempted request are written to.
            self._theirs.handle_preemptions(OffloadingConnectorMetadata({}, {}, jobs))
        reports: Any = super().build_connector_worker_meta()
        if reports is not None and reports.metadata[1] is not None:
            for job in reports.metadata[1].completed_jobs:
                self._stores.pop(job, None)
        return reports

    def _in_the_way(self, grants: dict[str, Grant]) -> Iterator[int]:
        """Stores that read what evicted requests hold, or columns that were somebody's before."""
        columns = {block for grant in grants.values() for group in grant.columns for block in group}
        for name, job in self._stores.items() if grants else ():
            assert isinstance(job.src_spec, GPULoadStoreSpec)
            if job.req_id in grants or not columns.isdisjoint(job.src_spec.block_ids.tolist()):
                yield name


def _grants(metadata: MultiKVConnectorMetadata) -> dict[str, Grant]:
    """By request, the evictions at the end of a step."""
    plan = plan_of(metadata)
    assert plan is not None
    granted: tuple[Observation | Cut, ...] = (*plan.observations, *plan.cuts)
    return {what.req_id: what.grant for what in granted if what.grant is not None}
