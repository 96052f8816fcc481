#!/usr/bin/env bash
# The checks that need a GPU, with the Python that is given (PYTHON, default the checkout's environment).
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON="${PYTHON:-.venv/bin/python}"
"$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu "$@"
