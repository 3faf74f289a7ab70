"""What eviction costs in answers: verbatim copying and a needle in a haystack, served by the engine.

Every condition is an engine of its own in a process of its own; all see the same prompts, made from real text with a
fixed seed. ``copy``: twelve tokens of the context are repeated at the end of the prompt; the figure is the share of the
next 40 that the model goes on with before its first error. ``needle``: a five-digit number is hidden in the context
and asked for at the end; the figure is the share of prompts whose answer holds it. A task at which the full cache
fails says nothing about eviction.

    python benchmarks/quality.py MODEL --out benchmarks/results/quality.json
"""

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

from common import speeches, write
from tqdm import tqdm

COPY_GIVEN, COPY_ASKED = 12, 40


def conditions(args: argparse.Namespace) -> dict[str, dict]:
    """Engine arguments by name; the first is the full cache."""
    found: dict[str, dict] = {"full cache": {}}
    for policy in args.policies:
        for budget in args.budgets:
            for prefill in args.prefills:
                found[f"{policy} {budget:.0%} {prefill}"] = {
                    "kv_eviction": policy,
                    "kv_eviction_budget": budget,
                    "kv_eviction_config": {"prefill": prefill},
                }
    return found


def make_prompts(tokenize, length: int, count: int) -> dict[str, list[tuple[list[int], object]]]:
    """``count`` prompts of each task with what to expect."""
    texts = [tokenize(text) for text in speeches()[:count]]
    dice = random.Random(length)
    copy, needle = [], []
    for text in texts:
        text = text[:length]
        place = dice.randrange(length // 10, length - length // 4)
        given = text[place : place + COPY_GIVEN]
        copy.append((text + tokenize("\n\n") + given, text[place + COPY_GIVEN : place + COPY_GIVEN + COPY_ASKED]))
        number = str(dice.randrange(10000, 99999))
        fact = tokenize(f" The special magic number for the harbour is {number}. ")
        question = tokenize(
            "\n\nWhat is the special magic number for the harbour mentioned in the text? "
            "The special magic number for the harbour mentioned in the text is"
        )
        needle.append((text[:place] + fact + text[place:] + question, number))
    return {"copy": copy, "needle": needle}


def serve(args: argparse.Namespace) -> None:
    """One condition: reads engine arguments from standard input, writes figures to standard output."""
    from vllm import SamplingParams

    from cake_vllm import LLM

    llm = LLM(
        args.model,
        dtype="float32",
        block_size=32,
        enforce_eager=True,
        max_model_len=max(args.lengths) + 200,
        max_num_batched_tokens=args.chunk,
        kv_cache_memory_bytes=2 * 2**30,
        **json.load(sys.stdin),
    )
    tokenizer = llm.get_tokenizer()
    figures = {}
    for length in args.lengths:
        tasks = make_prompts(lambda text: tokenizer(text)["input_ids"], length, args.count)
        for task, cases in tasks.items():
            params = SamplingParams(temperature=0, max_tokens=COPY_ASKED if task == "copy" else 12, ignore_eos=True)
            scores = []
            for prompt, expected in cases:
                output = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0].outputs[0]
                if task == "needle":
                    scores.append(float(expected in output.text))
                else:
                    pairs = enumerate(zip(output.token_ids, expected, strict=True))
                    scores.append(next((i for i, (a, b) in pairs if a != b), COPY_ASKED) / COPY_ASKED)
            figures[f"{task} {length}"] = scores
    print(json.dumps(figures))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument(
        "--policies", nargs="+", default=["cake", "snapkv", "layer-defensivekv", "echo", "dropkv", "restkv", "lagkv"]
    )
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.2, 0.5], help="fractions of the prompt")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 4000])
    parser.add_argument("--prefills", nargs="+", default=["exact", "progressive"])
    parser.add_argument("--chunk", type=int, default=512, help="--max-num-batched-tokens")
    parser.add_argument("--count", type=int, default=12, help="prompts of each task and length")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args)

    results = {}
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    for name, engine_args in tqdm(conditions(args).items()):
        run = subprocess.run(
            [sys.executable, *sys.argv, "--serve"],
            input=json.dumps(engine_args),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=env,
        )
        results[name] = json.loads(run.stdout.splitlines()[-1])

    columns = list(results["full cache"])
    print(f"\n{'':36}" + "".join(f"{column:>14}" for column in columns))
    for name, figures in results.items():
        print(f"{name:36}" + "".join(f"{sum(figures[c]) / len(figures[c]):14.2f}" for c in columns))
    write(args.out, results)
    return None


if __name__ == "__main__":
    main()
