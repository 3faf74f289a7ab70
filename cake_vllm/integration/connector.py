"""The KV connector through which the two halves of the plugin talk. It transfers no KV."""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from cake_vllm.integration.engine import eviction_config
from cake_vllm.integration.messages import EvictionReport, StepPlan
from cake_vllm.integration.metrics import EvictionPromMetrics, EvictionStats
from cake_vllm.integration.reports import install_news
from cake_vllm.integration.scheduler.drafts import install_drafts
from cake_vllm.integration.scheduler.scheduler import EvictionScheduler

#: vLLM has one worker's end of a connector per process.
COMPANY = (
    "an engine with --kv-eviction lives in this process, and another one cannot start beside it: shut that one down "
    "first (llm.llm_engine.engine_core.shutdown()), or unset VLLM_ENABLE_V1_MULTIPROCESSING, so that each has its own"
)


class KVEvictionConnector(KVConnectorBase_V1, SupportsHMA):
    """One object per process; each forwards vLLM's hooks to the half that belongs there.

    Attributes:
        is_alone: whether no other connector runs beside it.
    """

    is_alone = True

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        super().__init__(vllm_config, role, kv_cache_config)
        config = eviction_config(vllm_config)
        assert config is not None, "the connector is set up only where eviction is on"
        if role == KVConnectorRole.SCHEDULER:
            self.scheduler = EvictionScheduler(
                config,
                kv_cache_config,
                vllm_config.scheduler_config,
                vllm_config.model_config.max_model_len,
                vllm_config.num_speculative_tokens,
                vllm_config.num_lookahead_tokens,
            )
            install_news()
            is_late = vllm_config.scheduler_config.async_scheduling
            if config.decode != "off" and vllm_config.num_speculative_tokens and not is_late:
                install_drafts()

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is handed to another engine."""
        return False

    # Scheduler side

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """See :class:`EvictionScheduler`."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self.scheduler.bind(kv_cache_manager)

    def on_new_request(self, request: Request) -> None:
        """See :class:`EvictionScheduler`."""
        self.scheduler.add(request)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """See :class:`EvictionScheduler`. With evicted rows :meth:`start_load_kv` is to come before the forward."""
        plan = self.scheduler.plan(scheduler_output)
        scheduler_output.has_sync_kv_loads |= bool(plan.redirected)
        return plan

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """See :class:`EvictionScheduler`."""
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, EvictionReport):
            self.scheduler.finish(report.evictions())
            self.scheduler.took(report.seconds)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The request's blocks may be freed at once; the second value travels in its response."""
        return False, self.scheduler.remove(request.request_id)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """No KV comes from outside; vLLM asks when it would admit the request if there is memory."""
        self.scheduler.asked(request, num_computed_tokens)
        return 0, False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """There was."""
        self.scheduler.admitted()

    # Worker side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Makes the worker half, now that there are caches to look at: what it cannot serve ends the start here."""
        from cake_vllm.integration.worker.worker import EvictionWorker

        config = eviction_config(self._vllm_config)
        assert config is not None
        assert self._kv_cache_config is not None
        layers = self._vllm_config.compilation_config.static_forward_context
        if any(name not in layers or not _is_of(cache, layers[name]) for name, cache in kv_caches.items()):
            raise RuntimeError(COMPANY)
        self.worker = EvictionWorker(config, self._vllm_config, self._kv_cache_config)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Prepares the step while the forward context is set and before the first layer runs."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepPlan)
        # A step without tokens runs no forward.
        metadata = get_forward_context().attn_metadata if is_forward_context_available() else None
        if isinstance(metadata, list):
            raise RuntimeError("--kv-eviction does not work together with micro-batching: drop --enable-dbo")
        self.worker.begin(connector_metadata, metadata)

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Compacts what this step finished, and reports it."""
        return self.worker.finish()

    def wait_for_save(self) -> None:
        """Nothing to wait for. With drafts this hook comes after the report."""

    def clear_connector_metadata(self) -> None:
        """The step is over; on either runner this hook comes last, after the report and after all drafts."""
        super().clear_connector_metadata()
        self.worker.end()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """No KV comes from outside. Runner V2 shows the metadata of full CUDA graphs here and nowhere else."""
        if metadata := kwargs.get("attn_metadata"):
            self.worker.replay(metadata)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """No KV comes from outside."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """No KV goes outside."""

    # Metrics

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """What was evicted since the last call; counted on the scheduler's side only."""
        return self.scheduler.take_stats() if self.role == KVConnectorRole.SCHEDULER else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """Statistics back from their payload."""
        return EvictionStats(data) if data else EvictionStats.empty()

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> KVConnectorPromMetrics | None:
        """The counters on ``/metrics``."""
        return EvictionPromMetrics(*args)


def _is_of(cache: Any, layer: Any) -> bool:
    """Whether a KV cache is this layer's; those that are no tensors are of layers that are not evicted."""
    if not (isinstance(cache, torch.Tensor) and isinstance(layer.kv_cache, torch.Tensor)):
        return True
    return cache.untyped_storage().data_ptr() == layer.kv_cache.untyped_storage().data_ptr()
