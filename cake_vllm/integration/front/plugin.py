"""What the plugin registers in every process, and what it switches on when a user asks for eviction."""

from collections.abc import Callable
from typing import Any

import vllm
from packaging.version import Version
from vllm.config import KVTransferConfig, SpeculativeConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.engine.input_processor import InputProcessor

from cake_vllm import BELOW_VLLM, MIN_VLLM
from cake_vllm.config import BUDGET_KEY, CONFIG_KEY, OFF, POLICY_KEY, KVEvictionConfig, flag
from cake_vllm.integration.front.args import install_args
from cake_vllm.integration.front.patching import wrap

# Below the name "vllm", so that vLLM's logging configuration applies.
logger = init_logger("vllm.cake_vllm")

CONNECTOR = "KVEvictionConnector"

#: Stock attention backends that can evict, and the class that takes each one's place.
BACKENDS = {
    "CPU_ATTN": "cake_vllm.integration.worker.cpu_attention.EvictingCPUBackend",
    "FLASH_ATTN": "cake_vllm.integration.worker.gpu_attention.EvictingFlashBackend",
    "TRITON_ATTN": "cake_vllm.integration.worker.gpu_attention.EvictingTritonBackend",
}


def install() -> None:
    """Makes eviction available in this process. Registers names only; nothing of it runs unless it is switched on."""
    if is_supported(vllm.__version__):
        for name, path in BACKENDS.items():
            register_backend(AttentionBackendEnum[name], path)
        if CONNECTOR not in KVConnectorFactory._registry:
            KVConnectorFactory.register_connector(CONNECTOR, "cake_vllm.integration.connector", CONNECTOR)
    install_args()
    wrap(EngineArgs, "create_engine_config", _create_engine_config)
    wrap(InputProcessor, "_validate_params", _validate_params)


def is_supported(version: str) -> bool:
    """Whether this plugin was tested with vLLM ``version``."""
    release = Version(Version(version).base_version)
    return Version(MIN_VLLM) <= release < Version(BELOW_VLLM)


def eviction_config(vllm_config: VllmConfig | None) -> KVEvictionConfig | None:
    """The resolved settings that travel in a ``VllmConfig``; ``None`` when eviction is off."""
    settings = getattr(vllm_config, "additional_config", None)
    return KVEvictionConfig.from_settings(settings) if isinstance(settings, dict) else None


def _create_engine_config(original: Callable[..., VllmConfig], self: Any, *args: Any, **kwargs: Any) -> VllmConfig:
    settings = self.additional_config
    config = KVEvictionConfig.from_settings(settings) if isinstance(settings, dict) else None
    if config is None:
        return original(self, *args, **kwargs)
    if not is_supported(vllm.__version__):
        raise ValueError(
            f"{flag(POLICY_KEY)} needs vLLM >= {MIN_VLLM} and < {BELOW_VLLM}, and this is {vllm.__version__}: "
            "install a supported vLLM or another release of cake_vllm"
        )
    refuse_arguments(self)
    self.kv_transfer_config = KVTransferConfig(kv_connector=CONNECTOR, kv_role="kv_producer")
    vllm_config = original(self, *args, **kwargs)
    refuse_model(vllm_config)
    refuse_speculation(config, vllm_config.speculative_config)
    resolved = config.resolve(vllm_config.model_config.hf_text_config)
    vllm_config.additional_config = {**settings, **resolved.settings()}
    preset = resolved.options.get("preset", "none for this model")
    logger.info("KV eviction is on: budget %s, %s, tau preset: %s", resolved.budget, resolved.policy, preset)
    logger.info(
        "KV eviction gives every full-attention layer a KV cache group of its own and uses the KV connector %s",
        CONNECTOR,
    )
    return vllm_config


def _validate_params(original: Callable[..., Any], self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    asked = getattr(params, "extra_args", None) or {}
    if not {POLICY_KEY, BUDGET_KEY} & asked.keys():
        return original(self, params, *args, **kwargs)
    try:
        config = eviction_config(self.vllm_config)
        if config is not None:
            config.for_request(asked, self.vllm_config.model_config.max_model_len)
        elif asked.get(POLICY_KEY, OFF) != OFF or BUDGET_KEY in asked:
            raise ValueError(f"{POLICY_KEY} needs a server with eviction: start it with {flag(POLICY_KEY)}")
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
    return original(self, params, *args, **kwargs)


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
        (args.pipeline_parallel_size > 1, "--pipeline-parallel-size", "set it to 1"),
        (args.decode_context_parallel_size > 1, "--decode-context-parallel-size", "set it to 1"),
        (args.prefill_context_parallel_size > 1, "--prefill-context-parallel-size", "set it to 1"),
        (bool(args.enable_dbo), "--enable-dbo", "drop it"),
    ]
    for refused, argument, fix in checks:
        if refused:
            raise ValueError(f"{flag(POLICY_KEY)} does not work together with {argument} yet: {fix}")


def refuse_speculation(config: KVEvictionConfig, speculative: SpeculativeConfig | None) -> None:
    """Refuses drafts that come from a model, whose layers would be evicted too, and drafts in what is evicted.

    Raises:
        ValueError: one sentence that says what to change.
    """
    if speculative is None:
        return
    if speculative.method != "ngram":
        raise ValueError(
            f"{flag(POLICY_KEY)} does not work together with --speculative-config of method {speculative.method} yet: "
            "use ngram or drop one of the two"
        )
    if config.decode != "off":
        raise ValueError(
            f"{flag(POLICY_KEY)} cannot evict generated tokens before their drafts are verified: "
            f"""set {flag(CONFIG_KEY)} '{{"decode": "off"}}' or drop --speculative-config"""
        )


def window_cuts(window: int | None, max_model_len: int) -> bool:
    """Whether a sliding window hides a token from another one of the same request; a window as long as what can be
    served, in tokens, is full attention.
    """
    return window is not None and window < max_model_len


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
    if cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
        raise ValueError(f"{flag(POLICY_KEY)} does not work together with --kv-cache-dtype {cache_dtype} yet: use auto")
    backend = vllm_config.attention_config.backend
    if backend is not None and backend.name not in BACKENDS:
        raise ValueError(
            f"{flag(POLICY_KEY)} has no attention backend for {backend.name}: choose {', '.join(BACKENDS)}"
        )
