"""Time to first token and time of a decode step against stock vLLM, side by side on one machine.

Both engines live at once, each in a process of its own, and take turns: a prompt here and then there, a few decode
steps here and then there. So what else happens on the machine hits both, and the ratios are steadier than the times.
``heads`` is the engine with eviction, asked for ``layer-defensivekv``, which gives every KV head a budget of its own.
Every figure is a median over repetitions after a warm-up.

``decode, nothing to evict``: what eviction costs those who do not need it. ``first token``: what an eviction costs the
prompt. ``decode, evicted``: long prompts cut to the budget, against stock vLLM with as long prompts, and against stock
vLLM with prompts as short as the budget, which is the limit.

With ``--runner v2`` the first figure only, and of its host code: without a GPU this runner's kernels run under Triton's
interpreter, whose time is left out.

With ``--decoding ROWS`` another figure: the longest step of a batch of requests that evict what they generate every 64
tokens, beside the median one. Their prompts are as long as each other, so that all are judged in one step, or a token
apart, so that one is in each. A batch runs for two periods, ``--repeats`` times; the longest step is the median of the
periods' longest ones. What stock vLLM's is above its median step, the machine is to blame for.

    python benchmarks/latency.py MODEL --out benchmarks/results/latency.json
    python benchmarks/latency.py MODEL --decoding 32 --out benchmarks/results/latency_decoding.json
"""

import argparse
import multiprocessing
import os
import statistics
import time
import types
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
# Threads of the engine whose turn it is not must not spin for long.
os.environ.setdefault("KMP_BLOCKTIME", "1")

import torch
from common import speeches, write
from tqdm import tqdm

#: Decode steps in a turn; the first one finds cold caches and does not count.
TURN = 6
#: Methods that judge what was generated, and how often they do; in tokens.
JUDGES, EVERY = ("snapkv", "rkv", "echo"), 64


def serve(pipe: Any, model: str, settings: dict[str, Any], kind: "type[Engine]") -> None:
    """One engine; answers ``(method, arguments)`` from the pipe until it is ``None``."""
    engine = kind(model, settings)
    pipe.send(None)
    while (call := pipe.recv()) is not None:
        method, arguments = call
        pipe.send(getattr(engine, method)(*arguments))


class Engine:
    """vLLM's offline engine and a clock."""

    def __init__(self, model: str, settings: dict[str, Any]):
        self._kernels = 0.0
        if os.environ.get("TRITON_INTERPRET") == "1":
            self._interpret_kernels()
        from cake_vllm import LLM

        defaults = {"block_size": 32, "enforce_eager": True, "enable_prefix_caching": False, "max_num_seqs": 16}
        self.llm = LLM(model, **(defaults | settings))
        self.engine = self.llm.llm_engine
        self._running: list[str] = []
        self._count = 0

    def _interpret_kernels(self) -> None:
        """Lets vLLM find an active Triton on a machine without a GPU, and clocks its interpreter."""
        import triton.backends
        from triton.runtime.interpreter import GridExecutor

        driver = types.SimpleNamespace(is_active=lambda: True)
        triton.backends.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)
        run = GridExecutor.__call__

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                self._kernels += time.perf_counter() - start

        GridExecutor.__call__ = timed

    def tokens(self, text: str) -> list[int]:
        """Ids of a text."""
        return self.llm.get_tokenizer()(text)["input_ids"]

    def first_token(self, prompt: list[int]) -> float:
        """Seconds from the request to its first token."""
        start = time.perf_counter()
        # A request for one token would not be evicted.
        self._add(prompt, 2)
        while not any(output.outputs[0].token_ids for output in self.engine.step()):
            pass
        seconds = time.perf_counter() - start
        self.stop()
        return seconds

    def start(self, prompts: list[list[int]], max_tokens: int, policy: str | None) -> None:
        """Brings a batch to its decode phase."""
        for prompt in prompts:
            self._add(prompt, max_tokens, policy)
        begun: set[str] = set()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        while len(begun) < len(prompts):
            begun |= {output.request_id for output in self.engine.step() if output.outputs[0].token_ids}

    def steps(self, count: int = TURN) -> list[float]:
        """Seconds of decode steps, of which the first one does not count."""
        times = []
        for _ in range(count):
            start, kernels = time.perf_counter(), self._kernels
            self.engine.step()
            times.append(time.perf_counter() - start - (self._kernels - kernels))
        return times[1:]

    def memory(self) -> dict[str, int]:
        """Bytes: what requests hold of the pool now, and on a GPU the most allocated since :meth:`start`."""
        found = {"held": self._held()}
        if torch.cuda.is_available():
            found["most allocated"] = torch.cuda.max_memory_allocated()
        return found

    def _held(self) -> int:
        scheduler = self.engine.engine_core.engine_core.scheduler
        pool, config = scheduler.kv_cache_manager.block_pool, scheduler.kv_cache_config
        in_use = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        return in_use * sum(
            group.kv_cache_spec.page_size_bytes * len(group.layer_names) for group in config.kv_cache_groups
        )

    def stop(self) -> None:
        """Ends the batch."""
        self.engine.abort_request(self._running)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        self._running.clear()

    def _add(self, prompt: list[int], max_tokens: int, policy: str | None = None) -> None:
        from vllm import SamplingParams

        name = f"r{self._count}"
        self._count += 1
        self._running.append(name)
        wish = {"kv_eviction": policy} if policy else None
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, extra_args=wish
        )
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params)


class Remote:
    """An :class:`Engine` in another process."""

    def __init__(self, model: str, settings: dict[str, Any], kind: type[Engine] = Engine):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, model, settings, kind))
        self._process.start()
        # Ours would keep the pipe open if the process died.
        theirs.close()
        self._pipe.recv()

    def __call__(self, method: str, *arguments: Any) -> Any:
        """Calls a method over there."""
        self._pipe.send((method, arguments))
        return self._pipe.recv()

    def close(self) -> None:
        """Ends the process."""
        self._pipe.send(None)
        self._process.join()


def first_tokens(engines: dict[str, Remote], text: list[int], length: int, repeats: int) -> dict[str, list[float]]:
    """Seconds to the first token of prompts of one length, by engine."""
    runs: dict[str, list[float]] = {name: [] for name in engines}
    for index in range(repeats + 1):
        for name, engine in engines.items():
            runs[name].append(engine("first_token", text[index : index + length]))
    return {name: seconds[1:] for name, seconds in runs.items()}


def decode_steps(
    cases: dict[str, tuple[Remote, list[list[int]]]], turns: int, policy: str | None = None
) -> dict[str, list[float]]:
    """Seconds of decode steps of batches that take turns; those that are not stock may ask for a policy."""
    runs: dict[str, list[float]] = {name: [] for name in cases}
    for name, (engine, prompts) in cases.items():
        engine("start", prompts, TURN * (turns + 1), None if name == "stock" else policy)
    for _ in range(turns):
        for name, (engine, _prompts) in cases.items():
            runs[name] += engine("steps")
    for engine, _prompts in cases.values():
        engine("stop")
    return runs


def decoding(model: str, settings: dict[str, Any], rows: int, budget: int, repeats: int) -> dict[str, Any]:
    """By batch, method and repetition, seconds of decode steps in which requests may be evicted."""
    # So far beyond the budget that prompts are evicted, and so short of a block's end that all have as many blocks.
    block = 32
    length = (budget // block + 2) * block
    num_steps = 2 * EVERY + 1
    settings = settings | {
        "max_num_seqs": rows,
        # All prompts are computed in one step, or they would not be judged together later.
        "max_num_batched_tokens": rows * (length + block),
        "max_model_len": length + block + num_steps + 2 * TURN,
        "block_size": block,
    }
    eviction = {"kv_eviction": JUDGES[-1], "kv_eviction_budget": budget}
    stock = Remote(model, settings)
    ours = Remote(model, {**settings, **eviction, "kv_eviction_config": {"decode": "window", "every": EVERY}})
    text = stock("tokens", speeches()[0])
    batches = {"all in one step": [length] * rows, "one in a step": [length + i % block for i in range(rows)]}
    results: dict[str, Any] = {batch: {name: [] for name in ("stock", *JUDGES)} for batch in batches}
    for _ in tqdm(range(repeats)):
        for batch, lengths in batches.items():
            prompts = [text[97 * i : 97 * i + length] for i, length in enumerate(lengths)]
            for name, runs in results[batch].items():
                engine, policy = (stock, None) if name == "stock" else (ours, name)
                engine("start", prompts, num_steps + TURN, policy)
                runs.append(engine("steps", num_steps))
                engine("stop")
    for engine in (stock, ours):
        engine.close()
    print(f"\n| {rows} rows, judged | method | median step | longest | ratio |\n|---|---|---|---|---|")
    for batch, of_batch in results.items():
        for name, runs in of_batch.items():
            usual = statistics.median(statistics.median(run) for run in runs)
            longest = statistics.median(max(half) for run in runs for half in (run[:EVERY], run[EVERY:]))
            print(f"| {batch} | {name} | {usual * 1e3:.1f} ms | {longest * 1e3:.1f} ms | {longest / usual:.2f} |")
    return results


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--budget", type=int, default=256, help="of the evicted batch and of the first tokens")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 4000, 8000], help="for the first token")
    parser.add_argument("--context", type=int, default=6000, help="of the evicted batch")
    parser.add_argument("--batch", type=int, default=8, help="of the evicted batch")
    parser.add_argument("--turns", type=int, default=30, help=f"of {TURN} decode steps each")
    parser.add_argument("--repeats", type=int, default=5, help="of each first token, and with --decoding of a batch")
    parser.add_argument("--dtype", default="auto", help="of the model (default: its own)")
    parser.add_argument("--runner", choices=("v1", "v2"), default="v1", help="vLLM's model runner")
    parser.add_argument("--decoding", type=int, metavar="ROWS", help="only: the longest step of a batch of so many")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    args = parser.parse_args()
    if args.runner == "v2":
        os.environ |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}

    settings = {
        "dtype": args.dtype,
        "max_model_len": max(max(args.lengths) + 16, args.context + TURN * (args.turns + 2)),
        "kv_cache_memory_bytes": 4 * 2**30,
    }
    if args.decoding:
        write(args.out, decoding(args.model, settings, args.decoding, args.budget, args.repeats))
        return
    eviction = {"kv_eviction": "cake", "kv_eviction_budget": args.budget}
    stock, cake = Remote(args.model, settings), Remote(args.model, {**settings, **eviction})
    both = {"stock": stock, "cake": cake}
    text = stock("tokens", speeches()[0])
    short = [text[97 * i : 97 * i + 100] for i in range(16)]
    long = [text[97 * i : 97 * i + args.context] for i in range(args.batch)]
    cut = [prompt[: args.budget] for prompt in long]
    lengths, compared = args.lengths, {args.context: long, args.budget: cut}
    if args.runner == "v2":
        lengths, compared = [], {}
    results: dict[str, dict[str, list[float]]] = {}
    with tqdm(total=2 + len(lengths) + len(compared)) as bar:
        for batch in (1, 16):
            cases = {name: (engine, short[:batch]) for name, engine in both.items()}
            results[f"decode, nothing to evict, batch {batch}"] = decode_steps(cases, args.turns)
            bar.update()
        for length in lengths:
            results[f"first token, {length} tokens"] = first_tokens(both, text, length, args.repeats)
            bar.update()
        for length, prompts in compared.items():
            figure = f"decode, {args.context} evicted to {args.budget}, stock at {length}, batch {args.batch}"
            results[figure] = decode_steps({"stock": (stock, prompts), "cake": (cake, long)}, args.turns)
            cases = {"stock": (stock, prompts), "heads": (cake, long)}
            results[f"heads, {figure}"] = decode_steps(cases, args.turns, "layer-defensivekv")
            bar.update()
    for engine in both.values():
        engine.close()

    print(f"\n{'median, milliseconds':60} {'stock':>9} {'evicting':>9} {'ratio':>7}")
    for figure, runs in results.items():
        a, b = (statistics.median(seconds) * 1e3 for seconds in runs.values())
        print(f"{figure:60} {a:9.1f} {b:9.1f} {b / a:7.3f}")
    write(args.out, results)


if __name__ == "__main__":
    main()
