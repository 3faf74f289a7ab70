"""Full CUDA graphs of decode steps.

vLLM's own graphs serve steps in which nothing is evicted. Runner V2's are captured a second time, over rows of which
any may read private pages (``captured.py``). What fits neither (a step that scores, rows with owners of the other kind,
wider tables; evicted rows on runner V1) runs with piecewise graphs, or eagerly where there are none.
"""

import functools
import inspect
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from vllm.config import CUDAGraphMode
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group, kv_transfer_state
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager, ModelCudaGraphManager
from vllm.v1.worker.gpu_worker import Worker

from cake_vllm.integration.messages import StepPlan, plan_of
from cake_vllm.integration.patching import wrap


class _Step:
    """What this process knows of the step that is being set up.

    Attributes:
        plan: what the scheduler says of it; ``None``: it is not one of an engine with eviction, or a dummy.
        runner: vLLM's model runner, which has the batch.
        replays: whether it runs as one of the second graphs.
    """

    plan: StepPlan | None = None
    runner: Any = None
    replays = False


step = _Step()
_GRAPHS = "kv_eviction_graphs"
#: A missed row would read blocks that are not its own any more.
MISPLACED = "evicted requests are not where the scheduler put them"
# Of vLLM's functions, which are asked every step.
_signature = functools.cache(inspect.signature)


def install_graphs() -> None:
    """Lets steps with evicted rows choose their graphs; called by worker processes with eviction."""
    wrap(Worker, "execute_model", _remember_plan)
    wrap(CudagraphDispatcher, "dispatch", _dispatch_v1)
    wrap(CudaGraphManager, "dispatch", _dispatch_v2)
    wrap(CudaGraphManager, "run_fullgraph", _run_full_graph)
    wrap(ModelCudaGraphManager, "capture", _capture_twice)


def _remember_plan(original: Callable[..., Any], worker: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
    metadata = scheduler_output.kv_connector_metadata
    # The worker half forgets it at the end of the step: drafts choose graphs, too.
    step.plan, step.replays = plan_of(metadata), False
    step.runner = worker.model_runner
    if metadata is None:
        # Of an engine without a connector, which was in this process before: it must not meet this one.
        with _swapped(kv_transfer_state, _KV_CONNECTOR_AGENT=None):
            return original(worker, scheduler_output, *args, **kwargs)
    return original(worker, scheduler_output, *args, **kwargs)


def _has_work() -> bool:
    return step.plan is not None and bool(step.plan.observations or step.plan.redirected)


def evicted_rows(req_idx: np.ndarray | None) -> np.ndarray:
    """Rows of the step's batch that were evicted, for what is planned on the host before a connector is asked.

    Args:
        req_idx: ``[R]`` places of its requests among those of the runner; ``None`` on runner V1: they are rows.

    Raises:
        RuntimeError: if there are not as many as the scheduler says.
    """
    if step.plan is None or not step.plan.redirected:
        return np.empty(0, dtype=np.int64)
    requests = step.runner.input_batch if req_idx is None else step.runner.req_states
    places = [requests.req_id_to_index[name] for name in _worker().reading.evicted(step.plan, requests.req_id_to_index)]
    rows = np.array(places, dtype=np.int64) if req_idx is None else np.isin(req_idx, places).nonzero()[0]
    if len(rows) != sum(count.num_rows for count in step.plan.redirected.values()):
        raise RuntimeError(MISPLACED)
    return rows


def _dispatch_v1(original: Callable[..., Any], dispatcher: Any, *args: Any, **kwargs: Any) -> Any:
    if not _has_work():
        return original(dispatcher, *args, **kwargs)
    call = _signature(original).bind(dispatcher, *args, **kwargs)
    call.arguments["invalid_modes"] = {CUDAGraphMode.FULL, *(call.arguments.get("invalid_modes") or ())}
    return original(*call.args, **call.kwargs)


def _dispatch_v2(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    found = original(manager, *args, **kwargs)
    step.replays = False
    if found.cg_mode != CUDAGraphMode.FULL or not _has_work():
        return found
    if found in getattr(manager, _GRAPHS, {}) and _worker().captured.fits(step.plan):
        step.replays = True
        return found
    call = _signature(original).bind(manager, *args, **kwargs)
    # Full graphs are for uniform batches.
    call.arguments |= {"uniform_token_count": None, "max_query_len": None}
    relaxed = original(*call.args, **call.kwargs)
    if relaxed.cg_mode != CUDAGraphMode.FULL:
        return relaxed
    given = {name: call.arguments[name] for name in ("num_tokens", "num_reqs")}
    return replace(relaxed, cg_mode=CUDAGraphMode.NONE, uniform_token_count=None, max_query_len=None, **given)


def _run_full_graph(original: Callable[..., Any], manager: Any, desc: Any) -> Any:
    if not step.replays:
        return original(manager, desc)
    with _swapped(manager, graphs=getattr(manager, _GRAPHS)):
        return original(manager, desc)


def _capture_twice(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> None:
    original(manager, *args, **kwargs)
    descs = [
        desc
        for desc in manager._capture_descs.get(CUDAGraphMode.FULL, ())
        if desc.num_ubatches == 1
        and desc.num_reqs == desc.num_tokens
        and 1 in (desc.uniform_token_count, desc.max_query_len)
    ]
    is_measuring = manager._max_full_descs_to_capture is not None
    if not descs or is_measuring or not has_kv_transfer_group():
        return
    again: dict[Any, Any] = {}
    with _swapped(manager, graphs=again, _capture_descs={CUDAGraphMode.FULL: descs}), _worker().captured.capturing():
        original(manager, *args, **kwargs)
    setattr(manager, _GRAPHS, again)


def _worker() -> Any:
    return get_kv_transfer_group().worker  # type: ignore[attr-defined]


@contextmanager
def _swapped(owner: Any, **attributes: Any) -> Any:
    before = {name: getattr(owner, name) for name in attributes}
    vars(owner).update(attributes)
    try:
        yield
    finally:
        vars(owner).update(before)
