"""Full CUDA graphs without a GPU: decode steps run over the buffers that a captured step reads, at recorded addresses.

Which graphs a step gets is vLLM's choice among those that this plugin leaves; its dispatchers are vLLM's own here, with
nothing captured behind them. With graphs: see ``gpu/``.
"""

import copy
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from elsewhere import ReferenceFlashBackend, flash_in_torch, in_place_of_cpu_attn
from random_models import numbers, save_random_kind
from ties import assert_same
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import SpeculatorCudaGraphManager

from cake_vllm.integration.messages import Redirected, StepPlan
from cake_vllm.integration.worker import graphs
from cake_vllm.integration.worker.attention import RedirectedImpl

BUDGET, NUM_ROWS = 120, 8


@contextmanager
def rehearsed(engine):
    """Decode steps run as they are captured and replayed; yields how many did, and the addresses that they read."""
    worker, seen = engine.connector.worker, SimpleNamespace(steps=0, addresses={})
    begin, captured, worker.captured._most_rows = worker.begin, worker.captured.work, NUM_ROWS

    def capturing(metadata):
        work = captured(metadata)
        (rows,) = work.redirected
        read = (rows.tables, rows.lengths, rows.query_start_loc, work.is_here, work.stock.seq_lens)
        addresses = [tensor.data_ptr() for tensor in read]
        assert seen.addresses.setdefault(len(metadata.seq_lens), addresses) == addresses
        return work

    def beginning(plan, attn_metadata):
        RedirectedImpl.captured_step = None
        is_decode = attn_metadata and (next(iter(attn_metadata.values())).query_start_loc.diff() == 1).all()
        if not (is_decode and plan.redirected and worker.captured.fits(plan)):
            begin(plan, attn_metadata)
            return
        # In this order on runner V2: the plan without metadata, then the metadata.
        begin(plan, None)
        graphs.step.replays = True
        worker.replay(attn_metadata)
        RedirectedImpl.captured_step = capturing
        seen.steps += 1

    with mock.patch.multiple(worker, begin=beginning):
        yield seen
    RedirectedImpl.captured_step, graphs.step.replays = None, False


@pytest.mark.engine
@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["cake", pytest.param("layer-defensivekv", marks=pytest.mark.contract)])
def test_a_replayed_step_is_the_eager_one(start_engine, tiny_model, is_v2, name):
    with flash_in_torch():
        rehearse_elsewhere(start_engine, ReferenceFlashBackend, tiny_model, is_v2, name)


@pytest.mark.engine
def test_a_replayed_step_leaves_windows_alone(start_engine, tmp_path, same_on_both):
    """Their layers run in the same graph; those beside them have sinks."""
    with flash_in_torch():
        model = save_random_kind(tmp_path, "sinks")
        rehearse_elsewhere(start_engine, ReferenceFlashBackend, model, is_v2=False, name="layer-defensivekv")


def rehearse_elsewhere(start_engine, backend, model, is_v2, name):
    """The same of an engine with this backend."""
    settings = {"kv_eviction": name, "kv_eviction_budget": BUDGET, "kv_eviction_config": {"window": 8, "decode": "off"}}
    settings |= {"skip_tokenizer_init": True, "max_num_batched_tokens": 256, "max_model_len": 1024}
    with in_place_of_cpu_attn(backend):
        engine = start_engine(model, **settings)
        rehearse(engine, is_v2)
        engine.shutdown()


def rehearse(engine, is_v2):
    """Replayed steps of an engine give what eager ones give."""
    prompts = [numbers(20 + index, length) for index, length in enumerate((50, 300, 420, 700)[: 2 if is_v2 else 4])]
    expected = engine.runs(prompts, 6 if is_v2 else 60)
    engine.forget_prefixes()
    with rehearsed(engine) as seen:
        got = engine.runs(prompts, 6 if is_v2 else 60)
    assert seen.steps >= (4 if is_v2 else 50)
    assert sum(bool(run.kept) for run in got) == len(prompts) - 1
    for run, reference in zip(got, expected, strict=True):
        assert_same(run, reference)


PLANS = {
    "nothing evicted": (StepPlan(), "FULL", "FULL"),
    "not ours": (None, "FULL", "FULL"),
    "evicted": (StepPlan(redirected={False: Redirected(1, 1, 1)}), "PIECEWISE", "again"),
    "the other kind": (StepPlan(redirected={True: Redirected(1, 1, 1)}), "PIECEWISE", "PIECEWISE"),
    "both kinds": (StepPlan(redirected=dict.fromkeys((False, True), Redirected(1, 1, 1))), "PIECEWISE", "PIECEWISE"),
    "wider than captured": (
        StepPlan(redirected={False: Redirected(1, 1, 1)}, grown={"a": [[1, 2]]}),
        None,
        "PIECEWISE",
    ),
    "scores": (StepPlan(observations=(mock.sentinel.observation,)), "PIECEWISE", "PIECEWISE"),
}


@pytest.fixture
def config(start_engine, tiny_model):
    """Of an engine with eviction whose decode steps would be captured."""
    engine = start_engine(tiny_model, skip_tokenizer_init=True, kv_eviction="cake", kv_eviction_budget=BUDGET)
    config = copy.copy(engine.vllm_config)
    config.compilation_config = copy.copy(config.compilation_config)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    config.compilation_config.splitting_ops = list(CompilationConfig._attention_ops)
    config.compilation_config.cudagraph_capture_sizes = [1, 2, 4]
    config.compilation_config.max_cudagraph_capture_size = 4
    worker = engine.connector.worker
    with mock.patch.object(worker.captured, "_most_rows", 4):
        worker.captured.__dict__.pop("buffers", None)
        width = worker.captured.buffers.tables.shape[2]
        with mock.patch.object(type(worker.reading.rows[False]), "width", width - 1):
            yield config
    worker.captured.__dict__.pop("buffers", None)


@pytest.mark.engine
@pytest.mark.contract
@pytest.mark.parametrize("situation", PLANS)
def test_which_graphs_a_step_gets(same_on_both, config, situation):
    plan, of_v1, of_v2 = PLANS[situation]
    with mock.patch.object(graphs.step, "plan", plan):
        if of_v1:
            dispatcher = CudagraphDispatcher(config)
            dispatcher.initialize_cudagraph_keys(CUDAGraphMode.FULL_AND_PIECEWISE, 1)
            mode, _ = dispatcher.dispatch(3, uniform_decode=True)
            assert mode.name == of_v1
        platform = SimpleNamespace(get_global_graph_pool=lambda: None)
        with mock.patch.object(cudagraph_utils, "current_platform", platform):
            manager = cudagraph_utils.CudaGraphManager(
                config, torch.device("cpu"), CUDAGraphMode.FULL_AND_PIECEWISE, decode_query_len=1
            )
        manager._graphs_captured = True
        full = manager._capture_descs[CUDAGraphMode.FULL]
        setattr(manager, graphs._GRAPHS, dict.fromkeys(full))
        found = manager.dispatch(3, 3, 1, 0, max_query_len=1)
        assert (found.cg_mode.name, graphs.step.replays) == ("FULL" if of_v2 == "again" else of_v2, of_v2 == "again")
        assert found.num_tokens == 4
        # A server without piecewise graphs runs eagerly what the full ones cannot.
        manager._candidates = {
            key: [d for d in of if d.cg_mode == CUDAGraphMode.FULL] for key, of in manager._candidates.items()
        }
        found = manager.dispatch(3, 3, 1, 0, max_query_len=1)
        assert found.cg_mode.name == ("NONE" if of_v2 == "PIECEWISE" else "FULL")
        graphs.step.replays = False


@pytest.mark.engine
@pytest.mark.contract
@pytest.mark.parametrize(("situation", "mode"), [("nothing evicted", "FULL"), ("evicted", "PIECEWISE")])
def test_drafts_run_no_full_graph_while_rows_are_evicted(same_on_both, config, situation, mode):
    """Theirs are not captured a second time: their layers' tables are found as their passes come."""
    platform = SimpleNamespace(get_global_graph_pool=lambda: None)
    with mock.patch.object(cudagraph_utils, "current_platform", platform):
        manager = SpeculatorCudaGraphManager(config, torch.device("cpu"), CUDAGraphMode.FULL_AND_PIECEWISE, 1)
    manager._graphs_captured = True
    with mock.patch.object(graphs.step, "plan", PLANS[situation][0]):
        assert manager.dispatch(3, 3, 1, 0, max_query_len=1).cg_mode.name == mode


def test_the_second_graphs_are_captured_and_replayed():
    """vLLM's capture is called again for decode steps of one token for each request, into other graphs."""
    descs = [
        cudagraph_utils.BatchExecutionDescriptor(CUDAGraphMode.FULL, 4, 4, uniform_token_count=1),
        # With two tokens for each request, and one for mixed batches.
        cudagraph_utils.BatchExecutionDescriptor(CUDAGraphMode.FULL, 4, 2, uniform_token_count=2),
        cudagraph_utils.BatchExecutionDescriptor(CUDAGraphMode.FULL, 4, 4),
    ]
    manager = SimpleNamespace(graphs={}, _capture_descs={CUDAGraphMode.FULL: descs}, _max_full_descs_to_capture=None)
    captured = SimpleNamespace(is_capturing=False)

    @contextmanager
    def capturing():
        captured.is_capturing = True
        yield
        captured.is_capturing = False

    def capture(manager):
        for desc in manager._capture_descs[CUDAGraphMode.FULL]:
            manager.graphs[desc] = "second" if captured.is_capturing else "first"

    captured.capturing = capturing
    with mock.patch.multiple(
        graphs, has_kv_transfer_group=lambda: True, _worker=lambda: SimpleNamespace(captured=captured)
    ):
        graphs._capture_twice(capture, manager)
    assert manager.graphs == dict.fromkeys(descs, "first")
    assert manager.kv_eviction_graphs == {descs[0]: "second"}
    for replays in (False, True):
        with mock.patch.object(graphs.step, "replays", replays):
            ran = graphs._run_full_graph(lambda manager, desc: manager.graphs[desc], manager, descs[0])
        assert ran == ("second" if replays else "first")
    manager._max_full_descs_to_capture, manager.graphs, before = 1, {}, manager.kv_eviction_graphs
    graphs._capture_twice(capture, manager)
    assert manager.kv_eviction_graphs is before, "vLLM was only measuring"
