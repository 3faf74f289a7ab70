"""The examples, as their README runs them, with a small model of random weights."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from conftest import ROOT, as_users_start, users_environment

sys.path.insert(0, str(ROOT / "deploy"))

from demo import server

pytestmark = [pytest.mark.full, pytest.mark.slow]

EXAMPLES = ROOT / "examples"
FLAGS = ["--block-size", "32", "--enforce-eager", "--max-model-len", "8192"]
PROMPT = 2000
LAYERS = 4
#: More is not kept with a budget of 512: whole pages of 32, and the prompt's last block.
BUDGET_HELD = 512 + 2 * 32


@pytest.fixture(scope="module")
def environment(policy_package):
    """For servers and examples, with the package of ``examples/policy`` installed."""
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return users_environment(PYTHONPATH=f"{ROOT}:{policy_package}", VLLM_CPU_KVCACHE_SPACE="1", PATH=path)


@pytest.fixture(scope="module")
def urls(chatty_model, environment):
    """Of a server that evicts and of a stock one, which start side by side."""
    eviction = ["--kv-eviction", "cake", "--kv-eviction-budget", "256", "--enable-prompt-tokens-details"]
    common = [*FLAGS, "--dtype", "float32", "--served-model-name", chatty_model]
    with ExitStack() as stack, ThreadPoolExecutor() as pool, as_users_start(**environment):
        servers = [server(chatty_model, *common, *flags) for flags in (eviction, [])]
        yield list(pool.map(stack.enter_context, servers))


@pytest.fixture
def run(environment):
    """Runs an example and returns what it printed."""

    def run(*command: str, **more: str) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env={**environment, **more}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    return run


def numbers(pattern: str, printed: str) -> list[int]:
    return [int(number) for number in re.findall(pattern, printed)]


def test_each_is_listed_with_its_command():
    listed = re.findall(
        r"^\| \[([\w.]+)\]\(\1\) \|.*\| `(?:python|pip install|examples/)", (EXAMPLES / "README.md").read_text(), re.M
    )
    assert sorted(listed) == sorted(
        path.name for path in EXAMPLES.iterdir() if path.name not in ("README.md", "__pycache__")
    )


@pytest.mark.parametrize("method", ["layer-defensivekv", "value-norm"])
def test_chat(urls, run, method):
    """With a method of this project's, whose heads compete, and with the one of ``examples/policy``."""
    printed = run("python", "examples/chat.py", "--url", urls[0], "--method", method, "--budget", "512")
    assert f"Method and budget: {method}, 512" in printed
    assert len(re.search(r"Kept in each layer: (.*)", printed)[1].split()) == LAYERS
    ((kept, prompt),) = re.findall(r"Mean kept: (\d+) of (\d+) prompt tokens", printed)
    assert int(prompt) > PROMPT
    assert 512 <= int(kept) < BUDGET_HELD


def test_long_document(urls, run):
    printed = run("python", "examples/long_document.py", "--url", urls[0])
    first, second = numbers(r"Prompt tokens: (\d+)", printed)
    assert PROMPT < first < second
    # All of the first prompt's full blocks, although it was evicted and they were freed.
    assert numbers(r"from the prefix cache: (\d+)", printed)[1] == first // 32 * 32


def test_batch(chatty_model, run):
    printed = run("python", "examples/batch.py", chatty_model, "--budget", "512", *FLAGS)
    rows = {
        name: (int(kept), int(of)) for name, kept, of in re.findall(r"^([\w-]+): kept (\d+) of (\d+): ", printed, re.M)
    }
    assert list(rows) == ["none", "cake", "layer-defensivekv"]
    whole, *evicted = rows.values()
    assert whole[0] == whole[1] > PROMPT
    assert all(512 <= kept < BUDGET_HELD for kept, _ in evicted)


def test_bench(chatty_model, urls, run):
    printed = run("examples/bench.sh", chatty_model, *reversed(urls), REQUESTS="4", INPUT_LEN="1024", OUTPUT_LEN="8")
    assert numbers(r"Successful requests: +(\d+)", printed) == [4, 4]
    stock, evicting = numbers(r"Blocks that evictions freed: (\d+)", printed)
    assert stock == 0
    assert evicting > 0
