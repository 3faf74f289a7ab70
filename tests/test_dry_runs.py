"""What is written for a GPU runs on the CPU, in small: it cannot rot until it meets one."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = [pytest.mark.full, pytest.mark.slow]


def run(*command: str) -> str:
    """Output of a Python program."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


#: Runner V2 shows Triton, interpreted, which is slow: one of its tests.
SELECTED = {"v1": [], "v2": ["-k", "served_as_replayed and TRITON_ATTN and layer-defensivekv and exact"]}


@pytest.mark.parametrize("runner", SELECTED)
def test_the_tests(runner):
    command = ["-m", "pytest", "-c", "pyproject.toml", "-p", "no:xdist", "--all", "-q", "tests/gpu", "--dry-run"]
    summary = run(*command, "--runner", runner, *SELECTED[runner]).splitlines()[-1]
    assert "passed" in summary
    # V1 has no Triton here, and nothing runs asynchronously: four replays each, two on kept tokens, two on graphs.
    assert ("16 skipped" in summary) == (runner == "v1")


def test_the_benchmarks(chatty_model, tmp_path):
    out = tmp_path / "gpu.json"
    printed = run("benchmarks/gpu/run.py", chatty_model, "--dry-run", "--out", str(out))
    results = json.loads(out.read_text())["results"]
    for context in results["contexts"].values():
        assert list(context) == ["stock", "cake", "layer-defensivekv"]
        assert all(figures["seconds"] for figures in context.values())
        held = [figures["held"] for figures in context.values()]
        assert max(held[1:]) < held[0]
    assert set(results["servers"]) == {"memory-bound", "ample pool"}
    for side in results["servers"].values():
        assert all(server["figures"]["completed"] for server in side.values())
    for kind in results["references"].values():
        assert kind["torch"]["difference"] < 1e-3
    assert "flash-attn is not installed" in printed
