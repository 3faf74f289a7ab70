"""What a decode step costs where rows were evicted: launches, memory and host work, beside stock vLLM's.

Counted on the CPU, for FLASH_ATTN's own code over a reference of its kernel in torch: every operation that a device
would run is a launch, the attention kernel is one. ``per layer``: in a layer's forward, stock's own taken off.
``per step``: in the plugin's part before the first layer and behind the last one. ``KiB``: what both allocate, which
depends on what is kept and not on the context. ``waits``: for an answer of the device. ``host``: microseconds of
Python around the kernels, medians.

Half of the rows of a batch are evicted, or all, or none, by a method that gives every layer or every head as much, so
that steps can be compared byte for byte; ``both``: half by layer and half by head.

    python benchmarks/step_cost.py --out benchmarks/results/step_cost.json
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from common import write
from counting import Operations, Waits, kernel
from elsewhere import ReferenceFlashBackend, flash_in_torch, in_place_of_cpu_attn
from random_models import numbers, save_random_model
from tqdm import tqdm
from vllm import SamplingParams

from cake_vllm import LLM

BLOCK_SIZE = 32
#: What a request asks for, by its owners.
WISHES = {
    "none": {"kv_eviction": "none"},
    "layer": {"kv_eviction": "snapkv"},
    "head": {"kv_eviction": "adakv", "kv_eviction_config": '{"alpha": 1.0}'},
}


class Clock:
    """Time spent in kernels, which is not the host's on a device."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self, function: Any) -> Any:
        """The kernel, counted and timed."""
        counted = kernel(function)

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return counted(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return run


class Bench:
    """An engine whose layers, and the plugin's part beside them, are looked at.

    Args:
        model: its directory.
        evicts: whether it is one with eviction.
        budget: tokens per layer.
        num_rows: of a batch.
        longest: tokens of a request, whole blocks.
        clock: what the kernels count in.
    """

    def __init__(self, model: str, evicts: bool, budget: int, num_rows: int, longest: int, clock: Clock):
        settings = {"kv_eviction": "snapkv", "kv_eviction_budget": budget} if evicts else {}
        self.clock = clock
        self.llm = LLM(
            model,
            dtype="float32",
            block_size=BLOCK_SIZE,
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_num_seqs=num_rows,
            max_model_len=longest,
            max_num_batched_tokens=2048,
            kv_cache_memory_bytes=2**28,
            enable_prefix_caching=False,
            **settings,
        )
        self.engine = self.llm.llm_engine
        self.evicts = evicts
        self._parts: dict[str, list[tuple[Any, str]]] = {"layers": [], "step": []}
        context = self.engine.vllm_config.compilation_config.static_forward_context
        self._parts["layers"] = [(layer.impl, "forward") for layer in context.values()]
        if evicts:
            from vllm.distributed.kv_transfer import get_kv_transfer_group

            worker = get_kv_transfer_group().worker
            self._parts["step"] = [(worker, "begin"), (worker, "finish")]

    def close(self) -> None:
        """Ends the engine."""
        self.engine.engine_core.shutdown()

    def steps(self, wishes: list[str], context: int, num_steps: int) -> dict[str, dict[str, list[float]]]:
        """Figures of decode steps by part and kind, of a batch whose prompts have ``context`` tokens.

        Half of the steps are counted, the others timed: counting takes time.
        """
        for index, wish in enumerate(wishes):
            params = SamplingParams(
                temperature=0,
                max_tokens=num_steps + 3,
                ignore_eos=True,
                detokenize=False,
                extra_args=WISHES[wish] if self.evicts else None,
            )
            self.engine.add_request(f"r{index}", {"prompt_token_ids": numbers(index, context)}, params)
        begun: set[str] = set()
        while len(begun) < len(wishes):
            begun |= {output.request_id for output in self.engine.step() if output.outputs[0].token_ids}
        # The first step after an eviction drops what the prompt held.
        self.engine.step()
        figures: dict[str, dict[str, list[float]]] = {
            part: {kind: [] for kind in ("launches", "bytes", "waits", "seconds")} for part in self._parts
        }
        for step in range(num_steps):
            with self._watched(step % 2 == 0, figures):
                self.engine.step()
        self.engine.abort_request([f"r{index}" for index in range(len(wishes))])
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return figures

    @contextmanager
    def _watched(self, counts: bool, figures: dict[str, dict[str, list[float]]]) -> Iterator[None]:
        """Adds up what one step does in each part."""
        totals = {part: dict.fromkeys(("launches", "bytes", "waits", "seconds"), 0.0) for part in self._parts}

        def watch(part: str, method: Any) -> Any:
            def watching(*args: Any, **kwargs: Any) -> Any:
                found = totals[part]
                with (
                    Waits() if counts else nullcontext() as waits,
                    Operations() if counts else nullcontext() as operations,
                ):
                    start, in_kernels = time.perf_counter(), self.clock.seconds
                    result = method(*args, **kwargs)
                    found["seconds"] += time.perf_counter() - start - (self.clock.seconds - in_kernels)
                if counts:
                    found["launches"] += operations.launches.total()
                    found["bytes"] += operations.num_bytes
                    found["waits"] += waits.seen.total()
                return result

            return watching

        for part, methods in self._parts.items():
            for owner, name in methods:
                setattr(owner, name, watch(part, getattr(owner, name)))
        try:
            yield
        finally:
            for methods in self._parts.values():
                for owner, name in methods:
                    delattr(owner, name)
        for part, found in totals.items():
            for kind, value in found.items():
                if (kind == "seconds") != counts:
                    figures[part][kind].append(value)


def batches(num_rows: int) -> dict[tuple[str, str], list[str]]:
    """What the requests of a batch ask for, by owners and by the rows that are evicted."""
    return {
        ("any", "none"): ["none"] * num_rows,
        **{(owner, "half"): ["none", owner] * (num_rows // 2) for owner in ("layer", "head")},
        **{(owner, "all"): [owner] * num_rows for owner in ("layer", "head")},
        ("both", "half"): ["none", "layer", "none", "head"] * (num_rows // 4),
        ("both", "all"): ["layer", "head"] * (num_rows // 2),
    }


def measure(
    num_layers: int, num_rows: int, contexts: list[int], budget: int, num_steps: int
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Figures by ``owners, rows, context``, and of ``stock`` by context."""
    results = {}
    clock, longest = Clock(), (max(contexts) // BLOCK_SIZE + 4) * BLOCK_SIZE
    with (
        tempfile.TemporaryDirectory() as model,
        flash_in_torch(clock),
        in_place_of_cpu_attn(ReferenceFlashBackend),
    ):
        save_random_model(Path(model), "llama", "LlamaForCausalLM", num_hidden_layers=num_layers, head_dim=16)
        stock = Bench(model, False, budget, num_rows, longest, clock)
        for context in contexts:
            results[f"stock, none, {context}"] = stock.steps(["none"] * num_rows, context, num_steps)
        stock.close()
        evicting = Bench(model, True, budget, num_rows, longest, clock)
        for ((owners, rows), wishes), context in tqdm(list(itertools.product(batches(num_rows).items(), contexts))):
            results[f"{owners}, {rows}, {context}"] = evicting.steps(wishes, context, num_steps)
        evicting.close()
    return results


def medians(figures: dict[str, list[float]]) -> dict[str, float]:
    """By kind."""
    return {kind: statistics.median(values) for kind, values in figures.items()}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[32, 80])
    parser.add_argument("--rows", type=int, default=8, help="of a batch, a multiple of 4")
    parser.add_argument("--contexts", type=int, nargs="+", default=[514, 1026], help="in tokens")
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="fewer than fill a block")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    args = parser.parse_args()
    results = {
        str(layers): measure(layers, args.rows, args.contexts, args.budget, args.steps) for layers in args.layers
    }
    print("\n| layers | owners | evicted | context | per layer | per step | KiB | waits | host, per layer | per step |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for layers, runs in results.items():
        for name, run in runs.items():
            owners, rows, context = name.split(", ")
            own, step = medians(run["layers"]), medians(run["step"])
            base = medians(runs[f"stock, none, {context}"]["layers"]) if owners != "stock" else Counter()
            cells = [
                f"{(own['launches'] - base['launches']) / int(layers):g}",
                f"{step['launches']:g}",
                f"{(own['bytes'] + step['bytes']) / 1024:.1f}",
                f"{own['waits'] + step['waits']:g}",
                f"{(own['seconds'] - base['seconds']) / int(layers) * 1e6:.0f}",
                f"{step['seconds'] * 1e6:.0f}",
            ]
            print(f"| {layers} | {owners} | {rows} | {context} | " + " | ".join(cells) + " |")
    write(args.out, results)


if __name__ == "__main__":
    main()
