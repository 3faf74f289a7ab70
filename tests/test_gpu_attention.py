"""The GPU backends: Triton's attention interpreted on the CPU, and everything on a GPU where there is one."""

import pytest
import torch
from engine import Engine
from random_models import save_random_model
from ties import assert_same

from cake_vllm.integration.worker.gpu_attention import EvictingTritonBackend, EvictingTritonImpl, side_by_side


class InterpretedTritonImpl(EvictingTritonImpl):
    """Attention is vLLM's Triton kernel; only the kernel that writes the cache asks for a GPU's properties."""

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        used = slot_mapping >= 0
        block, slot = slot_mapping[used] // kv_cache.shape[2], slot_mapping[used] % kv_cache.shape[2]
        kv_cache[block, :, slot] = torch.cat([key, value], dim=-1)[: len(used)][used]


class InterpretedTritonBackend(EvictingTritonBackend):
    """Triton's attention under the only name that vLLM's CPU platform asks for."""

    evicting_impl = InterpretedTritonImpl

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"


def test_side_by_side():
    layout = side_by_side(16, 8, torch.device("cpu"))
    cache = torch.arange(2 * 3 * 16 * 16.0).view(2, 3, 16, 16)
    flat = cache.view(2, 3, -1)
    assert torch.equal(flat[:, :, layout.key_index], cache[..., :8])
    assert torch.equal(flat[:, :, layout.value_index], cache[..., 8:])


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("name", ["cake", "layer-defensivekv"])
@pytest.mark.interpreted
def test_triton_attention_interpreted(start_engine, tmp_path, is_v2, monkeypatch, name):
    """The same tokens and positions as the CPU backend, on a model small enough for an interpreter."""
    if not is_v2:
        pytest.skip("needs Triton's interpreter: --runner v2")
    from vllm.v1.attention.backends.registry import _ATTN_OVERRIDES, AttentionBackendEnum

    model = save_random_model(tmp_path, "llama", "LlamaForCausalLM", num_hidden_layers=3)
    kwargs = {
        "kv_eviction": name,
        "kv_eviction_budget": 40,
        "kv_eviction_config": {"window": 8},
        "max_num_batched_tokens": 64,
        "max_model_len": 256,
        "skip_tokenizer_init": True,
    }
    prompts = [[(7 * i + j) % 250 for i in range(150 + 40 * j)] for j in range(2)]
    on_cpu: Engine = start_engine(model, **kwargs)
    expected = on_cpu.runs(prompts, 8)
    assert all(run.kept for run in expected)
    path = f"{__name__}.{InterpretedTritonBackend.__qualname__}"
    monkeypatch.setitem(_ATTN_OVERRIDES, AttentionBackendEnum.CPU_ATTN, path)
    from vllm.v1.attention import selector

    selector._cached_get_attn_backend.cache_clear()
    interpreted: Engine = start_engine(model, **kwargs, seed=1)
    got = interpreted.runs(prompts, 8)
    (layer, *_) = interpreted.vllm_config.compilation_config.static_forward_context.values()
    interpreted.shutdown()
    selector._cached_get_attn_backend.cache_clear()
    assert type(layer.impl).__name__ == "InterpretedTritonImpl"
    for run, reference in zip(got, expected, strict=True):
        assert_same(run, reference)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TRITON_ATTN"])
def test_on_a_gpu(start_engine, text_ids, backend):
    kwargs = {"block_size": 16, "enforce_eager": False, "attention_config": {"backend": backend}, "dtype": "bfloat16"}
    engine: Engine = start_engine(kv_eviction="cake", kv_eviction_budget=256, **kwargs)
    prompts = [text_ids[:1500], text_ids[500:1800]]
    together = engine.generate(prompts, 16)
    assert engine.stats()["requests"] == 2
    assert [len(tokens) for tokens in together] == [16, 16]
    assert engine.is_idle()
