#!/usr/bin/env bash
# Set up .venv if need be, then lint, type-check, compile the Triton kernels (no GPU needed) and test. Arguments go to pytest,
# e.g. `tests/run.sh tests/unit/data`, `tests/run.sh -n 0 --pdb` (without -n 0 the tests run in a process per core).
# Where CI=true, root and apt-get allow it, bubblewrap is installed for the sandbox suite; a line at the end says if that did not run.
# Every step runs; the exit code is non-zero if any failed. The tests run on the CPU, GPU or not; without arguments and where
# there is a GPU, tests/gpu/run.sh follows.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh
# shellcheck source=tests/bubblewrap.sh
source tests/bubblewrap.sh
install_bubblewrap

failed=()
step() { # step NAME COMMAND...
    local name="$1"
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

background=()
logs="$(mktemp -d)"
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$logs"' EXIT
begin() { # begin NAME COMMAND...: a step that `finish` waits for and prints
    local name="$1"
    shift
    "$@" >"$logs/$name" 2>&1 &
    background+=("$!" "$name")
}
finish() {
    set -- "${background[@]}"
    while (($#)); do
        step "$2" printed "$1" "$logs/$2"
        shift 2
    done
}
printed() { # printed PROCESS LOG
    local status=0
    wait "$1" || status=$?
    cat "$2"
    return "$status"
}

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
begin "mypy" "$PYTHON" -m mypy megatron_m1 kernels
for target in 80 90 100; do
    begin "compile for sm_$target" env -u TRITON_INTERPRET "$PYTHON" -m m1_kernels.compile_check --targets "$target"
done
step "ruff check" "$PYTHON" -m ruff check .
step "ruff format" "$PYTHON" -m ruff format --check .
finish
workers="$(env -u OMP_NUM_THREADS nproc)" # at most 8, each with ranks of its own
distribute=(--numprocesses "$((workers < 8 ? workers : 8))" --dist loadfile --no-loadscope-reorder)
step "pytest" env CUDA_VISIBLE_DEVICES= "$PYTHON" -m pytest -q "${distribute[@]}" "$@"
if (($# == 0)) && "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    step "pytest on the GPU" env PYTHON="$PYTHON" bash tests/gpu/run.sh
fi

report_sandbox "$PYTHON"
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
