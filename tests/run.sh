#!/usr/bin/env bash
# Sets up and runs everything that must pass: formatting, lint, types, and the tests on both of vLLM's model runners.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
deploy/setup.sh >/dev/null
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/python -m pytest -c pyproject.toml tests "$@"
.venv/bin/python -m pytest -c pyproject.toml tests --runner v2 -m engine "$@"
