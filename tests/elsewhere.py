"""The GPU backends in the place of the CPU's: FlashAttention's kernel in torch, Triton's kernels interpreted."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import flash_reference
import torch
from engine import Engine
from random_models import numbers
from stored import Stored, StoredReplay, save_scaled_model
from ties import assert_same
from vllm.model_executor.layers.attention import Attention
from vllm.plugins import load_general_plugins
from vllm.v1.attention import selector
from vllm.v1.attention.backends import flash_attn, flash_attn_diffkv
from vllm.v1.attention.backends.registry import _ATTN_OVERRIDES, AttentionBackendEnum

from cake_vllm.integration.worker.gpu_attention import EvictingFlashBackend, EvictingTritonBackend, EvictingTritonImpl
from cake_vllm.policies import create_policy


class InterpretedTritonImpl(EvictingTritonImpl):
    """Attention is vLLM's Triton kernel; only the kernel that writes the cache asks for a GPU's properties."""

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        scales = layer._k_scale, layer._v_scale
        flash_reference.reshape_and_cache_flash(
            key, value, key_cache, value_cache, slot_mapping, self.kv_cache_dtype, *scales
        )


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


def in_place_of_cpu_attn(backend: type) -> AbstractContextManager[None]:
    """Engines that start meanwhile take ``backend``."""
    return in_place_of("CPU_ATTN", f"{backend.__module__}.{backend.__qualname__}")


@contextmanager
def in_place_of(name: str, path: str) -> Iterator[None]:
    """The same under any name that the CPU platform knows."""
    # Plugins would register the CPU's own again.
    load_general_plugins()
    try:
        with mock.patch.dict(_ATTN_OVERRIDES, {AttentionBackendEnum[name]: path}):
            selector._cached_get_attn_backend.cache_clear()
            yield
    finally:
        selector._cached_get_attn_backend.cache_clear()


@contextmanager
def flash_in_torch(wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda kernel: kernel) -> Iterator[None]:
    """Lets vLLM find a FlashAttention that takes caches of eight bits and sinks, as on Hopper; its kernels wrapped."""
    with (
        mock.patch.object(flash_attn, "flash_attn_supports_kv_cache_dtype", return_value=True),
        mock.patch.object(flash_attn, "get_flash_attn_version", return_value=2),
        mock.patch.object(flash_attn, "flash_attn_supports_sinks", return_value=True, create=True),
        mock.patch.object(flash_attn, "_FA4_DENSE_ATTENTION_KERNEL", wrap(flash_reference.flash_attn_varlen_func)),
        mock.patch.object(
            flash_attn, "reshape_and_cache_flash", wrap(flash_reference.reshape_and_cache_flash), create=True
        ),
        mock.patch.multiple(
            flash_attn_diffkv,
            create=True,
            flash_attn_varlen_func=wrap(flash_reference.flash_attn_unequal),
            triton_reshape_and_cache_flash_diffkv=wrap(flash_reference.reshape_and_cache_unequal),
            get_flash_attn_version=lambda **_: 3,
            is_flash_attn_varlen_func_available=lambda: True,
        ),
    ):
        yield


def same_elsewhere(
    start_engine: Callable[..., Engine],
    backend: type,
    model: str,
    prompts: list[list[int]],
    num_tokens: int,
    drafts: dict[str, Any] | None = None,
    **kwargs: Any,
) -> list[type]:
    """An engine with ``backend`` in the place of the CPU's, and ``drafts``, keeps and says what one does without.

    Both deal out whole blocks: a GPU's pages are smaller than a CPU's.

    Returns:
        What its layers are.
    """
    kwargs = {"skip_tokenizer_init": True, "max_num_batched_tokens": 64, **kwargs}
    expected = start_engine(model, **kwargs).runs(prompts, num_tokens)
    assert any(run.kept for run in expected)
    whole_blocks = mock.patch.object(backend, "get_supported_kernel_block_sizes", return_value=[32])
    with in_place_of_cpu_attn(backend), whole_blocks:
        engine = start_engine(model, **kwargs, seed=1, speculative_config=drafts)
        got = engine.runs(prompts, num_tokens)
        layers = list(engine.vllm_config.compilation_config.static_forward_context.values())
        engine.shutdown()
    for run, reference in zip(got, expected, strict=True):
        assert_same(run, reference)
    return [type(layer.impl) for layer in layers if isinstance(layer, Attention)]


def replayed_elsewhere(
    start_engine: Callable[..., Engine],
    folder: Path,
    backend: type,
    model: str,
    length: int,
    num_tokens: int,
    name: str,
    budget: int,
    quantizes_queries: bool = True,
    **options: Any,
) -> Stored:
    """An engine with ``backend`` in the place of the CPU's and an 8-bit cache says what a replay over it says.

    The model with its scales is saved in ``folder``; returns what the engine stored. Blocks are of two pages.
    FlashInfer can be told to leave queries as they are.
    """
    scaled, size = save_scaled_model(folder, model, quantizes_queries), 64
    settings = {"kv_eviction": name, "kv_eviction_budget": budget, "kv_eviction_config": options}
    prompt = numbers(180, length)
    with in_place_of_cpu_attn(backend):
        attention = {} if quantizes_queries else {"disable_flashinfer_q_quantization": True}
        settings |= {"attention_config": attention, "max_num_batched_tokens": size, "skip_tokenizer_init": True}
        engine = start_engine(scaled, **settings)
        replay = StoredReplay(model)
        replay.stored = Stored.of(engine, torch.float8_e4m3fn)
        (served,) = engine.served([prompt], num_tokens)
        layers = engine.vllm_config.compilation_config.static_forward_context.values()
        assert {type(layer.impl) for layer in layers} == {backend.evicting_impl}
        engine.shutdown()
    assert served.choices
    policy = create_policy(name, {"window": options["window"]})
    chunk = size if options.get("prefill") == "progressive" else None
    sizes = {"block_size": 32, "page_size": 16}
    replay.verify(prompt, served, policy, budget, **sizes, decode=options["decode"], chunk=chunk)
    return replay.stored
