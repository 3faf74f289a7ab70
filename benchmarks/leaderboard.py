"""RULER's thirteen tasks as two projects publish them, served by vLLM: averages beside the published ones.

``kvpress``: 4K, the context is evicted before the question is known (``--prefill progressive``: one chunk is the
context), a quarter to seven eighths go. ``tangram``: 8K, the question ends the prompt, 75 to 10% stay. Both in the
chat's template, 50 contexts a task, and the model's own end of an answer.

    python benchmarks/leaderboard.py MODEL --out benchmarks/results/leaderboard_MODEL.json

What stands behind goes to ``quality.py``: ``--samples 5``, ``--data``, ``--server-args``. ``gate`` is worth adding to
``--policies`` once the model is calibrated.

Not the same as published: contexts are drawn anew from RULER's own sources (``ruler.py``), and are a little shorter
than the 4,096 and 8,192 tokens that prompts and answers have together there; kvpress's own question is not in the
budget, here the budget is divided once more over what is left and the question.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import quality
from common import write
from ruler import RULER
from tables import interval, main_metric, with_interval

POLICIES = ("full", "echo", "layer-defensivekv", "cake", "snapkv", "adakv", "keydiff", "random")
#: What is left for a question and its answer of a published length.
ROOM = 256
SETTINGS: dict[str, list[str]] = {
    "kvpress": ["--prefill", "progressive", "--lengths", str(4096 - ROOM), "--budgets", "0.75", "0.5", "0.25", "0.125"],
    "tangram": ["--prefill", "exact", "--lengths", str(8192 - ROOM), "--budgets", "0.75", "0.5", "0.25", "0.1"],
}
#: Averages over the thirteen tasks, percents, full cache first, by setting and model; heads in groups of four.
#: Tangram: README of https://github.com/aiha-lab/tangram at 0a3329b. kvpress: its leaderboard
#: (https://huggingface.co/spaces/nvidia/kvpress-leaderboard) has them as files and pictures, which could not be read.
PUBLISHED: dict[str, dict[str, dict[str, tuple[float, ...]]]] = {
    "kvpress": {},
    "tangram": {
        "llama-3.1-8b": {
            "SnapKV, by group of heads": (94.6, 91.7, 88.4, 75.6, 61.0),
            "KeyDiff, by group of heads": (94.6, 94.4, 91.0, 81.8, 71.0),
            "Expected Attention, by group of heads": (94.6, 94.3, 93.2, 77.0, 55.9),
            "Fast KVzip, by group of heads": (94.6, 94.6, 94.3, 85.0, 62.6),
            "SnapKV, heads alike": (93.1, 89.0, 84.2, 71.2, 56.0),
            "KeyDiff, heads alike": (93.1, 87.8, 83.2, 76.1, 67.7),
            "Expected Attention, heads alike": (93.1, 79.3, 61.4, 40.3, 21.0),
        },
        "qwen3-4b": {
            "SnapKV, by group of heads": (93.8, 89.0, 80.7, 70.0, 59.2),
            "KeyDiff, by group of heads": (93.8, 92.3, 84.1, 74.6, 61.0),
            "Expected Attention, by group of heads": (93.8, 93.5, 93.2, 80.4, 60.9),
            "Fast KVzip, by group of heads": (93.8, 93.5, 92.7, 83.0, 39.6),
            "SnapKV, heads alike": (93.7, 85.0, 77.0, 68.8, 59.0),
            "KeyDiff, heads alike": (93.7, 89.8, 80.2, 70.9, 55.1),
            "Expected Attention, heads alike": (93.7, 77.3, 50.5, 28.4, 15.6),
        },
    },
}


def average(cells: dict[str, Any]) -> dict[str, Any]:
    """Mean over tasks of the means over contexts, percents, and the middle 95% of resamples of the contexts, if any
    task has several.
    """
    by_task = [100 * np.array(main_metric(cell)["contexts"]) for cell in cells.values()]
    low, high = interval(*by_task)
    kept = float(np.mean([cell["kept"] for cell in cells.values()]))
    return {"mean": float(np.mean([of.mean() for of in by_task])), "low": low, "high": high, "kept": kept}


def published(setting: str, model: str) -> dict[str, tuple[float, ...]]:
    """What is published of a model, by the name of its folder."""
    plain = re.sub(r"[^a-z0-9.]+", "-", model.lower()).replace("meta-llama", "llama")
    return next((of for name, of in PUBLISHED[setting].items() if name in plain), {})


def show(setting: str, model: str, averages: dict[str, dict[str, Any]], num_tasks: int) -> None:
    """Prints averages, a line for each method, and the published ones below."""
    budgets = list(dict.fromkeys(row.split()[1] for row in averages if " " in row))
    print(f"\n{setting}, {model}: mean of {num_tasks} tasks, percent, with 95% intervals over contexts\n")
    print(
        "| | full |" + "".join(f" {float(budget):.1%} |" for budget in budgets) + "\n|---|---|" + "---|" * len(budgets)
    )

    def cell(row: str) -> str:
        of = averages.get(row)
        return with_interval(of, ".1f") if of else "-"

    for policy in dict.fromkeys(row.split()[0] for row in averages if " " in row):
        print(f"| `{policy}` | {cell('full')} | " + " | ".join(cell(f"{policy} {budget}") for budget in budgets) + " |")
    theirs = published(setting, model)
    for method, figures in theirs.items():
        print(f"| {method} (published) | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |")
    if not theirs:
        print("\nNothing that is published of this model in this setting could be read.")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory, with a tokenizer")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--out", type=Path, help="where to write the JSON; the setting comes behind its name")
    args, rest = parser.parse_known_args()
    for setting in args.settings:
        out = args.out and args.out.with_name(f"{args.out.stem}_{setting}.json")
        asked = ["--tasks", *RULER, "--samples", "50", "--max-tokens", "128", "--chat", "--policies", *POLICIES]
        asked += [*SETTINGS[setting], "--compare", "echo", "snapkv", *rest]
        found = quality.main([args.model, *asked, *(["--out", str(out)] if out else [])])
        (by_row,) = found["figures"].values()
        averages = {row: average(cells) for row, cells in by_row.items()}
        model = Path(args.model).resolve().name
        show(setting, model, averages, len(next(iter(by_row.values()))))
        write(out, {**found, "averages": averages, "published": published(setting, model)})


if __name__ == "__main__":
    main()
