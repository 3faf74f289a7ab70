"""Ray Serve for real: two replicas behind one endpoint answer as one server does, also while one of them is killed."""

import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, users_environment
from openai import BadRequestError, OpenAI
from random_models import numbers

pytest.importorskip("ray.serve", reason="no ray[serve] here")
sys.path.insert(0, str(ROOT / "deploy"))

from demo import free_port, is_ready

pytestmark = [pytest.mark.full, pytest.mark.slow]

RAY = ROOT / "deploy" / "ray"
BUDGET = 128
# One request at a time: no answer depends on its batch mates, and a queue is soon there.
FLAGS = ["--dtype", "float32", "--block-size", "32", "--max-model-len", "1024", "--enforce-eager"]
FLAGS += ["--max-num-seqs", "1", "--num-gpu-blocks-override", "300", "--enable-prompt-tokens-details"]
FLAGS += ["--kv-eviction", "cake", "--kv-eviction-budget", str(BUDGET)]
PROMPTS = [numbers(seed, 300) for seed in range(16)]


def wait_until(holds) -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def answer(url: str, number: int, prompt: list[int] | None = None):
    """The client as everybody has it, but that it tries longer, and which conversation a request belongs to."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=10)
    return client.completions.create(
        model="demo",
        prompt=prompt or PROMPTS[number],
        max_tokens=16,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True, "vllm_xargs": {"kv_eviction_report": True}},
        extra_headers={"x-session-id": f"conversation {number}"},
    )


def content(completion) -> tuple:
    """What does not depend on who answered."""
    report = completion.kv_transfer_params["kv_eviction"]
    return completion.choices[0].token_ids, completion.choices[0].text, report["kept_tokens"], report["policy"]


class Application:
    """The application of ``serve.yaml``, with a small model and on CPUs, started by ``serve run``."""

    def __init__(self, model: str, folder: Path):
        self._folder, port = folder, free_port()
        self.url = f"http://127.0.0.1:{port}"
        config = yaml.safe_load((RAY / "serve.yaml").read_text())
        config["http_options"] = {"host": "127.0.0.1", "port": port}
        (application,) = config["applications"]
        application["args"] = {"model": model, "flags": ["--served-model-name", "demo", *FLAGS]}
        (deployment,) = application["deployments"]
        deployment["ray_actor_options"] = {"num_cpus": 0.1}
        scaling = deployment["autoscaling_config"]
        scaling |= {"max_replicas": 2, "upscale_delay_s": 0, "metrics_interval_s": 1, "look_back_period_s": 2}
        scaling["policy"]["policy_kwargs"]["waiting"] = 1
        (folder / "serve.yaml").write_text(yaml.safe_dump(config))
        env = users_environment(PYTHONPATH=f"{RAY}:{ROOT}", RAY_TMPDIR=str(folder), VLLM_CPU_KVCACHE_SPACE="1")
        # Several engines on few cores: their threads would wait for each other.
        env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        env |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_metrics_report_interval_ms": "1000"}
        # On a busy machine Ray's proxy takes longer than the 15 seconds after which it is given up.
        env |= {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
        command = [Path(sys.executable).parent / "serve", "run", "serve.yaml"]
        with open(folder / "log", "w") as log:
            self._process = psutil.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text()

    @property
    def rings(self) -> list[int]:
        """How many replicas the router chose from, from its first choice to now."""
        return [int(number) for number in re.findall(r"(\d+) replicas, \d+ vnodes", self.log)]

    @property
    def replicas(self) -> list[psutil.Process]:
        """The replicas' processes; the parents of the engines'."""
        return [child for child in self._process.children(recursive=True) if child.name().startswith("ray::ServeRepl")]

    def series(self, name: str) -> dict[str, float]:
        """One of vLLM's series by replica, as Ray exports it on each node."""
        found = {}
        for targets in json.loads((self._folder / "ray" / "prom_metrics_service_discovery.json").read_text()):
            for target in targets["targets"]:
                with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as page:
                    lines = re.findall(rf"^ray_{name}{{(.*)}} (\S+)$", page.read().decode(), re.MULTILINE)
                found |= {re.search(r'ReplicaId="(\w+)"', labels)[1]: float(value) for labels, value in lines}
        return found

    def stop(self) -> None:
        """Ends it and all that it started."""
        family = [self._process, *self._process.children(recursive=True)]
        self._process.terminate()
        _, alive = psutil.wait_procs(family, timeout=20)
        for process in alive:
            process.kill()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A path short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as path:
        yield Path(path)


@contextmanager
def load(url: str, expected: list[tuple]) -> Iterator[None]:
    """Four clients that ask for as long as the block lasts. Each gets all of its answers, and the right ones."""
    done = threading.Event()

    def client(first: int) -> int:
        number = first
        while not done.is_set():
            assert content(answer(url, number)) == expected[number]
            number = (number + 4) % len(expected)
        return number

    with ThreadPoolExecutor(4) as clients:
        asked = [clients.submit(client, first) for first in range(4)]
        try:
            yield
        finally:
            done.set()
        assert [client.result() for client in asked]


@pytest.fixture
def expected(start_engine, no_engine, chatty_model) -> list[tuple]:
    """What one engine answers, by prompt; it is gone when Ray starts."""
    settings = {"kv_eviction": "cake", "kv_eviction_budget": BUDGET}
    engine = start_engine(chatty_model, max_model_len=1024, max_num_seqs=1, num_gpu_blocks_override=300, **settings)
    found = []
    for prompt in PROMPTS:
        name = engine.add(prompt, 16, extra_args={"kv_eviction_report": True})
        engine.run()
        output = engine.outputs[name]
        report = output.kv_transfer_params["kv_eviction"]
        ((tokens, text),) = ((list(of.token_ids), of.text) for of in output.outputs)
        found.append((tokens, text, list(report["kept_tokens"]), report["policy"]))
    no_engine()
    return found


def test_two_replicas_are_one_server(chatty_model, folder, expected):
    assert all(BUDGET <= sum(kept) / len(kept) < BUDGET + 64 for _, _, kept, _ in expected)
    application = Application(chatty_model, folder)
    try:
        url = application.url
        wait_until(lambda: is_ready(url))

        # Requests wait: a second replica is started.
        wait_until(lambda: application.rings == [1])
        with load(url, expected):
            wait_until(lambda: "Upscaling Deployment" in application.log)
        wait_until(lambda: application.rings == [1, 2])

        # The next turn of a conversation finds its prefix, wherever that is.
        fresh = [numbers(100 + number, 300) for number in range(16)]
        for number, prompt in enumerate(fresh):
            first = answer(url, number, prompt)
            assert not first.usage.prompt_tokens_details.cached_tokens
            turns = prompt + first.choices[0].token_ids + numbers(200 + number, 20)
            assert answer(url, number, turns).usage.prompt_tokens_details.cached_tokens >= 256

        # Streams pass as they are made (in how few pieces, depends on how busy the server is), and so do refusals.
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        chat = {
            "model": "demo",
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 512,
            "temperature": 0,
            "extra_body": {"ignore_eos": True},
        }
        whole = client.chat.completions.create(**chat).choices[0].message.content
        parts = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**chat, stream=True)]
        assert sum(map(bool, parts)) > 1
        assert "".join(parts) == whole
        with pytest.raises(BadRequestError, match="kv_eviction 'cade' is unknown"):
            client.chat.completions.create(**chat | {"extra_body": {"vllm_xargs": {"kv_eviction": "cade"}}})

        # Both replicas evicted, and Ray's metrics say so.
        wait_until(lambda: len(application.series("vllm_kv_eviction_requests_total")) == 2)
        assert all(application.series("vllm_kv_eviction_freed_blocks_total").values())

        # One of them dies with what it is at, and the other one answers.
        victim, other = application.replicas
        orphans = victim.children(recursive=True)
        assert orphans
        with load(url, expected):
            time.sleep(2)
            victim.send_signal(signal.SIGKILL)
            wait_until(lambda: application.rings[:3] == [1, 2, 1])
            time.sleep(2)
        assert other in application.replicas
        assert not psutil.wait_procs(orphans, timeout=20)[1]
    except BaseException:
        print(application.log[-5000:])
        raise
    finally:
        application.stop()


def test_how_many_replicas_are_wanted(monkeypatch):
    from ray.serve.config import AutoscalingContext

    monkeypatch.syspath_prepend(RAY)
    from replicas import LoadPolicy

    def wanted(waiting: list[float], kv_usage: list[float], in_front: float = 0) -> int:
        nothing = dict.fromkeys(
            ("deployment_id", "deployment_name", "app_name", "raw_metrics", "policy_state", "current_time", "config")
        )
        nothing |= dict.fromkeys(("last_scale_up_time", "last_scale_down_time"))
        metrics = {"waiting": dict(enumerate(waiting)), "kv_usage": dict(enumerate(kv_usage))}
        context = AutoscalingContext(
            **nothing,
            current_num_replicas=len(waiting),
            target_num_replicas=len(waiting),
            running_replicas=[],
            total_num_requests=0,
            total_queued_requests=in_front,
            aggregated_metrics=metrics,
            capacity_adjusted_min_replicas=1,
            capacity_adjusted_max_replicas=8,
        )
        return LoadPolicy(waiting=4, kv_usage=0.8)(context)[0]

    assert wanted([], []) == 1
    assert wanted([0, 0], [0.1, 0.1]) == 1
    assert wanted([0, 0], [0.79, 0.8]) == 2
    assert wanted([0, 0], [0.9, 0.8]) == 3
    assert wanted([9], [0.1]) == 3
    assert wanted([0], [0.1], in_front=5) == 2
