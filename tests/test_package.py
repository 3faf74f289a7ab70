"""What a release is made of: wheel, sdist, their metadata, the command and its help."""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from conftest import ROOT

import cake_vllm
from cake_vllm.__main__ import main
from cake_vllm.policies import policy_names
from cake_vllm.tools import calibrate, inspect, plan

VERSION = cake_vllm.__version__
#: Where no index is asked, and nothing but this interpreter's packages is there.
OFFLINE = {**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONPATH": ""}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist."""
    pytest.importorskip("build")
    source, out = tmp_path_factory.mktemp("source") / "cake", tmp_path_factory.mktemp("dist")
    caches = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "golden", "results")
    shutil.copytree(ROOT, source, ignore=caches)
    # The wheel is made of the sdist, as for users who have no wheel.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, env=OFFLINE, check=True, stdout=subprocess.DEVNULL)
    return out


def test_the_wheel_has_the_package_and_nothing_else(built):
    (file,) = built.glob("*.whl")
    assert file.name == f"cake_vllm-{VERSION}-py3-none-any.whl"
    wheel = zipfile.ZipFile(file)
    info = f"cake_vllm-{VERSION}.dist-info/"
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cake_vllm").rglob("*.py")}
    assert {name for name in wheel.namelist() if not name.startswith(info)} == {*modules, "cake_vllm/py.typed"}
    assert info + "licenses/LICENSE" in wheel.namelist()
    entries = wheel.read(info + "entry_points.txt").decode()
    assert "[vllm.general_plugins]\ncake_vllm = cake_vllm:register" in entries
    assert "[console_scripts]\ncake-vllm = cake_vllm.__main__:main" in entries


def test_its_metadata(built):
    (file,) = built.glob("*.whl")
    metadata = message_from_bytes(zipfile.ZipFile(file).read(f"cake_vllm-{VERSION}.dist-info/METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("cake-vllm", VERSION)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload(decode=True).decode().strip() == (ROOT / "README.md").read_text().strip()
    extras = {"cpu", "cuda", "reference", "ray", "inspect", "deploy", "bench", "docs", "test"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    required = metadata.get_all("Requires-Dist")
    # A plain requirement of vLLM would pull the build for CUDA onto a machine without a GPU.
    assert [line for line in required if "extra ==" not in line] == ["numpy", "packaging"]
    assert 'matplotlib; extra == "inspect"' in required


def test_the_sdist_has_what_a_build_needs_and_no_tests(built):
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = "setup.py pyproject.toml README.md LICENSE CHANGELOG.md CONTRIBUTING.md SECURITY.md patches/README.md"
    assert set(wanted.split()) <= names
    assert "cake_vllm/py.typed" in names
    assert not [name for name in names if name.split("/")[0] in ("tests", "benchmarks", "deploy", ".venv")]


def test_the_command_of_an_installed_wheel(built, tmp_path):
    (file,) = built.glob("*.whl")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), str(file)]
    subprocess.run(command, env=OFFLINE, check=True)
    env = {**OFFLINE, "PYTHONPATH": str(tmp_path)}
    told = subprocess.run(
        [tmp_path / "bin" / "cake-vllm", "--version"], env=env, cwd=tmp_path, check=True, stdout=-1, text=True
    )
    assert told.stdout == f"cake-vllm {VERSION}\n"
    told = subprocess.run(
        [sys.executable, "-m", "cake_vllm", "--help"], env=env, cwd=tmp_path, check=True, stdout=-1, text=True
    )
    assert "plan " in told.stdout
    assert "inspect " in told.stdout


def test_the_changelog_knows_this_version():
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"\n## {VERSION}\n" in changes
    assert changes.index(f"## {VERSION}") < changes.index("## 0.1.0")


def test_what_contributors_are_told_is_there():
    """Files, options and names that the guide mentions."""
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    for file in ("patches/README.md", "cake_vllm/policies/base.py", "cake_vllm/integration/patching.py"):
        assert file.removeprefix("cake_vllm/") in guide
        assert (ROOT / file).is_file()
    for test in ("columns", "policies", "replay", "fuzz", "plan", "formulas", "gate", "package"):
        assert f"test_{test}.py" in guide
        assert (ROOT / "tests" / f"test_{test}.py").is_file()
    for option in ("--runner", "--all", "--golden-dir", "--seed"):
        assert f'"{option}"' in (ROOT / "tests" / "conftest.py").read_text()
        assert option in guide


@pytest.mark.parametrize("tool", [plan, inspect, calibrate])
def test_help_says_something_of_every_option(tool):
    commands = argparse.ArgumentParser().add_subparsers()
    tool.add_command(commands)
    ((name, parser),) = commands.choices.items()
    text = parser.format_help()
    assert parser.description
    for action in parser._actions:
        assert action.help, action.dest
        assert max([*action.option_strings, action.metavar or ""], key=len) in text
    for policy in policy_names() if tool is not calibrate else ():
        assert policy in text
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0


def test_help_of_vllm_has_all_flags_choices_and_options():
    cake_vllm.register()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from cake_vllm.config import KEYS, flag

    # vLLM's own `format_help` shows the groups that the command line names.
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    text = " ".join(argparse.ArgumentParser.format_help(parser).split())
    text = text[text.index("KVEviction") :]
    options = "prefill", "progressive", "decode", "min_tokens", "max_tokens", "recent_tokens"
    for word in (*map(flag, KEYS), *policy_names(), *options):
        assert word in text
