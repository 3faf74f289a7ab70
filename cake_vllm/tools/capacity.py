"""How many requests a KV pool holds: divided by vLLM's own functions, counted with the scheduler's."""

import argparse
import importlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from cake_vllm.config import KVEvictionConfig
from cake_vllm.kernels import columns_for, page_of
from cake_vllm.tools.layers import built_specs


@dataclass(frozen=True)
class Model:
    """What a model keeps in its KV cache, on each GPU.

    Attributes:
        layers: all of those with a KV cache.
        evictable: those of full attention.
        kv_heads: of a layer, on each GPU.
        query_heads: the same.
        head_size: elements of a key.
        token: bytes that the evictable layers keep of one.
        dtype: of the model.
    """

    layers: int
    evictable: int
    kv_heads: int
    query_heads: int
    head_size: int
    token: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Pool:
    """The KV cache as vLLM will report it.

    Attributes:
        memory: bytes on each GPU.
        blocks: of ``block_size`` tokens, the null block included.
        block_size: vLLM's, which is what was asked for unless layers keep states.
        groups: of layers of full attention, each with blocks of its own.
        others: blocks that layers with a sliding window, chunks or states need for one request, at most.
        tokens: vLLM's "KV cache size".
        concurrency: vLLM's "Maximum concurrency", of requests without eviction.
    """

    memory: int
    blocks: int
    block_size: int
    groups: int
    others: int
    tokens: int
    concurrency: float


@dataclass(frozen=True)
class States:
    """What the other layers of a hybrid model keep of a request, however long it is, on each GPU.

    Attributes:
        layers: that keep one.
        memory: bytes of one state in all of them.
        blocks: of the pool that a request takes for states at most, by vLLM's mode of caching them: ``"none"`` without
            the prefix cache, ``"align"`` with it.
        block: bytes of one of these blocks.
    """

    layers: int
    memory: int
    blocks: dict[str, int]
    block: int


@dataclass(frozen=True)
class Requests:
    """Requests of one kind, in blocks of all groups together.

    Attributes:
        entering: that many must be free for the next one.
        decoding: what each holds at most while it decodes.
        at_once: how many of them run, one of which is entering.
    """

    entering: int
    decoding: int
    at_once: int

    @classmethod
    def in_pool(cls, pool: Pool, entering: int, decoding: int, most: int | None) -> "Requests":
        """Counts them, given blocks of one group; ``most`` run at once, whatever the pool holds."""
        entering, decoding = (blocks * pool.groups + pool.others for blocks in (entering, decoding))
        usable = pool.blocks - 1
        at_once = 0 if entering > usable else min(1 + (usable - entering) // decoding, usable // decoding)
        return cls(entering, decoding, min(at_once, most or at_once))


def page_size(block_size: int) -> int:
    """Tokens of a page, by the smallest block that kernels take on CPUs or on GPUs."""
    from vllm.platforms import current_platform

    return page_of(block_size, 32 if current_platform.is_cpu() else 16)


def configure(args: argparse.Namespace, config: KVEvictionConfig) -> tuple[Any, dict[str, Any]]:
    """vLLM's own configuration of the engine, as far as no GPU is needed for it, and its layers' KV cache specs.

    Raises:
        ValueError: vLLM's or eviction's refusal.
    """
    wanted = args.context + args.output_len
    if (args.max_model_len or wanted) < wanted:
        raise ValueError(f"{_both(args)} are more than --max-model-len {args.max_model_len}: give a larger one")
    import cake_vllm

    cake_vllm.register()
    from vllm import envs
    from vllm.engine.arg_utils import EngineArgs

    given = {"max_num_batched_tokens": args.max_num_batched_tokens} if args.max_num_batched_tokens else {}
    # Without an executor's name vLLM looks for as many GPUs.
    parallel: dict[str, Any] = {
        name: getattr(args, name) for name in ("tensor_parallel_size", "pipeline_parallel_size")
    }
    if max(parallel.values()) > 1:
        parallel["distributed_executor_backend"] = "mp"
    engine_args = EngineArgs(
        args.model,
        skip_tokenizer_init=True,
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        block_size=args.block_size,
        enable_prefix_caching=args.enable_prefix_caching,
        additional_config=config.settings(),
        **parallel,
        **given,
    )
    longest = engine_args.create_model_config().max_model_len
    if not envs.VLLM_ALLOW_LONG_MAX_MODEL_LEN and max(wanted, args.max_model_len or 0) > longest:
        if wanted > longest:
            raise ValueError(f"{_both(args)} are more than the {longest:,} of {args.model}: give a smaller --context")
        raise ValueError(
            f"--max-model-len {args.max_model_len:,} is more than the {longest:,} of {args.model}: give a smaller one"
        )
    engine_args.max_model_len = args.max_model_len or wanted
    vllm_config = engine_args.create_engine_config()
    is_hybrid = vllm_config.model_config.is_hybrid
    if not is_hybrid and not _differ_in_heads(vllm_config.model_config.hf_text_config):
        return vllm_config, _specs(vllm_config)
    if args.pipeline_parallel_size > 1 or (args.tensor_parallel_size > 1 and not is_hybrid):
        what = "keep states: drop --pipeline-parallel-size" if is_hybrid else "differ in heads: plan it for one GPU"
        raise ValueError(f"there is no plan for several GPUs with {args.model}, whose layers {what}")
    return vllm_config, built_specs(engine_args, vllm_config)


def _differ_in_heads(text: Any) -> bool:
    """Whether a model's config has heads of several sizes, or other ones in layers with windows."""
    if getattr(text, "is_heterogeneous", False):
        return True
    values = getattr(text, "v_head_dim", None)
    return values not in (None, getattr(text, "head_dim", values)) or hasattr(text, "swa_num_key_value_heads")


def _both(args: argparse.Namespace) -> str:
    return f"a prompt of {args.context:,} tokens and {args.output_len:,} generated ones"


def describe(vllm_config: Any, specs: dict[str, Any]) -> Model:
    """What the KV cache depends on, on the GPUs that have the most of it."""
    from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

    specs = max(_stages(vllm_config, specs), key=len)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    full = [spec for spec in specs.values() if isinstance(spec, FullAttentionSpec)]
    return Model(
        sum(isinstance(spec, AttentionSpec) for spec in specs.values()),
        len(full),
        model.get_num_kv_heads(parallel),
        model.get_num_attention_heads(parallel),
        model.get_head_size(),
        sum(spec.page_size_bytes // spec.block_size for spec in full),
        model.dtype,
    )


def _bounds(vllm_config: Any) -> list[dict[str, int]]:
    """What each layer with a KV cache of its own sees at most, by the name in its spec; nothing: everything."""
    from cake_vllm.integration.engine import window_cuts

    model = vllm_config.model_config
    text = model.hf_text_config
    kinds = getattr(text, "layer_types", None)
    kinds = kinds or ["full_attention"] * model.get_total_num_hidden_layers()
    kinds = kinds[: len(kinds) - (getattr(text, "num_kv_shared_layers", None) or 0)]
    window, chunk, found = model.get_sliding_window(), model.attention_chunk_size, {}
    if window_cuts(window, model.max_model_len):
        found["sliding_attention"] = {"sliding_window": window}
    if chunk is not None:
        found["chunked_attention"] = {"attention_chunk_size": chunk}
    return [found.get(kind, {}) for kind in kinds]


def _specs(vllm_config: Any) -> dict[str, Any]:
    """Of the layers of a model without states, as its config describes them."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        FullAttentionSpec,
        MLAAttentionSpec,
        SlidingWindowSpec,
        get_kv_quant_mode,
    )

    model, cache = vllm_config.model_config, vllm_config.cache_config
    page = {
        "block_size": cache.block_size,
        "num_kv_heads": model.get_num_kv_heads(vllm_config.parallel_config),
        "head_size": model.get_head_size(),
        "dtype": kv_cache_dtype_str_to_dtype(cache.cache_dtype, model),
        "kv_quant_mode": get_kv_quant_mode(cache.cache_dtype),
    }
    full = MLAAttentionSpec if model.use_mla else FullAttentionSpec
    kinds: dict[str, Any] = {
        "sliding_window": SlidingWindowSpec,
        "attention_chunk_size": ChunkedLocalAttentionSpec,
    }
    return {
        f"model.layers.{index}.self_attn.attn": kinds.get(next(iter(bound), ""), full)(**page, **bound)
        for index, bound in enumerate(_bounds(vllm_config))
    }


def _stages(vllm_config: Any, specs: dict[str, Any]) -> list[dict[str, Any]]:
    """Which layers lie on which pipeline stage."""
    from vllm.distributed.utils import get_pp_indices

    size, layers = vllm_config.parallel_config.pipeline_parallel_size, list(specs.items())
    if size == 1:
        return [specs]
    ends = [get_pp_indices(vllm_config.model_config.get_total_num_hidden_layers(), rank, size) for rank in range(size)]
    return [dict(layers[start:end]) for start, end in ends]


def divide(vllm_config: Any, specs: dict[str, Any], memory: int) -> tuple[Pool, States | None]:
    """vLLM's own division of a pool of ``memory`` bytes among layers, and what of it is states."""
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

    cache = vllm_config.cache_config
    cache.kv_cache_layout = cache.kv_cache_layout or "LBHNC"
    planning: Any = kv_cache_utils
    if not hasattr(planning, "get_kv_cache_groups"):
        # Since vLLM 0.33.
        planning = importlib.import_module("vllm.v1.core.kv_cache_planning")
    groups = planning.get_kv_cache_groups(vllm_config, specs)
    stages = (planning._project_kv_cache_groups_to_worker(groups, stage) for stage in _stages(vllm_config, specs))
    configs = [planning.get_kv_cache_config_from_groups(vllm_config, stage, memory) for stage in stages]
    # Of all GPUs' pools as many blocks are used as the smallest has.
    config = min(configs, key=lambda config: config.num_blocks)
    tokens, concurrency = kv_cache_utils.get_kv_cache_capacity(vllm_config, config)
    full = [group for group in groups if isinstance(group.kv_cache_spec, FullAttentionSpec)]
    others = sum(_blocks(group.kv_cache_spec, vllm_config) for group in groups if group not in full)
    pool = Pool(memory, config.num_blocks, cache.block_size, len(full), others, tokens, concurrency)
    states = [spec for spec in specs.values() if isinstance(spec, MambaSpec)]
    if not states:
        return pool, None
    keeping = [group.kv_cache_spec for group in groups if isinstance(group.kv_cache_spec, MambaSpec)]
    blocks = {
        mode: sum(
            _blocks(spec, SimpleNamespace(cache_config=SimpleNamespace(mamba_cache_mode=mode))) for spec in keeping
        )
        for mode in ("none", "align")
    }
    size = max(len(group.layer_names) for group in groups) * keeping[0].page_size_bytes
    return pool, States(len(states), sum(spec.real_page_size_bytes for spec in states), blocks, size)


def _blocks(spec: Any, vllm_config: Any) -> int:
    """That a group of layers needs for a request of the model's length."""
    return -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes)


def count(
    vllm_config: Any,
    pool: Pool,
    config: KVEvictionConfig,
    prompt_len: int,
    output_len: int,
    most: int | None = None,
) -> tuple[dict[str, Requests], KVEvictionConfig | None]:
    """Requests of each kind that run at once, and the settings under which prefill is progressive.

    Of a prompt that is not evicted there are ``whole`` ones only, and of elastic budgets no ``progressive`` ones.
    """
    from cake_vllm.integration.scheduler.spec import EvictableSpec

    config = config.beside(prompt_len)
    size, policy = vllm_config.cache_config.block_size, config.policy
    prompt, full, end = -(-prompt_len // size), prompt_len // size, -(-(prompt_len + output_len) // size)
    found = {"whole": Requests.in_pool(pool, prompt, end, most)}
    # Where budgets are elastic: of a request at its floor.
    stays = min(output_len, config.recent_tokens) if config.cuts_outputs else output_len
    floor = min(config.least_tokens(prompt_len), prompt_len) + stays if config.is_elastic else 0
    budget = floor or config.tokens(prompt_len)
    columns = columns_for(budget, size, page_size(size))
    evicted = prompt_len + output_len if config.cuts_outputs else prompt_len
    if output_len < 2 or not policy.is_evicted(evicted, budget) or columns >= evicted // size:
        return found, None
    behind = 1 if config.is_elastic else config.period(size) if config.decode != "off" else end - full
    found["exact"] = Requests.in_pool(pool, prompt, columns + behind, most)
    if config.is_elastic:
        return found, None
    options = {**config.options, "prefill": "progressive"}
    if config.decode == "off":
        # Else a request might grow to any length, and vLLM admits it only where its whole prompt has room.
        options.setdefault("decode", next(way for way in policy.decodes if way != "off"))
    progressive = KVEvictionConfig(config.policy_name, config.budget, options)
    bound = progressive.max_request_tokens(vllm_config.model_config.max_model_len, vllm_config.max_in_flight_tokens)
    spec = EvictableSpec(block_size=size, num_kv_heads=1, head_size=1, dtype=torch.int8, max_request_tokens=bound)
    entering = min(prompt, spec.max_request_blocks or prompt)
    behind = progressive.period(size) if progressive.decode != "off" else end - full
    found["progressive"] = Requests.in_pool(pool, entering, columns + behind, most)
    return found, progressive
