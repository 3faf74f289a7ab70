"""``FLASHINFER`` in the place of the CPU's backend: vLLM's own code over the reference of FlashInfer's kernels."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import flash_reference
import flashinfer_reference
import torch
from elsewhere import flash_in_torch
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.triton_utils import HAS_TRITON
from vllm.utils import flashinfer as support

with flashinfer_reference.in_place_of_flashinfer():
    from vllm.v1.attention.backends import flashinfer
from vllm.v1.attention.backends import triton_attn

from cake_vllm.integration.worker import flashinfer_attention
from cake_vllm.integration.worker.attention import is_quantized
from cake_vllm.integration.worker.flashinfer_attention import EvictingFlashInferBackend
from cake_vllm.integration.worker.gpu_attention import EvictingFlashBackend, EvictingTritonBackend, HeadMajorBackend


class ReferenceFlashInferBackend(EvictingFlashInferBackend):
    """FLASHINFER under the only name that vLLM's CPU platform asks for."""

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"


class Gpu:
    """This platform, of another capability."""

    def __init__(self, capability: tuple[int, int] | None):
        self.capability = DeviceCapability(*capability) if capability else None

    def __getattr__(self, name: str) -> Any:
        return getattr(current_platform, name)

    def get_device_capability(self) -> DeviceCapability | None:
        return self.capability

    def is_device_capability(self, asked: int) -> bool:
        return self.capability is not None and self.capability.to_int() == asked

    def is_device_capability_family(self, asked: int) -> bool:
        return self.capability is not None and self.capability.to_int() // 10 == asked // 10


class copy_page_indices:
    """Instead of a kernel of Triton's, which runner V1 has to do without."""

    @staticmethod
    def __class_getitem__(grid: tuple[int]) -> Any:
        (num_rows,) = grid

        def copy(indices: torch.Tensor, table: torch.Tensor, stride: int, ends: torch.Tensor, BLOCK_SIZE: int) -> None:
            for row in range(num_rows):
                indices[ends[row] : ends[row + 1]] = table[row, : ends[row + 1] - ends[row]]

        return copy


def beside(head_size: int, has_soft_cap: bool, has_sinks: bool, kv_cache_dtype: str) -> type[HeadMajorBackend]:
    """What there is a reference of."""
    return EvictingTritonBackend if is_quantized(kv_cache_dtype) else EvictingFlashBackend


@contextmanager
def flashinfer_in_torch(capability: tuple[int, int], has_trtllm: bool) -> Iterator[None]:
    """Lets vLLM choose FlashInfer's kernels as on a GPU of this capability, with or without TensorRT-LLM's at hand."""
    gpu = Gpu(capability)
    with ExitStack() as patches:
        patches.enter_context(flash_in_torch())
        for owner, attributes in {
            flashinfer: {
                "current_platform": gpu,
                "trtllm_workspace_buffer": torch.zeros(16, dtype=torch.uint8),
                "flashinfer_xqa_batch_decode_with_kv_cache": flashinfer_reference.xqa_batch_decode_with_kv_cache,
            },
            support: {"current_platform": gpu, "has_nvidia_artifactory": lambda: has_trtllm},
            flashinfer.custom_ops: {"scaled_fp8_quant": flash_reference.scaled_fp8_quant},
            flashinfer_attention: {"choose_beside": beside},
            triton_attn: {"unified_attention": flash_reference.unified_attention},
        }.items():
            patches.enter_context(mock.patch.multiple(owner, **attributes))
        if not HAS_TRITON:
            patches.enter_context(mock.patch.object(flashinfer, "_copy_page_indices_kernel", copy_page_indices))
        write = flash_reference.reshape_and_cache_flash
        patches.enter_context(mock.patch.object(torch.ops._C_cache_ops, "reshape_and_cache_flash", write, create=True))
        if hasattr(flashinfer, "_get_multi_ctas_kv_counter_buffer"):
            # Of 0.33, on a GPU: counters of TensorRT-LLM's kernels.
            counters = mock.patch.object(flashinfer, "_get_multi_ctas_kv_counter_buffer", return_value=torch.zeros(1))
            patches.enter_context(counters)
        support.supports_trtllm_attention.cache_clear()
        patches.callback(support.supports_trtllm_attention.cache_clear)
        yield
