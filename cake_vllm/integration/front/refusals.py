"""What is refused when an engine is configured: a row for each thing that eviction cannot serve yet.

A row goes when what it names is served. What only the layers of a model know is refused where they are built.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from vllm.config import KVTransferConfig, ModelConfig, VllmConfig

from cake_vllm.config import POLICY_KEY, KVEvictionConfig, flag
from cake_vllm.integration.engine import BACKENDS, CONNECTOR, window_cuts
from cake_vllm.integration.gates import find_gates

#: What ``--kv-cache-dtype`` may ask for: numbers of eight bits with one scale for the keys of a layer and one for its
#: values, and vLLM's unquantized caches.
CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")

#: Methods of speculation without and with attention layers of their own.
DRAFTS_WITHOUT_CACHE = ("ngram", "ngram_gpu", "suffix", "medusa")
DRAFT_MODELS = ("eagle", "eagle3", "mtp", "draft_model")
METHODS = (*DRAFTS_WITHOUT_CACHE, *DRAFT_MODELS)

#: KV connectors of vLLM's that were run beside ours; and what such a one copies with, if it is not told.
COMPANIONS = ("OffloadingConnector",)
COPIES = "CPUOffloadingSpec"

#: Whether something (``of``) is such; what it then has; what to change. The texts may name attributes of ``of``.
Row = tuple[Callable[[Any], bool | None], str, str]

WITHOUT = "serve it without the flag"
ONE_OF_TWO = "drop one of the two"
OTHER_DRAFTS = f"use another, or {ONE_OF_TWO}"
OTHER_CONNECTOR = f"use {', '.join(COMPANIONS)}, or {ONE_OF_TWO}"


class Engine(NamedTuple):
    """An engine as vLLM has configured it, and what is to be evicted."""

    config: KVEvictionConfig
    vllm: VllmConfig
    model: ModelConfig
    drafts: Any


#: Engine arguments, before vLLM reads them.
ARGUMENTS: tuple[Row, ...] = (
    (
        lambda of: (
            of.kv_transfer_config is not None and of.kv_offloading_size is None and _never_ran(of.kv_transfer_config)
        ),
        "kv-transfer-config of {of.kv_transfer_config.kv_connector}, which was never run beside it,",
        OTHER_CONNECTOR,
    ),
    (
        lambda of: of.kv_offloading_size is not None and of.kv_offloading_backend != "native",
        "kv-offloading-backend {of.kv_offloading_backend}, which was never run beside it,",
        OTHER_CONNECTOR,
    ),
    (lambda of: of.disable_hybrid_kv_cache_manager is True, "disable-hybrid-kv-cache-manager", "drop it"),
    (lambda of: of.decode_context_parallel_size > 1, "decode-context-parallel-size", "set it to 1"),
    (lambda of: of.prefill_context_parallel_size > 1, "prefill-context-parallel-size", "set it to 1"),
    (lambda of: bool(of.enable_dbo), "enable-dbo", "drop it"),
    # Layers that read another's cache are then left out of a prefill.
    (lambda of: bool(of.kv_sharing_fast_prefill), "kv-sharing-fast-prefill", "drop it"),
)

#: Models, by their attention.
MODELS: tuple[Row, ...] = (
    (lambda of: of.model.runner_type != "generate", "pooling models", WITHOUT),
    (lambda of: of.model.is_encoder_decoder, "encoder-decoder attention", WITHOUT),
    (
        lambda of: hasattr(of.model.hf_text_config, "index_topk"),
        "sparse attention over latents, which reads few tokens as it is",
        WITHOUT,
    ),
    (lambda of: of.model.use_mla and of.model.is_hybrid, "latent attention beside layers that keep states", WITHOUT),
    (lambda of: of.model.is_attention_free, "models without attention", WITHOUT),
    (lambda of: getattr(of.model, "rswa_window", None) is not None, "reference sliding-window attention", WITHOUT),
    (
        lambda of: window_cuts(of.vllm.cache_config.sliding_window, of.model.max_model_len),
        "a sliding window in every layer",
        "serve it up to {of.vllm.cache_config.sliding_window} tokens, where the window cuts nothing, with "
        f"--disable-sliding-window, or {WITHOUT}",
    ),
)

#: What else vLLM was set to.
SETTINGS: tuple[Row, ...] = (
    # A chunk behind an eviction reads its own pages, by kernels that are not told where pictures lie in these.
    (
        lambda of: of.config.is_progressive and of.model.is_mm_prefix_lm,
        "prefill progressive for {of.model.architectures[0]}, whose pictures are attended to in both directions,",
        """drop it, or serve no pictures (--limit-mm-per-prompt '{{{{"image": 0}}}}')""",
    ),
    (
        lambda of: of.vllm.cache_config.cache_dtype not in CACHE_DTYPES,
        "--kv-cache-dtype {of.vllm.cache_config.cache_dtype}",
        f"choose {', '.join(CACHE_DTYPES)}",
    ),
    (
        lambda of: _divides_full_layers(of),
        "--kv-cache-dtype-skip-layers that names some layers of full attention and not the others",
        "name all of them or none",
    ),
    (
        lambda of: (getattr(of.vllm.quant_config, "kv_cache_scheme", None) or {}).get("strategy") == "attn_head",
        "a checkpoint whose KV cache has a scale for each head",
        f"choose one with a scale for each layer, or {WITHOUT}",
    ),
    (
        lambda of: (asked := of.vllm.attention_config.backend) is not None and asked.name not in BACKENDS,
        "the attention backend {of.vllm.attention_config.backend.name}",
        f"choose {', '.join(BACKENDS)}",
    ),
    (
        lambda of: of.drafts and of.drafts.method not in METHODS,
        "--speculative-config of method {of.drafts.method}",
        f"use one of {', '.join(METHODS)}, or {ONE_OF_TWO}",
    ),
    # A state is kept for each draft, and blocks of attention are taken ahead of them.
    (
        lambda of: of.drafts and of.model.is_hybrid,
        "a --speculative-config for {of.model.architectures[0]}, whose layers keep states,",
        ONE_OF_TWO,
    ),
)

#: Another KV connector beside ours, as vLLM has configured it.
BESIDE_ANOTHER: tuple[Row, ...] = (
    (
        lambda of: _never_ran(of.vllm.kv_transfer_config),
        "the KV connector {of.vllm.kv_transfer_config.kv_connector}, which was never run beside it,",
        OTHER_CONNECTOR,
    ),
    (
        lambda of: (
            (extra := of.vllm.kv_transfer_config.kv_connector_extra_config).get("spec_name", COPIES) != COPIES
            and not extra.get("spec_module_path")
        ),
        "the offloading spec {of.vllm.kv_transfer_config.kv_connector_extra_config[spec_name]}, which was never run "
        "beside it,",
        f"set spec_name to {COPIES}, or {ONE_OF_TWO}",
    ),
    (
        # Of runner V1's stages only the last one begins its copies then; on V2 it was never run.
        lambda of: of.drafts and of.vllm.parallel_config.pipeline_parallel_size > 1,
        "KV offloading and a --speculative-config over pipeline stages",
        "drop one of the three",
    ),
)

#: Models that draft. Their layers lie in the blocks of the request and keep there what is most recent, so one page of
#: theirs must be as large as one of the target's, and their passes such that rows can be told apart: first the tokens
#: of the step, then a token for each row.
DRAFTERS: tuple[Row, ...] = (
    (
        # vLLM's draft models write by the rows of the first KV cache group, whichever theirs is.
        lambda of: _has_windows(of.model) or _has_windows(of.drafts.draft_model_config),
        "layers with a sliding window or chunks, the target's or its own,",
        OTHER_DRAFTS,
    ),
    (lambda of: of.drafts.use_gemma4_mtp(), "layers that read the target's KV cache", OTHER_DRAFTS),
    (
        lambda of: of.drafts.use_step3p5_mtp() or of.drafts.use_multi_module_mtp(),
        "several modules that take turns",
        OTHER_DRAFTS,
    ),
    (lambda of: of.drafts.parallel_drafting, "parallel_drafting", OTHER_DRAFTS),
    (lambda of: of.drafts.disable_padded_drafter_batch, "disable_padded_drafter_batch", OTHER_DRAFTS),
    (
        lambda of: of.drafts.attention_backend not in (None, of.vllm.attention_config.backend),
        "an attention_backend that is not the target's",
        OTHER_DRAFTS,
    ),
    (
        lambda of: of.drafts.kv_cache_dtype not in (None, of.vllm.cache_config.cache_dtype),
        "a kv_cache_dtype that is not the target's",
        OTHER_DRAFTS,
    ),
    (
        lambda of: of.drafts.draft_parallel_config.tensor_parallel_size != of.vllm.parallel_config.tensor_parallel_size,
        "a draft_tensor_parallel_size that is not the target's",
        OTHER_DRAFTS,
    ),
    (
        lambda of: _kv_heads(of.drafts.draft_model_config, of) != _kv_heads(of.model, of),
        "KV heads of another number or size than the target's",
        OTHER_DRAFTS,
    ),
)


def refuse_arguments(args: Any) -> None:
    """Refuses engine arguments that contradict eviction.

    Raises:
        ValueError: one sentence that names the argument and the fix.
    """
    _refuse(ARGUMENTS, "does not work together with --{} yet", args)


def refuse_engine(config: KVEvictionConfig, vllm_config: VllmConfig) -> None:
    """Refuses models, settings and drafts that eviction cannot serve.

    Raises:
        ValueError: one sentence that says what it is and what to change.
    """
    of = Engine(config, vllm_config, vllm_config.model_config, vllm_config.speculative_config)
    _refuse(MODELS, "cannot evict from {}, which {{of.model.architectures[0]}} has", of)
    _refuse(SETTINGS, "does not work together with {} yet", of)
    if of.drafts is not None and of.drafts.method in DRAFT_MODELS:
        _refuse(DRAFTERS, "does not work together with a --speculative-config with {} yet", of)


def refuse_companion(config: KVEvictionConfig, vllm_config: VllmConfig) -> None:
    """Refuses what eviction cannot serve beside the KV connector that the user has set up.

    Raises:
        ValueError: one sentence that says what it is and what to change.
    """
    of = Engine(config, vllm_config, vllm_config.model_config, vllm_config.speculative_config)
    _refuse(BESIDE_ANOTHER, "does not work together with {} yet", of)


def refuse_without_gates(config: KVEvictionConfig, vllm_config: VllmConfig) -> None:
    """Refuses a policy that needs gates of a model that has none yet, or a file of another one's.

    Raises:
        ValueError: one sentence with the command that makes them.
    """
    if config.policy.needs_gate:
        find_gates(vllm_config.model_config, getattr(config.policy, "gates", ""))


def _refuse(rows: Iterable[Row], form: str, of: Any) -> None:
    for is_met, what, fix in rows:
        if is_met(of):
            raise ValueError(f"{flag(POLICY_KEY)} {form.format(what)}: {fix}".format(of=of))


def _never_ran(asked: KVTransferConfig) -> bool:
    """Whether a KV connector was never run beside ours, or is somebody's own under the name of one that was."""
    return asked.kv_connector not in (CONNECTOR, *COMPANIONS) or asked.kv_connector_module_path is not None


def _has_windows(model: ModelConfig) -> bool:
    if model.attention_chunk_size is not None:
        return True
    text = model.hf_text_config
    is_mixed = "sliding_attention" in (getattr(text, "layer_types", None) or ())
    return is_mixed and window_cuts(getattr(text, "sliding_window", None), model.max_model_len)


def _divides_full_layers(of: Engine) -> bool:
    """Whether layers of full attention have pages of different size, and could not use each other's."""
    cache, text = of.vllm.cache_config, of.model.hf_text_config
    if not cache.cache_dtype.startswith("fp8"):
        return False
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    skipped = [str(index) in cache.kv_cache_dtype_skip_layers for index, kind in enumerate(kinds) if "full" in kind]
    return any(skipped) and not all(skipped)


def _kv_heads(model: ModelConfig, of: Engine) -> tuple[int, int]:
    return model.get_num_kv_heads(of.vllm.parallel_config), model.get_head_size()
