"""The conversations of ``benchmarks/turns.py``, and what its tables say of answers."""

import random
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from sessions import make_session
from tasks import Texts
from turns import ages, figures, show, stage_of

TURNS, TOKENS, FACTS = 20, 2000, 3
WORDS = ("stone", "river", "lamp", "cloud", "paper", "glass", "wheel", "field", "north", "silver")


@pytest.fixture(scope="module")
def texts(model_dir, tmp_path_factory) -> Texts:
    from transformers import AutoTokenizer

    dice, file = random.Random(1), tmp_path_factory.mktemp("prose") / "prose.txt"
    file.write_text(" ".join(" ".join(dice.choices(WORDS, k=9)).capitalize() + "." for _ in range(3000)))
    return Texts(AutoTokenizer.from_pretrained(model_dir), text=file)


def make(texts: Texts, seed: int):
    return make_session(texts, TURNS, TOKENS, FACTS, random.Random(seed))


def test_facts_are_as_old_as_is_said(texts):
    session = make(texts, 0)
    assert session == make(texts, 0), "the same seed gives the same"
    assert session != make(texts, 1)
    assert len(session.prompts[-1]) == TOKENS
    said = [texts.tokenizer.decode(turn.said) for turn in session.turns]
    assert sum(text.count("special magic number") for text in said) == FACTS
    for index, (turn, prompt) in enumerate(zip(session.turns, session.prompts, strict=True)):
        assert bool(turn.expected) == (index >= TURNS // 2)
        # What a turn is asked is in no other prompt.
        assert prompt == [token for of in session.turns[: index + 1] for token in of.said] + turn.question
        if turn.expected:
            assert f" is {turn.expected}." in said[index - turn.age]
            assert sum(turn.expected in text for text in said) == 1
            assert turn.expected not in texts.tokenizer.decode(turn.question)


def test_outputs_are_of_mixed_length(texts):
    lengths = sorted(len(turn.said) for turn in make(texts, 0).turns)
    assert lengths[-1] > 4 * lengths[2] > 0


def test_tables(capsys):
    assert [stage_of(turn, 20) for turn in (0, 6, 7, 13, 14, 19)] == ["early"] * 2 + ["middle"] * 2 + ["late"] * 2
    assert ages(20) == [(1, 5), (5, 10), (10, 20)]
    turns = [{"turn": turn, "prompt": 100 * (turn + 1), "cached": 100 * turn, "first": 1.0 + turn} for turn in range(3)]
    turns[2] |= {"age": 2, "right": True}
    counted = {"GPU": 200, "below": 100, "preemptions": 0, "evicted": 1, "cuts": 0, "seconds": 6.0}
    counted |= {"at once": 1.5, "peak": 2.0}
    slow = [turn | {"first": 2 * turn["first"]} for turn in turns]
    table = {name: figures({"counted": counted, "turns": of}, 3) for name, of in (("stock", turns), ("echo 0.2", slow))}
    assert (table["stock"]["GPU"], table["stock"]["below"]) == (0.333, 0.167)
    assert table["stock"]["cached"] == {"early": 0.0, "middle": 0.5, "late": 0.667}
    assert table["stock"]["right"] == {"1 to 2": [1, 1]}
    show(table)
    printed = capsys.readouterr().out
    assert "| echo 0.2 | 2.00 (2.00x) | 4.00 (2.00x) | 6.00 (2.00x) | 0.00 | 0.50 | 0.67 | 0.33 | 0.17 |" in printed
    assert "| echo 0.2 | 1/1 |" in printed
