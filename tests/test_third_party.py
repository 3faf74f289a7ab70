"""A policy from another distribution: installed, listed and served."""

import pytest
from conftest import POLICY_PACKAGE, ROOT
from engine import Engine

from cake_vllm import policies


@pytest.fixture
def third_party(policy_package, monkeypatch):
    monkeypatch.syspath_prepend(policy_package)
    policies.third_party_policies.cache_clear()
    yield
    policies.third_party_policies.cache_clear()


def test_the_documentation_shows_the_package():
    page = (ROOT / "docs" / "writing-a-policy.md").read_text()
    assert (POLICY_PACKAGE / "my_policies.py").read_text().partition('"""\n\n')[2] in page
    entry = 'entry_points={"cake_vllm.policies": ["value-norm = my_policies:ValueNorm"]}'
    assert entry in page
    assert entry in (POLICY_PACKAGE / "setup.py").read_text()


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
