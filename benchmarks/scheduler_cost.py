"""What many KV cache groups cost the scheduler: vLLM's real ``KVCacheManager``, stock against one group per layer.

``decode step``: slots for one token of every running request, the mean over a block's worth of steps, so that growth is
in it. ``admission``: slots for a prompt of 32K tokens; ``its pages``: as many pages from the pool and nothing else.
``finish``: the pages of a request with a prompt of 1,000 tokens go back. Every figure is a median in microseconds,
beside its ratio to stock in the same run.

    python benchmarks/scheduler_cost.py --out benchmarks/results/scheduler_cost.json
"""

import argparse
import gc
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from common import write
from tqdm import tqdm
from vllm import SamplingParams
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from cake_vllm.integration.spec import EvictableSpec

BLOCK_SIZE = 16
SHAPE = {"block_size": BLOCK_SIZE, "num_kv_heads": 8, "head_size": 128, "dtype": torch.bfloat16}


class Bench:
    """A pool, its manager, and requests with prompts of 1,000 tokens."""

    def __init__(self, num_layers: int, num_requests: int, steps: int, caching: bool):
        specs = [EvictableSpec(**SHAPE, layer_index=index) for index in range(num_layers)] or [
            FullAttentionSpec(**SHAPE)
        ]
        groups = [KVCacheGroupSpec([f"layer {index}"], spec) for index, spec in enumerate(specs)]
        tokens = num_requests * (1000 + steps + BLOCK_SIZE) + 40_000
        config = KVCacheConfig(len(specs) * tokens // BLOCK_SIZE + 1, [], groups)
        self.manager = KVCacheManager(config, 40_000, BLOCK_SIZE, BLOCK_SIZE, enable_caching=caching)
        hasher = get_request_block_hasher(BLOCK_SIZE, sha256_cbor) if caching else None
        self.requests = [self._request(str(index), 1000, hasher) for index in range(num_requests)]
        self.long = self._request("long", 32_768, hasher)
        for request in self.requests:
            self._prefill(request)

    def _request(self, name: str, length: int, hasher) -> Request:
        prompt = [hash((name, position)) % 1000 for position in range(length)]
        return Request(name, prompt, SamplingParams(max_tokens=100), None, block_hasher=hasher)

    def _prefill(self, request: Request) -> None:
        assert self.manager.allocate_slots(request, request.num_tokens) is not None
        request.num_computed_tokens = request.num_tokens

    def decode_step(self) -> float:
        """Seconds."""
        for request in self.requests:
            request.append_output_token_ids(7)
        start = time.perf_counter()
        for request in self.requests:
            self.manager.allocate_slots(request, 1)
        seconds = time.perf_counter() - start
        for request in self.requests:
            request.num_computed_tokens += 1
        return seconds

    def admission(self) -> float:
        """Seconds."""
        start = time.perf_counter()
        self._prefill(self.long)
        seconds = time.perf_counter() - start
        self.manager.free(self.long)
        self.manager.block_pool.reset_prefix_cache()
        self.long.num_computed_tokens = 0
        return seconds

    def pages(self) -> float:
        """Seconds."""
        pool, count = self.manager.block_pool, len(self.manager.coordinator.single_type_managers)
        start = time.perf_counter()
        blocks = pool.get_new_blocks(count * 32_768 // BLOCK_SIZE)
        seconds = time.perf_counter() - start
        pool.free_blocks(blocks)
        return seconds

    def finish(self) -> float:
        """Seconds."""
        request = self.requests.pop()
        start = time.perf_counter()
        self.manager.free(request)
        return time.perf_counter() - start


def measure(num_layers: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every repetition, by figure."""
    bench = Bench(num_layers, args.requests, args.steps, args.caching)
    gc.collect()
    gc.freeze()
    decode = [bench.decode_step() for _ in range(args.steps)]
    # A block's worth of steps at a time: one of them allocates.
    blocks = [sum(decode[start : start + BLOCK_SIZE]) / BLOCK_SIZE for start in range(0, len(decode), BLOCK_SIZE)]
    figures = {"decode step": blocks[1:], "admission": [bench.admission() for _ in range(5)]}
    figures["its pages"] = [bench.pages() for _ in range(5)]
    figures["finish"] = [bench.finish() for _ in range(args.requests)]
    gc.unfreeze()
    return figures


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[30, 80])
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6 * BLOCK_SIZE, help="decode steps, a multiple of the block size")
    parser.add_argument("--caching", action="store_true", help="with prefix caching")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    args = parser.parse_args()
    init_none_hash(sha256_cbor)
    cases = {"stock, one group": 0} | {f"{layers} layers": layers for layers in args.layers}
    results = {name: measure(layers, args) for name, layers in tqdm(cases.items())}
    medians = {name: {what: statistics.median(runs) for what, runs in case.items()} for name, case in results.items()}
    stock = medians["stock, one group"]
    print(f"\n{'median, microseconds':24}" + "".join(f"{what:>14}{'ratio':>8}" for what in stock))
    for name, figures in medians.items():
        cells = (f"{seconds * 1e6:14.0f}{seconds / stock[what]:8.2f}" for what, seconds in figures.items())
        print(f"{name:24}" + "".join(cells))
    write(args.out, {"medians": medians, "seconds": results})


if __name__ == "__main__":
    main()
