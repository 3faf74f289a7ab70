"""``cake-vllm plan``: how many requests a KV pool holds, with and without eviction, from a model's config alone.

The pool is divided by vLLM's own functions, and what an evicted request holds is counted with the scheduler's:

                 entering                          decoding
    whole        its prompt                        its prompt and what it generates
    exact        its prompt                        private columns, and its blocks behind the prompt's full ones
    progressive  private columns and some chunks   private columns, and the block that is being filled

Blocks are vLLM's; where it has several groups of layers (sliding windows beside full attention), one of each.
"""

import argparse
import dataclasses
import importlib
import json
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cake_vllm.config import (
    BUDGET_KEY,
    CONFIG_KEY,
    DEFAULT_BUDGET,
    POLICY_KEY,
    KVEvictionConfig,
    argument,
    flag,
    parse_budget,
    parse_options,
)
from cake_vllm.kernels import EvictedRows, Grid, columns_for
from cake_vllm.policies import LayerInputs, LayerScore, Policy, policy_names
from cake_vllm.policies.entries import LinearGate, Rotary

#: Prompts that policies are tried on, tokens: what they keep grows in proportion.
TRIALS = (1024, 2048)


@dataclass(frozen=True)
class Model:
    """What a model keeps in its KV cache, on each GPU.

    Attributes:
        layers: all of those with a KV cache.
        evictable: those of full attention.
        kv_heads: of a layer, on each GPU.
        query_heads: the same.
        head_size: elements of a key.
        dtype: of the model.
    """

    layers: int
    evictable: int
    kv_heads: int
    query_heads: int
    head_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Pool:
    """The KV cache as vLLM will report it.

    Attributes:
        memory: bytes on each GPU.
        blocks: of ``block_size`` tokens, the null block included.
        groups: of layers of full attention, each with blocks of its own.
        others: blocks that layers with a sliding window need for one request, at most.
        tokens: vLLM's "KV cache size".
        concurrency: vLLM's "Maximum concurrency", of requests without eviction.
    """

    memory: int
    blocks: int
    groups: int
    others: int
    tokens: int
    concurrency: float


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


@dataclass(frozen=True)
class Cost:
    """Memory beside the pool, on each GPU.

    Attributes:
        what: takes it.
        memory: bytes.
        when: it is there.
    """

    what: str
    memory: int
    when: str


@dataclass(frozen=True)
class Plan:
    """What ``cake-vllm plan`` prints.

    Attributes:
        requests: by kind; kinds that the settings rule out are missing.
        flags: of ``vllm serve``.
        notes: what else to know, a sentence each.
    """

    model: Model
    weights: int
    pool: Pool
    requests: dict[str, Requests]
    costs: list[Cost]
    flags: list[str]
    notes: list[str]


def add_command(commands: Any) -> None:
    """Adds the subcommand to what ``ArgumentParser.add_subparsers`` returned."""
    parser = commands.add_parser(
        "plan",
        help="how many requests a KV pool holds with and without eviction, what it costs, and the flags to use",
        description="How many requests a KV pool holds with and without eviction, what eviction takes in memory "
        "beside it, and the flags to use: from the model's config alone, without a GPU. Sizes are numbers of GiB, or "
        "have a unit, such as 512MiB.",
    )
    parser.add_argument("model", metavar="MODEL", help="a directory, or a name that vLLM can look up")
    memory = parser.add_mutually_exclusive_group(required=True)
    memory.add_argument("--gpu-memory", type=size, metavar="SIZE", help="of each GPU")
    memory.add_argument(
        "--kv-cache-memory", type=size, metavar="SIZE", help="of the KV pool on each GPU, in place of the GPU's"
    )
    parser.add_argument("--context", type=positive, required=True, metavar="N", help="tokens of a prompt")
    parser.add_argument(
        "--output-len", type=positive, default=256, metavar="N", help="tokens that it generates (default: %(default)s)"
    )
    add_eviction(parser, "N|F|auto", "tokens per layer, a fraction of the prompt, or auto")
    parser.add_argument("--block-size", type=positive, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--kv-cache-dtype", default="auto", help="as of vllm serve (default: %(default)s)")
    parser.add_argument("--tp", type=positive, default=1, metavar="N", help="tensor-parallel GPUs (default: 1)")
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.92, metavar="F", help="default: %(default)s, as vLLM's"
    )
    parser.add_argument(
        "--max-num-batched-tokens",
        type=positive,
        metavar="N",
        help="tokens of a step (default: vLLM's on this machine)",
    )
    parser.add_argument(
        "--max-num-seqs", type=positive, metavar="N", help="requests at once at most (default: as many as fit)"
    )
    parser.add_argument(
        "--weights",
        type=size,
        metavar="SIZE",
        help="of all GPUs together (default: counted in the model's files, or else by its config)",
    )
    parser.add_argument(
        "--overhead",
        type=size,
        default=2 * 2**30,
        metavar="SIZE",
        help="what else each GPU holds, an assumption: activations, CUDA graphs, libraries (default: 2GiB; vLLM "
        "measures it when it starts)",
    )
    parser.add_argument("--json", action="store_true", help="numbers in bytes, for programs")
    parser.set_defaults(run=run)


def add_eviction(parser: argparse.ArgumentParser, budgets: str, described: str) -> None:
    """Adds a method, its budget and its knobs, as ``vllm serve`` has them, and the model's dtype."""
    parser.add_argument("--policy", choices=policy_names(), default="cake", help="default: %(default)s")
    parser.add_argument(
        "--budget",
        type=argument(parse_budget),
        default=DEFAULT_BUDGET,
        metavar=budgets,
        help=f"as {flag(BUDGET_KEY)} of vllm serve: {described} (default: %(default)s)",
    )
    parser.add_argument(
        "--config",
        type=argument(parse_options),
        default={},
        metavar="JSON",
        help=f"as {flag(CONFIG_KEY)} of vllm serve",
    )
    parser.add_argument("--dtype", default="auto", help="as of vllm serve (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Prints the plan for parsed arguments."""
    plan = make(args)
    print(as_json(plan) if args.json else as_text(plan, args))


def size(text: str) -> int:
    """Bytes of ``80``, ``80GiB``, ``79.6 GiB``, ``512MiB`` or ``80GB``.

    Raises:
        argparse.ArgumentTypeError: if it is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?)?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: give a number of GiB, or one such as 512MiB")
    number, unit, binary = found.groups()
    power = "KMGT".index((unit or "G").upper()) + 1
    return int(float(number) * (1024 if binary or not unit else 1000) ** power)


def positive(text: str) -> int:
    """A whole number above 0.

    Raises:
        argparse.ArgumentTypeError: if it is not.
    """
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def make(args: argparse.Namespace) -> Plan:
    """The plan for parsed arguments.

    Raises:
        ValueError: one sentence, if vLLM or eviction cannot serve what they ask for.
    """
    settings = {POLICY_KEY: args.policy, BUDGET_KEY: args.budget, CONFIG_KEY: args.config}
    config = KVEvictionConfig.from_settings(settings)
    assert config is not None
    vllm_config = configure(args, config)
    model = describe(vllm_config)
    weights = args.weights or weight_bytes(args.model, vllm_config.model_config)
    if args.kv_cache_memory:
        memory = args.kv_cache_memory
    else:
        memory = int(args.gpu_memory * args.gpu_memory_utilization) - weights // args.tp - args.overhead
        if memory <= 0:
            raise ValueError(
                f"nothing is left for a KV pool: {_text(weights // args.tp)} of weights and {_text(args.overhead)} of "
                f"overhead on each GPU of {_text(args.gpu_memory)}: give a larger --gpu-memory or --tp"
            )
    pool = divide(vllm_config, memory)
    requests, progressive = count(vllm_config, pool, config, args.context, args.output_len, args.max_num_seqs)
    if "exact" not in requests:
        notes = ["Eviction would free nothing of such a prompt: it is no longer than the budget, or hardly."]
        return Plan(
            model, weights, pool, requests, [], _flags(args, vllm_config, None, requests["whole"].at_once), notes
        )
    fits = requests["exact"].at_once or progressive is None
    chosen, kind = (config, "exact") if fits and not config.is_progressive else (progressive or config, "progressive")
    num_prompts = 1 + vllm_config.scheduler_config.max_num_batched_tokens // args.context
    costs = beside(chosen, model, pool, requests[kind], args, num_prompts)
    notes = list(_notes(args, config, chosen, requests[kind], sum(cost.memory for cost in costs)))
    flags = _flags(args, vllm_config, chosen, requests[kind].at_once)
    return Plan(model, weights, pool, requests, costs, flags, notes)


def configure(args: argparse.Namespace, config: KVEvictionConfig) -> Any:
    """vLLM's own configuration of the engine, as far as no GPU is needed for it.

    Raises:
        ValueError: vLLM's or eviction's refusal.
    """
    import cake_vllm

    cake_vllm.register()
    from vllm.engine.arg_utils import EngineArgs

    given = {"max_num_batched_tokens": args.max_num_batched_tokens} if args.max_num_batched_tokens else {}
    # Without an executor's name vLLM looks for as many GPUs.
    parallel = {"tensor_parallel_size": args.tp, "distributed_executor_backend": "mp"} if args.tp > 1 else {}
    return EngineArgs(
        args.model,
        skip_tokenizer_init=True,
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        block_size=args.block_size,
        max_model_len=args.context + args.output_len,
        additional_config=config.settings(),
        **parallel,
        **given,
    ).create_engine_config()


def describe(vllm_config: Any) -> Model:
    """What the KV cache depends on."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    windows = _windows(vllm_config)
    return Model(
        len(windows),
        windows.count(None),
        model.get_num_kv_heads(parallel),
        model.get_num_attention_heads(parallel),
        model.get_head_size(),
        model.dtype,
    )


def _windows(vllm_config: Any) -> list[int | None]:
    """The sliding window of each layer, where it cuts something."""
    from cake_vllm.integration.front.plugin import window_cuts

    model = vllm_config.model_config
    kinds = getattr(model.hf_text_config, "layer_types", None)
    kinds = kinds or ["full_attention"] * model.get_num_layers(vllm_config.parallel_config)
    window = model.get_sliding_window()
    window = window if window_cuts(window, model.max_model_len) else None
    return [window if kind == "sliding_attention" else None for kind in kinds]


def divide(vllm_config: Any, memory: int) -> Pool:
    """vLLM's own division of a pool of ``memory`` bytes."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec, get_kv_quant_mode

    model, cache = describe(vllm_config), vllm_config.cache_config
    cache.kv_cache_layout = cache.kv_cache_layout or "LBHNC"
    page = {
        "block_size": cache.block_size,
        "num_kv_heads": model.kv_heads,
        "head_size": model.head_size,
        "dtype": kv_cache_dtype_str_to_dtype(cache.cache_dtype, vllm_config.model_config),
        "kv_quant_mode": get_kv_quant_mode(cache.cache_dtype),
    }
    specs: dict[str, KVCacheSpec] = {
        f"model.layers.{index}.self_attn.attn": SlidingWindowSpec(**page, sliding_window=window)
        if window
        else FullAttentionSpec(**page)
        for index, window in enumerate(_windows(vllm_config))
    }
    planning: Any = kv_cache_utils
    if not hasattr(planning, "get_kv_cache_groups"):
        # Since vLLM 0.33.
        planning = importlib.import_module("vllm.v1.core.kv_cache_planning")
    groups = planning.get_kv_cache_groups(vllm_config, specs)
    config = planning.get_kv_cache_config_from_groups(vllm_config, groups, memory)
    tokens, concurrency = kv_cache_utils.get_kv_cache_capacity(vllm_config, config)
    full = [group for group in groups if isinstance(group.kv_cache_spec, FullAttentionSpec)]
    others = sum(
        -(-group.kv_cache_spec.max_memory_usage_bytes(vllm_config) // group.kv_cache_spec.page_size_bytes)
        for group in groups
        if group not in full
    )
    return Pool(memory, config.num_blocks, len(full), others, tokens, concurrency)


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

    size, policy = vllm_config.cache_config.block_size, config.policy
    prompt, full, end = -(-prompt_len // size), prompt_len // size, -(-(prompt_len + output_len) // size)
    found = {"whole": Requests.in_pool(pool, prompt, end, most)}
    # Where budgets are elastic: of a request at its floor.
    budget = config.least_tokens(prompt_len) + output_len if config.is_elastic else config.tokens(prompt_len)
    columns = columns_for(budget, size)
    if output_len < 2 or not policy.is_evicted(prompt_len, budget) or columns >= full:
        return found, None
    behind = 1 if config.is_elastic or config.decode != "off" else end - full
    found["exact"] = Requests.in_pool(pool, prompt, columns + behind, most)
    if config.is_elastic:
        return found, None
    options = {**config.options, "prefill": "progressive"}
    if config.decode == "off":
        # Else a request might grow to any length, and vLLM admits it only where its whole prompt has room.
        options.setdefault("decode", next(way for way in policy.decodes if way != "off"))
    progressive = KVEvictionConfig(config.policy_name, config.budget, options)
    bound = progressive.max_request_tokens(prompt_len + output_len, vllm_config.max_in_flight_tokens)
    spec = EvictableSpec(block_size=size, num_kv_heads=1, head_size=1, dtype=torch.int8, max_request_tokens=bound)
    entering = min(prompt, spec.max_request_blocks or prompt)
    behind = 1 if progressive.decode != "off" else end - full
    found["progressive"] = Requests.in_pool(pool, entering, columns + behind, most)
    return found, progressive


def weight_bytes(model: str, model_config: Any) -> int:
    """Size of a model's weights as vLLM will hold them, bytes, of all GPUs together.

    Read off the headers of local files in the format safetensors, else counted in the model that the config describes.

    Raises:
        ValueError: if there are no such files and the config says that weights are quantized.
    """
    folder, item = Path(model), model_config.dtype.itemsize
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = json.loads(index.read_text())
        files = {folder / name for name in listed["weight_map"].values()}
        if not all(file.is_file() for file in files):
            return int(listed["metadata"]["total_size"])
    else:
        files = set(folder.glob("*.safetensors"))
    if files:
        return sum(_file_bytes(file, item) for file in files)
    if getattr(model_config.hf_config, "quantization_config", None):
        raise ValueError(f"the config of {model} says that its weights are quantized, not how large: give --weights")
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model_config.hf_config)
    return item * sum(parameter.numel() for parameter in empty.parameters())


def _file_bytes(file: Path, item: int) -> int:
    from safetensors import safe_open

    total = 0
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            tensor = tensors.get_slice(name)
            kind = tensor.get_dtype()
            # Floating-point weights are loaded in the model's dtype, quantized ones as they are.
            bits = 8 * item if kind in ("F64", "F32", "F16", "BF16") else int(re.findall(r"\d+", kind)[0])
            total += math.prod(tensor.get_shape()) * bits // 8
    return total


def beside(
    config: KVEvictionConfig,
    model: Model,
    pool: Pool,
    requests: Requests,
    args: argparse.Namespace,
    num_prompts: int,
) -> list[Cost]:
    """Memory that eviction takes beside the pool; vLLM's profile of the start does not see it.

    Args:
        config: the settings.
        model: what the KV cache is made of.
        pool: the KV pool.
        requests: those that are served with these settings.
        args: of the command.
        num_prompts: that may end in one step.
    """
    policy, item, prompt_len = config.policy, model.dtype.itemsize, args.context
    length = min(prompt_len, requests.entering * args.block_size) if config.is_progressive else prompt_len
    queries = model.evictable * policy.num_queries * model.query_heads * model.head_size * item
    scores = model.evictable * score_bytes(policy, model.kv_heads, length)
    always = bool(config.num_rescoring)
    kept = requests.at_once if always else num_prompts
    found = [
        Cost("queries of the window", kept * queries, "of all requests" if always else f"of {num_prompts} that enter"),
        Cost("scores", num_prompts * scores, f"of {num_prompts} that enter"),
    ]
    if config.is_elastic:
        # A request that is cut keeps its scores, in half precision, in place of the queries.
        worth = requests.at_once * max(scores // 2, queries)
        found[0] = Cost("what prompts are worth", worth, "of all requests, once they are cut")
    if policy.takes_notes:
        notes = model.evictable * score_bytes(policy, model.kv_heads, length, notes=True)
        found.append(Cost("notes", num_prompts * notes, f"of {num_prompts} that enter"))
    copies = 2 if policy.needs_values else 1
    keys = copies * model.kv_heads * length * model.head_size * item
    found.append(Cost("values and keys" if copies == 2 else "keys", keys, "of the layer that is scored, a copy"))
    even = -(-config.tokens(prompt_len) // args.block_size) if not config.is_elastic else requests.decoding
    by_head = policy.selection != "layer"
    tables = table_bytes(model, pool, requests.at_once, even, by_head)
    most = table_bytes(model, pool, requests.at_once, prompt_len // args.block_size, by_head)
    found.append(
        Cost("tables of evicted requests", tables, f"if budgets are even; {_text(most)} if some owner keeps all")
    )
    return found


def score_bytes(policy: Policy, kv_heads: int, length: int, notes: bool = False) -> int:
    """What a policy's scores, or its notes, of one layer take for a prompt; it is tried on two short ones.

    Args:
        policy: any.
        kv_heads: of the layer.
        length: of the prompt, tokens.
        notes: whether it is about the notes.
    """
    first, second = (_trial(policy, kv_heads, trial, notes) for trial in TRIALS)
    return first + (second - first) * (length - TRIALS[0]) // (TRIALS[1] - TRIALS[0])


def _trial(policy: Policy, kv_heads: int, length: int, notes: bool) -> int:
    width, places = 8, policy.noted(0, length) if notes else range(policy.num_queries)
    inputs = LayerInputs(
        torch.randn(kv_heads, len(places), width),
        torch.randn(kv_heads, length, width),
        width**-0.5,
        values=torch.randn(kv_heads, length, width) if policy.needs_values else None,
        output_weight=torch.randn(width, kv_heads * width) if policy.needs_output_weight else None,
        budget=length // 2,
        gate=LinearGate.random(kv_heads, width, Rotary()) if policy.needs_gate else None,
    )
    if notes:
        return policy.note(inputs, places, None).nbytes
    score: LayerScore = policy.judge(inputs)
    return sum(tensor.nbytes for tensor in (score.indicator, score.terms, *score.extra))


def table_bytes(model: Model, pool: Pool, num_requests: int, num_pages: int, by_head: bool) -> int:
    """Memory of the workers' tables when that many requests have been evicted.

    Args:
        model: what the KV cache is made of.
        pool: the KV pool.
        num_requests: that are evicted.
        num_pages: of the owner with the most.
        by_head: whether the owners are KV heads.
    """
    pages = torch.empty(model.evictable * pool.blocks, model.kv_heads, 1, device="meta")
    layers = range(model.evictable)
    base = tuple(layer * pool.blocks for layer in layers)
    grid = Grid(pages, base, 1, pool.blocks, tuple(layer % pool.groups for layer in layers))
    rows = {of: EvictedRows(grid, of) for of in (False, True)}
    counts = np.full(model.evictable * (model.kv_heads if by_head else 1), num_pages)
    held = np.zeros((len(counts), num_pages), dtype=np.int64)
    for request in range(num_requests):
        rows[by_head].store(str(request), held, counts, num_pages, [[1]] * pool.groups)
    return sum(table.num_bytes for table in rows.values())


def _notes(
    args: argparse.Namespace, config: KVEvictionConfig, chosen: KVEvictionConfig, requests: Requests, extra: int
) -> Iterator[str]:
    if chosen.is_progressive and not config.is_progressive:
        yield "The pool does not hold a whole prompt: prefill has to be progressive, an approximation of its own."
    if not requests.at_once:
        yield "Not one request fits: vLLM would refuse to start, or never admit it."
    if config.is_elastic:
        yield "The budget is elastic: requests are whole while there is room; counted are those cut to their floors."
    margin = int(args.gpu_memory * (1 - args.gpu_memory_utilization)) if args.gpu_memory else extra
    if extra > margin:
        fitting = max(math.floor((1 - extra / args.gpu_memory) * 100) / 100, 0.01)
        yield (
            f"What eviction takes beside the pool ({_text(extra)}) is more than --gpu-memory-utilization "
            f"{args.gpu_memory_utilization} leaves ({_text(margin)}): give {fitting:.2f}, or fewer --max-num-seqs."
        )


def _flags(args: argparse.Namespace, vllm_config: Any, config: KVEvictionConfig | None, at_once: int) -> list[str]:
    """Of ``vllm serve``; without a config it serves without eviction."""
    scheduler = vllm_config.scheduler_config
    flags: dict[str, Any] = {}
    if config is not None:
        flags |= {flag(POLICY_KEY): config.policy_name, flag(BUDGET_KEY): config.budget}
        if config.options:
            flags[flag(CONFIG_KEY)] = json.dumps(dict(config.options))
        if config.is_progressive:
            flags["--max-num-batched-tokens"] = scheduler.max_num_batched_tokens
    flags |= {"--max-model-len": args.context + args.output_len, "--block-size": args.block_size}
    if args.max_num_seqs or at_once > scheduler.max_num_seqs:
        flags["--max-num-seqs"] = args.max_num_seqs or at_once
    if args.gpu_memory:
        flags["--gpu-memory-utilization"] = args.gpu_memory_utilization
    else:
        flags["--kv-cache-memory-bytes"] = args.kv_cache_memory
    if args.dtype != "auto":
        flags["--dtype"] = args.dtype
    if args.kv_cache_dtype != "auto":
        flags["--kv-cache-dtype"] = args.kv_cache_dtype
    if args.tp > 1:
        flags["--tensor-parallel-size"] = args.tp
    return [part for name, value in flags.items() for part in (name, str(value))]


def as_text(plan: Plan, args: argparse.Namespace) -> str:
    """A plan as people read it."""
    model, pool, gpus = plan.model, plan.pool, f" on each of {args.tp} GPUs" if args.tp > 1 else ""
    dtype = str(model.dtype).removeprefix("torch.")
    lines = [
        f"Model     {model.layers} layers, {model.kv_heads} KV heads of {model.head_size}{gpus}, {dtype}",
        f"Weights   {_text(plan.weights)}",
        f"KV pool   {_text(pool.memory)}{gpus}: {pool.blocks:,} blocks of {args.block_size} tokens; in vLLM's words "
        f"{pool.tokens:,} tokens, {pool.concurrency:.2f} requests of {args.context + args.output_len:,}",
        "",
        f"{args.policy}, budget {args.budget}: prompts of {args.context:,} tokens and {args.output_len:,} generated",
        "",
        f"{'':22}{'blocks to enter':>16}{'while decoding':>16}{'at once':>10}",
    ]
    names = {"whole": "without eviction", "exact": "exact prefill", "progressive": "progressive prefill"}
    lines += [
        f"{names[kind]:22}{of.entering:16,}{of.decoding:16,}{of.at_once:10,}" for kind, of in plan.requests.items()
    ]
    if plan.costs:
        lines += ["", f"Beside the pool{gpus or ' on the GPU'}, at most"]
        lines += [f"{cost.what:28}{_text(cost.memory):>12}  {cost.when}" for cost in plan.costs]
    lines += [f"\n{note}" for note in plan.notes]
    lines += ["", shlex.join(["vllm", "serve", args.model, *plan.flags])]
    return "\n".join(lines)


def as_json(plan: Plan) -> str:
    """A plan as programs read it."""
    return json.dumps(dataclasses.asdict(plan), indent=2, default=str)


def _text(memory: int) -> str:
    unit = next((power for power in (3, 2, 1) if memory >= 1024**power), 0)
    return f"{memory / 1024**unit:.4g} {('bytes', 'KiB', 'MiB', 'GiB')[unit]}"
