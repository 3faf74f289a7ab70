#!/usr/bin/env bash
# The main job on any machine: a server with CAKE on a real model, a long request over HTTP, and what was freed.
set -euo pipefail
cd "$(dirname "$0")/.."
model=$(deploy/setup.sh)
exec .venv/bin/python deploy/demo.py "$model" "$@"
