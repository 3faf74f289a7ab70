"""Stock vLLM and this plugin on the same KV memory, under ``vllm bench serve``.

Starts one server after the other with a pool that holds a few full prompts, sends the same requests to each with the
same seed, all at once, and follows ``/metrics`` meanwhile. Prints one table, and with ``--out`` writes the raw numbers
and draws the course of each run beside them.

``peak running``: the most requests that the engine ran at once. ``peak tokens/s``: the best second of output, which is
one of decoding alone. ``tokens/s``: of the whole run, prompts included.

    python benchmarks/serve_compare.py MODEL --text --out benchmarks/results/serve_text.json

With ``--outputs`` what is generated is what fills the pool, and requests may end by themselves: beside stock runs a
server that goes back to ``--budget`` generated tokens every 64, one that does so when memory is short, and ``length``
and ``ended`` are the mean length of an output and the share of those that did not come to ``--output-len``.

    python benchmarks/serve_compare.py MODEL --text --outputs --requests 32 --input-len 128 --output-len 1024
        --pool-prompts 8 --policy rkv --budget 256 --chunk 512 --out benchmarks/results/serve_outputs.json
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "deploy"))

from common import bench_serve, custom_dataset, speeches, write
from demo import samples, server
from tqdm import tqdm

#: Series of ``/metrics`` that are followed, by their names in the results.
SERIES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "usage": "vllm:kv_cache_usage_perc",
    "generated": "vllm:generation_tokens_total",
    "preemptions": "vllm:num_preemptions_total",
    "freed blocks": "vllm:kv_eviction_freed_blocks_total",
    "evicted requests": "vllm:kv_eviction_requests_total",
}


def read_metrics(url: str) -> dict[str, float]:
    """Current values of :data:`SERIES`; those that the server does not have are 0."""
    found = dict.fromkeys(SERIES, 0.0)
    names = {series: name for name, series in SERIES.items()}
    for series, _, value in samples(url, "|".join(names)):
        found[names[series]] += value
    return found


class Follower(threading.Thread):
    """Reads the metrics a few times a second until :meth:`stop`."""

    def __init__(self, url: str, total: int, name: str):
        super().__init__()
        self.url = url
        self.samples: list[dict[str, float]] = []
        self._bar = tqdm(desc=name, total=total, unit="tok")
        self._done = threading.Event()

    def run(self) -> None:
        """See the base class."""
        start, first = time.monotonic(), read_metrics(self.url)
        while not self._done.wait(0.25):
            now = read_metrics(self.url)
            counted = {
                key: now[key] - first[key] for key in ("generated", "preemptions", "freed blocks", "evicted requests")
            }
            self.samples.append({"time": time.monotonic() - start, **now, **counted})
            self._bar.update(counted["generated"] - self._bar.n)

    def stop(self) -> dict[str, list[float]]:
        """Ends it and returns the samples by series; counters start at 0."""
        self._done.set()
        self.join()
        self._bar.close()
        return {key: [round(sample[key], 3) for sample in self.samples] for key in self.samples[0]}


def pieces(args: argparse.Namespace) -> Iterator[str]:
    """Prompts of prose, each from another place."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = list(itertools.chain.from_iterable(tokenizer(text)["input_ids"] for text in speeches()[:20]))
    for index in range(args.requests + args.warmups):
        piece = ids[index * args.input_len : (index + 1) * args.input_len]
        assert len(piece) == args.input_len, "the text is too short: ask for fewer requests"
        yield tokenizer.decode(piece)


def measure(name: str, flags: list[str], args: argparse.Namespace, dataset: list[str]) -> dict[str, Any]:
    """One server's figures and its course."""
    num_blocks = args.pool_prompts * -(-(args.input_len + args.output_len) // args.block_size)
    common = ["--dtype", args.dtype, "--block-size", str(args.block_size)]
    common += [] if args.graphs else ["--enforce-eager"]
    common += ["--max-model-len", str(args.input_len + args.output_len + 64), "--max-num-seqs", str(args.requests)]
    common += ["--load-format", args.load_format]
    common += ["--max-num-batched-tokens", str(args.chunk), "--num-gpu-blocks-override", str(num_blocks + 1)]
    with server(args.model, *common, *flags) as url:
        follower = Follower(url, args.requests * args.output_len, name)
        follower.start()
        try:
            sent = ("--num-prompts", str(args.requests), "--num-warmups", str(args.warmups), "--save-detailed")
            client = bench_serve(url, args.model, dataset, *sent, is_ended=args.outputs)
        finally:
            samples = follower.stop()
    lengths = client["output_lens"]
    ends = {"length": statistics.mean(lengths), "ended": statistics.mean(each < args.output_len for each in lengths)}
    return {
        "figures": {
            "completed": client["completed"],
            **(ends if args.outputs else {}),
            "requests/s": client["request_throughput"],
            "peak running": max(samples["running"]),
            "peak tokens/s": client["max_output_tokens_per_s"],
            "tokens/s": client["output_throughput"],
            "seconds": client["duration"],
            "TTFT s": client["median_ttft_ms"] / 1e3,
            "TPOT ms": client["median_tpot_ms"],
            "ITL ms": client["median_itl_ms"],
            "preemptions": samples["preemptions"][-1],
            "freed blocks": samples["freed blocks"][-1],
        },
        "client": {key: value for key, value in client.items() if isinstance(value, int | float)},
        "lengths": lengths,
        "samples": samples,
    }


def draw(results: dict[str, Any], file: Path) -> None:
    """Running requests, pool usage and generated tokens over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"running": "requests running", "usage": "share of the pool in use", "generated": "tokens generated"}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(13, 3.6), layout="constrained")
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for name, result in results.items():
            axis.plot(result["samples"]["time"], result["samples"][key], label=name)
        axis.set(title=title, xlabel="seconds", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(file, dpi=110)


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--input-len", type=int, default=2048)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--pool-prompts", type=int, default=4, help="full requests that the pool holds")
    parser.add_argument("--budget", default="0.1")
    parser.add_argument("--policy", default="cake")
    parser.add_argument(
        "--prefill", nargs="+", default=["exact", "progressive"], help="a server for each, beside stock"
    )
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=512, help="max-num-batched-tokens of the servers")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--load-format", default="auto", help="dummy: random weights")
    parser.add_argument("--graphs", action="store_true", help="without --enforce-eager")
    parser.add_argument("--warmups", type=int, default=2, help="requests before the clock starts")
    parser.add_argument("--outputs", action="store_true", help="evict what is generated, see above")
    parser.add_argument("--text", action="store_true", help="prompts of real English prose instead of random tokens")
    parser.add_argument("--out", type=Path, help="where to write the JSON, and a PNG beside it")
    return parser


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Figures and courses by server."""
    with tempfile.TemporaryDirectory() as folder:
        if args.text:
            dataset = custom_dataset(pieces(args), Path(folder), args.output_len)
        else:
            lengths = ["--random-input-len", str(args.input_len), "--random-output-len", str(args.output_len)]
            dataset = ["random", *lengths]
        return {name: measure(name, flags, args, dataset) for name, flags in servers_of(args).items()}


def servers_of(args: argparse.Namespace) -> dict[str, list[str]]:
    """Flags of each server by its name; stock comes first."""

    def evicting(budget: str, **config: Any) -> list[str]:
        flags = ["--kv-eviction", args.policy, "--kv-eviction-budget", budget]
        return [*flags, "--kv-eviction-config", json.dumps(config)]

    if args.outputs:
        always = evicting(args.budget, decode="window", every=64, protect={"prompt": True})
        servers = {"decode": always, "auto": evicting("auto")}
    else:
        servers = {prefill: evicting(args.budget, prefill=prefill) for prefill in args.prefill}
    return {"stock": [], **{f"{args.policy}, {name}": flags for name, flags in servers.items()}}


def show(results: dict[str, Any]) -> None:
    """Prints the table."""
    stock = results["stock"]["figures"]
    print("\n| |" + "".join(f" {name} |" for name in results) + "\n|---|" + "---|" * len(results))
    for what, base in stock.items():
        cells = []
        for result in results.values():
            value = result["figures"][what]
            ratio = f" ({value / base:.2f}x)" if base and result is not results["stock"] else ""
            cells.append(f" {value:,.{0 if value >= 100 or value == int(value) else 1}f}{ratio} |")
        print(f"| {what} |" + "".join(cells))


def main() -> None:
    """Runs the benchmark."""
    args = parser().parse_args()
    results = compare(args)
    show(results)
    write(args.out, results)
    if args.out:
        draw(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
