"""The engine on a GPU against the Hugging Face replay, and CUDA graphs against eager execution.

With ``--dry-run``: over references of FlashAttention's and FlashInfer's kernels, and, on ``--runner v2``, Triton
interpreted.
"""

import sys
from unittest import mock

import pytest
import torch
from conftest import ROOT
from elsewhere import InterpretedTritonBackend, ReferenceFlashBackend, flash_in_torch, in_place_of_cpu_attn
from random_models import numbers, save_random_eagle, save_random_model
from replay import Replay
from stored import Stored, StoredReplay, save_scaled_model
from test_drafts import NGRAM, drafts
from test_elastic import preemptions
from ties import assert_same

sys.path.append(str(ROOT / "benchmarks"))
sys.path.append(str(ROOT / "benchmarks" / "gpu"))

from references import Compared

from cake_vllm.integration.worker.captured import ReplayedRows
from cake_vllm.policies import create_policy

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

BUDGET, CHUNK = 150, 256
#: What 30 layers make of float16's 1e-3. Budgets that heads compete for, and those of later evictions, move by whole
#: pages then: float16 on a CPU shows it, too.
HALF = {"rank_bound": 5e-2, "gap_bound": 0.1}


@pytest.fixture(params=["FLASH_ATTN", "TRITON_ATTN", "FLASH_ATTN-async", "FLASHINFER"])
def settings(request, is_dry, is_v2):
    """Of an engine with this backend; but for Triton they compute in half precision."""
    backend, _, is_async = request.param.partition("-")
    is_flash = backend != "TRITON_ATTN"
    common = {
        "skip_tokenizer_init": True,
        "max_num_batched_tokens": CHUNK,
        "seed": int(is_flash),
        "max_model_len": 1024,
        # Looked through after each step.
        "num_gpu_blocks_override": 1500,
    }
    if not is_dry:
        if backend == "FLASHINFER":
            pytest.importorskip("flashinfer")
        dtype = "float16" if is_flash else "float32"
        common |= {"block_size": 16, "dtype": dtype, "async_scheduling": bool(is_async)}
        yield {**common, "attention_config": {"backend": backend}, "gpu_memory_utilization": 0.3}
        return
    if is_async:
        pytest.skip("without a GPU vLLM schedules synchronously")
    if not is_flash and not is_v2:
        pytest.skip("without a GPU Triton is interpreted: --runner v2")
    if backend == "FLASHINFER":
        from flashinfer_elsewhere import ReferenceFlashInferBackend, flashinfer_in_torch

        with flashinfer_in_torch((9, 0), has_trtllm=True), in_place_of_cpu_attn(ReferenceFlashInferBackend):
            yield {**common, "seed": 2}
        return
    with flash_in_torch(), in_place_of_cpu_attn(ReferenceFlashBackend if is_flash else InterpretedTritonBackend):
        yield common


@pytest.fixture(scope="module")
def replays(served_model):
    """Made when they are first asked for."""
    made: dict[bool, Replay] = {}

    def replay(half: bool) -> Replay:
        if half not in made:
            made[half] = Replay(served_model, **(HALF if half else {}))
        return made[half]

    return replay


@pytest.mark.parametrize(
    ("name", "prefill", "decode"),
    [
        ("cake", "exact", "cake"),
        *((name, prefill, "window") for name in ("cake", "layer-defensivekv") for prefill in ("exact", "progressive")),
    ],
)
def test_served_as_replayed(start_engine, served_model, replays, settings, name, prefill, decode, is_v2, is_dry):
    is_half = settings.get("dtype") == "float16"
    if is_half and (name, prefill) != ("cake", "exact"):
        pytest.skip("half precision moves budgets by pages: see test_attention_of_kept_tokens")
    options = {"prefill": prefill, "decode": decode}
    eviction = {"kv_eviction": name, "kv_eviction_budget": BUDGET, "kv_eviction_config": options}
    engine = start_engine(served_model, **settings, **eviction)
    engine.forget_prefixes()
    # One alone: where chunks end depends on the batch.
    num_tokens = 4 if is_dry and is_v2 else 40
    prompt = numbers(63, 300 if is_dry and is_v2 else 900)
    (served,) = engine.served([prompt], num_tokens)
    chunk = CHUNK if prefill == "progressive" else None
    replay, sizes = replays(is_half), {"block_size": settings.get("block_size", 32), "page_size": 16}
    replay.verify(prompt, served, create_policy(name, {}), BUDGET, **sizes, decode=decode, chunk=chunk)
    assert served.choices
    # By events that the device passed; nobody waited for them.
    assert min(engine.stats()["seconds"]) > 0
    assert engine.is_idle()


@pytest.mark.parametrize("name", ["cake", "layer-defensivekv"])
def test_attention_of_kept_tokens(no_engine, served_model, settings, name, is_v2, is_dry):
    """What FlashAttention makes of pages and of head pages, against torch in float32 on the same kept tokens."""
    if is_dry and is_v2:
        pytest.skip("the same on both runners")
    eviction = {"kv_eviction": name, "kv_eviction_budget": BUDGET, "kv_eviction_config": {"decode": "off"}}
    no_engine()
    common = {"dtype": "float32", "kv_cache_memory_bytes": 2**28, "enforce_eager": True}
    engine = Compared(served_model, {**common, **settings, **eviction})
    found = engine.compare([numbers(80 + index, 300 + 50 * index) for index in range(4)], name, 1)
    engine.engine.engine_core.shutdown()
    assert found["torch"]["difference"] < (5e-3 if settings.get("dtype") == "float16" else 1e-5)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory) -> str:
    """A random Llama whose heads every backend takes."""
    fields = {"num_hidden_layers": 4, "head_dim": 64}
    return save_random_model(tmp_path_factory.mktemp("wide"), "llama", "LlamaForCausalLM", **fields)


def half(settings: dict) -> dict:
    """How far apart runs of an engine with these settings may be."""
    return HALF if settings.get("dtype") == "float16" else {}


@pytest.mark.parametrize("name", ["cake", "layer-defensivekv"])
def test_running_requests_shrink(start_engine, served_model, settings, name, is_dry, is_v2):
    """Elastic budgets: what three prompts lack of a pool they give while they run, and nobody is preempted."""
    if is_dry and is_v2:
        pytest.skip("the same on both runners")
    size, num_tokens = settings.get("block_size", 32), 120
    blocks = 3 * (-(-601 // size) + 2)
    pool = {"num_gpu_blocks_override": blocks + 1, "kv_eviction": name, "kv_eviction_budget": "auto"}
    pool["kv_eviction_config"] = {"min_tokens": 128}
    engine = start_engine(served_model, **(settings | pool))
    engine.stats()
    before = preemptions(engine)
    wish = {"kv_eviction_report": True}
    names = [engine.add(numbers(85 + index, 600), num_tokens, extra_args=wish) for index in range(3)]
    done = engine.run()
    assert [len(done[name]) for name in names] == [num_tokens] * 3
    assert preemptions(engine) == before
    assert engine.stats()["cuts"] > 0
    reports = [engine.outputs[name].kv_transfer_params["kv_eviction"] for name in names]
    assert all(budget >= 128 for report in reports for budget in report["cut_to"])
    assert any(report["cut_to"] for report in reports)
    assert engine.is_idle()


@pytest.mark.parametrize("name", ["cake", "layer-defensivekv"])
def test_eight_bits(start_engine, wide_model, tmp_path, settings, name, is_dry, is_v2):
    """Caches with the scales of a checkpoint: replayed in float32; half precision shows that it runs."""
    if is_dry and is_v2:
        pytest.skip("the same on both runners")
    eviction = {"kv_eviction": name, "kv_eviction_budget": 100}
    eviction["kv_eviction_config"] = {"window": 8, "decode": "window"}
    engine = start_engine(save_scaled_model(tmp_path / "scaled", wide_model), **settings, **eviction)
    is_half = settings.get("dtype") == "float16"
    replay = None if is_half else StoredReplay(wide_model)
    if replay:
        replay.stored = Stored.of(engine, torch.float8_e4m3fn)
    prompt = numbers(180, 600)
    (served,) = engine.served([prompt], 40)
    if replay:
        policy, size = create_policy(name, {"window": 8}), settings.get("block_size", 32)
        replay.verify(prompt, served, policy, 100, block_size=size, page_size=16, decode="window")
    assert len(served.tokens) == 40
    assert served.choices
    engine.shutdown()


@pytest.mark.parametrize("method", ["ngram", "eagle"])
def test_drafts_change_nothing(start_engine, tiny_model, tmp_path_factory, settings, method, is_dry, is_v2):
    """Rows of all kinds; EAGLE's drafts under asynchronous scheduling where there is a GPU."""
    if is_dry and is_v2:
        pytest.skip("the same on both runners")
    if settings.get("attention_config", {}).get("backend") == "FLASHINFER":
        pytest.skip("FlashInfer has no kernel for heads of 32, of which the drafting model's are")
    speculation = NGRAM
    if method == "eagle":
        path = tmp_path_factory.mktemp("eagle")
        speculation = {"method": method, "model": save_random_eagle(path, method), "num_speculative_tokens": 3}
    eviction = {"kv_eviction": "cake", "kv_eviction_budget": 100, "kv_eviction_config": {"decode": "off"}}
    common = {**settings, **eviction, "async_scheduling": None}
    prompts = [numbers(1, 300), numbers(2, 50), numbers(3, 400)]
    found = []
    for speculative_config in (None, speculation):
        engine = start_engine(tiny_model, **common, speculative_config=speculative_config)
        assert engine.vllm_config.scheduler_config.async_scheduling == (
            not is_dry and (speculative_config is None or method == "eagle")
        )
        names = [
            engine.add(prompt, 60, extra_args=wish, logprobs=2, detokenize=False)
            for wish in ({}, {"kv_eviction": "layer-defensivekv"}, {"kv_eviction": "none"})
            for prompt in prompts
        ]
        engine.run()
        found.append([engine.run_of(name) for name in names])
    assert drafts(engine)[1] > 0
    for run, reference in zip(*found, strict=True):
        assert_same(run, reference, **half(settings))


WISHES = {
    # Decode steps run as vLLM's full graphs, or as the second ones (runner V2).
    "layers": ("cake", [{}, {"kv_eviction": "none"}]),
    "heads": ("layer-defensivekv", [{}, {"kv_eviction": "none"}]),
    # And with piecewise ones, until requests of the other kind are gone.
    "both": ("cake", [{}, {"kv_eviction": "layer-defensivekv"}, {"kv_eviction": "none"}]),
}


@pytest.mark.parametrize(("name", "wishes"), WISHES.values(), ids=WISHES)
def test_graphs_change_nothing(start_engine, served_model, settings, name, wishes, is_dry, is_v2):
    """CUDA graphs against eager execution; rows of all kinds share a batch. Without a GPU both are eager."""
    eviction = {"kv_eviction": name, "kv_eviction_budget": BUDGET, "kv_eviction_config": {"decode": "off"}}
    prompts = [numbers(70 + index, 250 + 50 * index) for index in range(2 if is_dry and is_v2 else 6)]
    found = []
    for is_eager in (True, False):
        engine = start_engine(served_model, **settings, **eviction, enforce_eager=is_eager or is_dry)
        engine.forget_prefixes()
        engine.stats()
        num_tokens = [4 if is_dry and is_v2 else 30 + 5 * (index % 3 != 1) for index in range(len(prompts))]
        with mock.patch.object(ReplayedRows, "fill", autospec=True, side_effect=ReplayedRows.fill) as filled:
            names = [
                engine.add(prompt, n, logprobs=2, detokenize=False, extra_args=wishes[index % len(wishes)])
                for index, (prompt, n) in enumerate(zip(prompts, num_tokens, strict=True))
            ]
            engine.run()
        evicted = [index for index in range(len(prompts)) if "none" not in wishes[index % len(wishes)].values()]
        assert engine.stats()["requests"] == len(evicted)
        assert (filled.call_count > 3) == (is_v2 and not is_dry and not is_eager)
        found.append([engine.run_of(name) for name in names])
    for run, reference in zip(*found, strict=True):
        assert_same(run, reference, **half(settings))
