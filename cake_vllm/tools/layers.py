"""A model's own layers without their weights: for models whose blocks vLLM sizes by what layers keep."""

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def built_specs(engine_args: Any, vllm_config: Any) -> dict[str, Any]:
    """KV cache specs of a model's layers on each GPU, by name.

    The layers are vLLM's, built for one GPU and without memory; ``vllm_config`` gets the block size that vLLM gives it
    once they are there.

    Args:
        engine_args: vLLM's ``EngineArgs``.
        vllm_config: what they configure.

    Raises:
        ValueError: one sentence, if this machine's vLLM cannot build the model.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.models import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.v1.kv_cache_interface import MambaSpec
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    alone = dataclasses.replace(engine_args, tensor_parallel_size=1, enforce_eager=True).create_engine_config()
    with set_current_vllm_config(alone), _one_process():
        try:
            _build(alone)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
            raise ValueError(
                f"there is no plan for {engine_args.model} on this machine: vLLM sizes its blocks by what its layers "
                f"keep, and cannot build these here ({reason}): run it where the model is served"
            ) from error
        vllm_config.compilation_config.static_forward_context = alone.compilation_config.static_forward_context
        current_platform.update_block_size_for_backend(vllm_config)
        specs: dict[str, Any] = get_kv_cache_spec(vllm_config)
    if parallel.tensor_parallel_size == 1:
        return specs
    if len({spec.shapes for spec in specs.values() if isinstance(spec, MambaSpec)}) > 1:
        raise ValueError(
            f"there is no plan for {engine_args.model} on several GPUs, as its states differ: plan for one"
        )
    of: Any = ModelRegistry.resolve_model_cls(model.architecture, model_config=model)[0]
    shapes, heads = of.get_mamba_state_shape_from_config(vllm_config), model.get_num_kv_heads(parallel)
    return {
        name: dataclasses.replace(
            spec, **{"shapes": shapes} if isinstance(spec, MambaSpec) else {"num_kv_heads": heads}
        )
        for name, spec in specs.items()
    }


def _build(vllm_config: Any) -> None:
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    # vLLM keeps these for the process's next model, and those of this one have no memory.
    kept, shared = rotary_embedding._ROPE_DICT, dict(rotary_embedding._ROPE_DICT)
    kept.clear()
    try:
        with torch.device("meta"), set_default_torch_dtype(vllm_config.model_config.dtype):
            initialize_model(vllm_config)
    finally:
        kept.clear()
        kept.update(shared)


@contextmanager
def _one_process() -> Iterator[None]:
    """Lets layers find themselves alone, unless an engine in this process has told them who is there."""
    from vllm.distributed import parallel_state

    if parallel_state.model_parallel_is_initialized():
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            parallel_state.init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
            parallel_state.ensure_model_parallel_initialized(1, 1)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()
