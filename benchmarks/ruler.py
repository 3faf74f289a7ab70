"""RULER's tasks (https://arxiv.org/abs/2404.06654) in their published form.

Templates and numbers are those of the package ``nvidia-long-context-eval`` 26.3 (Apache-2.0), whose own generators are
programs with requirements of their own. What is different: a length is that of the context alone; contexts are filled
to the sentence, word or document; sentences are split by their marks instead of NLTK; each sample has dice of its own
and begins elsewhere in the essays. Words come from the package ``wonderwords``, the rest of the data from RULER's.
"""

import itertools
import math
import random
import re
import string
import uuid
from functools import partial

from tasks import Sample, Task, Texts, documents, fill

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
#: Positions that needles are drawn from, percents of the essay.
DEPTHS = [round(100 * index / 39) for index in range(40)]

NIAH = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}",
    "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
)
TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}",
    "\nQuestion: Find all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assgined the "
    "value {query}, they are: ",
)
COMMON_WORDS = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}",
    "\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)
FREQUENT_WORDS = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}",
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)


def _draw(kind: str, texts: Texts, dice: random.Random) -> str:
    if kind == "numbers":
        return str(dice.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=dice.getrandbits(128), version=4))
    return f"{dice.choice(texts.words('adjective'))}-{dice.choice(texts.words('noun'))}"


def _around(words: list[str], start: int, count: int) -> list[str]:
    """So many words from ``start`` on, the first ones behind the last."""
    return (words[start:] + words[:start])[:count]


def niah(
    texts: Texts,
    length: int,
    dice: random.Random,
    index: int,
    haystack: str = "essay",
    key_kind: str = "words",
    value_kind: str = "numbers",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
) -> list[Sample]:
    """Needles in essays, in repeated sentences (``repeat``) or among other needles (``needle``)."""
    by_key = {
        _draw(key_kind, texts, dice): [_draw(value_kind, texts, dice) for _ in range(values)]
        for _ in range(max(keys, queries))
    }
    facts = [NEEDLE.format(kind=value_kind, key=key, value=value) for key, of in by_key.items() for value in of]
    dice.shuffle(facts)
    asked = dice.sample(list(by_key), queries)
    query = ", ".join(asked[:-1]) + ", and " + asked[-1] if queries > 1 else asked[0]
    context_form, question, prefix = NIAH
    kind = value_kind
    if queries * values == 1:
        context_form = context_form.replace("Some", "A").replace("are hidden", "is hidden")
        question, prefix = question.replace("are all", "is"), prefix.removesuffix("are") + "is"
        kind = value_kind[:-1]
    seed, start = dice.random(), dice.randrange(len(texts.essay)) if haystack == "essay" else 0

    def build(units: int) -> tuple[str, None]:
        own = random.Random(seed)
        if haystack == "essay":
            sentences = re.split(r"(?<=[.!?])\s+", " ".join(_around(texts.essay, start, 5 * units)))
            places = sorted(len(sentences) * depth // 100 for depth in own.sample(DEPTHS, len(facts)))
            for place, fact in zip(reversed(places), facts, strict=True):
                sentences.insert(place, fact)
            return context_form.format(kind=kind, context=" ".join(sentences)), None
        others = [
            NOISE
            if haystack == "repeat"
            else NEEDLE.format(kind=value_kind, key=_draw(key_kind, texts, own), value=_draw(value_kind, texts, own))
            for _ in range(units)
        ]
        for fact in facts:
            others.insert(own.randrange(len(others) + 1), fact)
        return context_form.format(kind=kind, context="\n".join(others)), None

    context, _ = fill(texts, length, len(texts.essay) // 5 if haystack == "essay" else length, build)
    answers = [value for key in asked for value in by_key[key]]
    return [
        Sample(
            context,
            texts.encode(question.format(kind=kind, query=query)),
            answers,
            ("all found",),
            128,
            prefix=texts.encode(prefix.format(kind=kind, query=query)),
        )
    ]


def variable_tracking(texts: Texts, length: int, dice: random.Random, index: int, hops: int = 4) -> list[Sample]:
    """A chain of assignments among repeated sentences, behind an example of 500 tokens."""

    def chain(letters: int) -> tuple[list[str], str]:
        names: dict[str, None] = {}
        while len(names) <= hops:
            names["".join(dice.choices(string.ascii_uppercase, k=letters))] = None
        return list(names), str(dice.randrange(10_000, 99_999))

    def text_of(names: list[str], value: str, units: int, seed: float) -> str:
        lines = [f"VAR {names[0]} = {value}"]
        lines += [f"VAR {name} = VAR {before} " for before, name in itertools.pairwise(names)]
        sentences = [f"{NOISE}\n"] * (units + len(lines))
        places = sorted(random.Random(seed).sample(range(len(sentences)), len(lines)))
        for shift, (place, line) in enumerate(zip(places, lines, strict=True)):
            sentences.insert(place + shift, line)
        return TRACKING[0].format(context=" ".join(sentences).replace(". \n", ".\n"))

    def behind(value: str) -> list[str]:
        return [part.format(query=value, num_v=hops + 1) for part in TRACKING[1:]]

    def shown(units: int) -> tuple[str, str]:
        text = text_of(*example, units, seed)
        return text, f"{text}{''.join(behind(example[1]))} {' '.join(example[0])}\n\n"

    example, (names, value), seed = chain(3), chain(5), dice.random()
    _, solved = fill(texts, min(500, length // 2), length, shown)
    context, _ = fill(texts, length, length, lambda units: (solved + text_of(names, value, units, seed), None))
    question, prefix = map(texts.encode, behind(value))
    return [Sample(context, question, names, ("all found",), 30, prefix=prefix)]


def common_words(texts: Texts, length: int, dice: random.Random, index: int, common: int = 10) -> list[Sample]:
    """A numbered list in which ten words come more often than others, behind a short example."""
    words = sorted({word for kind in ("noun", "adjective", "verb") for word in texts.words(kind)})
    is_short = length < 4096
    small, large = ((20, 3, 1), (6, 1)) if is_short else ((40, 10, 3), (30, 3))
    seed = dice.random()

    def example(own: random.Random, count: int, often: int, seldom: int) -> tuple[str, list[str]]:
        chosen = own.sample(words, count)
        listed = chosen[:common] * often + chosen[common:] * seldom
        own.shuffle(listed)
        return " ".join(f"{number}. {word}" for number, word in enumerate(listed, start=1)), chosen[:common]

    def build(units: int) -> tuple[str, list[str]]:
        own = random.Random(seed)
        shown, of_shown = example(own, *small)
        asked, answers = example(own, common + units, *large)
        solved = "".join(COMMON_WORDS).format(context=shown)
        solved += " ".join(f"{number}. {word}" for number, word in enumerate(of_shown, start=1))
        return f"{solved}\n{COMMON_WORDS[0].format(context=asked)}", answers

    context, answers = fill(texts, length, len(words) - common, build)
    question, prefix = map(texts.encode, COMMON_WORDS[1:])
    return [Sample(context, question, answers, ("all found",), 120, prefix=prefix)]


def frequent_words(texts: Texts, length: int, dice: random.Random, index: int) -> list[Sample]:
    """Made-up words whose frequencies fall with the square of their rank; the three behind the dots are asked for."""
    vocabulary: dict[str, None] = {"...": None}
    while len(vocabulary) < max(length // 50, 4):
        vocabulary["".join(dice.choices(string.ascii_lowercase, k=6))] = None
    words, seed = list(vocabulary), dice.random()

    def build(units: int) -> tuple[str, None]:
        listed = [
            word
            for rank, word in enumerate(words, start=1)
            for _ in range(int(10 * units * rank**-2 / (math.pi**2 / 6)))
        ]
        random.Random(seed).shuffle(listed)
        return FREQUENT_WORDS[0].format(context=" ".join(listed)), None

    context, _ = fill(texts, length, length, build)
    question, prefix = map(texts.encode, FREQUENT_WORDS[1:])
    return [Sample(context, question, words[1:4], ("all found",), 50, prefix=prefix)]


RULER: dict[str, Task] = {
    "niah_single_1": partial(niah, haystack="repeat"),
    "niah_single_2": niah,
    "niah_single_3": partial(niah, value_kind="uuids"),
    "niah_multikey_1": partial(niah, keys=4),
    "niah_multikey_2": partial(niah, haystack="needle"),
    "niah_multikey_3": partial(niah, haystack="needle", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": partial(niah, values=4),
    "niah_multiquery": partial(niah, queries=4),
    "vt": variable_tracking,
    "cwe": common_words,
    "fwe": frequent_words,
    "qa_1": partial(documents, dataset="squad", metrics=("found", "F1")),
    "qa_2": partial(documents, dataset="hotpotqa", metrics=("found", "F1")),
}
