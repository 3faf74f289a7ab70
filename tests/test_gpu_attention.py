"""The GPU backends on the CPU, with Triton interpreted and FlashAttention's kernel in torch; and on a GPU, if any."""

import pytest
import torch
from engine import Engine
from flash_reference import flash_attn_varlen_func, reshape_and_cache_flash
from random_models import numbers, save_random_model
from stored import Stored, StoredReplay, save_scaled_model
from ties import assert_same
from vllm.v1.attention.backends import flash_attn

from cake_vllm.integration.worker.gpu_attention import (
    EvictingFlashBackend,
    EvictingFlashImpl,
    EvictingTritonBackend,
    EvictingTritonImpl,
    side_by_side,
)
from cake_vllm.policies import create_policy


class InterpretedTritonImpl(EvictingTritonImpl):
    """Attention is vLLM's Triton kernel; only the kernel that writes the cache asks for a GPU's properties."""

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        scales = layer._k_scale, layer._v_scale
        reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, self.kv_cache_dtype, *scales)


class InterpretedTritonBackend(EvictingTritonBackend):
    """Triton's attention under the only name that vLLM's CPU platform asks for."""

    evicting_impl = InterpretedTritonImpl

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"


class ReferenceFlashBackend(EvictingFlashBackend):
    """FLASH_ATTN under the same name."""

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"


def test_side_by_side():
    layout = side_by_side(16, 8, torch.device("cpu"))
    cache = torch.arange(2 * 3 * 16 * 16.0).view(2, 3, 16, 16)
    flat = cache.view(2, 3, -1)
    assert torch.equal(flat[:, :, layout.key_index], cache[..., :8])
    assert torch.equal(flat[:, :, layout.value_index], cache[..., 8:])


@pytest.fixture
def elsewhere(start_engine, monkeypatch):
    """Starts an engine with a backend in the place of the CPU's."""
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import _ATTN_OVERRIDES, AttentionBackendEnum

    started: list[Engine] = []

    def start(backend: type, model: str, **kwargs) -> Engine:
        path = f"{__name__}.{backend.__qualname__}"
        monkeypatch.setitem(_ATTN_OVERRIDES, AttentionBackendEnum.CPU_ATTN, path)
        selector._cached_get_attn_backend.cache_clear()
        started.append(start_engine(model, **kwargs, seed=1))
        return started[-1]

    yield start
    for engine in started:
        engine.shutdown()
    selector._cached_get_attn_backend.cache_clear()


def impls(engine: Engine) -> list[type]:
    return [type(layer.impl) for layer in engine.vllm_config.compilation_config.static_forward_context.values()]


@pytest.fixture
def same_elsewhere(start_engine, elsewhere):
    """An engine with a backend in the place of the CPU's keeps and says the same; returns its layers' classes."""

    def check(backend: type, model: str, prompts: list[list[int]], num_tokens: int, **kwargs) -> list[type]:
        kwargs = {"skip_tokenizer_init": True, "max_num_batched_tokens": 64, **kwargs}
        expected = start_engine(model, **kwargs).runs(prompts, num_tokens)
        assert any(run.kept for run in expected)
        engine = elsewhere(backend, model, **kwargs)
        for run, reference in zip(engine.runs(prompts, num_tokens), expected, strict=True):
            assert_same(run, reference)
        return impls(engine)

    return check


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("cake", marks=pytest.mark.full), "layer-defensivekv"])
@pytest.mark.interpreted
def test_triton_attention_interpreted(same_elsewhere, tmp_path, is_v2, name):
    """The same tokens and positions as the CPU backend, on a model small enough for an interpreter."""
    if not is_v2:
        pytest.skip("needs Triton's interpreter: --runner v2")
    model = save_random_model(tmp_path, "llama", "LlamaForCausalLM", num_hidden_layers=3)
    prompts = [[(7 * i + j) % 250 for i in range(150 + 40 * j)] for j in range(2)]
    settings = {"kv_eviction": name, "kv_eviction_budget": 40, "kv_eviction_config": {"window": 8}}
    found = same_elsewhere(InterpretedTritonBackend, model, prompts, 8, max_model_len=256, **settings)
    assert found == [InterpretedTritonImpl] * 3


@pytest.fixture
def flash_in_torch(monkeypatch):
    """Lets vLLM find a FlashAttention that also takes caches of eight bits, as on Hopper."""
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda **_: 2)
    monkeypatch.setattr(flash_attn, "flash_attn_supports_kv_cache_dtype", lambda *_, **__: True)
    monkeypatch.setattr(flash_attn, "_FA4_DENSE_ATTENTION_KERNEL", flash_attn_varlen_func)
    monkeypatch.setattr(flash_attn, "reshape_and_cache_flash", reshape_and_cache_flash, raising=False)


@pytest.mark.engine
@pytest.mark.interpreted
@pytest.mark.parametrize("prefill", [pytest.param("exact", marks=pytest.mark.full), "progressive"])
@pytest.mark.parametrize("name", ["cake", "layer-defensivekv"])
def test_flash_attention_by_reference(same_elsewhere, tiny_model, flash_in_torch, is_v2, name, prefill):
    """FLASH_ATTN's own code over a kernel in torch; prompts of all kinds, in batches that mix them."""
    settings = {"kv_eviction": name, "kv_eviction_budget": 100}
    settings["kv_eviction_config"] = {"window": 8, "prefill": prefill, "decode": "window"}
    lengths = (40, 150, 260) if is_v2 else (40, 400, 150, 600)
    prompts = [numbers(140 + length, length) for length in lengths]
    num_tokens = 6 if is_v2 else 70
    found = same_elsewhere(ReferenceFlashBackend, tiny_model, prompts, num_tokens, max_model_len=1024, **settings)
    assert found == [EvictingFlashImpl] * 4


@pytest.mark.engine
@pytest.mark.parametrize("name", [pytest.param("cake", marks=pytest.mark.full), "defensivekv"])
def test_flash_attention_beside_sliding_windows(same_elsewhere, tmp_path, flash_in_torch, same_on_both, name):
    """With a soft cap on the logits, as Gemma 2 has both."""
    model = save_random_model(
        tmp_path, "gemma2", "Gemma2ForCausalLM", num_hidden_layers=4, sliding_window=64, attn_logit_softcapping=2.0
    )
    settings = {"kv_eviction": name, "kv_eviction_budget": 100}
    prompts = [numbers(150, 300), numbers(151, 40), numbers(152, 500)]
    found = same_elsewhere(ReferenceFlashBackend, model, prompts, 40, max_model_len=1024, **settings)
    assert found == [EvictingFlashImpl] * 4


@pytest.fixture
def replayed_elsewhere(elsewhere, tmp_path):
    """An engine with a backend in the place of the CPU's and an 8-bit cache says what a replay over it says."""

    def check(backend: type, model: str, length: int, num_tokens: int, name: str, budget: int, **options) -> Stored:
        scaled, size = save_scaled_model(tmp_path / "scaled", model), 64
        settings = {"kv_eviction": name, "kv_eviction_budget": budget, "kv_eviction_config": options}
        engine = elsewhere(backend, scaled, skip_tokenizer_init=True, max_num_batched_tokens=size, **settings)
        replay = StoredReplay(model)
        replay.stored = Stored.of(engine, torch.float8_e4m3fn)
        prompt = numbers(180, length)
        (served,) = engine.served([prompt], num_tokens)
        assert served.choices
        policy = create_policy(name, {"window": options["window"]})
        chunk = size if options.get("prefill") == "progressive" else None
        replay.verify(prompt, served, policy, budget, block_size=32, decode=options["decode"], chunk=chunk)
        assert set(impls(engine)) == {backend.evicting_impl}
        return replay.stored

    return check


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("cake", marks=pytest.mark.full), "layer-defensivekv"])
@pytest.mark.interpreted
def test_triton_attention_over_eight_bits(replayed_elsewhere, tmp_path, is_v2, name):
    if not is_v2:
        pytest.skip("needs Triton's interpreter: --runner v2")
    model = save_random_model(tmp_path / "plain", "llama", "LlamaForCausalLM", num_hidden_layers=3)
    replayed_elsewhere(InterpretedTritonBackend, model, 190, 8, name, 40, window=8, decode="off")


@pytest.mark.engine
@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("name", "prefill", "decode"),
    [
        ("cake", "exact", "cake"),
        ("layer-defensivekv", "progressive", "window"),
        pytest.param("layer-defensivekv", "exact", "off", marks=pytest.mark.full),
    ],
)
def test_flash_attention_over_eight_bits(replayed_elsewhere, tiny_model, flash_in_torch, is_v2, name, prefill, decode):
    """Of keys, values and queries."""
    options = {"window": 8, "prefill": prefill, "decode": decode}
    stored = replayed_elsewhere(
        ReferenceFlashBackend, tiny_model, 260 if is_v2 else 600, 10 if is_v2 else 70, name, 100, **options
    )
    assert stored.queries


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
