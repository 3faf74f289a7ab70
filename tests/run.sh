#!/usr/bin/env bash
# Sets up and runs what must pass: formatting, lint, types, and the tests on both of vLLM's model runners. With --all,
# more of the same, and a few on the next vLLM release. `--vllm 0.33.0` (first) runs the engine's tests on that release's
# Python files. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
deploy/setup.sh >/dev/null

# A file's tests share engines: each worker takes whole files. More workers than four would wait for the longest one.
cores=$(nproc)
workers=$((cores < 4 ? cores : 4))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / workers))}
status=0
suite() {
    "$python" -m pytest -c pyproject.toml tests --numprocesses "$workers" --dist loadfile --no-loadscope-reorder \
        --durations 20 "$@" || status=$?
}

python=.venv/bin/python
if [ "${1:-}" = --vllm ]; then
    python=$("$python" tests/contract.py "$2")
    suite "${@:3}" -m engine
    exit "$status"
fi
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
suite "$@"
suite --runner v2 -m engine "$@"
if [[ " $* " == *" --all "* ]]; then
    python=$("$python" tests/contract.py)
    suite "$@" -m contract
fi
exit "$status"
