"""How right an answer is, from 0 to 1: token F1, RULER's and LongBench's metrics, and copying.

LongBench's are those of its ``metrics.py`` and ``eval.py`` (https://github.com/THUDM/LongBench), slips included;
RULER's those of its ``eval/synthetic/constants.py``.
"""

import difflib
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence


def first_line(text: str) -> str:
    """The first line that is not empty."""
    return text.strip().partition("\n")[0].strip()


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous spaces (SQuAD's)."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def overlap_f1(ours: Sequence[str], truth: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of two bags of words."""
    same = (Counter(ours) & Counter(truth)).total()
    return 2 * same / (len(ours) + len(truth)) if same else 0.0


def token_f1(text: str, truth: str) -> float:
    """Of normalized words."""
    return overlap_f1(normalized(text).split(), normalized(truth).split())


def exact(text: str, truth: str) -> float:
    """Whether they are the same when normalized."""
    return float(normalized(text) == normalized(truth))


def contains(text: str, truth: str) -> float:
    """Whether the truth occurs in the text, upper or lower case."""
    return float(truth.lower() in text.lower())


def begins(text: str, truth: str) -> float:
    """Whether the text begins with the truth, as a whole word or number."""
    return float(re.match(rf"{re.escape(truth)}(?!\w|[.,]\d)", text.strip("\n `*'\"")) is not None)


def token_f1_zh(text: str, truth: str) -> float:
    """Of Chinese words; every punctuation mark and symbol is left out, not only those that LongBench lists."""

    def words(of: str) -> list[str]:
        cut = ("".join(char for char in word.lower() if unicodedata.category(char)[0] not in "PS") for word in _cut(of))
        return [word for word in ("".join(word.split()) for word in cut) if word]

    return overlap_f1(words(text), words(truth))


def rouge_l(text: str, truth: str) -> float:
    """F of ROUGE-L over sentences, by the package ``rouge``; 0 of an empty text."""
    from rouge import Rouge

    try:
        return Rouge(metrics=["rouge-l"]).get_scores([text], [truth], avg=True)["rouge-l"]["f"]
    except ValueError:
        return 0.0


def rouge_l_zh(text: str, truth: str) -> float:
    """The same of Chinese words."""
    return rouge_l(" ".join(_cut(text)), " ".join(_cut(truth)))


def number_share(text: str, truth: str) -> float:
    """Share of the numbers in the text that are the first one of the truth."""
    wanted, numbers = re.findall(r"\d+", truth)[0], re.findall(r"\d+", text)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def code_similarity(text: str, truth: str) -> float:
    """Of the first line of code, to whole percents."""
    lines = text.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, code, truth).ratio()) / 100 if code and truth else 0.0


def classification(text: str, truth: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that the text names, if the right one is among them."""
    named = [name for name in classes if name in text]
    # As published: what follows a removed one is not looked at.
    for name in named:
        if name in truth and name != truth:
            named.remove(name)
    return 1 / len(named) if truth in named else 0.0


def letter(text: str, truth: str) -> float:
    """LongBench v2: whether the letter in "The correct answer is (B)" is the right one."""
    found = re.search(r"The correct answer is (?:\(([A-D])\)|([A-D]))", text.replace("*", ""))
    return float(found is not None and truth in found.groups())


#: Words that nearly every sentence of a language has, and hardly any of another of these.
LANGUAGES = {
    "English": "the of and is are was to in it that this by",
    "French": "le les des du et est une dans pour qui ce sur",
    "German": "der das die und ist von ein eine zu den nicht mit",
    "Spanish": "el los las del y es una para que por se con",
}


def follows(text: str, rule: str) -> float:
    """Whether an answer follows an instruction; an empty one follows none.

    Args:
        text: the answer.
        rule: ``case upper``, ``length most 12``, ``language French``, ``format begins >>``, or another of these kinds.
    """
    kind, _, check = rule.partition(" ")
    words = text.split()
    if not words:
        return 0.0
    if kind == "case":
        return float(text == (text.upper() if check == "upper" else text.lower()) and text.lower() != text.upper())
    if kind == "length":
        bound, _, number = check.partition(" ")
        return float(len(words) <= int(number) if bound == "most" else len(words) >= int(number))
    if kind == "language":
        plain = Counter(re.findall(r"\w+", text.lower()))
        counts = {name: sum(plain[word] for word in known.split()) for name, known in LANGUAGES.items()}
        return float(counts[check] == max(counts.values()) > 0)
    return float(text.strip().startswith(check.removeprefix("begins ")))


def of_kind(kind: str) -> Callable[[str, Sequence[str]], float]:
    """Share of the rules of one kind that an answer follows."""

    def share(text: str, rules: Sequence[str]) -> float:
        found = [follows(text, rule) for rule in rules if rule.startswith(f"{kind} ")]
        return sum(found) / len(found)

    return share


def boxed(text: str, truth: str) -> float:
    """Whether the last ``\\boxed{}`` of a text, or else its last number, is the truth as TeX or as a number."""
    found, start = "", text.rfind("\\boxed{")
    if start >= 0:
        depth = 0
        for place in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                found = text[start + len("\\boxed{") : place]
                break
    elif numbers := re.findall(r"-?\d[\d,]*(?:\.\d+)?", text):
        found = numbers[-1]
    return float(bool(found) and _plain(found) == _plain(truth))


def _plain(formula: str) -> str | float:
    """A formula without what does not change it."""
    for mark in (r"\left", r"\right", r"\!", r"\,", r"\;", r"\ ", r"\$", r"\%", "$", "%", "^\\circ", r"^{\circ}", " "):
        formula = formula.replace(mark, "")
    formula = (
        re.sub(r"\\(?:text|mathrm|mbox|textbf)\{([^{}]*)\}", r"\1", formula)
        .replace("dfrac", "frac")
        .replace("tfrac", "frac")
    )
    formula = re.sub(r"\\frac(\w)(\w)", r"\\frac{\1}{\2}", formula).rstrip(".")
    plain = re.sub(r"(?<=\d),(?=\d{3}\b)", "", formula)
    fraction = re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}|(-?)(\d+)/(\d+)", plain)
    if fraction:
        sign, over, under = [part for part in fraction.groups() if part is not None]
        return (-1 if sign else 1) * int(over) / int(under) if int(under) else plain
    try:
        return float(plain)
    except ValueError:
        return plain


def before_error(is_right: Sequence[bool]) -> float:
    """Share of the tokens before the first error: so far greedy decoding goes right."""
    return next((index for index, right in enumerate(is_right) if not right), len(is_right)) / len(is_right)


def _cut(text: str) -> list[str]:
    import jieba

    return list(jieba.cut(text, cut_all=False))


def best(of: Callable[[str, str], float]) -> Callable[[str, Sequence[str]], float]:
    """The best over all accepted answers."""
    return lambda text, truths: max(of(text, truth) for truth in truths)


#: Metrics of texts by name: of the text and the accepted answers, or all that are to be found.
TEXT_METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "found": best(contains),
    "begins": best(begins),
    "all found": lambda text, truths: sum(contains(text, truth) for truth in truths) / len(truths),
    "F1": lambda text, truths: best(token_f1)(first_line(text), truths),
    "exact": lambda text, truths: best(exact)(first_line(text), truths),
    "letter": best(letter),
    "boxed": best(boxed),
    "followed": lambda text, rules: sum(follows(text, rule) for rule in rules) / len(rules),
    **{kind: of_kind(kind) for kind in ("case", "length", "language", "format")},
    "refused": lambda text, truths: contains(text, truths[0]),
    "kept secret": lambda text, truths: 1 - contains(text, truths[1]),
}

#: LongBench's metrics by data set.
LONGBENCH: dict[str, Callable[..., float]] = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"), token_f1),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), rouge_l),
    **dict.fromkeys(("dureader", "vcsum"), rouge_l_zh),
    **dict.fromkeys(("trec", "lsht"), classification),
    **dict.fromkeys(("passage_retrieval_en", "passage_retrieval_zh", "passage_count"), number_share),
    **dict.fromkeys(("lcc", "repobench-p"), code_similarity),
    "multifieldqa_zh": token_f1_zh,
    "triviaqa": token_f1,
}
#: Data sets of examples: one line is the answer, and no chat is made of them.
OF_EXAMPLES = ("trec", "triviaqa", "samsum", "lsht")


def longbench(dataset: str, text: str, truths: Sequence[str], classes: Sequence[str]) -> float:
    """LongBench's figure of one answer."""
    if dataset in OF_EXAMPLES:
        text = text.lstrip("\n").split("\n")[0]
    metric = LONGBENCH[dataset]
    more = (classes,) if metric is classification else ()
    return max(metric(text, truth, *more) for truth in truths)
