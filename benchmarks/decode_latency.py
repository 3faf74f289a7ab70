"""A decode step at very long contexts: stock vLLM, and evicted to a budget; beside the limit, stock at that context.

The model is small and random, with rope for 128K tokens and the heads of a model where the cache is what a step reads.
Stock vLLM's cache is filled without a prompt, by vLLM's own ``DecodeBenchConnector``; the evicted one by a prompt of
that length with progressive prefill, which is what makes such prompts affordable here. Engines take turns, as in
``latency.py``. ``of the limit``: how much of the speed-up that stock vLLM would have at the short context is reached.

    python benchmarks/decode_latency.py --out benchmarks/results/decode_latency.json
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from common import write
from latency import TURN, Remote, decode_steps
from tqdm import tqdm


def save_model(path: str, max_position: int, num_layers: int) -> None:
    """A Llama of random weights, without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=max_position,
        architectures=["LlamaForCausalLM"],
    )
    LlamaForCausalLM(config).save_pretrained(path)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[32_768, 131_072])
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--policy", default="cake")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--turns", type=int, default=20, help=f"of {TURN} decode steps each")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    args = parser.parse_args()

    longest = max(args.contexts) + TURN * (args.turns + 2)
    settings = {
        "dtype": "float32",
        "max_model_len": longest,
        "skip_tokenizer_init": True,
        "max_num_batched_tokens": 2048,
    }
    results: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as model:
        save_model(model, longest, args.layers)
        bytes_per_token = args.layers * 2 * 8 * 64 * 4
        filled = {
            "kv_transfer_config": {"kv_connector": "DecodeBenchConnector", "kv_role": "kv_both"},
            "kv_cache_memory_bytes": int(bytes_per_token * longest * 1.05),
        }
        eviction = {
            "kv_eviction": args.policy,
            "kv_eviction_budget": args.budget,
            "kv_eviction_config": {"prefill": "progressive"},
            "kv_cache_memory_bytes": bytes_per_token * 16_384,
        }
        stock, cake = Remote(model, {**settings, **filled}), Remote(model, {**settings, **eviction})
        for context in tqdm(args.contexts):
            prompt = [(index * index + index) % 509 for index in range(context)]
            evicted = {f"{args.policy}": (cake, [prompt])}
            results[f"{context}"] = decode_steps({"stock": (stock, [prompt]), **evicted}, args.turns)
            limit = decode_steps({"limit": (stock, [prompt[: args.budget]]), **evicted}, args.turns)
            results[f"{context}"] |= {"limit": limit["limit"], f"{args.policy}, beside the limit": limit[args.policy]}
        for engine in (stock, cake):
            engine.close()

    print(f"\n{'context':>8} {'stock ms':>9} {'evicted ms':>11} {'speed-up':>9} {'limit ms':>9} {'of the limit':>13}")
    for context, runs in results.items():
        full, ours, limit, beside = (statistics.median(seconds) * 1e3 for seconds in runs.values())
        print(f"{context:>8} {full:9.1f} {ours:11.1f} {full / ours:9.1f} {limit:9.1f} {limit / beside:13.2f}")
    write(args.out, results)


if __name__ == "__main__":
    main()
