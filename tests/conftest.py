"""Options and fixtures of the whole suite."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        action="append",
        default=None,
        type=Path,
        help="folder of recorded official outputs (cake_*.npz); may be given several times",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        folders = metafunc.config.getoption("--golden-dir") or []
        files = [file for folder in folders for file in sorted(folder.glob("cake_*.npz"))]
        if files:
            metafunc.parametrize("case", files, ids=[file.stem for file in files], indirect=True)
        else:
            reason = "no cake_*.npz: pass --golden-dir DIR"
            metafunc.parametrize("case", [pytest.param(None, marks=pytest.mark.skip(reason=reason))], indirect=True)
