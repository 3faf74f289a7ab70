"""A server under load from clients who come and go, and one whose engine is killed."""

import json
import random
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, as_users_start

sys.path.insert(0, str(ROOT / "deploy"))

from demo import is_ready, metrics, samples, server

pytestmark = pytest.mark.slow

FLAGS = [
    "--dtype",
    "float32",
    "--block-size",
    "32",
    "--max-model-len",
    "2048",
    "--enforce-eager",
    "--max-num-seqs",
    "16",
]
BUDGET = 128
#: Prompts beyond this fill more blocks than the columns that their eviction takes.
EVICTED = BUDGET + 63


@pytest.fixture(scope="module", autouse=True)
def _as_users_start():
    with as_users_start():
        yield


def post(url: str, body: dict, timeout: float = 120) -> dict:
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps({"model": "demo", **body}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.loads(answer.read())


def series(url: str, name: str) -> float:
    """Sum of a series of vLLM's own."""
    return sum(value for _, _, value in samples(url, name))


def control(url: str, action: str) -> None:
    """Pauses or resumes."""
    urllib.request.urlopen(urllib.request.Request(f"{url}/{action}", method="POST"), timeout=60).close()


def wait_until(holds) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def engine_process() -> psutil.Process:
    """The process that holds the model."""
    found = [
        child
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "EngineCore" in child.name() + " ".join(child.cmdline())
    ]
    (engine,) = found
    return engine


def left_in_engine(url: str) -> dict[str, int]:
    """Objects of requests in the engine's process once nothing runs, by class."""
    wait_until(lambda: not series(url, "vllm:num_requests_running"))
    # The last statistics travel with a step's output, and what finished is forgotten with the next step.
    post(url, {"prompt": [5, 6, 7], "max_tokens": 3})
    body = json.dumps({"method": "living"}).encode()
    request = urllib.request.Request(f"{url}/collective_rpc", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        (left,) = json.loads(answer.read())["results"]
    return left


@pytest.mark.full
def test_hundreds_of_requests(chatty_model, monkeypatch):
    """Nothing leaks, neither memory nor objects nor descriptors, and the counters are what the clients count."""
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    # A pool small enough to be touched as a whole before memory is first measured.
    pool = ["--num-gpu-blocks-override", "1500"]
    flags = ["--kv-eviction", "cake", "--kv-eviction-budget", str(BUDGET), *FLAGS, *pool]
    flags += ["--worker-extension-cls", "counting.Census"]
    with server(chatty_model, *flags) as url:
        lock, served, dropped = threading.Lock(), [], []

        def client(number: int) -> None:
            dice = random.Random(number)
            length = dice.choice((dice.randint(1, 60), dice.randint(EVICTED + 1, 600)))
            prompt = [dice.randrange(1000, 40000) for _ in range(length)]
            body = {"prompt": prompt, "max_tokens": dice.randint(2, 24), "ignore_eos": True, "temperature": 0}
            if dice.random() < 0.1:
                # Leaves without waiting for the answer.
                try:
                    post(url, body, timeout=dice.choice((0.01, 0.1, 0.4)))
                except (TimeoutError, urllib.error.URLError):
                    with lock:
                        dropped.append(length)
                    return
            else:
                usage = post(url, body)["usage"]
                assert usage["prompt_tokens"] == length
                assert usage["completion_tokens"] == body["max_tokens"]
            with lock:
                served.append(length)

        with ThreadPoolExecutor(24) as pool:
            list(pool.map(client, range(150)))
            engine = engine_process()
            few = left_in_engine(url)
            before, descriptors = engine.memory_info().rss, engine.num_fds()
            list(pool.map(client, range(150, 360)))
        assert left_in_engine(url) == few
        assert sum(few.values()) <= 1
        assert len(dropped) > 8
        assert series(url, "vllm:kv_cache_usage_perc") == 0
        assert engine.memory_info().rss - before < 100 * 2**20
        assert engine.num_fds() == descriptors
        ours = metrics(url)
        certain = sum(length > EVICTED for length in served)
        assert certain <= ours["requests"] <= certain + sum(length > EVICTED for length in dropped)
        assert ours["failures"] == 0
        assert ours["freed_blocks"] * 32 == ours["evicted_tokens"] > 0


@pytest.fixture(scope="module")
def log_file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("log") / "server.log"


@pytest.fixture(scope="module")
def open_server(chatty_model, log_file):
    """A server that tells all and can be paused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
        flags = ["--kv-eviction", "cake", "--kv-eviction-budget", "400", *FLAGS]
        with server(chatty_model, *flags, log_file=log_file) as url:
            yield url


def test_wishes_over_http(open_server):
    """Budgets by request, what was kept in the answer, and refusals as HTTP 400."""
    prompt = list(range(1000, 1500))
    for wish, kept in (({}, 400), ({"kv_eviction_budget": 128}, 128), ({"kv_eviction_budget": "0.5"}, 250)):
        wish = {**wish, "kv_eviction_report": 1}
        answer = post(open_server, {"prompt": prompt, "max_tokens": 3, "ignore_eos": True, "vllm_xargs": wish})
        report = answer["kv_transfer_params"]["kv_eviction"]
        assert report["policy"] == "cake"
        assert kept <= sum(report["kept_tokens"]) / 4 < kept + 64
    assert post(open_server, {"prompt": prompt, "max_tokens": 3})["kv_transfer_params"] is None
    for wish, message in (
        ({"kv_eviction": "cade"}, "kv_eviction 'cade' is unknown"),
        ({"kv_eviction_budget": -1}, "kv_eviction_budget -1 is not a budget"),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(open_server, {"prompt": prompt, "max_tokens": 3, "vllm_xargs": wish})
        assert refused.value.code == 400
        assert message in json.loads(refused.value.read())["error"]["message"]


def test_a_paused_server_goes_on_where_it_was(open_server):
    """With what was evicted still evicted; other pauses preempt or abort what runs, and leave no page behind."""
    body = {"prompt": list(range(2000, 2600)), "max_tokens": 250, "ignore_eos": True, "temperature": 0}
    # The second one finds the prompt in the prefix cache, as those below do.
    _, whole = post(open_server, body), post(open_server, body)
    with ThreadPoolExecutor(1) as pool:

        def paused(how: str):
            """A request in whose midst the server was paused."""
            running = pool.submit(post, open_server, body)
            wait_until(lambda: series(open_server, "vllm:num_requests_running") == 1)
            control(open_server, f"pause?{how}")
            return running

        running = paused("mode=keep&clear_cache=false")
        produced = series(open_server, "vllm:generation_tokens_total")
        time.sleep(1)
        assert not running.done()
        assert series(open_server, "vllm:generation_tokens_total") == produced
        control(open_server, "resume")
        assert running.result()["choices"][0]["text"] == whole["choices"][0]["text"]
        running = paused("mode=keep")
        control(open_server, "resume")
        assert running.result()["usage"] == whole["usage"]
        assert paused("mode=abort").result()["choices"][0]["finish_reason"] == "abort"
        control(open_server, "resume")
    post(open_server, {"prompt": [5, 6, 7], "max_tokens": 3})
    assert series(open_server, "vllm:kv_cache_usage_perc") == 0


def test_nothing_tells_what_was_asked(open_server, log_file):
    """Neither the log at its most talkative, nor ``/metrics``, nor a refusal has words of a prompt."""
    prompt = "the zyzzyva and the quokka " * 120
    post(open_server, {"prompt": prompt, "max_tokens": 3})
    assert "evicted request" in log_file.read_text()
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(open_server, {"prompt": prompt, "max_tokens": 3, "vllm_xargs": {"kv_eviction_budget": 0}})
    with urllib.request.urlopen(f"{open_server}/metrics", timeout=30) as answer:
        told = [log_file.read_text(), refused.value.read().decode(), answer.read().decode()]
    assert not any("zyzzyva" in text for text in told)


def test_a_killed_engine_is_noticed(open_server):
    """As in stock vLLM: what runs is answered with an error, and the server ends. The last test of this server."""
    with ThreadPoolExecutor(4) as pool:
        body = {"prompt": list(range(1000, 1400)), "max_tokens": 1500, "ignore_eos": True}
        running = [pool.submit(post, open_server, body) for _ in range(4)]
        wait_until(lambda: series(open_server, "vllm:num_requests_running") == 4)
        engine_process().kill()
        for request in running:
            with pytest.raises((urllib.error.URLError, ConnectionError)):
                request.result(timeout=60)
    wait_until(lambda: not is_ready(open_server))
