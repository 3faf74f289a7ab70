"""All that is to be measured on one GPU, in one command; with ``--dry-run`` the same on the CPU with small numbers.

``contexts``: a decode step and the memory held after prompts of 8K to 128K tokens, evicted to 1,024, against stock
vLLM: the table of the CAKE paper (https://arxiv.org/abs/2503.12491, section 5). ``servers``: stock vLLM and the plugin
under ``vllm bench serve``, in a pool that holds a few of the requests and in one that holds all. ``references``: one
layer's attention of evicted requests against flash-attn, xformers and torch on the same kept tokens.

    python benchmarks/gpu/run.py MODEL --out benchmarks/results/gpu.json

With ``--shape``, a model of that shape with random weights and the tokenizer of MODEL. With ``--parts``, some of it.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import serve_compare
from common import write
from latency import Remote
from references import Compared
from shapes import SHAPES, save
from tqdm import tqdm

METHODS = ("cake", "layer-defensivekv")


def compare_contexts(model: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds of decode steps and bytes, by context and method; one engine after the other."""
    settings = {"max_model_len": max(args.contexts) + 512, **args.engine}
    if not args.dry_run:
        settings["cudagraph_capture_sizes"] = [1, 2, 4]
    eviction = {"kv_eviction_budget": args.budget, "kv_eviction_config": {"decode": "off"}}
    engines = {"stock": settings, **{name: settings | eviction | {"kv_eviction": name} for name in args.methods}}
    results: dict[str, dict[str, Any]] = {str(context): {} for context in args.contexts}
    for name, of_engine in engines.items():
        engine = Remote(model, of_engine)
        for context in tqdm(args.contexts, desc=name):
            prompt = [(index * index + index) % args.vocabulary for index in range(context)]
            engine("start", [prompt], 6 * (args.turns + 2), None)
            steps = [second for _ in range(args.turns) for second in engine("steps")]
            results[str(context)][name] = {"seconds": steps, **engine("memory")}
            print(name, context, f"{statistics.median(steps) * 1e3:.2f} ms", flush=True)
            engine("stop")
        engine.close()
    print("\n| context | engine | decode step, ms | held, MiB | most allocated, MiB |")
    print("|---|---|---|---|---|")
    for context, found in results.items():
        for name, figures in found.items():
            sizes = (figures.get(kind) for kind in ("held", "most allocated"))
            cells = " | ".join("-" if size is None else f"{size / 2**20:,.1f}" for size in sizes)
            print(f"| {context} | {name} | {statistics.median(figures['seconds']) * 1e3:.2f} | {cells} |")
    return results


def compare_servers(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Both servers in both pools."""
    results = {}
    for side, prompts in {"memory-bound": args.pool, "ample pool": args.requests + 1}.items():
        of_side = serve_compare.parser().parse_args([model, *args.serve, "--pool-prompts", str(prompts)])
        results[side] = serve_compare.compare(of_side)
        print(f"\n{side}:")
        serve_compare.show(results[side])
    return results


def compare_references(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Latency and difference of each reference by who competes for the budget."""
    settings = {"max_model_len": max(args.contexts) + 512, **args.engine, "enforce_eager": True}
    remote = Remote(model, settings | {"kv_eviction": METHODS[0], "kv_eviction_budget": args.budget}, Compared)
    prompts = [[(index * index + shift) % args.vocabulary for index in range(args.contexts[0])] for shift in range(4)]
    results = {name: remote("compare", prompts, name, args.repeats) for name in args.methods}
    remote.close()
    print("\n| competing | reference | ours, us | reference, us | largest difference |\n|---|---|---|---|---|")
    for name, references in results.items():
        for reference, figures in references.items():
            if isinstance(figures, str):
                print(f"| {name} | {figures} | | | |")
                continue
            ours, theirs = (statistics.median(figures[who]) * 1e6 for who in ("ours", "theirs"))
            print(f"| {name} | {reference} | {ours:.0f} | {theirs:.0f} | {figures['difference']:.1e} |")
    return results


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory, with a tokenizer")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 16_384, 32_768, 65_536, 130_000])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--requests", type=int, default=128, help="to the servers")
    parser.add_argument("--pool", type=int, default=8, help="full requests that the smaller pool holds")
    parser.add_argument("--turns", type=int, default=30, help="of decode steps")
    parser.add_argument("--repeats", type=int, default=50, help="of a reference's call")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--parts", nargs="+", default=["contexts", "references", "servers"], help="what is measured")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with small numbers")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    args = parser.parse_args()
    args.vocabulary = 509
    args.engine = {"block_size": 16, "enforce_eager": False, "dtype": "bfloat16", "max_num_batched_tokens": 8192}
    args.serve = ["--input-len", "8192", "--output-len", "256", "--block-size", "16", "--chunk", "8192", "--graphs"]
    if args.dry_run:
        args.contexts, args.budget, args.turns, args.repeats = [512, 1024], 128, 2, 2
        args.requests, args.pool = 4, 2
        args.engine = {"dtype": "float32", "kv_cache_memory_bytes": 2**27}
        args.serve = ["--input-len", "256", "--output-len", "16", "--warmups", "0", "--dtype", "float32"]
        args.serve += ["--prefill", "exact"]
    args.serve += ["--requests", str(args.requests), "--budget", "0.25"]
    if args.shape:
        args.engine["load_format"] = "dummy"
        args.serve += ["--load-format", "dummy"]

    with tempfile.TemporaryDirectory() as folder:
        model = save(args.shape, args.model, Path(folder)) if args.shape else args.model
        results = {part: PARTS[part](model, args) for part in args.parts}
    write(args.out, results)


PARTS = {"contexts": compare_contexts, "references": compare_references, "servers": compare_servers}

if __name__ == "__main__":
    main()
