#!/usr/bin/env bash
# Set up .venv if need be, then lint, type-check, compile the Triton kernels (no GPU needed) and test. Arguments go to pytest, e.g. `tests/run.sh tests/unit/data`.
# Every step runs; the exit code is non-zero if any failed. The tests run on the CPU, GPU or not; without arguments and where
# there is a GPU, tests/gpu/run.sh follows.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh

failed=()
step() { # step NAME COMMAND...
    local name="$1"
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
step "ruff check" "$PYTHON" -m ruff check .
step "ruff format" "$PYTHON" -m ruff format --check .
step "mypy" "$PYTHON" -m mypy megatron_m1 kernels
step "compile for sm_80, sm_90, sm_100" env -u TRITON_INTERPRET "$PYTHON" -m m1_kernels.compile_check
step "pytest" env CUDA_VISIBLE_DEVICES= "$PYTHON" -m pytest -q "$@"
if (($# == 0)) && "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    step "pytest on the GPU" env PYTHON="$PYTHON" bash tests/gpu/run.sh
fi

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
