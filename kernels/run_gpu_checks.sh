#!/usr/bin/env bash
# Everything that shows the kernels right and fast on this GPU: their unit tests on the GPU, the tests that need one, and a
# short benchmark (arguments go to it; `--sections ...`). PYTHON chooses the interpreter, default the checkout's environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-.venv/bin/python}"
"$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "run_gpu_checks.sh needs a CUDA device")'

failed=()
step() { # step NAME COMMAND...
    local name="$1"
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

step "unit tests of the kernels" "$PYTHON" -m pytest -q -p no:cacheprovider tests/unit/kernels
step "lightning attention on the GPU" "$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu/test_lightning_attention.py
step "benchmark" "$PYTHON" -m m1_kernels.benchmark --quick "$@"

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
