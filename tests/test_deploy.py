"""Set-up on machines that are not as they should be, and what the extras of the distribution hold."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PathDistribution
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
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
