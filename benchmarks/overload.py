"""More requests than the memory holds: stock vLLM, fixed budgets, and budgets that shrink when memory is short.

Requests arrive at random (Poisson) at multiples of the rate that the stock server can carry, which is measured first by
sending everything at once. Prompts are pieces of real text of mixed length; a third of them asks for a hidden number,
a third for the continuation of a passage that stands earlier in the text, and the last third for nothing that has an
answer. ``good/s``: requests per second whose first token and whose time per token keep the limits, multiples of what
stock takes for one request at a time. ``copy``: share of the passage's continuation before the first error.
``needle``: share of numbers found. Figures are medians over seeds, with the least and the most.

Beside stock itself stands what an operator tries first: fewer requests at once, an 8-bit cache in the same memory and,
on a GPU, KV offloading.

    python benchmarks/overload.py MODEL --out benchmarks/results/overload.json
"""

import argparse
import itertools
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "deploy"))

from common import bench_serve, check_settings, custom_dataset, gpu_name, speeches, write
from demo import samples, server

QUESTION = (
    "\n\nWhat is the special magic number for the harbour mentioned in the text? The special magic number for the "
)
QUESTION += "harbour mentioned in the text is"
GIVEN, ASKED = 12, 24
COLUMNS = ("good/s", "within limits", "TTFT p50 s", "TTFT p99 s", "TPOT p50 s", "tokens/s", "preemptions", "cuts")
COLUMNS += ("copy", "needle")
SERIES = ("vllm:num_preemptions_total", "vllm:kv_eviction_cuts_total")


def make_requests(tokenizer: Any, args: argparse.Namespace, seed: int | str) -> list[dict[str, str]]:
    """Prompts with their task and what to expect; other pieces of text for every seed."""
    dice = random.Random(seed)
    ids = list(itertools.chain.from_iterable(tokenizer(text)["input_ids"] for text in speeches()[:20]))
    requests = []
    for index in range(args.requests):
        length = dice.randint(*args.lengths)
        start = dice.randrange(len(ids) - length)
        piece, place = ids[start : start + length], dice.randrange(length // 10, length * 3 // 4)
        task = ("copy", "needle", "text")[index % 3]
        prompt, expected = tokenizer.decode(piece), ""
        if task == "copy":
            prompt += "\n\n" + tokenizer.decode(piece[place : place + GIVEN])
            expected = tokenizer.decode(piece[place + GIVEN : place + GIVEN + ASKED])
        elif task == "needle":
            expected = str(dice.randrange(10000, 99999))
            fact = f" The special magic number for the harbour is {expected}. "
            prompt = tokenizer.decode(piece[:place]) + fact + tokenizer.decode(piece[place:]) + QUESTION
        requests.append({"task": task, "prompt": prompt, "expected": expected})
    return requests


def score(request: dict[str, str], answer: str) -> float:
    """How right an answer is, from 0 to 1."""
    expected = request["expected"]
    if request["task"] == "needle":
        return float(expected in answer)
    pairs = enumerate(zip(answer, expected, strict=False))
    right = next((index for index, (a, b) in pairs if a != b), min(len(answer), len(expected)))
    return right / len(expected)


def counters(url: str) -> dict[str, float]:
    """Current values of :data:`SERIES`."""
    found = dict.fromkeys(SERIES, 0.0)
    for series, _, value in samples(url, "|".join(SERIES)):
        found[series] += value
    return found


def send(url: str, requests: list[dict[str, str]], args: argparse.Namespace, *options: str) -> dict[str, Any]:
    """What vLLM's client saw: ``ttfts``, ``tpots``, the texts, and more; in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = custom_dataset((request["prompt"] for request in requests), Path(folder), args.output_len)
        sent = ("--num-prompts", str(len(requests)), "--save-detailed", *options)
        client = bench_serve(url, args.model, dataset, *sent)
    return {**client, "ttfts": np.array(client["ttfts"]), "tpots": np.array([np.mean(itls) for itls in client["itls"]])}


def load(
    url: str, requests: list[dict[str, str]], rate: float, limits: dict[str, float], args: argparse.Namespace
) -> dict[str, Any]:
    """Sends the requests at ``rate`` per second, and returns the figures of the run."""
    before = counters(url)
    client = send(url, requests, args, "--request-rate", str(rate))
    counted = {series: value - before[series] for series, value in counters(url).items()}
    ttft, tpot = client["ttfts"], client["tpots"]
    is_good = (ttft <= limits["ttft"]) & (tpot <= limits["tpot"])
    tasks: dict[str, list[float]] = {"copy": [], "needle": []}
    for request, answer in zip(requests, client["generated_texts"], strict=True):
        if request["expected"]:
            tasks[request["task"]].append(score(request, answer))
    return {
        "good/s": float(is_good.sum()) / client["duration"],
        "within limits": float(is_good.mean()),
        "TTFT p50 s": float(np.percentile(ttft, 50)),
        "TTFT p99 s": float(np.percentile(ttft, 99)),
        "TPOT p50 s": float(np.percentile(tpot, 50)),
        "TPOT p99 s": float(np.percentile(tpot, 99)),
        "tokens/s": client["output_throughput"],
        "preemptions": counted["vllm:num_preemptions_total"],
        "cuts": counted["vllm:kv_eviction_cuts_total"],
        **{task: float(np.mean(scores)) for task, scores in tasks.items()},
        "raw": {"seconds": client["duration"], "ttft": ttft.round(3).tolist(), "tpot": tpot.round(4).tolist(), **tasks},
    }


def unloaded(url: str, requests: list[dict[str, str]], args: argparse.Namespace) -> dict[str, float]:
    """What a request takes alone: medians of the first token and of the time per token, seconds."""
    client = send(url, requests, args, "--max-concurrency", "1")
    return {"ttft": float(np.median(client["ttfts"])), "tpot": float(np.median(client["tpots"]))}


def summary(runs: list[dict[str, Any]], key: str) -> tuple[float, float, float]:
    """Median, least and most of a figure over the runs of one load."""
    values = [run[key] for run in runs]
    return float(np.median(values)), min(values), max(values)


def servers_of(args: argparse.Namespace) -> dict[str, list[str]]:
    """The servers by name: flags of each, its pool among them, in the same memory."""
    longest = args.lengths[1] + args.output_len + 200
    common = [
        "--block-size",
        "32",
        "--enforce-eager",
        "--max-model-len",
        str(longest),
        "--max-num-batched-tokens",
        "512",
        "--dtype",
        args.dtype,
    ]
    blocks = args.pool_tokens // 32
    plain, twice = (["--num-gpu-blocks-override", str(count + 1)] for count in (blocks, 2 * blocks))
    eight = [*twice, "--kv-cache-dtype", "fp8"]
    policy = ["--kv-eviction", args.policy, "--kv-eviction-budget"]
    elastic = [*policy, "auto", "--kv-eviction-config", json.dumps({"min_tokens": args.floor})]
    servers = {
        "stock": plain,
        # Admits only what it can carry to its end.
        "stock, cautious": [
            *plain,
            "--max-num-seqs",
            str(max(args.pool_tokens // (sum(args.lengths) // 2 + args.output_len), 1)),
        ],
        # The most that an 8-bit cache could give: on a CPU without AVX-512 and AMX vLLM has none.
        "stock, twice the pool": twice,
        "stock, 8 bits": eight,
        "auto": [*plain, *elastic],
        "10%": [*plain, *policy, "0.1"],
        "20%": [*plain, *policy, "0.2"],
        "auto, 8 bits": [*eight, *elastic],
    }
    if "gpu" in gpu_name():
        # vLLM's copies to the host's memory need one.
        offloading = ["--kv-offloading-size", str(args.offloading)]
        for name in ("stock", "stock, 8 bits", "auto"):
            servers[f"{name}, offloading"] = [*servers[name], *offloading]
    return {name: [*common, *flags] for name, flags in servers.items() if not args.servers or name in args.servers}


def draw(results: dict[str, Any], file: Path) -> None:
    """Goodput and accuracy over load."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"good/s": "requests per second within the limits", "copy": "copy", "needle": "needle"}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(13, 3.6), layout="constrained")
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for name, runs in results["servers"].items():
            figures = np.array([summary(of_load, key) for of_load in runs.values()])
            loads, distances = [float(load) for load in runs], np.abs(figures[:, 1:] - figures[:, :1]).T
            axis.errorbar(loads, figures[:, 0], yerr=distances, marker="o", capsize=2, label=name)
        axis.set(title=title, xlabel="load, multiples of what stock carries", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory")
    parser.add_argument("--requests", type=int, default=36, help="of each run, a multiple of three")
    parser.add_argument("--lengths", type=int, nargs=2, default=[300, 1500], help="shortest and longest text, tokens")
    parser.add_argument("--output-len", type=int, default=192)
    parser.add_argument(
        "--loads", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0], help="multiples of stock's capacity"
    )
    parser.add_argument("--pool-tokens", type=int, default=6000, help="tokens that the pool holds")
    parser.add_argument("--policy", default="layer-defensivekv")
    parser.add_argument("--floor", type=float, default=0.1, help="of the elastic budget, a share of the prompt")
    parser.add_argument("--ttft", type=float, default=10.0, help="limit of the first token, multiples of stock's alone")
    parser.add_argument(
        "--tpot", type=float, default=5.0, help="limit of the time per token, multiples of stock's alone"
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each load, each of other prompts")
    parser.add_argument("--offloading", type=float, default=16, help="where a GPU is: GiB of the host's memory")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--servers", nargs="+", help="some of them only")
    parser.add_argument("--out", type=Path, help="where to write the JSON, and a PNG beside it")
    parser.add_argument("--resume", action="store_true", help="measure what --out does not have yet, and no more")
    args = parser.parse_args()
    if args.resume and not (args.out and args.out.exists()):
        parser.error("--resume goes on with what is in --out, and nothing is")
    settings = {key: value for key, value in vars(args).items() if key not in ("servers", "loads", "out", "resume")}
    settings["model"] = Path(args.model).resolve().name
    results: dict[str, Any] = {"settings": settings, "servers": {}}
    if args.resume:
        results = json.loads(args.out.read_text())["results"]
        check_settings(args.out, results["settings"], settings)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for name, flags in servers_of(args).items():
        runs: dict[str, list[dict[str, Any]]] = results["servers"].setdefault(name, {})
        missing = [times for times in args.loads if str(times) not in runs]
        if not missing:
            continue
        with server(args.model, *flags) as url:
            send(url, make_requests(tokenizer, args, 99)[:3], args)
            if "limits" not in results:
                results["alone"] = unloaded(url, make_requests(tokenizer, args, 98)[:9], args)
                results["limits"] = {key: getattr(args, key) * alone for key, alone in results["alone"].items()}
                client = send(url, make_requests(tokenizer, args, 0), args)
                results["capacity"] = client["completed"] / client["duration"]
            for times in missing:
                # Fresh prompts for each run: none is in the prefix cache.
                seeds = [f"{times} {seed}" for seed in range(args.seeds)]
                rate = times * results["capacity"]
                runs[str(times)] = [
                    load(url, make_requests(tokenizer, args, seed), rate, results["limits"], args) for seed in seeds
                ]
                print(name, times, {key: summary(runs[str(times)], key) for key in COLUMNS}, flush=True)
                results["servers"][name] = runs = dict(sorted(runs.items(), key=lambda load: float(load[0])))
                # All of it takes two hours or more: what is known stays if it ends early.
                write(args.out, results)
    print("\n| server | load | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 2) + "|")
    for name, runs in results["servers"].items():
        for times, of_load in runs.items():
            cells = ("{:,.2f} [{:,.2f}, {:,.2f}]".format(*summary(of_load, key)) for key in COLUMNS)
            print(f"| {name} | {times} | " + " | ".join(cells) + " |")
    if args.out:
        draw(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
