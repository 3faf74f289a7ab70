#!/usr/bin/env bash
# Sets up and runs what must pass: formatting, lint, types, and the tests on both of vLLM's model runners, as many at a
# time as there are cores. With --all, more of the same, and a few on the next vLLM release. `--vllm 0.33.0` (first) runs
# the engine's tests on that release's Python files. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
deploy/setup.sh >/dev/null

python=.venv/bin/python
cores=$(nproc)
workers=$((cores < 4 ? cores : 4))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / workers))}
status=0
run() { "$@" -n "$workers" --dist loadfile --durations=20 || status=$?; }
suite() { "$python" -m pytest -c pyproject.toml tests "$@"; }

if [ "${1:-}" = --vllm ]; then
    python=$("$python" tests/contract.py "$2")
    run suite "${@:3}" -m engine
    exit "$status"
fi
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
run suite "$@"
run suite "$@" --runner v2 -m engine
if [[ " $* " == *" --all "* ]]; then
    python=$("$python" tests/contract.py)
    run suite "$@" -m contract
fi
exit "$status"
