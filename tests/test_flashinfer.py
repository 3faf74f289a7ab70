"""FLASHINFER on the CPU: vLLM's own code over FlashInfer's kernels in torch, evicted rows over FlashAttention's."""

import flashinfer_reference
import pytest
from elsewhere import same_elsewhere
from flashinfer_elsewhere import ReferenceFlashInferBackend, flashinfer_in_torch
from random_models import numbers

from cake_vllm.integration.worker.flashinfer_attention import EvictingFlashInferImpl

full = pytest.mark.full
#: By what vLLM chooses on a GPU: its capability, whether TensorRT-LLM's kernels are at hand, and those that run then.
KERNELS = {
    "ampere": ((8, 0), False, {"prefill", "decode"}),
    "hopper": ((9, 0), True, {"prefill", "decode by lengths on the device"}),
    "blackwell": ((10, 0), True, {"prefill by lengths on the device", "decode by lengths on the device"}),
}


@pytest.mark.engine
@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("gpu", "name", "prefill"),
    [
        ("ampere", "layer-defensivekv", "progressive"),
        ("blackwell", "cake", "exact"),
        pytest.param("ampere", "cake", "exact", marks=full),
        pytest.param("hopper", "cake", "progressive", marks=full),
        pytest.param("hopper", "layer-defensivekv", "exact", marks=full),
        pytest.param("blackwell", "layer-defensivekv", "progressive", marks=full),
    ],
)
def test_flashinfer_by_reference(start_engine, tiny_model, is_v2, gpu, name, prefill):
    """Prompts of all kinds, in batches that mix them; evicted rows are planned with their new tokens alone."""
    settings = {"kv_eviction": name, "kv_eviction_budget": 100, "max_model_len": 1024}
    settings["kv_eviction_config"] = {"window": 8, "prefill": prefill, "decode": "window"}
    lengths, num_tokens = ((40, 150, 260), 6) if is_v2 else ((40, 400, 150, 600), 40)
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
            assert 40 < longest <= 40 + num_tokens
            assert any(1 in lengths and max(lengths) > 1 for lengths in calls)
        else:
            assert longest == max(lengths) if prefill == "exact" else 100 < longest <= 100 + 64
