"""Tasks over what is not prose: a listing of Python code, and a table of numbers.

The code is the standard library's of the Python that runs. What is asked for is drawn anew and put in its place, so
that no model knows it by heart: a name, or a number.
"""

import ast
import functools
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tasks import THINGS, Sample, Task, Texts, fill

Function = ast.FunctionDef | ast.AsyncFunctionDef
#: Characters that a module must have for each token of a context; tokens that are left behind the function's line.
CHARS, ROOM = 8, 200
COLUMNS = ("visitors", "expenses")


@functools.cache
def modules() -> tuple[str, ...]:
    """Sources of the standard library's own modules, packages left out, by name."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return tuple(file.read_text(encoding="utf-8", errors="replace") for file in files)


@functools.cache
def functions(source: str) -> tuple[Function, ...]:
    """Functions of a module whose names nobody else has there."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, Function)]
    names = [node.name for node in nodes]
    return tuple(node for node in nodes if names.count(node.name) == 1 and not node.name.startswith("__"))


def with_docstring(function: Function) -> Iterator[str]:
    """Its docstring, if that is a line of some words."""
    text = ast.get_docstring(function) or ""
    if len(text.split()) >= 5 and "\n" not in text and function.name.lower() not in text.lower():
        yield text


def with_default(function: Function) -> Iterator[tuple[str, ast.Constant]]:
    """Its parameters whose defaults are whole numbers."""
    given = [*function.args.posonlyargs, *function.args.args]
    pairs = [*zip(reversed(given), reversed(function.args.defaults), strict=False)]
    pairs += [pair for pair in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True) if pair[1]]
    for parameter, default in pairs:
        if isinstance(default, ast.Constant) and type(default.value) is int:
            yield parameter.arg, default


def around(texts: Texts, source: str, place: int, length: int, dice: random.Random) -> list[int]:
    """``length`` tokens of a source, fewer if there are not so many, with what lies at a place anywhere in them."""
    # More than the tokens asked for on either side, and not the whole of a large module.
    near = 2 * CHARS * length
    before, behind = texts.encode(source[max(place - near, 0) : place]), texts.encode(source[place : place + near])
    count = min(dice.randrange(max(length - ROOM, 1)), len(before))
    count = min(max(count, length - len(behind)), len(before))
    return [*before[len(before) - count :], *behind[: length - count]]


def code(
    texts: Texts, length: int, dice: random.Random, index: int, of: Callable[[Function], Iterator], asks_name: bool
) -> list[Sample]:
    """A function is asked for by its docstring, or the default of a parameter by both names.

    Args:
        texts: see :mod:`tasks`.
        length: of the context, tokens.
        dice: of this context.
        index: of this context.
        of: what a function may be asked for by.
        asks_name: whether the name is asked for, or the default.
    """
    large = [source for source in modules() if len(source) > CHARS * length]
    while True:
        source = dice.choice(large)
        found = [(function, what) for function in functions(source) for what in of(function)]
        if found:
            break
    function, what = dice.choice(found)
    if asks_name:
        answer = "_".join(dice.sample(THINGS, 2))
        name = re.compile(rf"\b{re.escape(function.name)}\b")
        place = _offset(source, function.lineno, 0)
        before, behind = (name.sub(answer, part) for part in (source[:place], source[place:]))
        question = f'Question: What is the name of the function above whose docstring is "{what}"?\nAnswer: def'
    else:
        parameter, default = what
        answer = str(dice.randrange(1000, 100_000))
        place = _offset(source, function.lineno, 0)
        first, last = (
            _offset(source, line, column)
            for line, column in ((default.lineno, default.col_offset), (default.end_lineno, default.end_col_offset))
        )
        before, behind = source[:place], f"{source[place:first]}{answer}{source[last:]}"
        question = (
            f"Question: What is the default of the parameter {parameter} of the function {function.name} above?\n"
            f"Answer: {parameter}="
        )
    context = around(texts, before + behind, len(before), length, dice)
    return [Sample(context, texts.encode(f"\n\n{question}"), [answer], ("begins", "found"), 12, in_chat=False)]


def _offset(source: str, line: int, column: int) -> int:
    """Characters before a place that Python's parser names by its line, from 1 on, and the bytes before it there."""
    lines = source.splitlines(keepends=True)
    before = lines[line - 1].encode()[:column].decode()
    return sum(map(len, lines[: line - 1])) + len(before)


def table(texts: Texts, length: int, dice: random.Random, index: int) -> list[Sample]:
    """One row of a table of two columns of numbers; at 2,000 tokens it has some hundred rows."""
    names = [f"{thing} {number}" for thing in THINGS for number in range(10, 1000)]
    dice.shuffle(names)
    rows = [(name, *(str(dice.randrange(1000, 10_000)) for _ in COLUMNS)) for name in names]
    share = dice.random()

    def build(units: int) -> tuple[str, tuple[str, ...]]:
        lines = (", ".join(row) for row in (("place", *COLUMNS), *rows[:units]))
        return "\n".join(lines), rows[int(share * units)]

    context, (name, *answers) = fill(texts, length, len(rows), build)
    question = f"\n\nQuestion: In the table above, what are the {' and '.join(COLUMNS)} of {name}?\nAnswer: {name},"
    return [Sample(context, texts.encode(question), answers, ("all found",), 16, in_chat=False)]


LISTINGS: dict[str, Task] = {
    "code-name": partial(code, of=with_docstring, asks_name=True),
    "code-default": partial(code, of=with_default, asks_name=False),
    "table": table,
}
