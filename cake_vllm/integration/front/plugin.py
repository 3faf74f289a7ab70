"""What the plugin registers in every process, and what it switches on when a user asks for eviction."""

from collections.abc import Callable
from typing import Any

from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from cake_vllm.config import BUDGET_KEY, CONFIG_KEY, POLICY_KEY, KVEvictionConfig, flag
from cake_vllm.integration.front.requests import install_http, install_requests
from cake_vllm.integration.gates import find_gates
from cake_vllm.integration.reports import install_states

# Below the name "vllm", so that vLLM's logging configuration applies.
logger = init_logger("vllm.cake_vllm")

CONNECTOR = "KVEvictionConnector"

#: Stock attention backends that can evict, and the class that takes each one's place.
BACKENDS = {
    "CPU_ATTN": "cake_vllm.integration.worker.cpu_attention.EvictingCPUBackend",
    "FLASH_ATTN": "cake_vllm.integration.worker.gpu_attention.EvictingFlashBackend",
    "FLASHINFER": "cake_vllm.integration.worker.flashinfer_attention.EvictingFlashInferBackend",
    "TRITON_ATTN": "cake_vllm.integration.worker.gpu_attention.EvictingTritonBackend",
}

#: What ``--kv-cache-dtype`` may ask for: numbers of eight bits with one scale for the keys of a layer and one for its
#: values, and vLLM's unquantized caches.
QUANTIZED = ("fp8", "fp8_e4m3", "fp8_e5m2")
CACHE_DTYPES = ("auto", "float16", "bfloat16", *QUANTIZED)

#: Methods of speculation without and with attention layers of their own.
DRAFTS_WITHOUT_CACHE = ("ngram", "ngram_gpu", "suffix", "medusa")
DRAFT_MODELS = ("eagle", "eagle3", "mtp", "draft_model")


def install() -> None:
    """Registers what eviction is made of. Names only; nothing of it runs unless it is switched on."""
    for name, path in BACKENDS.items():
        register_backend(AttentionBackendEnum[name], path)
    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "cake_vllm.integration.connector", CONNECTOR)
    install_requests()
    install_states()


def eviction_config(vllm_config: VllmConfig | None) -> KVEvictionConfig | None:
    """The resolved settings that travel in a ``VllmConfig``; ``None`` when eviction is off."""
    settings = getattr(vllm_config, "additional_config", None)
    return KVEvictionConfig.from_settings(settings) if isinstance(settings, dict) else None


def switch_on(
    config: KVEvictionConfig, original: Callable[..., VllmConfig], args: Any, *rest: Any, **kwargs: Any
) -> VllmConfig:
    """Configures an engine that evicts.

    Args:
        config: what the user set.
        original: vLLM's ``EngineArgs.create_engine_config``.
        args: its engine arguments.
        rest: what else it was called with.
        kwargs: the same.

    Raises:
        ValueError: one sentence, if eviction cannot serve what else was set.
    """
    refuse_arguments(args)
    args.kv_transfer_config = KVTransferConfig(kv_connector=CONNECTOR, kv_role="kv_producer")
    vllm_config = original(args, *rest, **kwargs)
    refuse_model(vllm_config)
    refuse_speculation(config, vllm_config)
    refuse_without_gates(config, vllm_config)
    choose_draft_backend(vllm_config)
    if isinstance(args, AsyncEngineArgs):
        install_http()
    resolved = config.resolve(vllm_config.model_config.hf_text_config)
    vllm_config.additional_config = {**args.additional_config, **resolved.settings()}
    preset = resolved.options.get("preset", "none for this model")
    logger.info("KV eviction is on: budget %s, %s, tau preset: %s", resolved.budget, resolved.policy, preset)
    logger.info("KV eviction uses the KV connector %s", CONNECTOR)
    return vllm_config


def refuse_without_gates(config: KVEvictionConfig, vllm_config: VllmConfig) -> None:
    """Refuses a policy that needs gates of a model that has none yet, or a file of another one's.

    Raises:
        ValueError: one sentence with the command that makes them.
    """
    if config.policy.needs_gate:
        find_gates(vllm_config.model_config, getattr(config.policy, "gates", ""))


def choose_draft_backend(vllm_config: VllmConfig) -> None:
    """A model that drafts takes what the target was told to take, unless it was told so itself: they share blocks."""
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.attention_backend is None:
        speculative.attention_backend = vllm_config.attention_config.backend


def refuse_arguments(args: Any) -> None:
    """Refuses engine arguments that contradict eviction.

    Raises:
        ValueError: one sentence that names the argument and the fix.
    """
    ours = args.kv_transfer_config is not None and args.kv_transfer_config.kv_connector == CONNECTOR
    checks = [
        (args.kv_transfer_config is not None and not ours, "--kv-transfer-config", "drop one of the two"),
        (args.kv_offloading_size is not None, "--kv-offloading-size", "drop one of the two"),
        (args.disable_hybrid_kv_cache_manager is True, "--disable-hybrid-kv-cache-manager", "drop it"),
        (args.decode_context_parallel_size > 1, "--decode-context-parallel-size", "set it to 1"),
        (args.prefill_context_parallel_size > 1, "--prefill-context-parallel-size", "set it to 1"),
        (bool(args.enable_dbo), "--enable-dbo", "drop it"),
    ]
    for refused, argument, fix in checks:
        if refused:
            raise ValueError(f"{flag(POLICY_KEY)} does not work together with {argument} yet: {fix}")


def refuse_speculation(config: KVEvictionConfig, vllm_config: VllmConfig) -> None:
    """Refuses drafts that eviction cannot serve, and drafts whose fate the scheduler learns too late.

    Layers that draft lie in the blocks of the request and keep there what is most recent, so one page of theirs must be
    as large as one of the target's, and their passes such that rows can be told apart: first the tokens of the step,
    then a token for each row.

    Verified a step late, the length of a request is not known when its next step is planned, so no step can be made to
    end with a block, and nothing that ends there can be cut.

    Raises:
        ValueError: one sentence that says what to change.
    """
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    if speculative.method not in (*DRAFTS_WITHOUT_CACHE, *DRAFT_MODELS):
        raise ValueError(
            f"{flag(POLICY_KEY)} does not work together with --speculative-config of method {speculative.method} yet: "
            f"use one of {', '.join((*DRAFTS_WITHOUT_CACHE, *DRAFT_MODELS))}, or drop one of the two"
        )
    if speculative.method in DRAFT_MODELS:
        refuse_draft_model(vllm_config)
    if (config.decode != "off" or config.is_elastic) and vllm_config.scheduler_config.async_scheduling:
        what = "cut requests when memory is short" if config.is_elastic else "evict generated tokens"
        fix = (
            f"{flag(BUDGET_KEY)} to a number" if config.is_elastic else f"""{flag(CONFIG_KEY)} '{{"decode": "off"}}'"""
        )
        raise ValueError(
            f"{flag(POLICY_KEY)} cannot {what} while drafts are verified a step late: set --no-async-scheduling or "
            f"{fix}, or drop --speculative-config"
        )


def refuse_draft_model(vllm_config: VllmConfig) -> None:
    """Refuses models that draft in a way that eviction cannot serve.

    Raises:
        ValueError: one sentence that says what it is.
    """
    speculative, model = vllm_config.speculative_config, vllm_config.model_config
    assert speculative is not None
    draft, parallel = speculative.draft_model_config, vllm_config.parallel_config
    backends = (speculative.attention_backend, vllm_config.attention_config.backend)
    checks = [
        # vLLM's draft models write by the rows of the first KV cache group, whichever theirs is.
        (_has_windows(model) or _has_windows(draft), "sliding-window layers, the target's or its own,"),
        (speculative.use_gemma4_mtp(), "layers that read the target's KV cache"),
        (speculative.use_step3p5_mtp() or speculative.use_multi_module_mtp(), "several modules that take turns"),
        (speculative.parallel_drafting, "parallel_drafting"),
        (speculative.disable_padded_drafter_batch, "disable_padded_drafter_batch"),
        (backends[0] not in (None, backends[1]), "an attention_backend that is not the target's"),
        (
            speculative.kv_cache_dtype not in (None, vllm_config.cache_config.cache_dtype),
            "a kv_cache_dtype that is not the target's",
        ),
        (
            speculative.draft_parallel_config.tensor_parallel_size != parallel.tensor_parallel_size,
            "a draft_tensor_parallel_size that is not the target's",
        ),
        (
            (draft.get_num_kv_heads(parallel), draft.get_head_size())
            != (model.get_num_kv_heads(parallel), model.get_head_size()),
            "KV heads of another number or size than the target's",
        ),
    ]
    for refused, what in checks:
        if refused:
            raise ValueError(
                f"{flag(POLICY_KEY)} does not work together with a --speculative-config with {what} yet: use another, "
                "or drop one of the two"
            )


def window_cuts(window: int | None, max_model_len: int) -> bool:
    """Whether a sliding window hides a token from another one of the same request; a window as long as what can be
    served, in tokens, is full attention.
    """
    return window is not None and window < max_model_len


def _has_windows(model: Any) -> bool:
    text = model.hf_text_config
    is_mixed = "sliding_attention" in (getattr(text, "layer_types", None) or ())
    return is_mixed and window_cuts(getattr(text, "sliding_window", None), model.max_model_len)


def refuse_model(vllm_config: VllmConfig) -> None:
    """Refuses models and caches that eviction cannot serve.

    Raises:
        ValueError: one sentence that names what it is.
    """
    model = vllm_config.model_config
    cache_dtype = vllm_config.cache_config.cache_dtype
    checks = [
        (model.runner_type != "generate", "pooling models"),
        (model.is_encoder_decoder, "encoder-decoder attention"),
        (model.use_mla, "multi-head latent attention (MLA)"),
        (model.is_attention_free, "models without attention"),
        (model.is_hybrid, "models that mix attention with state-space layers"),
        (model.attention_chunk_size is not None, "chunked local attention"),
        (getattr(model, "rswa_window", None) is not None, "reference sliding-window attention"),
    ]
    for refused, what in checks:
        if refused:
            architecture = ", ".join(model.architectures)
            raise ValueError(
                f"{flag(POLICY_KEY)} cannot evict from {what}, which {architecture} has: serve it without the flag"
            )
    window = vllm_config.cache_config.sliding_window
    if window_cuts(window, model.max_model_len):
        raise ValueError(
            f"{flag(POLICY_KEY)} cannot evict from a sliding window in every layer, which "
            f"{', '.join(model.architectures)} has: serve it up to {window} tokens, where the window cuts nothing, "
            "with --disable-sliding-window, or serve it without the flag"
        )
    if cache_dtype not in CACHE_DTYPES:
        raise ValueError(
            f"{flag(POLICY_KEY)} does not work together with --kv-cache-dtype {cache_dtype} yet: "
            f"choose {', '.join(CACHE_DTYPES)}"
        )
    scheme = getattr(vllm_config.quant_config, "kv_cache_scheme", None) or {}
    if scheme.get("strategy") == "attn_head":
        raise ValueError(
            f"{flag(POLICY_KEY)} does not work together with a checkpoint whose KV cache has a scale for each head "
            "yet: choose one with a scale for each layer, or serve it without the flag"
        )
    backend = vllm_config.attention_config.backend
    if backend is not None and backend.name not in BACKENDS:
        raise ValueError(
            f"{flag(POLICY_KEY)} has no attention backend for {backend.name}: choose {', '.join(BACKENDS)}"
        )
