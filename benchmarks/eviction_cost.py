"""What each policy's eviction costs a prompt: seconds and memory in the worker's part of the plugin.

One engine; every request asks for a policy of its own, with knobs as in ``gate+evidence=0``. ``looking``: queries set
aside and scores computed, in the layers' forwards. ``evicting``: budgets divided, positions chosen, tokens moved. Both
beside the time of two tokens of the same prompt without eviction (a request for one token is not evicted). ``peak``:
the most memory that both hold at any time beside the KV cache, by torch's profiler, in a run of its own.

    python benchmarks/eviction_cost.py MODEL --out benchmarks/results/eviction_cost.json
"""

import argparse
import bisect
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

from cells import Row
from common import speeches, write
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm
from vllm import SamplingParams

from cake_vllm import LLM
from cake_vllm.integration.worker.judging import Judging
from cake_vllm.integration.worker.worker import EvictionWorker
from cake_vllm.policies import policy_names

SPAN = "eviction"


class Clock:
    """Adds up the seconds that a method takes, and marks its span for the profiler.

    Args:
        owner: of the method.
        name: of the method.
        now: what seconds are read from.
    """

    def __init__(self, owner: type, name: str, now: Callable[[], float] = time.perf_counter):
        self.seconds = 0.0
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                with record_function(SPAN):
                    return method(*args, **kwargs)
            finally:
                self.seconds += now() - start

        setattr(owner, name, timed)

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def peak_memory(run: Callable[[], Any]) -> int:
    """The most bytes that were allocated within spans and not yet freed, while ``run`` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns()) for event in events if event.name() == SPAN
    )
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    starts, live, peak = [start for start, _ in spans], 0, 0
    for moment, change in changes:
        index = bisect.bisect_right(starts, moment) - 1
        if index >= 0 and moment <= spans[index][1]:
            live += change
            peak = max(peak, live)
    return peak


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--policies", nargs="+", default=list(policy_names()))
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--length", type=int, default=4000, help="of the prompts, tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="auto", help="of the model (default: its own)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of the process instead of the clock's: on busy machines"
    )
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    args = parser.parse_args()

    now = time.process_time if args.cpu_time else time.perf_counter
    looking, evicting = Clock(Judging, "_observe", now), Clock(EvictionWorker, "finish", now)
    llm = LLM(
        args.model,
        dtype=args.dtype,
        block_size=32,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=args.length + 100,
        kv_cache_memory_bytes=2**30,
        kv_eviction=(first := Row(args.policies[0])).name,
        kv_eviction_budget=args.budget,
        kv_eviction_config=first.knobs,
    )
    text = llm.get_tokenizer()(speeches()[0])["input_ids"][: args.length]

    def first_token(policy: str) -> tuple[float, float, float]:
        looking.take(), evicting.take()
        row = Row(policy)
        wish = {"kv_eviction": row.name} | ({"kv_eviction_config": json.dumps(row.knobs)} if row.knobs else {})
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, extra_args=wish)
        start = now()
        llm.generate({"prompt_token_ids": text}, params, use_tqdm=False)
        return now() - start, looking.take(), evicting.take()

    names = ["none", *args.policies]
    results: dict[str, Any] = {name: {"seconds": []} for name in names}
    with tqdm(total=len(names) * (args.repeats + 2)) as bar:
        for name in names:
            first_token(name)
            bar.update()
        for _ in range(args.repeats):
            for name in names:
                results[name]["seconds"].append(first_token(name))
                bar.update()
        for name in names:
            results[name]["peak bytes"] = peak_memory(lambda name=name: first_token(name))
            bar.update()
    stock = statistics.median(total for total, _, _ in results["none"]["seconds"])
    print(f"\ntwo tokens without eviction: {stock:.3f} s")
    print("\n| policy | looking | evicting | of two tokens | peak |\n|---|---|---|---|---|")
    for name in args.policies:
        look, evict = (statistics.median(run[i] for run in results[name]["seconds"]) for i in (1, 2))
        times = f"{look * 1e3:.1f} ms | {evict * 1e3:.1f} ms | {(look + evict) / stock:.2%}"
        print(f"| `{name}` | {times} | {results[name]['peak bytes'] / 2**20:.1f} MiB |")
    write(args.out, results)


if __name__ == "__main__":
    main()
