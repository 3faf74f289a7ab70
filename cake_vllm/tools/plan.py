"""``cake-vllm plan``: how many requests a KV pool holds, with and without eviction, from a model's config alone.

The pool is divided by vLLM's own functions, and what an evicted request holds is counted with the scheduler's:

                 entering                          decoding
    whole        its prompt                        its prompt and what it generates
    exact        its prompt                        private columns, and its blocks behind the prompt's full ones
    progressive  private columns and some chunks   private columns, and the block that is being filled

Blocks are vLLM's; where it has several groups of layers (windows or states beside full attention), one of each.
"""

import argparse
import dataclasses
import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cake_vllm.config import BUDGET_KEY, CONFIG_KEY, POLICY_KEY, KVEvictionConfig, flag
from cake_vllm.tools.capacity import Model, Pool, Requests, States, configure, count, describe, divide, page_size
from cake_vllm.tools.costs import Cost, beside, weight_bytes
from cake_vllm.tools.options import UTILIZATION, add_eviction, amount, positive, readable, share, size


@dataclass(frozen=True)
class Plan:
    """What ``cake-vllm plan`` prints.

    Attributes:
        states: of a hybrid model.
        requests: by kind; kinds that the settings rule out are missing.
        max_model_len: tokens of the longest request.
        flags: of ``vllm serve``.
        notes: what else to know, a sentence each.
    """

    model: Model
    max_model_len: int
    weights: int
    pool: Pool
    states: States | None
    requests: dict[str, Requests]
    costs: list[Cost]
    flags: list[str]
    notes: list[str]


def add_command(commands: Any) -> None:
    """Adds the subcommand to what ``ArgumentParser.add_subparsers`` returned."""
    parser = commands.add_parser(
        "plan",
        allow_abbrev=False,
        help="how many requests a KV pool holds with and without eviction, what it costs, and the flags to use",
        description="How many requests a KV pool holds with and without eviction, what eviction takes in memory "
        "beside it, and the flags to use: from the model's config alone, without a GPU. Sizes are numbers of GiB, or "
        "have a unit, such as 512MiB.",
    )
    parser.add_argument("model", metavar="MODEL", help="a directory, or a name that vLLM can look up")
    memory = parser.add_mutually_exclusive_group(required=True)
    memory.add_argument("--gpu-memory", type=size, metavar="SIZE", help="of each GPU")
    memory.add_argument(
        "--kv-cache-memory-bytes",
        type=amount,
        metavar="N",
        help="of the KV pool on each GPU, such as 20G, in place of the GPU's",
    )
    parser.add_argument("--context", type=positive, required=True, metavar="N", help="tokens of a prompt")
    parser.add_argument(
        "--output-len", type=positive, default=256, metavar="N", help="tokens that it generates (default: %(default)s)"
    )
    parser.add_argument(
        "--max-model-len",
        type=positive,
        metavar="N",
        help="tokens of the longest request (default: these two together)",
    )
    add_eviction(parser, "N|F|auto", "tokens per layer, a fraction of the prompt, or auto")
    parser.add_argument("--block-size", type=positive, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--kv-cache-dtype", default="auto", help="as of vllm serve (default: %(default)s)")
    parser.add_argument(
        "--tensor-parallel-size",
        "-tp",
        type=positive,
        default=1,
        metavar="N",
        help="tensor-parallel GPUs (default: 1)",
    )
    parser.add_argument(
        "--pipeline-parallel-size",
        "-pp",
        type=positive,
        default=1,
        metavar="N",
        help="pipeline stages, of so many GPUs each (default: 1)",
    )
    parser.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        help="as of vllm serve: what a request holds of states depends on it (default: vLLM's)",
    )
    parser.add_argument(
        "--gpu-memory-utilization", type=share, default=UTILIZATION, metavar="F", help="default: %(default)s, as vLLM's"
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


def run(args: argparse.Namespace) -> None:
    """Prints the plan for parsed arguments."""
    plan = make(args)
    print(as_json(plan) if args.json else as_text(plan, args))


def make(args: argparse.Namespace) -> Plan:
    """The plan for parsed arguments.

    Raises:
        ValueError: one sentence, if vLLM or eviction cannot serve what they ask for.
    """
    settings = {key: getattr(args, key) for key in (POLICY_KEY, BUDGET_KEY, CONFIG_KEY)}
    config = KVEvictionConfig.from_settings(settings)
    assert config is not None
    vllm_config, specs = configure(args, config)
    model, longest = describe(vllm_config, specs), vllm_config.model_config.max_model_len
    weights = args.weights or weight_bytes(args.model, vllm_config.model_config)
    on_each = weights // _gpus(args)
    if args.kv_cache_memory_bytes:
        memory = args.kv_cache_memory_bytes
    else:
        memory = int(args.gpu_memory * args.gpu_memory_utilization) - on_each - args.overhead
        if memory <= 0:
            raise ValueError(
                f"nothing is left for a KV pool: {readable(on_each)} of weights and "
                f"{readable(args.overhead)} of overhead on each GPU of {readable(args.gpu_memory)}: "
                "give a larger --gpu-memory, --tensor-parallel-size or --pipeline-parallel-size"
            )
    pool, states = divide(vllm_config, specs, memory)
    requests, progressive = count(vllm_config, pool, config, args.context, args.output_len, args.max_num_seqs)
    if "exact" not in requests:
        notes = ["Eviction would free nothing of such a prompt: it is no longer than the budget, or hardly."]
        return Plan(
            model,
            longest,
            weights,
            pool,
            states,
            requests,
            [],
            _flags(args, vllm_config, None, requests["whole"].at_once),
            notes,
        )
    fits = requests["exact"].at_once or progressive is None
    chosen, kind = (config, "exact") if fits and not config.is_progressive else (progressive or config, "progressive")
    num_prompts = 1 + vllm_config.scheduler_config.max_num_batched_tokens // args.context
    costs = beside(chosen, model, pool, requests[kind], args, num_prompts)
    notes = list(_notes(args, config, chosen, requests[kind], sum(cost.memory for cost in costs)))
    if states is not None and page_size(pool.block_size) == 32:
        notes.append(
            "Blocks and states are sized as on CPUs, where this ran: on GPUs pages have 16 tokens, and states may have "
            "another dtype."
        )
    flags = _flags(args, vllm_config, chosen, requests[kind].at_once)
    return Plan(model, longest, weights, pool, states, requests, costs, flags, notes)


def _gpus(args: argparse.Namespace) -> int:
    return args.tensor_parallel_size * args.pipeline_parallel_size


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
            f"What eviction takes beside the pool ({readable(extra)}) is more than --gpu-memory-utilization "
            f"{args.gpu_memory_utilization} leaves ({readable(margin)}): give {fitting:.2f}, or fewer --max-num-seqs."
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
    flags |= {"--max-model-len": vllm_config.model_config.max_model_len, "--block-size": args.block_size}
    if args.max_num_seqs or at_once > scheduler.max_num_seqs:
        flags["--max-num-seqs"] = args.max_num_seqs or at_once
    if args.gpu_memory:
        flags["--gpu-memory-utilization"] = args.gpu_memory_utilization
    else:
        flags["--kv-cache-memory-bytes"] = args.kv_cache_memory_bytes
    if args.dtype != "auto":
        flags["--dtype"] = args.dtype
    if args.kv_cache_dtype != "auto":
        flags["--kv-cache-dtype"] = args.kv_cache_dtype
    if args.tensor_parallel_size > 1:
        flags["--tensor-parallel-size"] = args.tensor_parallel_size
    if args.pipeline_parallel_size > 1:
        flags["--pipeline-parallel-size"] = args.pipeline_parallel_size
    found = [part for name, value in flags.items() for part in (name, str(value))]
    if args.enable_prefix_caching is not None:
        found.append("--enable-prefix-caching" if args.enable_prefix_caching else "--no-enable-prefix-caching")
    return found


def as_text(plan: Plan, args: argparse.Namespace) -> str:
    """A plan as people read it."""
    model, pool, gpus = plan.model, plan.pool, f" on each of {_gpus(args)} GPUs" if _gpus(args) > 1 else ""
    dtype = str(model.dtype).removeprefix("torch.")
    lines = [
        f"Model     {model.layers} layers, {model.kv_heads} KV heads of {model.head_size}{gpus}, {dtype}; "
        f"{readable(model.token)} a token in the {model.evictable} that are evicted",
        f"Weights   {readable(plan.weights)}",
        f"KV pool   {readable(pool.memory)}{gpus}: {pool.blocks:,} blocks of {pool.block_size} tokens; in vLLM's words "
        f"{pool.tokens:,} tokens, {pool.concurrency:.2f} requests of {plan.max_model_len:,}",
    ]
    if states := plan.states:
        without, cached = (
            f"{states.blocks[mode]} ({readable(states.blocks[mode] * states.block)})" for mode in ("none", "align")
        )
        lines.append(
            f"States    {readable(states.memory)} of a request in {states.layers} layers: blocks of the pool for them "
            f"without the prefix cache {without}, with it {cached}"
        )
    lines += [
        "",
        f"{args.kv_eviction}, budget {args.kv_eviction_budget}: "
        f"prompts of {args.context:,} tokens and {args.output_len:,} generated",
        "",
        f"{'':22}{'blocks to enter':>16}{'while decoding':>16}{'at once':>10}",
    ]
    names = {"whole": "without eviction", "exact": "exact prefill", "progressive": "progressive prefill"}
    lines += [
        f"{names[kind]:22}{of.entering:16,}{of.decoding:16,}{of.at_once:10,}" for kind, of in plan.requests.items()
    ]
    if plan.costs:
        lines += ["", f"Beside the pool{gpus or ' on the GPU'}, at most"]
        lines += [f"{cost.what:28}{readable(cost.memory):>12}  {cost.when}" for cost in plan.costs]
    lines += [f"\n{note}" for note in plan.notes]
    lines += ["", shlex.join(["vllm", "serve", args.model, *plan.flags])]
    return "\n".join(lines)


def as_json(plan: Plan) -> str:
    """A plan as programs read it."""
    return json.dumps(dataclasses.asdict(plan), indent=2, default=str)
