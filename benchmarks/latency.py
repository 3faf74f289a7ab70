"""Time to first token and time of a decode step, with CAKE and with stock vLLM, in one run on one machine.

Both engines run in this process, one after the other, on prompts of equal length from a real text, each measured
several times after a warm-up. Prints medians and their ratio, and writes everything as JSON.

    python benchmarks/latency.py MODEL --out benchmarks/results/latency.json
"""

import argparse
import os
import statistics
import time
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

from common import speeches, write
from tqdm import tqdm
from vllm import SamplingParams

from cake_vllm import LLM


class Bench:
    """One engine and its clock."""

    def __init__(self, model: str, max_model_len: int, **kwargs):
        self.llm = LLM(
            model,
            dtype="float32",
            block_size=32,
            enforce_eager=True,
            enable_prefix_caching=False,
            max_model_len=max_model_len,
            max_num_seqs=16,
            kv_cache_memory_bytes=4 * 2**30,
            **kwargs,
        )
        self.engine = self.llm.llm_engine
        self._count = 0

    def first_token(self, prompt: list[int]) -> float:
        """Seconds from the request to its first token."""
        start = time.perf_counter()
        self._add(prompt, 1)
        self._drain()
        return time.perf_counter() - start

    def decode_steps(self, prompts: list[list[int]], steps: int) -> list[float]:
        """Seconds of each decode step of a batch."""
        for prompt in prompts:
            self._add(prompt, steps + 64)
        produced = 0
        while produced < len(prompts):
            produced = sum(bool(output.outputs[0].token_ids) for output in self.engine.step())
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            self.engine.step()
            times.append(time.perf_counter() - start)
        self.engine.abort_request([f"r{i}" for i in range(self._count)])
        self._drain()
        return times

    def close(self) -> None:
        """Ends the engine."""
        self.engine.engine_core.shutdown()

    def _add(self, prompt: list[int], max_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        self.engine.add_request(f"r{self._count}", {"prompt_token_ids": prompt}, params)
        self._count += 1

    def _drain(self) -> None:
        while self.engine.has_unfinished_requests():
            self.engine.step()


def measure(name: str, bench: Bench, text: list[int], args: argparse.Namespace) -> dict:
    """All figures of one engine, in seconds."""
    figures: dict[str, list[float]] = {}
    with tqdm(desc=name, total=len(args.lengths) * (args.repeats + 2)) as bar:
        for length in args.lengths:
            bench.first_token(text[:length])
            bar.update()
            runs = figures.setdefault(f"first token, {length} tokens", [])
            for i in range(args.repeats):
                runs.append(bench.first_token(text[i : i + length]))
                bar.update()
            prompts = [text[37 * i : 37 * i + length] for i in range(args.batch)]
            steps = bench.decode_steps(prompts, args.steps)
            figures[f"decode step, {length} tokens, batch {args.batch}"] = steps[len(steps) // 4 :]
            bar.update()
    return figures


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 4000])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=24, help="decode steps; the first quarter is not counted")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    args = parser.parse_args()

    max_model_len = max(args.lengths) + 200
    results = {}
    for name, kwargs in (("stock", {}), ("cake", {"kv_eviction": "cake", "kv_eviction_budget": args.budget})):
        bench = Bench(args.model, max_model_len, **kwargs)
        text = bench.llm.get_tokenizer()(speeches()[0])["input_ids"]
        results[name] = measure(name, bench, text, args)
        bench.close()

    print(f"\n{'median':44} {'stock':>9} {'cake':>9} {'ratio':>7}")
    for figure, stock in results["stock"].items():
        a, b = statistics.median(stock), statistics.median(results["cake"][figure])
        print(f"{figure:44} {a:8.3f}s {b:8.3f}s {b / a:7.3f}")
    write(args.out, results)


if __name__ == "__main__":
    main()
