"""FLASHINFER on the CPU: vLLM's own code over FlashInfer's kernels in torch, evicted rows over FlashAttention's."""

import sys
from types import ModuleType, SimpleNamespace
from unittest import mock

import flashinfer_reference
import numpy as np
import pytest
import torch
from elsewhere import replayed_elsewhere, same_elsewhere
from flashinfer_elsewhere import Gpu, ReferenceFlashInferBackend, flashinfer, flashinfer_in_torch
from random_models import numbers, save_random_kind, save_random_model
from test_graphs import rehearse_elsewhere
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends import fa_utils, flash_attn
from vllm.v1.attention.selector import AttentionSelectorConfig

from cake_vllm.integration.messages import Redirected, StepPlan
from cake_vllm.integration.worker import flashinfer_attention, graphs
from cake_vllm.integration.worker.flashinfer_attention import EvictingFlashInferImpl
from cake_vllm.integration.worker.gpu_attention import EvictingFlashBackend, EvictingTritonBackend

full = pytest.mark.full
#: By what vLLM chooses on a GPU: its capability, whether TensorRT-LLM's kernels are at hand, and those that run then.
KERNELS = {
    "ampere": ((8, 0), False, {"prefill", "decode"}),
    "hopper": ((9, 0), True, {"prefill", "decode by lengths on the device"}),
    "blackwell": ((10, 0), True, {"prefill by lengths on the device", "decode by lengths on the device"}),
}


@pytest.mark.engine
@pytest.mark.parametrize(
    ("gpu", "name", "prefill"),
    [
        pytest.param("ampere", "layer-defensivekv", "exact", marks=pytest.mark.interpreted),
        pytest.param("blackwell", "cake", "progressive", marks=pytest.mark.contract),
        pytest.param("hopper", "cake", "exact", marks=full),
    ],
)
def test_flashinfer_by_reference(start_engine, tiny_model, is_v2, gpu, name, prefill):
    """Prompts of all kinds, in batches that mix them; evicted rows are planned with their new tokens alone."""
    settings = {"kv_eviction": name, "kv_eviction_budget": 100, "max_model_len": 1024}
    settings["kv_eviction_config"] = {"window": 8, "prefill": prefill, "decode": "window"}
    lengths, num_tokens = ((260, 40), 6) if is_v2 else ((40, 400, 150, 600), 40)
    prompts = [numbers(140 + length, length) for length in lengths]
    capability, has_trtllm, kernels = KERNELS[gpu]
    flashinfer_reference.calls.clear()
    with flashinfer_in_torch(capability, has_trtllm):
        found = same_elsewhere(start_engine, ReferenceFlashInferBackend, tiny_model, prompts, num_tokens, **settings)
    assert found == [EvictingFlashInferImpl] * 4
    assert flashinfer_reference.calls.keys() == kernels
    for kernel, calls in flashinfer_reference.calls.items():
        longest = max(map(max, calls))
        if kernel.startswith("decode"):
            # Shorter than any prompt that was evicted.
            assert 40 < longest < 200
            assert any(1 in of_rows and max(of_rows) > 1 for of_rows in calls)
        else:
            assert longest == max(lengths) if prefill == "exact" else longest < 260


@pytest.mark.engine
@full
@pytest.mark.interpreted
@pytest.mark.parametrize(("gpu", "name"), [("blackwell", "cake"), ("ampere", "layer-defensivekv")])
def test_a_replayed_step_is_the_eager_one(start_engine, tiny_model, is_v2, gpu, name):
    capability, has_trtllm, _ = KERNELS[gpu]
    with flashinfer_in_torch(capability, has_trtllm):
        rehearse_elsewhere(start_engine, ReferenceFlashInferBackend, tiny_model, is_v2, name)


@pytest.mark.engine
@full
@pytest.mark.parametrize("name", ["cake", "layer-defensivekv"])
def test_flashinfer_with_sinks(start_engine, tmp_path, same_on_both, name):
    """TensorRT-LLM's kernels on Blackwell take them; evicted rows go to a kernel beside, which takes them too."""
    settings = {"kv_eviction": name, "kv_eviction_budget": 100, "max_model_len": 1024}
    prompts = [numbers(150, 300), numbers(151, 40), numbers(152, 500)]
    with flashinfer_in_torch((10, 0), has_trtllm=True):
        model = save_random_kind(tmp_path, "sinks")
        found = same_elsewhere(start_engine, ReferenceFlashInferBackend, model, prompts, 24, **settings)
    assert found == [EvictingFlashInferImpl] * 4


@pytest.mark.engine
@full
def test_flashinfer_beside_sliding_windows(start_engine, tmp_path, same_on_both):
    """With a soft cap on the logits, as Gemma 2 has both; layers with a window have stock metadata."""
    model = save_random_model(
        tmp_path, "gemma2", "Gemma2ForCausalLM", num_hidden_layers=4, sliding_window=64, attn_logit_softcapping=2.0
    )
    settings = {"kv_eviction": "cake", "kv_eviction_budget": 100, "max_model_len": 1024}
    prompts = [numbers(150, 300), numbers(151, 40), numbers(152, 500)]
    with flashinfer_in_torch((8, 0), has_trtllm=False):
        found = same_elsewhere(start_engine, ReferenceFlashInferBackend, model, prompts, 40, **settings)
    assert found == [EvictingFlashInferImpl] * 4


@pytest.mark.engine
@pytest.mark.parametrize(
    ("gpu", "quantizes", "name", "prefill", "decode"),
    [
        pytest.param("blackwell", True, "cake", "exact", "cake", marks=pytest.mark.contract),
        ("hopper", False, "layer-defensivekv", "progressive", "window"),
        pytest.param("blackwell", True, "layer-defensivekv", "progressive", "window", marks=full),
        pytest.param("hopper", False, "cake", "exact", "off", marks=full),
    ],
)
def test_flashinfer_over_eight_bits(start_engine, tiny_model, tmp_path, is_v2, gpu, quantizes, name, prefill, decode):
    """Queries are of 8 bits on Blackwell, and the model's own where the user says so.

    These have no scale here: FlashInfer is told of one whatever they are (vLLM 0.32).
    """
    capability, has_trtllm, kernels = KERNELS[gpu]
    options = {"window": 8, "prefill": prefill, "decode": decode}
    sizes = (260, 10) if is_v2 else (600, 70)
    flashinfer_reference.calls.clear()
    with flashinfer_in_torch(capability, has_trtllm):
        scaled = tmp_path / "scaled"
        stored = replayed_elsewhere(
            start_engine, scaled, ReferenceFlashInferBackend, tiny_model, *sizes, name, 100, quantizes, **options
        )
    assert any(stored.queries.values()) == quantizes
    assert flashinfer_reference.calls.keys() <= kernels


@pytest.mark.engine
@full
@pytest.mark.parametrize(("gpu", "method"), [("ampere", "ngram"), ("hopper", "ngram"), ("blackwell", "draft_model")])
def test_flashinfer_with_drafts(start_engine, tiny_model, same_on_both, gpu, method):
    """Rows with drafts are a prefill to native kernels, which read evicted ones as long as they were; not to XQA."""
    settings = {"kv_eviction": "cake", "kv_eviction_budget": 100, "max_model_len": 1024}
    drafts = {"method": method, "num_speculative_tokens": 3}
    drafts |= {"prompt_lookup_max": 3, "prompt_lookup_min": 1} if method == "ngram" else {"model": tiny_model}
    prompts = [numbers(150, 150) * 2, numbers(151, 40), numbers(152, 500)]
    capability, has_trtllm, _ = KERNELS[gpu]
    flashinfer_reference.calls.clear()
    with flashinfer_in_torch(capability, has_trtllm):
        same_elsewhere(start_engine, ReferenceFlashInferBackend, tiny_model, prompts, 40, drafts, **settings)
    calls = flashinfer_reference.calls
    if gpu == "ampere":
        assert max(map(max, calls["prefill"])) > 500
        return
    decodes = calls["decode by lengths on the device"]
    # A draft model also goes on from what there is of a prompt, as long as that is computed.
    assert max(map(max, decodes[-8 if method == "draft_model" else 0 :])) < 200


@pytest.mark.parametrize("req_idx", [None, np.array([5, 3])])
def test_a_missed_row_is_an_error(monkeypatch, req_idx):
    """Rows are requests' places on runner V1, and places are looked up on V2."""
    requests = SimpleNamespace(req_id_to_index={"a": 0, "b": 1} if req_idx is None else {"a": 5, "b": 3, "c": 4})
    runner = SimpleNamespace(input_batch=requests, req_states=requests)
    reading = SimpleNamespace(evicted=lambda plan, known: {*known} & {"b", "c"})
    monkeypatch.setattr(graphs, "_worker", lambda: SimpleNamespace(reading=reading))
    monkeypatch.setattr(graphs.step, "runner", runner)
    monkeypatch.setattr(graphs.step, "plan", StepPlan(redirected={False: Redirected(1, 1, 1)}))
    assert graphs.evicted_rows(req_idx).tolist() == [1]
    monkeypatch.setattr(graphs.step, "plan", StepPlan(redirected={False: Redirected(2, 2, 1)}))
    with pytest.raises(RuntimeError, match="not where the scheduler put them"):
        graphs.evicted_rows(req_idx)


BESIDE = {
    # Capability, FlashAttention's version there, head size, type, the cache's, and what serves evicted rows.
    "Hopper": ((9, 0), 3, 128, "float16", "auto", EvictingFlashBackend),
    "Blackwell": ((10, 0), 4, 128, "bfloat16", "auto", EvictingFlashBackend),
    "pages too small for its kernel": ((10, 0), 4, 256, "float16", "auto", EvictingTritonBackend),
    "no FlashAttention": ((10, 0), None, 128, "float16", "auto", EvictingTritonBackend),
    "8 bits": ((9, 0), 3, 128, "float16", "fp8_e4m3", EvictingTritonBackend),
    "float32": ((9, 0), 3, 128, "float32", "auto", EvictingTritonBackend),
    "a CPU": (None, None, 128, "float16", "auto", EvictingTritonBackend),
}


@pytest.mark.parametrize("situation", BESIDE)
def test_what_serves_evicted_rows(monkeypatch, situation):
    capability, version, head_size, dtype, cache_dtype, expected = BESIDE[situation]
    for module in (fa_utils, flashinfer_attention):
        monkeypatch.setattr(module, "current_platform", Gpu(capability))
    for module in (flash_attn, flashinfer_attention):
        monkeypatch.setattr(module, "get_flash_attn_version", lambda **_: version)
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=getattr(torch, dtype), get_head_size=lambda: head_size),
        cache_config=SimpleNamespace(block_size=16, cache_dtype="auto"),
    )
    for module, name in (
        (flashinfer_attention, "get_current_vllm_config"),
        (flash_attn, "get_current_vllm_config_or_none"),
    ):
        monkeypatch.setattr(module, name, lambda: config)
    assert flashinfer_attention.choose_beside(head_size, False, False, cache_dtype) is expected


CHOICES = {
    # Capability, cache type, block size, and what vLLM takes with eviction and without.
    "Blackwell": ((10, 0), "auto", None, "FLASHINFER", "FLASHINFER"),
    "Hopper": ((9, 0), "auto", None, "FLASH_ATTN", "FLASH_ATTN"),
    "blocks that are split": ((10, 0), "auto", 128, "FLASHINFER", "FLASHINFER"),
    "8 bits": ((10, 0), "fp8_e4m3", None, "FLASHINFER", "FLASHINFER"),
    "8 bits of another kind": ((10, 0), "fp8_e5m2", None, "TRITON_ATTN", "FLASHINFER"),
    "8 bits on Ampere": ((8, 0), "fp8", None, "TRITON_ATTN", "FLASHINFER"),
}


@pytest.mark.parametrize("situation", CHOICES)
def test_the_backend_is_vllms_choice(monkeypatch, situation):
    """By vLLM's code for CUDA, whose compiled library is not here."""
    capability, cache_dtype, block_size, *expected = CHOICES[situation]
    with mock.patch.dict(sys.modules, {"vllm._C_stable_libtorch": ModuleType("vllm._C_stable_libtorch")}):
        from vllm.platforms.cuda import CudaPlatformBase
    asked = AttentionSelectorConfig(128, torch.bfloat16, cache_dtype, block_size)
    for settings, name in zip(({"kv_eviction": "cake"}, {}), expected, strict=True):
        config = SimpleNamespace(additional_config=settings, model_config=None)
        for module in (flashinfer, flashinfer_attention):
            monkeypatch.setattr(module, "get_current_vllm_config_or_none", lambda config=config: config)
        found, _ = CudaPlatformBase.get_valid_backends(DeviceCapability(*capability), asked)
        assert min(found, key=lambda candidate: candidate.priority).backend.name == name
        assert {candidate.backend_class for candidate in found} >= {EvictingTritonBackend}
