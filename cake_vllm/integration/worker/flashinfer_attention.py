"""``FLASHINFER`` with eviction.

FlashInfer writes the cache and serves rows that were not evicted. Its plan has one row of pages for all layers, so
evicted rows, whose pages differ by layer, go to FlashAttention's kernel or to Triton's, which read the same cache.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config, get_current_vllm_config_or_none
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.v1.attention.backends.flashinfer import (
    FlashInferBackend,
    FlashInferImpl,
    FlashInferMetadata,
    FlashInferMetadataBuilder,
    FlashInferTrtllmAPIDecode,
    TRTLLMPrefill,
)
from vllm.v1.attention.selector import AttentionSelectorConfig

from cake_vllm.config import POLICY_KEY, flag
from cake_vllm.integration.engine import eviction_config
from cake_vllm.integration.scheduler.spec import EvictableSpec
from cake_vllm.integration.worker.attention import StepWork, is_quantized, smallest
from cake_vllm.integration.worker.gpu_attention import (
    EvictingFlashBackend,
    EvictingTritonBackend,
    HeadMajorBackend,
    HeadMajorImpl,
)
from cake_vllm.integration.worker.graphs import evicted_rows


@dataclass(kw_only=True)
class EvictingMetadata(FlashInferMetadata):
    """FlashInfer's, and the same batch as the worker half and the other kernels want it described.

    Attributes:
        beside: the other backend's metadata.
        seq_lens: ``[R]`` int32, logical.
        query_start_loc: ``[R + 1]`` int32.
        block_table: ``[R, C]`` int32.
        max_query_len: new tokens of the row with the most.
    """

    beside: Any
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    block_table: torch.Tensor
    max_query_len: int


class EvictingFlashInferBuilder(FlashInferMetadataBuilder):
    """Plans evicted rows with nothing but their new tokens."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.beside: Any = None
        if isinstance(kv_cache_spec, EvictableSpec):
            layer: Any = vllm_config.compilation_config.static_forward_context[layer_names[0]]
            builder = layer.impl.backend_beside.get_builder_cls()
            self.beside = builder(kv_cache_spec, layer_names, vllm_config, device)
            # FlashAttention's schedules are for one length in all layers; without, its kernel makes its own.
            self.beside.aot_schedule = False

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlashInferMetadata:
        """See the base class."""
        common = common_attn_metadata
        if self.beside is None:
            return super().build(common_prefix_len, common, fast_build)
        return EvictingMetadata(
            **vars(super().build(common_prefix_len, without_evicted(common), fast_build)),
            beside=self.beside.build(0, common),
            seq_lens=common.seq_lens,
            query_start_loc=common.query_start_loc,
            block_table=common.block_table_tensor,
            max_query_len=common.max_query_len,
        )


def without_evicted(common: CommonAttentionMetadata) -> CommonAttentionMetadata:
    """The same batch, whose lengths on the host are the new tokens alone where rows were evicted.

    FlashInfer's own kernels are planned by these. With drafts vLLM fetches the lengths from the device instead: evicted
    rows are then read as long as they were, from the null block, for a result that is overwritten all the same.
    """
    rows, lengths = torch.from_numpy(evicted_rows(common.req_idx)), common.seq_lens_cpu_upper_bound
    if lengths is None or not len(rows):
        return common
    num_new = common.query_start_loc_cpu.diff()[rows].to(lengths.dtype)
    return common.replace(seq_lens_cpu_upper_bound=lengths.index_copy(0, rows, num_new))


class EvictingFlashInferImpl(HeadMajorImpl, FlashInferImpl):  # type: ignore[misc]
    """FlashInfer that shows its keys to the worker half.

    Attributes:
        backend_beside: serves evicted rows.
        beside: its implementation for this layer.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        has_soft_cap, has_sinks = bool(self.logits_soft_cap), self.sinks is not None
        self.backend_beside = choose_beside(self.head_size, has_soft_cap, has_sinks, self.kv_cache_dtype)
        self.beside: Any = self.backend_beside.evicting_impl(*args, **kwargs)

    def _attend(self, step: StepWork, layer: Any, query: Any, key: Any, value: Any, metadata: Any, output: Any) -> None:
        self.beside.layer_index = self.layer_index
        self.beside._attend(step, layer, query, key, value, metadata.beside, output)

    def with_lengths(self, layer: Any, metadata: Any, seq_lens: torch.Tensor) -> Any:
        """See the base class; FlashInfer's own kernels had them as they were planned, TensorRT-LLM's read them here."""
        decode, prefill = metadata.decode, metadata.prefill
        if isinstance(decode, FlashInferTrtllmAPIDecode):
            decode = replace(decode, seq_lens=seq_lens[: metadata.num_decodes])
        if isinstance(prefill, TRTLLMPrefill):
            lengths = seq_lens[metadata.num_decodes :]
            # Pages before each row, as vLLM has it.
            ends = (-(-lengths // layer.kv_cache.shape[2])).cumsum(0, dtype=torch.int32)
            starts = torch.nn.functional.pad(ends, (1, 0))
            prefill = replace(prefill, seq_lens=lengths, cum_seq_lens_kv=starts)
        return replace(metadata, decode=decode, prefill=prefill, seq_lens=seq_lens)


class EvictingFlashInferBackend(HeadMajorBackend, FlashInferBackend):  # type: ignore[misc]
    """Takes the place of ``FLASHINFER``; without eviction it is the stock backend."""

    stock_impl = FlashInferImpl
    evicting_impl = EvictingFlashInferImpl

    @classmethod
    def get_builder_cls(cls) -> type[FlashInferMetadataBuilder]:
        """The builder that belongs to the implementation."""
        return FlashInferMetadataBuilder if cls._spec_fields is None else EvictingFlashInferBuilder

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: Any, kv_cache_dtype: Any, block_size: int | None, *rest: Any
    ) -> str | None:
        """Why vLLM must not take this backend, or ``None``; with eviction for one reason more.

        Triton's kernel, which takes evicted rows of 8 bits, reads no ``fp8_e5m2``, nor any on GPUs without them.
        """
        if eviction_config(get_current_vllm_config_or_none()) is not None:
            *_, capability = rest
            is_foreign = kv_cache_dtype == "fp8_e5m2" or capability.to_int() < 89
            if is_quantized(kv_cache_dtype or "auto") and is_foreign:
                return f"{flag(POLICY_KEY)} with FLASHINFER reads 8 bits of fp8_e4m3, on capability 8.9 or more, alone"
        return super().supports_combination(head_size, dtype, kv_cache_dtype, block_size, *rest)


def choose_beside(head_size: int, has_soft_cap: bool, has_sinks: bool, kv_cache_dtype: str) -> type[HeadMajorBackend]:
    """What serves evicted rows: FlashAttention where vLLM has it for such layers on this GPU, else Triton.

    Triton also over 8 bits: its kernel takes queries of 8 bits and the model's own, and FlashInfer is given either.
    """
    if is_quantized(kv_cache_dtype):
        return EvictingTritonBackend
    vllm_config, capability = get_current_vllm_config(), current_platform.get_device_capability()
    dtype: Any = vllm_config.model_config.dtype
    block_size = vllm_config.cache_config.block_size
    asked = AttentionSelectorConfig(head_size, dtype, "auto", block_size, has_sink=has_sinks)
    if capability is None or EvictingFlashBackend.validate_configuration(
        device_capability=capability, **asked._asdict()
    ):
        return EvictingTritonBackend
    # Its implementation chooses by the block, and its kernel is shown FlashInfer's pages.
    page = smallest(FlashInferBackend.get_supported_kernel_block_sizes())
    versions = {
        get_flash_attn_version(
            head_size=head_size,
            requires_softcap=has_soft_cap,
            has_sinks=has_sinks,
            kv_cache_block_size=size,
            supports_fa4_hd256=True,
        )
        for size in (asked.block_size, page)
    }
    return EvictingTritonBackend if None in versions or len(versions) > 1 else EvictingFlashBackend
