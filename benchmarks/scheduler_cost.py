"""What eviction costs the scheduler: vLLM's real ``KVCacheManager``, stock against one that evicts.

``decode step``: slots for one token of every running request and the plan for the worker, the mean over a block's worth
of steps, so that growth is in it. ``evicted``: the same with every request evicted to 256 tokens, and giving one block
back whenever it has filled one. ``admission``: slots for a prompt of 32K tokens. ``eviction``: this prompt's to 256
tokens, that is the grant and what is freed; ``finish``: the blocks of a request with a prompt of 1,000 tokens go back.
The worker's reports are those of a model with as many layers as ``--layers`` says. Every figure is a median in
microseconds; ratios are to stock in the same run.

    python benchmarks/scheduler_cost.py --caching --out benchmarks/results/scheduler_cost_caching.json
"""

import argparse
import gc
import os
import statistics
import time
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from common import write
from tqdm import tqdm
from vllm import SamplingParams
from vllm.config import SchedulerConfig
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from cake_vllm.config import KVEvictionConfig
from cake_vllm.integration.messages import Eviction
from cake_vllm.integration.scheduler.scheduler import EvictionScheduler
from cake_vllm.integration.scheduler.spec import EvictableSpec

BLOCK_SIZE = 16
PROMPT, LONG, BUDGET, LONGEST = 1000, 32_768, 256, 40_000
SHAPE = {"block_size": BLOCK_SIZE, "num_kv_heads": 8, "head_size": 128, "dtype": torch.bfloat16}


class Bench:
    """A pool, its manager, and running requests; if it evicts, the scheduler's half of the plugin beside them.

    Args:
        evicts: whether it does.
        budget: tokens per layer.
    """

    def __init__(self, evicts: bool, budget: int, args: argparse.Namespace):
        self.evicts, self.num_layers = evicts, args.layers
        spec = EvictableSpec(**SHAPE) if evicts else FullAttentionSpec(**SHAPE)
        groups = [KVCacheGroupSpec([f"layer {index}" for index in range(args.layers)], spec)]
        tokens = args.requests * (PROMPT + args.steps + 2 * BLOCK_SIZE) + LONGEST
        config = KVCacheConfig(tokens // BLOCK_SIZE + 1, [], groups)
        self.manager = KVCacheManager(config, LONGEST, BLOCK_SIZE, BLOCK_SIZE, enable_caching=args.caching)
        if evicts:
            limits = SchedulerConfig.default_factory(max_model_len=LONGEST, max_num_batched_tokens=LONGEST)
            settings = {"kv_eviction": "cake", "kv_eviction_budget": budget}
            self.half = EvictionScheduler(KVEvictionConfig.from_settings(settings), config, limits, LONGEST, 0)
            self.half.bind(self.manager)
        self._hasher = get_request_block_hasher(BLOCK_SIZE, sha256_cbor) if args.caching else None
        self._count = 0
        self.requests = [self._request(str(index), PROMPT) for index in range(args.requests)]
        for request in self.requests:
            self._plan([request], [self._prefill(request)])
            request.num_computed_tokens = request.num_tokens

    def _request(self, name: str, length: int) -> Request:
        prompt = [hash((name, position)) % 1000 for position in range(length)]
        return Request(name, prompt, SamplingParams(max_tokens=LONGEST), None, block_hasher=self._hasher)

    def _prefill(self, request: Request) -> KVCacheBlocks:
        if self.evicts:
            self.half.add(request)
        blocks = self.manager.allocate_slots(request, request.num_tokens)
        assert blocks is not None
        return blocks

    def _plan(self, requests: list[Request], new: list[KVCacheBlocks | None]) -> float:
        """Seconds of the scheduler's half; the worker keeps the budget in every layer, in no time."""
        if not self.evicts:
            return 0.0
        output = SchedulerOutput.make_empty()
        cached = output.scheduled_cached_reqs
        for request, blocks in zip(requests, new, strict=True):
            output.num_scheduled_tokens[request.request_id] = request.num_tokens - request.num_computed_tokens
            cached.req_ids.append(request.request_id)
            cached.new_block_ids.append(blocks.get_block_ids(allow_none=True) if blocks else None)
        start = time.perf_counter()
        plan = self.half.plan(output)
        seconds = time.perf_counter() - start
        kept = ((BUDGET,),) * self.num_layers
        evictions = {
            observation.req_id: Eviction(grant.epoch, False, BUDGET // BLOCK_SIZE, True, kept, kept)
            for observation in plan.observations
            if (grant := observation.grant) is not None
        }
        start = time.perf_counter()
        self.half.finish(evictions)
        return seconds + time.perf_counter() - start

    def decode_step(self) -> float:
        """Seconds."""
        for request in self.requests:
            request.append_output_token_ids(7)
        start = time.perf_counter()
        new = [self.manager.allocate_slots(request, 1) for request in self.requests]
        seconds = time.perf_counter() - start + self._plan(self.requests, new)
        for request in self.requests:
            request.num_computed_tokens += 1
        return seconds

    def admission(self) -> tuple[float, float]:
        """Seconds to admit a long request, and to evict it."""
        self._count += 1
        request = self._request(f"long {self._count}", LONG)
        start = time.perf_counter()
        blocks = self._prefill(request)
        admission = time.perf_counter() - start
        eviction = self._plan([request], [blocks])
        self._free(request)
        return admission, eviction

    def finish(self) -> float:
        """Seconds."""
        return self._free(self.requests.pop())

    def _free(self, request: Request) -> float:
        start = time.perf_counter()
        if self.evicts:
            self.half.remove(request.request_id)
        self.manager.free(request)
        return time.perf_counter() - start


def measure(cases: dict[str, bool], budget: int, args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds of every repetition by case and figure; the cases take turns, so that noise hits all of them."""
    benches = {name: Bench(evicts, budget, args) for name, evicts in cases.items()}
    seconds: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in cases}
    gc.collect()
    gc.freeze()
    for turn in tqdm(range(args.steps // BLOCK_SIZE + 1), desc=f"budget {budget}"):
        for name, bench in benches.items():
            # A block's worth of steps at a time: one of them allocates.
            steps = [bench.decode_step() for _ in range(BLOCK_SIZE)]
            admission, eviction = bench.admission()
            figures = {"decode step": sum(steps) / BLOCK_SIZE, "admission": admission, "eviction": eviction}
            figures["finish"] = bench.finish()
            if turn:
                for what, value in figures.items():
                    seconds[name][what].append(value)
    gc.unfreeze()
    return seconds


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--steps", type=int, default=16 * BLOCK_SIZE, help="decode steps, a multiple of the block size")
    parser.add_argument("--caching", action="store_true", help="with prefix caching")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    args = parser.parse_args()
    init_none_hash(sha256_cbor)
    cases = {"stock": False, "with eviction": True}
    results = measure(cases, LONGEST, args)
    for name, figures in measure(cases, BUDGET, args).items():
        results[name]["evicted"], results[name]["eviction"] = figures["decode step"], figures["eviction"]
    medians = {name: {what: statistics.median(runs) for what, runs in case.items()} for name, case in results.items()}
    stock = medians["stock"]
    columns = ("decode step", "evicted", "admission", "eviction", "finish")
    print(f"\n{'median, microseconds':24}" + "".join(f"{what:>14}{'ratio':>8}" for what in columns))
    for name, figures in medians.items():
        cells = (f"{figures[what] * 1e6:14.0f}{figures[what] / (stock[what] or 1):8.2f}" for what in columns)
        print(f"{name:24}" + "".join(cells))
    write(args.out, {"medians": medians, "seconds": results})


if __name__ == "__main__":
    main()
