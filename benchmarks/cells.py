"""The cells of the table of answers: rows, questions, and what was answered."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import check_settings
from tasks import Sample

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
        if lines:
            check_settings(file, lines[0], settings)
        self.records = lines[1:]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in [settings, *self.records]))

    def add(self, record: dict[str, Any]) -> None:
        """Writes it down."""
        self.records.append(record)
        if self.file:
            with self.file.open("a") as lines:
                lines.write(json.dumps(record) + "\n")
