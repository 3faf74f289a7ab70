"""What every process reads off an engine's configuration, and the names that are registered with vLLM."""

from collections.abc import Iterable

from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec

from cake_vllm.config import KVEvictionConfig

CONNECTOR = "KVEvictionConnector"
#: What runs instead, with that one and another one in it, where the user has another one, too.
BESIDE = "KVEvictionBesideConnector"

#: Stock backends of latent attention that can evict: their module, their class, and that of their metadata of a step.
LATENT_BACKENDS = {
    "CPU_MLA": ("cpu_mla", "CPUMLABackend", ""),
    "TRITON_MLA": ("triton_mla", "TritonMLABackend", ""),
    "FLASH_ATTN_MLA": ("flashattn_mla", "FlashAttnMLABackend", "FlashAttnMLADecodeMetadata"),
    "FLASHINFER_MLA": ("flashinfer_mla", "FlashInferMLABackend", "FlashInferMLADecodeMetadata"),
    "CUTLASS_MLA": ("cutlass_mla", "CutlassMLABackend", ""),
}

#: Stock attention backends that can evict, and the class that takes each one's place.
BACKENDS = {
    "CPU_ATTN": "cake_vllm.integration.worker.cpu_attention.EvictingCPUBackend",
    "FLASH_ATTN": "cake_vllm.integration.worker.gpu_attention.EvictingFlashBackend",
    "FLASHINFER": "cake_vllm.integration.worker.flashinfer_attention.EvictingFlashInferBackend",
    "TRITON_ATTN": "cake_vllm.integration.worker.gpu_attention.EvictingTritonBackend",
    "FLASH_ATTN_DIFFKV": "cake_vllm.integration.worker.gpu_attention.EvictingFlashUnequalBackend",
    "TRITON_ATTN_DIFFKV": "cake_vllm.integration.worker.gpu_attention.EvictingTritonUnequalBackend",
    **{name: f"cake_vllm.integration.worker.latent_attention.{name}" for name in LATENT_BACKENDS},
}


def eviction_config(vllm_config: VllmConfig | None) -> KVEvictionConfig | None:
    """The resolved settings that travel in a ``VllmConfig``; ``None`` when eviction is off."""
    settings = getattr(vllm_config, "additional_config", None)
    return KVEvictionConfig.from_settings(settings) if isinstance(settings, dict) else None


def window_cuts(window: int | None, max_model_len: int) -> bool:
    """Whether a sliding window hides a token from another one of the same request; a window as long as what can be
    served, in tokens, is full attention.
    """
    return window is not None and window < max_model_len


def placeholders(features: Iterable[MultiModalFeatureSpec]) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of a prompt's positions that stand for its pictures and other media, not what frames them."""
    ranges = (found for feature in features for found in feature.mm_position.extract_embeds_range())
    return tuple((first, last + 1) for first, last in ranges)
