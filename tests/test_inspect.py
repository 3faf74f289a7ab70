"""``cake-vllm inspect``: what the page says is what the engine serves and reports."""

import base64
import builtins
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from engine import Engine

from cake_vllm.__main__ import main
from cake_vllm.config import KVEvictionConfig
from cake_vllm.policies import LayerInputs
from cake_vllm.policies.cake import Cake
from cake_vllm.tools.inspect import Terms, read_prompt, tokenize
from cake_vllm.tools.report import Inspection, Layer, draw, page

pytest.importorskip("matplotlib")
LICENSE = ROOT / "LICENSE"
FLAGS = [
    "--dtype",
    "float32",
    "--kv-cache-memory-bytes",
    "256M",
    "--gpu-memory-utilization",
    "0.3",
    "--block-size",
    "32",
]


def inspected(model: str, tmp_path: Path, *flags: str) -> tuple[dict, str]:
    """The numbers of a page, and the page."""
    out, png = tmp_path / "report.html", tmp_path / "picture.png"
    assert main(["inspect", model, *FLAGS, "--out", str(out), "--png", str(png), *flags]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    page = out.read_text()
    return json.loads(re.findall(r'<script type="application/json" id="numbers">(.*)</script>', page)[0]), page


@pytest.mark.engine
@pytest.mark.parametrize(
    ("policy", "budget"),
    [
        ("cake", "200"),
        pytest.param("layer-defensivekv", "0.1", marks=pytest.mark.full),
    ],
)
def test_the_page_says_what_is_served(
    start_engine, no_engine, chatty_model, tmp_path, policy, budget, same_on_both, capsys
):
    no_engine()
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("</script><b>&amp; " + LICENSE.read_text()[:6000])
    numbers, text = inspected(
        chatty_model, tmp_path, "--prompt", str(prompt), "--kv-eviction", policy, "--kv-eviction-budget", budget
    )
    assert capsys.readouterr().out.count("wrote ") == 2
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(chatty_model)(prompt.read_text())["input_ids"]
    value = int(budget) if budget.isdigit() else float(budget)
    engine: Engine = start_engine(
        chatty_model, kv_eviction=policy, kv_eviction_budget=value, enable_prefix_caching=False, max_model_len=4096
    )
    engine.stats()
    judged = {}
    engine.connector.worker.judging.on_judged = lambda layer, inputs, score: judged.update({layer: (inputs, score)})
    ((_, kept),) = engine.trace([ids], 3, extra_args={"kv_eviction_report": True})
    stats, (output,) = engine.stats(), list(engine.outputs.values())[-1:]
    # The next case starts an engine of its own, and one lives at a time.
    engine.shutdown()
    report = output.kv_transfer_params["kv_eviction"]
    assert numbers["report"] == report
    assert numbers["prompt_len"] == len(ids)
    assert numbers["blocks"][0] - numbers["blocks"][1] == stats["freed_blocks"] > 0
    assert numbers["budget"] == (value if value > 1 else int(value * len(ids)))
    full_len = len(ids) // 32 * 32
    cake = Cake()
    for index, layer in enumerate(numbers["layers"]):
        assert layer["index"] == index
        of_report = report["kept_tokens"][index]
        assert layer["kept"] == (of_report if isinstance(of_report, list) else [of_report])
        for head, positions in enumerate(layer["positions"]):
            expected = range(full_len) if kept[index] is None else kept[index][head].tolist()
            assert positions == [*expected, *range(full_len, len(ids))]
            assert len(positions) == layer["kept"][head % len(layer["kept"])]
        terms = cake.score(judged[index][0]).terms
        torch.testing.assert_close(torch.tensor([layer["entropy"], layer["variance"]]), terms)
    preferences = cake.preferences([cake.score(judged[index][0]) for index in range(4)])
    shares = [preference / sum(preferences) for preference in preferences]
    assert [layer["preference"] for layer in numbers["layers"]] == pytest.approx(shares, rel=1e-4)
    if policy == "cake":
        counts = cake.budgets([judged[index][1] for index in range(4)], len(ids), value)
        assert [layer["budget"] for layer in numbers["layers"]] == [[count + 32] for count in counts]
    row = numbers["layers"][2]
    assert f"<td>2</td><td>{row['entropy']:.4g}</td><td>{row['variance']:.4g}</td>" in text
    assert f"<td>{' '.join(map(str, row['budget']))}</td><td>{' '.join(map(str, row['kept']))}</td>" in text
    # It works offline, and shows what was in the prompt as text.
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert "url(" not in text
    assert "@import" not in text
    assert base64.b64decode(re.findall(r"data:image/png;base64,([^\"]*)", text)[0]).startswith(b"\x89PNG")
    assert text.count("</script>") == 1
    assert len(re.findall(r'<span style="--k:[\d.]+" title="position \d+: \d+%">', text)) == len(ids)


def test_methods_without_a_window_have_no_entropy():
    """They look at no queries; the rest is shown."""
    config = KVEvictionConfig.from_settings({"kv_eviction": "knorm", "kv_eviction_budget": 64})
    terms = Terms(config, None)
    inputs = LayerInputs(torch.empty(2, 0, 8), torch.randn(2, 96, 8), 1.0)
    terms.look(0, inputs, config.policy.score(inputs))
    assert terms.of_layers(1) == [(None, None, None)]
    positions = [list(range(32)), list(range(64, 96))]
    layer = Layer(0, *terms.of_layers(1)[0], [64], [64], positions)
    report = {"policy": "knorm", "budget": 64, "kept_tokens": [64]}
    found = Inspection("m", "KNorm()", 64, 32, (3, 2), report, [layer], ["a"] * 96)
    assert found.is_kept.sum() == 64
    assert "<td>0</td><td>-</td><td>-</td><td>-</td><td>64</td>" in page(found, draw(found))


def test_each_token_has_its_text(chatty_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chatty_model)
    text = "Grüße an 東京 🎉, bitte.\n"
    ids, pieces = tokenize(tokenizer, text, is_chat=False)
    assert len(ids) == len(pieces)
    assert "".join(pieces) == text
    chat_ids, chat = tokenize(tokenizer, text, is_chat=True)
    turn = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    assert chat_ids == (turn if isinstance(turn, list) else turn["input_ids"])
    assert text.strip() in "".join(chat)


def test_a_prompt_is_a_file_or_a_text(tmp_path):
    (tmp_path / "a").write_text("from the file")
    assert read_prompt(str(tmp_path / "a")) == "from the file"
    assert read_prompt("some text " * 1000) == "some text " * 1000


BAD = [
    (["--kv-eviction-budget", "auto"], "give --kv-eviction-budget a number, and prefill exact"),
    (["--kv-eviction-config", '{"prefill": "progressive"}'], "give --kv-eviction-budget a number, and prefill exact"),
    (["--kv-eviction-budget", "20"], "--kv-eviction-budget 20 leaves nothing beside the window"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_errors_are_a_sentence(chatty_model, tmp_path, capsys, flags, message):
    assert main(["inspect", chatty_model, "--prompt", "a b c", "--out", str(tmp_path / "o.html"), *flags]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o.html").exists()


@pytest.mark.engine
@pytest.mark.full
def test_a_prompt_of_which_nothing_leaves(no_engine, chatty_model, tmp_path, capsys, same_on_both):
    no_engine()
    assert main(["inspect", chatty_model, *FLAGS, "--prompt", "a b c", "--out", str(tmp_path / "o.html")]) == 1
    assert "nothing was evicted of 3 tokens, in blocks of 32, with --kv-eviction-budget 1024" in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(chatty_model, tmp_path, capsys, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "matplotlib":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["inspect", chatty_model, "--prompt", "a", "--out", str(tmp_path / "o.html")]) == 1
    assert capsys.readouterr().err.endswith("draws with matplotlib: pip install 'cake-vllm[inspect]'\n")
