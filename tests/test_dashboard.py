"""Grafana's dashboard and Prometheus' alerts, evaluated by a real Prometheus that scrapes a real server under load."""

import json
import math
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, as_users_start

sys.path.insert(0, str(ROOT / "deploy"))

from demo import free_port, metrics, server

pytestmark = [
    pytest.mark.full,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("prometheus") and shutil.which("promtool")), reason="no prometheus and promtool on PATH"
    ),
]

PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text())
RULES = [rule for group in yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel, target) for panel in PANELS for target in panel["targets"]]
#: What Grafana puts in the place of its variables.
VARIABLES = {"$model": ".*", "$__rate_interval": "1m", "$__range": "1h"}

# Room for two of the requests below.
POOL = ["--num-gpu-blocks-override", "40", "--max-num-seqs", "4"]
ELASTIC = ["--kv-eviction", "cake", "--kv-eviction-budget", "auto", "--kv-eviction-config", '{"min_tokens": 64}']
FLAGS = ["--dtype", "float32", "--block-size", "32", "--max-model-len", "1024", "--enforce-eager", *POOL, *ELASTIC]


def ask(url: str, path: str, **query: str):
    """An answer of Prometheus' API."""
    with urllib.request.urlopen(f"{url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
        return json.loads(answer.read())["data"]


def numbers_of(url: str, expression: str) -> list[tuple[dict[str, str], float]]:
    """Labels and values of what an expression gives now."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    result = ask(url, "query", query=expression)["result"]
    return [(series["metric"], float(series["value"][1])) for series in result]


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[str]:
    """Prometheus with the configuration of ``deploy/``, but for the target and the intervals; yields its URL."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(PROMETHEUS / "rules.yml", folder)
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus",
        "--config.file=prometheus.yml",
        f"--web.listen-address={address}",
        "--storage.tsdb.path=db",
    ]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: numbers_of(f"http://{address}", "up == 1"))
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait()


def wait_until(holds) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if holds():
                return
        except urllib.error.URLError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.2)


def complete(url: str, number: int, **fields) -> None:
    """A request of 500 tokens and 40 more, two of which fill the pool."""
    prompt = [1000 + (number * 500 + i) % 40000 for i in range(500)]
    body = {"model": "demo", "prompt": prompt, "max_tokens": 40, "ignore_eos": True, "temperature": 0, **fields}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=120).close()


@pytest.fixture(scope="module")
def url(chatty_model, tmp_path_factory):
    """A Prometheus that has seen a server run short of memory, and heads compete."""
    with ExitStack() as stack:
        with as_users_start():
            served = stack.enter_context(server(chatty_model, *FLAGS))
        address = stack.enter_context(prometheus(served.removeprefix("http://"), tmp_path_factory.mktemp("prometheus")))
        with ThreadPoolExecutor(8) as clients:
            list(clients.map(lambda number: complete(served, number), range(40)))
        by_head = {"kv_eviction": "adakv", "kv_eviction_budget": 128}
        complete(served, 40, vllm_xargs=by_head)
        # The last statistics travel with a later step's output.
        complete(served, 41)
        counted = metrics(served)
        assert counted["cuts"] > 0
        assert counted["requests"] > 0
        # A scrape that began behind all of it has every series, whichever is looked at.
        behind = time.time()
        wait_until(lambda: numbers_of(address, f"timestamp(up) > {behind}"))
        yield address


@pytest.mark.parametrize(("panel", "target"), TARGETS, ids=[f"{p['title']}: {t['legendFormat']}" for p, t in TARGETS])
def test_each_line_of_the_dashboard_has_data(url, panel, target):
    found = numbers_of(url, target["expr"])
    assert found
    for labels, value in found:
        assert math.isfinite(value)
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels.keys()


def test_the_dashboard_offers_the_models(url):
    query = next(item["query"]["query"] for item in DASHBOARD["templating"]["list"] if item["type"] == "query")
    series, label = re.fullmatch(r"label_values\((\S+), (\w+)\)", query).groups()
    assert ask(url, f"label/{label}/values", **{"match[]": series}) == ["demo"]


def test_panels_lie_side_by_side():
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert {x for x, _ in cells} == set(range(24))
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_every_series_of_ours_is_on_the_dashboard(url):
    names = ask(url, "label/__name__/values")
    ours = {name for name in names if re.fullmatch(r"vllm:kv_eviction_\w+(?<!_created)", name)}
    shown = set(re.findall(r"vllm:kv_eviction_\w+", " ".join(target["expr"] for _, target in TARGETS)))
    assert ours == shown


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_each_alert_looks_at_series_that_exist(url, rule):
    """What it compares has data; whether it fires is shown by ``alerts.yml``."""
    operands = re.split(r" (?:unless on \([\w, ]+\)|[<>=]=? [\d.]+$) ?", rule["expr"])
    assert operands[0] != rule["expr"]
    for operand in filter(None, operands):
        found = numbers_of(url, operand)
        assert found
        assert all(math.isfinite(value) for _, value in found)


def test_prometheus_evaluates_the_rules(url):
    (group,) = ask(url, "rules")["groups"]
    assert [rule["name"] for rule in group["rules"]] == [rule["alert"] for rule in RULES]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}


@pytest.mark.parametrize(
    "command",
    [
        ["check", "config", "deploy/prometheus/prometheus.yml"],
        ["check", "config", "deploy/prometheus/prometheus.ray.yml"],
        ["check", "rules", "deploy/prometheus/rules.yml"],
        ["test", "rules", "tests/alerts.yml"],
    ],
    ids=" ".join,
)
def test_promtool(command):
    done = subprocess.run(["promtool", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
