"""What an elastic budget costs beside the KV cache: a cut in the middle of decoding against an eviction at the prompt's
end, and what is stored of a prompt until it is cut and after.

One engine with the budget ``auto``; both in turns, medians of milliseconds in the worker's part of the plugin. What is
``stored`` is a share of the prompt's own KV.

    python benchmarks/late_cut.py MODEL --out benchmarks/results/late_cut.json
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from common import speeches, write
from eviction_cost import Clock
from tqdm import tqdm

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from engine import Engine
from test_elastic import cut_once

from cake_vllm.integration.worker.judging import Judging
from cake_vllm.integration.worker.worker import EvictionWorker


def num_bytes(tensors: Any) -> int:
    """Of tensors, or what holds some."""
    return sum(tensor.nbytes for tensor in tensors)


class Bench:
    """An engine and the clocks of its worker."""

    def __init__(self, model: str, policy: str, length: int, dtype: str):
        self.clocks = [Clock(Judging, "_observe"), Clock(EvictionWorker, "finish")]
        settings = {"kv_eviction": policy, "kv_eviction_budget": "auto", "kv_eviction_config": {"min_tokens": 64}}
        pool = {"max_model_len": length + 200, "max_num_batched_tokens": 2048, "kv_cache_memory_bytes": 2**30}
        self.engine = Engine(model, dtype=dtype, **pool, **settings)

    def at_the_end(self, prompt: list[int], budget: int) -> float:
        """Seconds of an eviction at the end of a prompt."""
        self._take()
        self.engine.forget_prefixes()
        self.engine.add(prompt, 4, extra_args={"kv_eviction_budget": budget})
        self.engine.run()
        return self._take()

    def late(self, prompt: list[int], budget: int) -> tuple[float, dict[str, int]]:
        """Seconds of a cut after some tokens, what was stored before that to make it possible included; and bytes."""
        self._take()
        self.engine.forget_prefixes()
        name = self.engine.add(prompt, 20)
        while not self.engine.decoding:
            self.engine.step()
        (watched,) = self.engine.connector.worker.judging.watched.values()
        stored = {"until the first cut": num_bytes(watched.queries.values())}
        cut_once(self.engine, name, budget)
        kept = [score.indicator.bfloat16() for score in watched.worth.scores]
        extra = [tensor.bfloat16() for score in watched.worth.scores for tensor in score.extra]
        stored["after it"] = num_bytes([*kept, *extra])
        seconds = self._take()
        self.engine.run()
        return seconds, stored

    def _take(self) -> float:
        return sum(clock.take() for clock in self.clocks)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--policies", nargs="+", default=["cake", "layer-defensivekv"])
    parser.add_argument("--length", type=int, default=4000, help="of the prompt, tokens")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for policy in args.policies:
        bench = Bench(args.model, policy, args.length, args.dtype)
        prompt = bench.engine.llm.get_tokenizer()(speeches()[0])["input_ids"][: args.length]
        runs = []
        for _ in tqdm(range(args.repeats + 1), desc=policy):
            runs.append((bench.at_the_end(prompt, args.budget), *bench.late(prompt, args.budget)))
        model = bench.engine.vllm_config.model_config.hf_text_config
        per_token = model.num_hidden_layers * model.num_key_value_heads * model.head_dim * 2 * 2
        results[policy] = {
            "at the end": [end for end, _, _ in runs[1:]],
            "late": [late for _, late, _ in runs[1:]],
            "stored": runs[0][2],
            "KV": per_token * args.length,
        }
        bench.engine.shutdown()
    print("\n| policy | at the end, ms | late, ms | ratio | stored until the first cut | after it |")
    print("|---|---|---|---|---|---|")
    for policy, found in results.items():
        end, late = (statistics.median(found[kind]) * 1e3 for kind in ("at the end", "late"))
        shares = " | ".join(f"{size / found['KV']:.2%}" for size in found["stored"].values())
        print(f"| `{policy}` | {end:.0f} | {late:.0f} | {late / end:.2f} | {shares} |")
    write(args.out, results)


if __name__ == "__main__":
    main()
