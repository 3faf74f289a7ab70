"""Memory that an evicted request holds, against the size of its budget.

What a layer or a KV head gets is rounded up to whole pages, a request's columns to whole blocks, and the block that is
being filled comes on top. One engine for each policy and block size; every request asks for a budget of its own.
``held``: slots in the request's blocks right after the eviction, as a multiple of the budget. ``partial block``: what
of it is the block that new tokens go to.

    python benchmarks/memory.py MODEL --out benchmarks/results/memory.json
"""

import argparse
import itertools
import os
import statistics
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

from common import speeches, write
from tqdm import tqdm
from vllm import SamplingParams

from cake_vllm import LLM


def held(llm: LLM, prompt: list[int], budget: int) -> tuple[int, int]:
    """Slots in full blocks and in the partial one that a prompt holds after its eviction."""
    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=8, extra_args={"kv_eviction_budget": budget})
    engine.add_request("prompt", {"prompt_token_ids": prompt}, params)
    while not any(output.outputs[0].token_ids for output in engine.step()):
        pass
    core = engine.engine_core.engine_core
    (name,) = core.scheduler.requests
    manager = core.scheduler.kv_cache_manager
    total = manager.block_pool.num_gpu_blocks - 1 - manager.block_pool.get_num_free_blocks()
    (layers,) = manager.coordinator.single_type_managers
    partial = len(layers.req_to_blocks[name]) - len(prompt) // layers.block_size
    while engine.has_unfinished_requests():
        engine.step()
    return (total - partial) * layers.block_size, partial * layers.block_size


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--policies", nargs="+", default=["cake", "layer-defensivekv"])
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--length", type=int, default=4000, help="of the prompts, tokens")
    parser.add_argument("--prompts", type=int, default=5, help="for each budget, of lengths that differ by 7")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    args = parser.parse_args()

    rows = []
    cases = list(itertools.product(args.policies, args.block_sizes))
    with tqdm(total=len(cases) * len(args.budgets) * args.prompts) as bar:
        for policy, block_size in cases:
            llm = LLM(
                args.model,
                block_size=block_size,
                enforce_eager=True,
                enable_prefix_caching=False,
                max_model_len=args.length + 100,
                kv_cache_memory_bytes=2**30,
                kv_eviction=policy,
            )
            text = llm.get_tokenizer()(speeches()[0])["input_ids"]
            for budget in args.budgets:
                shares = []
                for index in range(args.prompts):
                    prompt = text[1000 * index : 1000 * index + args.length + 7 * index]
                    full, partial = held(llm, prompt, budget)
                    shares.append(((full + partial) / budget, partial / budget))
                    bar.update()
                rows.append({"policy": policy, "block size": block_size, "budget": budget, "shares": shares})
            llm.llm_engine.engine_core.shutdown()

    print("\n| policy | block size | budget | held | of it, partial block |\n|---|---|---|---|---|")
    for row in rows:
        whole, part = (statistics.median(share[i] for share in row["shares"]) for i in (0, 1))
        print(f"| `{row['policy']}` | {row['block size']} | {row['budget']} | {whole:.3f} | {part:.3f} |")
    write(args.out, rows)


if __name__ == "__main__":
    main()
