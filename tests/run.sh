#!/usr/bin/env bash
# Sets up and runs what must pass: formatting, lint, types, and the tests on both of vLLM's model runners, which share
# the cores. With --all, more of the same. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
deploy/setup.sh >/dev/null
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy

cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + 1) / 2))}
log=$(mktemp)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -f "$log"' EXIT
.venv/bin/python -m pytest -c pyproject.toml tests --durations=20 --runner v2 -m engine "$@" >"$log" 2>&1 &
status=0
.venv/bin/python -m pytest -c pyproject.toml tests --durations=20 "$@" || status=$?
wait $! || status=$?
cat "$log"
exit "$status"
