"""What the plugin registers in every process, and what it switches on when a user asks for eviction."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from vllm.config import KVTransferConfig, ModelConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from cake_vllm.config import AUTO, POLICY_KEY, KVEvictionConfig
from cake_vllm.integration.engine import BACKENDS, BESIDE, CONNECTOR
from cake_vllm.integration.front.refusals import (
    refuse_arguments,
    refuse_companion,
    refuse_engine,
    refuse_without_gates,
)
from cake_vllm.integration.front.requests import install_http, install_requests
from cake_vllm.integration.gates import find_gates
from cake_vllm.integration.reports import install_states

# Below the name "vllm", so that vLLM's logging configuration applies.
logger = init_logger("vllm.cake_vllm")


def install() -> None:
    """Registers what eviction is made of. Names only; nothing of it runs unless it is switched on."""
    for name, path in BACKENDS.items():
        register_backend(AttentionBackendEnum[name], path)
    for name, module in ((CONNECTOR, "connector"), (BESIDE, "beside")):
        if name not in KVConnectorFactory._registry:
            KVConnectorFactory.register_connector(name, f"cake_vllm.integration.{module}", name)
    install_requests()
    install_states()


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
    if args.kv_transfer_config is None and args.kv_offloading_size is None:
        args.kv_transfer_config = KVTransferConfig(kv_connector=CONNECTOR, kv_role="kv_producer")
    vllm_config = original(args, *rest, **kwargs)
    if args.additional_config[POLICY_KEY] == AUTO:
        config = choose_policy(args.additional_config, vllm_config.model_config)
    refuse_engine(config, vllm_config)
    refuse_without_gates(config, vllm_config)
    choose_draft_backend(vllm_config)
    asked = vllm_config.kv_transfer_config
    assert asked is not None
    if asked.kv_connector != CONNECTOR:
        refuse_companion(config, vllm_config)
        vllm_config.kv_transfer_config = run_beside(asked)
    if isinstance(args, AsyncEngineArgs):
        install_http()
    resolved = config.resolve(vllm_config.model_config.hf_text_config)
    vllm_config.additional_config = {**args.additional_config, **resolved.settings()}
    preset = resolved.options.get("preset", "none for this model")
    logger.info("KV eviction is on: budget %s, %s, tau preset: %s", resolved.budget, resolved.policy, preset)
    logger.info("KV eviction uses the KV connector %s", CONNECTOR)
    return vllm_config


def choose_policy(settings: dict[str, Any], model: ModelConfig) -> KVEvictionConfig:
    """The settings with the method that suits a model, if the user left that to us."""
    try:
        why, has_gates = f"gates of the model are at {find_gates(model)}", True
    except ValueError as error:
        why, has_gates = str(error), False
    config = KVEvictionConfig.from_settings(settings, has_gates)
    assert config is not None
    logger.info("KV eviction by %s: %s", config.policy_name, why)
    return config


def run_beside(theirs: KVTransferConfig) -> KVTransferConfig:
    """Two KV connectors, ours and the user's, as one."""
    ours = {"kv_connector": CONNECTOR, "kv_role": "kv_producer"}
    # The id is the engine's.
    others = {key: value for key, value in asdict(theirs).items() if key != "engine_id"}
    logger.info("KV eviction runs beside the KV connector %s", theirs.kv_connector)
    return replace(theirs, kv_connector=BESIDE, kv_connector_extra_config={"connectors": [ours, others]})


def choose_draft_backend(vllm_config: VllmConfig) -> None:
    """A model that drafts takes what the target was told to take, unless it was told so itself: they share blocks."""
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.attention_backend is None:
        speculative.attention_backend = vllm_config.attention_config.backend
