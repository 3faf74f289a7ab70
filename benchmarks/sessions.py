"""Conversations of many turns: what a tool returned, a question, an answer, and again.

A turn's prompt is what the conversation holds, with this turn's output of a tool, and a question behind it. Outputs are
prose of mixed length. Facts are sentences in those of early turns, and late turns ask for one. Questions and answers do
not stay in the conversation, where an answer would be found in place of the fact, and what stands for an answer there
is always the same: all servers are asked the same.
"""

import itertools
import random
from dataclasses import dataclass
from functools import cached_property

from tasks import THINGS, Texts

#: No tool's output is shorter, tokens, unless the mean is.
SHORTEST = 24


@dataclass(frozen=True)
class Turn:
    """One turn.

    Attributes:
        said: token ids that are added to the conversation.
        question: token ids behind it, of this turn's prompt only.
        expected: what an answer has to contain; empty if no fact is asked for.
        age: turns since the fact was said; 0 if none is asked for.
    """

    said: list[int]
    question: list[int]
    expected: str = ""
    age: int = 0


@dataclass(frozen=True)
class Session:
    """A conversation.

    Attributes:
        turns: in their order.
    """

    turns: list[Turn]

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Token ids that each turn sends."""
        so_far = itertools.accumulate(turn.said for turn in self.turns)
        return [said + turn.question for said, turn in zip(so_far, self.turns, strict=True)]


def mixed(total: int, count: int, dice: random.Random) -> list[int]:
    """``count`` lengths that add up to ``total``, many of them short and a few long (exponentially distributed)."""
    shortest = min(SHORTEST, total // count)
    shares = [dice.expovariate(1) for _ in range(count)]
    lengths = [shortest + int((total - shortest * count) * share / sum(shares)) for share in shares]
    lengths[0] += total - sum(lengths)
    return lengths


def make_session(texts: Texts, num_turns: int, num_tokens: int, num_facts: int, dice: random.Random) -> Session:
    """A conversation.

    Args:
        texts: the prose, and the tokenizer.
        num_turns: of it; facts are said in the first half, and each turn of the second asks for one.
        num_tokens: of the last turn's prompt.
        num_facts: at most one for each turn of the first half, and as many as :data:`tasks.THINGS`.
        dice: of this session.
    """
    half = num_turns // 2
    keys = [f"special magic number for the {thing}" for thing in dice.sample(THINGS, num_facts)]
    values = [str(value) for value in dice.sample(range(10_000, 100_000), num_facts)]
    said_in = sorted(dice.sample(range(half), num_facts))
    in_front = [texts.encode("\n\nTool: ")] + [texts.encode("\n\nAssistant: All right.\n\nTool: ")] * (num_turns - 1)
    facts = [texts.encode(f" The {key} is {value}.") for key, value in zip(keys, values, strict=True)]
    asked = [dice.randrange(num_facts) for _ in range(num_turns - half)]
    questions = [texts.encode("\n\nUser: Go on.\n\nAssistant:")] * half + [
        texts.encode(
            f"\n\nUser: What is the {keys[fact]} mentioned in the text?"
            f"\n\nAssistant: The {keys[fact]} mentioned in the text is"
        )
        for fact in asked
    ]
    room = num_tokens - sum(map(len, [*in_front, *facts, questions[-1]]))
    turns = []
    for turn, length in enumerate(mixed(room, num_turns, dice)):
        prose = texts.prose(length, dice)
        place = dice.choice(texts.sentence_ends(prose))
        sentence = facts[said_in.index(turn)] if turn in said_in else []
        said = [*in_front[turn], *prose[:place], *sentence, *prose[place:]]
        if turn < half:
            turns.append(Turn(said, questions[turn]))
        else:
            fact = asked[turn - half]
            turns.append(Turn(said, questions[turn], values[fact], turn - said_in[fact]))
    return Session(turns)
