"""Set-up on machines that are not as they should be, what the extras hold, and what each file's own tool says of it."""

import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PathDistribution
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from conftest import ROOT

#: User and group "nobody".
NOBODY = 65534


@pytest.fixture
def checkout() -> Iterator[Path]:
    """What set-up needs of this repository, in a folder that everybody may read."""
    with TemporaryDirectory() as folder:
        path = Path(folder)
        for name in ("deploy", "tests/run.sh", "cake_vllm/__init__.py", "setup.py", "README.md"):
            source = ROOT / name
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, path / name)
        path.chmod(0o755)
        yield path


def run(script: Path, tmp_path: Path, **changes) -> subprocess.CompletedProcess:
    """Runs a script with a cache of its own and without an index of packages."""
    env = {name: value for name, value in os.environ.items() if name not in ("XDG_CACHE_HOME", "PIP_FIND_LINKS")}
    env |= {"PYTHON": sys.executable, "CAKE_VLLM_CACHE": str(tmp_path / "cache"), "PIP_NO_INDEX": "1"}
    user = changes.pop("user", None)
    env = {name: value for name, value in (env | changes).items() if value is not None}
    return subprocess.run([script], env=env, user=user, capture_output=True, text=True, check=False)


def program(folder: Path, name: str, text: str) -> str:
    """A shell script that stands in the way of a program."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("script", ["deploy/setup.sh", "deploy/demo.sh", "tests/run.sh"])
@pytest.mark.parametrize(
    ("folder", "changes"),
    [
        ("/proc/.cache/cake_vllm", {"HOME": "/proc", "CAKE_VLLM_CACHE": None}),
        ("/proc/cake_vllm", {"XDG_CACHE_HOME": "/proc", "CAKE_VLLM_CACHE": None}),
        ("/proc/nowhere", {"CAKE_VLLM_CACHE": "/proc/nowhere"}),
    ],
    ids=["HOME", "XDG_CACHE_HOME", "CAKE_VLLM_CACHE"],
)
def test_a_cache_that_cannot_be_written(checkout, tmp_path, script, folder, changes):
    ran = run(checkout / script, tmp_path, **changes)
    assert ran.returncode == 1
    assert ran.stderr == (
        f"cannot write to {folder} (No such file or directory): set CAKE_VLLM_CACHE to a folder that can be written\n"
    )
    assert not (checkout / ".venv").exists()


def test_a_checkout_that_cannot_be_written(checkout, tmp_path):
    checkout.chmod(0o555)
    ran = run(checkout / "deploy/setup.sh", tmp_path, user=None if os.getuid() else NOBODY)
    checkout.chmod(0o755)
    assert ran.returncode == 1
    assert f"cannot write to {checkout}, where .venv goes: copy this folder" in ran.stderr


def test_what_is_missing_is_said_before_anything_is_installed(checkout, tmp_path):
    forward = f'*) exec "{sys.executable}" "$@" ;; esac'
    old = program(tmp_path, "old", f'case "$*" in *version_info*) echo 3.9 ;; {forward}')
    bare = program(tmp_path, "bare", f'case "$*" in *ensurepip*) exit 1 ;; {forward}')
    program(tmp_path, "df", "echo Filesystem; echo /dev/sda1 9999999 8999999 1048576 90% /")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for changes, message in (
        ({"PYTHON": "/nowhere/python"}, "there is no Python at /nowhere/python: set PYTHON to the path of one"),
        ({"PYTHON": old}, f"{old} is Python 3.9, and vLLM needs 3.11 to 3.14: set PYTHON to the path of one of these"),
        ({"PYTHON": bare}, f"install its module venv (on Debian: python{version}-venv)"),
        ({"PATH": f"{tmp_path}:{os.environ['PATH']}"}, f"{checkout} has 1 GB free, and .venv needs 6 GB"),
    ):
        ran = run(checkout / "deploy/setup.sh", tmp_path, **changes)
        assert ran.returncode == 1
        assert ran.stderr.startswith("deploy/setup.sh: ")
        assert message in ran.stderr
        assert ran.stderr.count("\n") == 1
    assert not (checkout / ".venv").exists()


@pytest.mark.slow
def test_each_stage_is_a_line_and_pip_is_heard_when_it_fails(checkout, tmp_path):
    """Without an index pip finds itself, and nothing else."""
    ran = run(checkout / "deploy/setup.sh", tmp_path)
    assert ran.returncode == 1
    start, venv, pip, vllm, *rest = ran.stderr.splitlines()
    assert start == f"Setting up {checkout}/.venv; this takes a few minutes and 4 GB."
    assert re.fullmatch(r"\[1/5\] a virtual environment \.* \d+ s", venv)
    assert re.fullmatch(r"\[2/5\] pip \.* \d+ s", pip)
    assert re.fullmatch(r"\[3/5\] vLLM for the CPU and this plugin \(.*\) \.* failed:", vllm)
    assert any("No matching distribution found" in line for line in rest)
    assert not list(checkout.glob(".venv/.ready-*"))


def test_what_is_there_already_is_found_without_a_word(checkout, tmp_path):
    """Also in a cache that cannot be written, as in an image that brings the model."""
    names = ("setup.py", "cake_vllm/__init__.py", "deploy/setup.sh")
    digest = hashlib.sha256(b"".join((checkout / name).read_bytes() for name in names)).hexdigest()
    (checkout / ".venv" / "bin").mkdir(parents=True)
    program(checkout / ".venv" / "bin", "python", f'exec "{sys.executable}" "$@"')
    (checkout / ".venv" / f".ready-{digest[:16]}").touch()
    model = tmp_path / "cache" / "SmolLM2-135M-Instruct"
    model.mkdir(parents=True)
    (model / "config.json").touch()
    (tmp_path / "cache").chmod(0o555)
    ran = run(checkout / "deploy/setup.sh", tmp_path, PYTHON="/nowhere/python")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{model}\n", "")


#: Their builds import torch, which pip's build isolation hides.
NEED_TORCH_TO_BUILD = {"flash-attn", "xformers"}


@pytest.fixture(scope="module")
def extras(tmp_path_factory) -> dict[str, set[str]]:
    """Names of the distributions in each extra."""
    folder = tmp_path_factory.mktemp("metadata")
    subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder], cwd=ROOT, check=True)
    found: dict[str, set[str]] = {}
    for requirement in PathDistribution(folder / "cake_vllm.egg-info").requires or []:
        parts = re.fullmatch(r'([\w-]+).*extra == "(\w+)".*', requirement)
        if parts:
            found.setdefault(parts[2], set()).add(parts[1])
    return found


def test_plain_pip_builds_nothing_that_needs_torch(extras):
    """What the pages, set-up and the images install with plain pip; the rest has an extra and two steps of its own."""
    files = [
        ROOT / "README.md",
        ROOT / "deploy" / "setup.sh",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("deploy/Dockerfile.*"),
    ]
    commands = [line for file in files for line in file.read_text().splitlines() if "pip install" in line]
    plain = {command for command in commands if "--no-build-isolation" not in command}
    groups = [names for command in plain for names in re.findall(r"\[([a-z,]+)\]", command)]
    asked = {extra for names in groups for extra in names.split(",")}
    assert {"cpu", "cuda", "test"} <= asked <= extras.keys()
    assert not NEED_TORCH_TO_BUILD & set().union(*(extras[extra] for extra in asked))
    assert extras["reference"] == NEED_TORCH_TO_BUILD
    assert any("[reference]" in command for command in set(commands) - plain)


DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
COMPOSE = ("compose.yaml", "compose.cpu.yaml")


def check(name: str, *arguments: object, **changes: str) -> subprocess.CompletedProcess:
    """Runs a tool that lies beside this Python or on PATH and has nothing to object; skips where there is none."""
    tool = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None:
        pytest.skip(f"no {name} here")
    done = subprocess.run(
        [tool, *arguments], cwd=ROOT, env=os.environ | changes, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def composed(*files: str) -> dict:
    """The services as Docker Compose sees them."""
    flags = [flag for file in files for flag in ("-f", DEPLOY / file)]
    config = check("docker-compose", *flags, "config", "--format", "json", MODEL="/models/one").stdout
    return json.loads(config)["services"]


@pytest.mark.parametrize("file", sorted(DEPLOY.glob("Dockerfile.*")), ids=lambda file: file.name)
def test_dockerfiles(file):
    check("hadolint", file)


def test_compose():
    """Also that what is built and mounted is there."""
    on_gpu = composed("compose.yaml")
    on_cpu = composed(*COMPOSE)
    assert on_gpu.keys() == on_cpu.keys() == {"cake-vllm", "prometheus", "grafana"}
    assert on_gpu["cake-vllm"]["deploy"]["resources"]["reservations"]["devices"]
    assert "deploy" not in on_cpu["cake-vllm"]
    for services in (on_gpu, on_cpu):
        build = services["cake-vllm"]["build"]
        assert Path(build["context"], build["dockerfile"]).is_file()
        mounts = [mount for service in services.values() for mount in service["volumes"] if mount["type"] == "bind"]
        assert [mount["source"] for mount in mounts if not Path(mount["source"]).exists()] == ["/models/one"]
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"][0]
    host, port = scraped["static_configs"][0]["targets"][0].split(":")
    assert port in {str(published["target"]) for published in on_gpu[host]["ports"]}


def manifests() -> list[dict]:
    """The resources of the base, file by file, and the alerts."""
    names = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    files = [(KUBERNETES / name).read_text() for name in names if name.endswith(".yaml")]
    return [yaml.safe_load(text) for text in [*files, check(str(KUBERNETES / "rules.sh")).stdout]]


@pytest.mark.parametrize("manifest", manifests(), ids=lambda manifest: manifest["kind"])
def test_kubernetes_schemas(manifest):
    """Kubernetes' own, and for its resources the Prometheus operator's."""
    if manifest["apiVersion"] == "monitoring.coreos.com/v1":
        operator = pytest.importorskip("cloudcoil.models.prometheus_operator.v1")
        getattr(operator, manifest["kind"]).model_validate(manifest)
    else:
        validate = pytest.importorskip("kubernetes_validate").validate
        validate(manifest, "1.32", strict=True)


def test_the_alerts_are_the_same_everywhere():
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())
    assert manifests()[-1]["spec"] == rules


def test_kustomize():
    """Everything is rendered, and every name that one resource has for another is that of one."""
    rendered = list(yaml.safe_load_all(check("kubectl", "kustomize", KUBERNETES).stdout))
    validate = pytest.importorskip("kubernetes_validate").validate
    for resource in rendered:
        if resource["kind"] != "PodMonitor":
            validate(resource, "1.32", strict=True)
    named = {(resource["kind"], resource["metadata"]["name"]): resource for resource in rendered}
    pods = named["Deployment", "cake-vllm"]["spec"]["template"]
    (container,) = pods["spec"]["containers"]
    assert container["image"] == "cake-vllm:cuda"
    settings = named["ConfigMap", container["envFrom"][0]["configMapRef"]["name"]]["data"]
    assert set(re.findall(r"\$\((\w+)\)", " ".join(container["args"]))) == settings.keys()
    target = named["HorizontalPodAutoscaler", "cake-vllm"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) in named
    service, monitor = named["Service", "cake-vllm"]["spec"], named["PodMonitor", "cake-vllm"]["spec"]
    for selector in (service["selector"], monitor["selector"]["matchLabels"]):
        assert selector.items() <= pods["metadata"]["labels"].items()
    (port,) = container["ports"]
    assert service["ports"][0]["targetPort"] == monitor["podMetricsEndpoints"][0]["port"] == port["name"]
    assert pods["metadata"]["labels"][monitor["jobLabel"]] == "cake-vllm"
    json.loads(named["ConfigMap", "cake-vllm-dashboard"]["data"]["cake-vllm.json"])


def test_the_autoscaler_asks_for_what_the_adapter_offers():
    metrics = yaml.safe_load((KUBERNETES / "autoscaler.yaml").read_text())["spec"]["metrics"]
    (rule,) = yaml.safe_load((KUBERNETES / "adapter.yaml").read_text())["rules"]["custom"]
    series = re.search(r'__name__=~"([^"]+)"', rule["seriesQuery"])[1]
    shown = (DEPLOY / "grafana" / "dashboard.json").read_text()
    for metric in metrics:
        name = metric["pods"]["metric"]["name"].replace("vllm_", "vllm:", 1)
        assert re.fullmatch(series, name)
        assert rule["name"] == {"matches": "vllm:(.*)", "as": "vllm_$1"}
        # Where test_dashboard.py finds it on a server.
        assert name in shown


def test_systemd(tmp_path):
    """With this Python's ``vllm`` in the place of the one that will be there."""
    text = (DEPLOY / "cake-vllm.service").read_text()
    folder = str(Path(sys.executable).parent)
    assert "/opt/cake-vllm/venv/bin" in text
    unit = tmp_path / "cake-vllm.service"
    unit.write_text(text.replace("/opt/cake-vllm/venv/bin", folder))
    # Keys that it does not know are a line, and no error.
    assert unit.name not in check("systemd-analyze", "verify", "--man=no", unit).stderr


@pytest.mark.full
def test_flags_are_flags_of_the_server():
    """Those in the service's file, the manifests and the compose files, as ``vllm serve`` reads them."""
    unit = (DEPLOY / "cake-vllm.service").read_text()
    systemd = re.search(r"^ExecStart=\S+ serve (.*)", unit, re.MULTILINE)[1]
    systemd = systemd.replace("$FLAGS", re.search(r"^#\s+FLAGS=(.*)", unit, re.MULTILINE)[1]).replace("${PORT}", "8000")
    (container,) = manifests()[0]["spec"]["template"]["spec"]["containers"]
    kubernetes = [argument.replace("$(BUDGET)", "1024") for argument in container["args"]]
    commands = [shlex.split(systemd), kubernetes]
    commands += [composed(*files)["cake-vllm"]["command"] for files in (COMPOSE[:1], COMPOSE)]
    importlib.import_module("cake_vllm").register()
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    for command in commands:
        read = parser.parse_args(command)
        assert (read.kv_eviction, str(read.kv_eviction_budget)) == ("cake", "1024")
