"""LongBench and LongBench v2, read from local files in their published form.

LongBench (https://github.com/THUDM/LongBench): a folder with its ``data/*.jsonl`` and ``config/dataset2prompt.json``
and ``config/dataset2maxlen.json``. LongBench v2: its ``data.json``. A context longer than asked for loses its middle.
"""

import json
import random
from functools import cache, partial
from pathlib import Path

from tasks import Sample, Task, Texts

#: Data sets that are never put into a chat's template.
RAW = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")

V2_PROMPT = (
    "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>\n\n"
    "What is the correct answer to this question: {question}\nChoices:\n(A) {choice_A}\n(B) {choice_B}\n"
    "(C) {choice_C}\n(D) {choice_D}\n\nFormat your response as follows: "
    '"The correct answer is (insert answer here)".'
)


def longbench_tasks(folder: Path | None, v2: Path | None) -> dict[str, Task]:
    """Tasks by name, ``longbench:DATASET`` and ``longbench2``."""
    tasks: dict[str, Task] = {}
    for file in sorted((folder / "data").glob("*.jsonl")) if folder else []:
        prompts, lengths = (_read(folder / "config" / f"dataset2{what}.json") for what in ("prompt", "maxlen"))
        if file.stem in prompts:
            tasks[f"longbench:{file.stem}"] = partial(
                _published, file=file, prompt=prompts[file.stem], max_tokens=lengths[file.stem]
            )
    if v2:
        tasks["longbench2"] = partial(_published, file=v2, prompt=V2_PROMPT, max_tokens=128)
    return tasks


def _published(
    texts: Texts, length: int, dice: random.Random, index: int, file: Path, prompt: str, max_tokens: int
) -> list[Sample]:
    rows = _read(file)
    if index >= len(rows):
        return []
    # The same order for every length and machine.
    row = rows[random.Random(0).sample(range(len(rows)), len(rows))[index]]
    before, _, behind = prompt.partition("{context}")
    context = texts.encode(before.format(**row) + row["context"])
    if len(context) > length:
        context = context[: length // 2] + context[len(context) - (length - length // 2) :]
    is_v2 = "choice_A" in row
    return [
        Sample(
            context,
            texts.encode(behind.format(**row)),
            [row["answer"]] if is_v2 else row["answers"],
            ("letter",) if is_v2 else ("LongBench",),
            max_tokens,
            in_chat=file.stem not in RAW,
            dataset="" if is_v2 else file.stem,
            classes=() if is_v2 else row["all_classes"] or (),
        )
    ]


@cache
def _read(file: Path) -> list | dict:
    text = file.read_text()
    return [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)
