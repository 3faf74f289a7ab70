"""What the tests on a GPU share; with ``--dry-run`` they run on the CPU."""

import pytest


@pytest.fixture(scope="session")
def is_dry(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--dry-run")


@pytest.fixture
def device(is_dry) -> str:
    return "cpu" if is_dry else "cuda"


@pytest.fixture(scope="session")
def served_model(request: pytest.FixtureRequest, is_dry) -> str:
    """The model of the engines: ``--model``."""
    given = request.config.getoption("--model")
    return given or request.getfixturevalue("tiny_model" if is_dry else "model_dir")
