"""The pages: they build, their links lead somewhere, and they say what the code says."""

import ast
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from conftest import ROOT
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cake_vllm import policies
from cake_vllm.integration.metrics import EvictionPromMetrics

DOCS = ROOT / "docs"


class Loaded(HTMLParser):
    """What a browser fetches to show a page."""

    def __init__(self):
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("script", "img", "iframe") or (tag == "link" and attrs.get("rel") != "canonical"):
            self.urls.append(attrs.get("src") or attrs.get("href") or "")


def test_the_site_is_built_from_this_repository_alone(tmp_path):
    """A link to a page, file or heading that is not there fails. Nothing is fetched, to build it or to read it."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", DOCS / "site" / "mkdocs.yml"]
    env = {
        **os.environ,
        "NO_MKDOCS_2_WARNING": "1",
        "http_proxy": "http://0.0.0.0:9",
        "https_proxy": "http://0.0.0.0:9",
    }
    done = subprocess.run([*command, "--site-dir", tmp_path], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert {path.stem for path in DOCS.glob("*.md")} <= {page.stem for page in pages}
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text())
        assert not [url for url in loaded.urls if "//" in url], page
    assert (tmp_path / "benchmarks" / "results" / "serve_text.png").exists()


@pytest.mark.parametrize("page", ["README.md", "examples/README.md", "patches/README.md", "benchmarks/README.md"])
def test_links_of_pages_that_are_read_in_the_repository(page):
    file = ROOT / page
    for target, anchor in re.findall(r"\]\((?!\w+:)([^()\s#]+)(#[^()\s]*)?\)", file.read_text()):
        linked = file.parent / target
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor[1:] in {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in headings}


def test_every_series_is_documented():
    made = {}

    def noted(cls):
        def make(name, documentation, labelnames, **kwargs):
            made[f"{name}_total" if cls is Counter else name] = cls.__name__.lower(), labelnames[1:]
            return cls(name, documentation, labelnames, registry=CollectorRegistry(), **kwargs)

        return make

    config = SimpleNamespace(kv_transfer_config=None)
    EvictionPromMetrics(config, {cls: noted(cls) for cls in (Counter, Gauge, Histogram)}, ["engine"], {0: ["0"]})
    rows = re.findall(r"^\| `(vllm:\w+)` \| (\w+)(?:; ([^|]*))? \|", (DOCS / "metrics.md").read_text(), re.MULTILINE)
    assert {name: (kind, re.findall(r"`(\w+)`", labels)) for name, kind, labels in rows} == made


def test_every_series_that_the_pages_name_exists():
    documented = set(re.findall(r"^\| `(vllm:\w+)`", (DOCS / "metrics.md").read_text(), re.MULTILINE))
    for page in DOCS.glob("*.md"):
        assert set(re.findall(r"vllm:kv_eviction_\w+", page.read_text())) <= documented, page


def test_the_table_of_models_is_what_the_script_prints():
    command = [sys.executable, ROOT / "benchmarks" / "models.py"]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert printed in (DOCS / "models.md").read_text()


def test_every_method_is_documented():
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| [^|]+ \|$", (DOCS / "policies.md").read_text(), re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([a-z-]+)`", row)} - {"--kv-eviction"} == set(
        policies._POLICIES
    )


def sentences() -> set[str]:
    """What the package may print, with `…` where something is put in."""
    found = set()
    for file in (ROOT / "cake_vllm").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(re.sub(r"%[a-z]|\{+[\w.\[\]]*\}+", "…", node.value))
    return found


#: Said by others.
NOT_OURS = ("unrecognized arguments: --kv-eviction", "To serve at least one request with the model's max seq len")


def test_symptoms_are_what_the_code_says():
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| [^|]+ \|$", (DOCS / "operating.md").read_text(), re.MULTILINE)
    quoted = {text for row in rows for text in re.findall(r"`([^`]+ [^`]+)`", row)} - set(NOT_OURS)
    assert len(quoted) > 30
    said = "\n".join(sentences())
    assert not {text for text in quoted if text not in said and not text.startswith(("--", '"'))}
