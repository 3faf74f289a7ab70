"""A policy from another distribution: installed, listed and served."""

import subprocess
import sys

import pytest
from conftest import ROOT
from engine import Engine

from cake_vllm import policies

PACKAGE = ROOT / "tests" / "third_party"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Where pip put the package."""
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "my_policies.py"):
        (source / name).write_text((PACKAGE / name).read_text())
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--target", target, source]
    subprocess.run(command, check=True)
    return target


@pytest.fixture
def third_party(installed, monkeypatch):
    monkeypatch.syspath_prepend(installed)
    policies.third_party_policies.cache_clear()
    yield
    policies.third_party_policies.cache_clear()


def test_readme_shows_the_package():
    readme = (ROOT / "README.md").read_text()
    source = (PACKAGE / "my_policies.py").read_text()
    assert source.partition('"""\n\n')[2] in readme
    assert 'entry_points={"cake_vllm.policies": ["value-norm = my_policies:ValueNorm"]}' in readme


def test_listed(third_party):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    import cake_vllm

    cake_vllm.register()
    assert "value-norm" in policies.policy_names()
    assert "value-norm" in EngineArgs.add_cli_args(FlexibleArgumentParser()).format_help()


def test_a_taken_name_is_refused(third_party, monkeypatch):
    monkeypatch.setitem(policies._POLICIES, "value-norm", "somewhere:Else")
    policies.third_party_policies.cache_clear()
    with pytest.raises(ValueError, match="'value-norm' of my_policies:ValueNorm is taken"):
        policies.policy_names()


@pytest.mark.engine
def test_served(third_party, start_engine, text_ids):
    engine: Engine = start_engine(kv_eviction="value-norm", kv_eviction_budget=100)
    (tokens,) = engine.generate([text_ids[:400]], 4)
    assert len(tokens) == 4
    stats = engine.stats()
    assert stats["requests"] == 1
    assert stats["freed_blocks"] > 0
    assert engine.is_idle()
