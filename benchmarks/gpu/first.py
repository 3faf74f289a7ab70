"""A quarter of an hour of a GPU: one command, in the order in which it tells most, a JSON line as each piece ends.

``a``: every way of evicting, on tiny random weights, against replays, other runs and torch on the same kept tokens:
``tests/gpu``, one attention backend after the other. ``b``: full CUDA graphs against eager execution, from the same
tests. ``c``: a decode step of a batch, stock vLLM at full and at kept length beside eviction by layer and by head.
``d``: requests that all come at once, long ones in a pool of four and short ones in the same, ample for them; stock,
stock with a KV cache of 8 bits, eviction by layer and by head. ``e``: what an eviction costs beside its prefill.

Every engine runs in a process of its own, with a limit of its own: it is forked from one that has imported vLLM and not
touched the GPU (spawned if an import has), so it starts at once, and what one breaks is whole for the next. Weights are
random, of an 8B shape. Where a command may not run as long as all of it takes, ``--parts`` splits it.

    python benchmarks/gpu/first.py --out first.jsonl
    python benchmarks/gpu/first.py --dry-run             # on a CPU, with tiny numbers
"""

import argparse
import gc
import importlib.metadata
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
# There may be no network, which nobody has to wait for.
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tests"))

from common import cpu_name, gpu_name
from latency import TURN, Engine
from random_models import save_random_model
from shapes import SHAPES, save

from cake_vllm.policies import policy_class, policy_names

ROOT = Path(__file__).resolve().parent.parent.parent
#: Called with what is known now.
Emit = Callable[[dict[str, Any]], None]
BACKENDS = ("TRITON_ATTN", "FLASH_ATTN", "FLASHINFER")
#: Eviction by layer and by head.
METHODS = ("cake", "layer-defensivekv")
EIGHT_BITS = "stock, fp8"


@dataclass(frozen=True)
class Piece:
    """What one process does.

    Attributes:
        part: its letter.
        name: what is looked at.
        limit: seconds.
        run: called with :data:`Emit`, the arguments of the command line and the name.
    """

    part: str
    name: str
    limit: float
    run: Callable[[Emit, argparse.Namespace, str], None]


def pieces(args: argparse.Namespace) -> list[Piece]:
    """All that is to be done, in its order; in a dry run what vLLM has on this CPU."""
    methods = ("stock", *METHODS, EIGHT_BITS)
    if args.dry_run:
        from stored import cpu_has_eight_bits

        methods = methods if cpu_has_eight_bits() else ("stock", *METHODS)
    return [
        Piece("a", "kernels", 60, run_kernels),
        *(Piece("a", backend, 90, run_tests) for backend in args.backends),
        *(Piece("b", backend, 90, run_graphs) for backend in args.backends),
        *(Piece("c", method, 110, time_decode) for method in ("stock", *METHODS)),
        *(Piece("d", method, 100, time_load) for method in methods),
        Piece("e", "evictions", 150, time_evictions),
    ]


class Outcomes:
    """Passes on how each test ends."""

    def __init__(self, emit: Emit):
        self._emit = emit

    def pytest_runtest_logreport(self, report: Any) -> None:
        """See pytest."""
        if report.when == "call" or not report.passed:
            found = {"test": report.nodeid.rpartition("::")[2], "outcome": report.outcome, "took": report.duration}
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext[-2000:]
            self._emit(found | ({"says": text} if text else {}))


def run_kernels(emit: Emit, args: argparse.Namespace, _: str) -> None:
    """The tests of moving pages and of tables."""
    _run_tests(emit, args, "test_gpu_kernels")


def run_tests(emit: Emit, args: argparse.Namespace, backend: str) -> None:
    """The tests of one backend but for those of graphs."""
    few = ""
    if args.dry_run:
        # One of each kind, of one backend.
        few = " and not async and (layer or eagle)" if backend == "FLASH_ATTN" else " and replayed and layer and exact"
    _run_tests(emit, args, f"{backend} and not graphs{few}")


def run_graphs(emit: Emit, args: argparse.Namespace, backend: str) -> None:
    """Those of graphs."""
    _run_tests(emit, args, f"{backend} and graphs{' and not async and both' if args.dry_run else ''}")


def _run_tests(emit: Emit, args: argparse.Namespace, selection: str) -> None:
    import pytest

    command = ["-c", str(ROOT / "pyproject.toml"), str(ROOT / "tests" / "gpu"), "--all", "-q"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "--runner", args.runner, "-k", selection]
    with tempfile.TemporaryDirectory() as folder:
        # Wide enough for the heads of all backends.
        save_random_model(Path(folder), "llama", "LlamaForCausalLM", num_hidden_layers=4, head_dim=64)
        pytest.main([*command, "--model", folder, *(["--dry-run"] if args.dry_run else [])], [Outcomes(emit)])


def settings(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """Of an engine of parts c to e."""
    of_engine = {"skip_tokenizer_init": True, **args.engine}
    if method == EIGHT_BITS:
        return of_engine | {"kv_cache_dtype": "fp8"}
    if method == "stock":
        return of_engine
    return of_engine | {"kv_eviction": method, "kv_eviction_budget": args.budget}


def prompt(args: argparse.Namespace, length: int, seed: int = 0) -> list[int]:
    """Tokens that do not repeat another prompt's."""
    return [(index * index + 7919 * seed + index) % args.vocabulary for index in range(length)]


def num_tokens(engine: Engine) -> int:
    """What the KV cache holds."""
    config = engine.engine.vllm_config.cache_config
    return config.num_gpu_blocks * config.block_size


def time_decode(emit: Emit, args: argparse.Namespace, method: str) -> None:
    """Decode steps by batch and context, stock's also at the length that the others keep.

    Evicted requests have private pages, so they may come from one prompt, which is computed once; stock's may not.
    """
    evicts, longest = method != "stock", max(args.contexts)
    spare = TURN * (args.turns + 2) + max(args.rows) * longest // args.engine["max_num_batched_tokens"] + 8
    of_engine = settings(args, method) | {"max_num_seqs": max(args.rows), "max_model_len": longest + spare + 32}
    of_engine |= {"enable_prefix_caching": evicts}
    if not args.dry_run:
        of_engine["cudagraph_capture_sizes"] = args.rows
    if evicts:
        of_engine["kv_eviction_config"] = {"decode": "off"}
    engine = Engine(args.model, of_engine)
    for context in sorted({*args.contexts, *(() if evicts else [args.budget])}):
        for rows in args.rows:
            case = {"context": context, "rows": rows}
            if not evicts and rows * (context + spare) > num_tokens(engine):
                emit(case | {"skipped": f"a pool of {num_tokens(engine)} tokens"})
                continue
            start = time.perf_counter()
            prompts = [prompt(args, context, 0 if evicts else row) for row in range(rows)]
            engine.start(prompts, spare, None)
            prefill = time.perf_counter() - start
            steps = [second for _ in range(args.turns) for second in engine.steps()]
            prefilled = {} if evicts else {"prefill": prefill}
            emit(case | {"ms": statistics.median(steps) * 1e3, **prefilled, **engine.memory(), "steps": steps})
            engine.stop()


def time_load(emit: Emit, args: argparse.Namespace, method: str) -> None:
    """Requests that come at once."""
    longest = max(length for length, _ in args.load)
    pool = args.pool * (longest + args.output) * args.token_bytes
    of_engine = settings(args, method) | {"max_model_len": longest + args.output + 16, "kv_cache_memory_bytes": pool}
    of_engine |= {"max_num_seqs": max(requests for _, requests in args.load)}
    if "kv_eviction" in of_engine:
        of_engine["kv_eviction_budget"] = 0.25
    engine = Engine(args.model, of_engine)
    for length, requests in args.load:
        # Kernels are compiled, and nothing is in the way, when the clock starts.
        serve(engine, [prompt(args, length, requests)], 8)
        prompts = [prompt(args, length, index) for index in range(requests)]
        found = serve(engine, prompts, args.output)
        emit({"input": length, "requests": requests, "pool": num_tokens(engine), **found})


def serve(engine: Engine, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
    """Figures of requests that are all there at the start: seconds, but for requests in a second."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    start, first, last = time.perf_counter(), {}, {}
    for index, tokens in enumerate(prompts):
        engine.engine.add_request(f"s{index}", {"prompt_token_ids": tokens}, params)
    scheduler, most = engine.engine.engine_core.engine_core.scheduler, 0
    while engine.engine.has_unfinished_requests():
        outputs, now = engine.engine.step(), time.perf_counter() - start
        most = max(most, scheduler.get_request_counts()[0])
        for output in outputs:
            first.setdefault(output.request_id, now)
            last[output.request_id] = now
    waits = sorted(first.values())
    per_token = [(last[name] - first[name]) / (num_tokens - 1) for name in first]
    return {
        "requests/s": len(prompts) / max(last.values()),
        "first token": {"median": statistics.median(waits), "most": waits[-1]},
        "per token": {"median": statistics.median(per_token), "most": max(per_token)},
        "running": most,
    }


def time_evictions(emit: Emit, args: argparse.Namespace, _: str) -> None:
    """Two tokens of a prompt that the prefix cache holds, with and without eviction; and of one that is computed."""
    from vllm import SamplingParams

    of_engine = settings(args, args.policies[0]) | {"max_model_len": max(args.evicted) + 64}
    engine = Engine(args.model, of_engine | {"enable_prefix_caching": True, "max_num_seqs": 4})

    def seconds(tokens: list[int], policy: str) -> float:
        wish = {"kv_eviction": policy}
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False, extra_args=wish)
        start = time.perf_counter()
        engine.llm.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)
        return time.perf_counter() - start

    for length in args.evicted:
        tokens = prompt(args, length)
        # Kernels are compiled.
        seconds(prompt(args, length // 2, 1), "none")
        computed = seconds(tokens, "none")
        cached = [seconds(tokens, "none") for _ in range(args.repeats)]
        emit({"length": length, "policy": "none", "computed": computed, "cached": cached})
        for policy in args.policies:
            runs = [seconds(tokens, policy) for _ in range(args.repeats + 1)]
            costs = statistics.median(runs[1:]) - statistics.median(cached)
            emit({"length": length, "policy": policy, "costs": costs, "of prefill": costs / computed, "runs": runs})


class Lines:
    """Where the lines go: to the screen, and to a file that grows."""

    def __init__(self, out: Path | None):
        self._out = out
        self._start = time.monotonic()
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.unlink(missing_ok=True)

    def __call__(self, line: dict[str, Any]) -> None:
        """Writes one, with the seconds since the start."""
        text = json.dumps({"at": time.monotonic() - self._start, **line}, default=str, ensure_ascii=False)
        # Half a microsecond says nothing.
        text = json.dumps(
            json.loads(text, parse_float=lambda digits: float(f"{float(digits):.5g}")), ensure_ascii=False
        )
        print(text, flush=True)
        if self._out:
            with self._out.open("a") as file:
                file.write(text + "\n")


def run(piece: Piece, args: argparse.Namespace, lines: Lines) -> None:
    """Does it in a process of its own, which ends at the piece's limit; the last line says how it ended."""
    process, start = (
        multiprocessing.get_context(args.method).Process(target=child, args=(piece, args, lines)),
        time.monotonic(),
    )
    process.start()
    process.join(min(piece.limit * args.patience, args.until - start))
    ended = f"limit of {time.monotonic() - start:.0f} s" if process.is_alive() else process.exitcode
    if process.is_alive():
        os.killpg(process.pid, 9)
    process.join()
    lines({"part": piece.part, "name": piece.name, "ended": ended, "took": time.monotonic() - start})


def child(piece: Piece, args: argparse.Namespace, lines: Lines) -> None:
    """The process of a piece."""
    # Whatever it starts ends with it.
    os.setsid()
    of_piece = {"part": piece.part, "name": piece.name}
    try:
        piece.run(lambda line: lines(of_piece | line), args, piece.name)
    except BaseException as error:
        lines(of_piece | {"error": f"{type(error).__name__}: {str(error)[:2000]}"})
        raise SystemExit(1) from error


def describe(args: argparse.Namespace, lines: Lines) -> None:
    """A line on the machine; in a process of its own, as it touches the GPU."""
    versions = {}
    for name in ("vllm", "torch", "triton", "flashinfer-python", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    machine = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), **gpu_name()}
    lines({"command": " ".join(sys.argv[1:]), "method": args.method, **machine, "versions": versions})


def without_gates() -> list[str]:
    """Policies that need nothing which is made of real weights."""
    return [name for name in policy_names() if not policy_class(name).needs_gate]


def parse() -> argparse.Namespace:
    """The command line, and what follows from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list("abcde"), choices=list("abcde"))
    parser.add_argument("--names", nargs="+", help="pieces of those parts: a backend, a method")
    parser.add_argument("--minutes", type=float, default=14, help="for all of it")
    parser.add_argument("--out", type=Path, help="where to write the lines")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS, help="of parts a and b")
    parser.add_argument("--runner", choices=("v1", "v2"), default="v2", help="vLLM's model runner, of parts a and b")
    parser.add_argument("--engine", type=json.loads, default={}, help="arguments of vLLM in parts c to e, as JSON")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny numbers")
    args = parser.parse_args()
    # Dry runs are for whoever has time.
    args.patience = 20 if args.dry_run else 1
    args.until = time.monotonic() + 60 * args.minutes * args.patience
    args.budget, args.contexts, args.rows, args.turns = 1024, [8192, 32_768, 130_000], [1, 8, 32], 8
    args.load, args.output, args.pool = [(32_768, 12), (1024, 64)], 256, 4
    args.evicted, args.repeats, args.policies = [32_768, 128_000], 3, without_gates()
    defaults = {"dtype": "bfloat16", "block_size": 16, "max_num_batched_tokens": 8192, "enforce_eager": False}
    defaults |= {"load_format": "dummy"}
    shape, args.vocabulary = SHAPES[args.shape], 32_003
    layers, heads, width = (shape[key] for key in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
    args.token_bytes = 2 * 2 * layers * heads * width
    if args.dry_run:
        args.budget, args.contexts, args.rows, args.turns = 64, [256, 512], [1, 2], 1
        args.load, args.output, args.vocabulary = [(256, 6), (64, 4)], 16, 251
        args.evicted, args.repeats, args.policies = [256], 1, list(METHODS)
        args.backends, args.runner = ["FLASH_ATTN", "FLASHINFER"], "v1"
        defaults = {"dtype": "float32", "max_num_batched_tokens": 256, "kv_cache_memory_bytes": 2**26}
        args.token_bytes = 4 * 2 * 4 * 2 * 32
    args.engine = defaults | args.engine
    return args


def main() -> None:
    """Runs what there is time for."""
    args = parse()
    import vllm.entrypoints.llm
    import vllm.v1.engine.core
    import vllm.v1.worker.gpu_worker  # noqa: F401

    lines = Lines(args.out)
    for args.method in ("fork", "spawn"):
        describing = multiprocessing.get_context(args.method).Process(target=describe, args=(args, lines))
        describing.start()
        describing.join()
        # A process cannot use CUDA if an import has initialised it before the fork: then each imports for itself.
        if describing.exitcode == 0:
            break
    # Nothing of it is looked at in every process again.
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        if args.dry_run:
            args.model = save_random_model(Path(folder) / "tiny", "llama", "LlamaForCausalLM", num_hidden_layers=4)
        else:
            args.model = save(args.shape, Path(folder))
        for piece in pieces(args):
            if piece.part not in args.parts or (args.names and piece.name not in args.names):
                continue
            if time.monotonic() > args.until - 10:
                lines({"part": piece.part, "name": piece.name, "ended": "no time left"})
                continue
            run(piece, args, lines)


if __name__ == "__main__":
    main()
