"""A plugin that is installed is never why vLLM does not start, and never ignored when it is asked for."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

#: What vLLM's environment looks like where the plugin is installed and left out.
LEFT_OUT = {**os.environ, "VLLM_PLUGINS": ""}


@pytest.fixture(scope="module")
def misfits() -> dict[str, dict]:
    """What happened in each vLLM of ``misfits.py``."""
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "misfits.py"], env=LEFT_OUT, stdout=subprocess.PIPE, text=True, check=True
    )
    told = [json.loads(line.removeprefix("MISFIT ")) for line in run.stdout.splitlines() if line.startswith("MISFIT ")]
    return {entry.pop("name"): entry for entry in told}


def test_a_plugin_that_does_not_fit_stands_aside(misfits):
    """It says so once, and vLLM goes on; who asks for eviction gets an error, whatever the plugin failed on."""
    fitting = misfits["nothing"]
    assert (fitting["registers"], fitting["unused"], fitting["warnings"]) == ("ok", "ok", [])
    assert len(misfits) > 10
    for name, told in ((name, told) for name, told in misfits.items() if name != "nothing"):
        assert (told["registers"], told["unused"]) == ("ok", "ok"), name
        (warning,) = told["warnings"]
        assert warning.startswith("cake_vllm stands aside, --kv-eviction cannot be used with "), name
        assert "--kv-eviction" in told["flag"], name
        # Without the gate nothing of the plugin runs; only flags are refused.
        assert told["settings"] == "ok" if "of the gate" in name else told["settings"].startswith("ValueError: "), name


def test_the_reason_is_told(misfits):
    assert "and this is 0.40.0: install a supported vLLM" in misfits["a later version"]["settings"]
    renamed = misfits["a method that was renamed"]
    assert "InputProcessor has no process_inputs" in renamed["settings"]
    assert "InputProcessor has no process_inputs" in renamed["warnings"][0]


def test_the_other_processes_must_load_it_too(misfits):
    """The plugin loaded by hand, and left out of ``VLLM_PLUGINS``."""
    for way in ("flag", "settings"):
        assert "VLLM_PLUGINS leaves out cake_vllm" in misfits["nothing"][way]


def test_a_server_without_the_plugin_refuses_its_flags():
    run = subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "gpt2", "--kv-eviction", "cake"],
        env=LEFT_OUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "unrecognized arguments: --kv-eviction" in run.stderr
