"""The real server over HTTP, as the README's demo runs it."""

import sys

import pytest
from conftest import ROOT
from openai import OpenAI

sys.path.insert(0, str(ROOT / "deploy"))

from demo import metrics, server

pytestmark = pytest.mark.slow

FLAGS = ["--dtype", "float32", "--block-size", "32", "--max-model-len", "4096", "--enforce-eager"]


@pytest.fixture(scope="module")
def url(model_dir):
    budget = ["--kv-eviction-budget", "256", "--kv-eviction-config", '{"gamma": 100}']
    with server(model_dir, "--kv-eviction", "cake", *budget, *FLAGS) as address:
        yield address


def test_chat_completions_and_metrics(url):
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    before = metrics(url)
    assert before["requests"] == before["evicted_tokens"] == before["freed_blocks"] == before["step_seconds_count"] == 0

    short = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Say hello."}], max_tokens=8, temperature=0
    )
    assert short.choices[0].message.content
    assert metrics(url)["requests"] == metrics(url)["step_seconds_count"] == 0

    document = (ROOT / "LICENSE").read_text()
    prompt_lens = []
    for question in ("What is this?", "Who is the licensor?"):
        stream = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": f"{document}\n{question}"}],
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        *_, last = stream
        prompt_lens.append(last.usage.prompt_tokens)

    after = metrics(url)
    assert after["requests"] == 2
    # And perhaps steps in which an answer had filled a block.
    assert after["step_seconds_count"] >= 2
    assert after["step_seconds_sum"] > 0
    layers = [key for key in after if key.isdigit()]
    assert len(layers) == 30
    # Each layer's gauge is that of the last request; all of them together keep the budget and the rounding.
    kept = sum(after[layer] for layer in layers)
    assert 30 * 256 <= kept < 30 * (256 + 32)
    # What is held is that, rounded up to whole blocks; and each may have given back a block that its answer filled.
    assert after["evicted_tokens"] == 32 * after["freed_blocks"]
    assert -2 * 32 <= sum(prompt_lens) - 2 * kept / 30 - after["evicted_tokens"] < 2 * 32
    assert after["in_place"] == 0
