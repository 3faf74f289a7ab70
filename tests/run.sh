#!/usr/bin/env bash
# Sets up and runs what must pass: formatting, lint, types, and the tests on both of vLLM's model runners, which share
# the cores. With --all, more of the same, and a few on the next vLLM release. `--vllm 0.33.0` (first) runs the engine's
# tests on that release's Python files. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
deploy/setup.sh >/dev/null

cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + 1) / 2))}
suite() { "$python" -m pytest -c pyproject.toml tests --durations=20 "$@"; }

python=.venv/bin/python
if [ "${1:-}" = --vllm ]; then
    python=$("$python" tests/contract.py "$2")
    suite "${@:3}" -m engine
    exit
fi
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy

log=$(mktemp)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -f "$log"' EXIT
suite --runner v2 -m engine "$@" >"$log" 2>&1 &
status=0
suite "$@" || status=$?
wait $! || status=$?
cat "$log"
if [[ " $* " == *" --all "* ]]; then
    python=$("$python" tests/contract.py)
    suite "$@" -m contract || status=$?
fi
exit "$status"
