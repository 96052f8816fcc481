#!/usr/bin/env bash
# Everything that shows the kernels right and fast on this GPU: their unit tests on the GPU and the tests that need one, side by
# side since they mostly wait for the compiler; those of large tensors, which need the GPU alone; and a short benchmark (arguments go
# to it; `--sections ...`). PYTHON chooses the interpreter, default the checkout's environment. TESTS_ONLY=1: no benchmark.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-.venv/bin/python}"
"$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "run_gpu_checks.sh needs a CUDA device")'

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
logs="$(mktemp -d)"
trap 'rm -rf "$logs"' EXIT
failed=()
names=()
pids=()

tests() { "$PYTHON" -m pytest -q -p no:cacheprovider --durations=3 "$@"; }

beside() { # beside PYTEST-ARGUMENTS...: start them and go on
    tests "$@" >"$logs/${#names[@]}" 2>&1 &
    names+=("$*")
    pids+=($!)
}

finish() { # wait for what `beside` started
    local i
    for i in "${!names[@]}"; do
        wait "${pids[i]}" || failed+=("${names[i]}")
        echo "== ${names[i]}"
        cat "$logs/$i"
    done
}

for width in D256 D128 D96 D64; do
    for dtype in fp32 bf16 fp16; do
        beside tests/gpu/test_lightning_widths.py -k "$width and $dtype"
    done
done
beside tests/gpu/test_lightning_attention.py -k "dense or mutants"
beside tests/gpu/test_lightning_attention.py -k packed
beside tests/gpu/test_lightning_bits.py -k "alone or resumed or horizon"
beside tests/gpu/test_lightning_bits.py -k "not (alone or resumed or horizon)"
beside tests/gpu/test_lightning_backward.py
beside tests/gpu/test_lightning_graphs.py
beside tests/gpu/test_lightning_silu.py
beside tests/gpu/test_norms.py
beside tests/gpu/test_softmax_attention.py
beside tests/unit/kernels/test_triton_lightning.py -k "dense or widths or slopes"
beside tests/unit/kernels/test_triton_lightning.py -k "not (dense or widths or slopes)"
beside tests/unit/kernels --ignore=tests/unit/kernels/test_triton_lightning.py
finish
echo "== large tensors"
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True tests tests/gpu/test_lightning_million.py tests/gpu/test_lightning_attention.py \
    -k "million or 31_bits" || failed+=("large tensors")
if [[ -z "${TESTS_ONLY:-}" ]]; then
    echo "== benchmark"
    "$PYTHON" -m m1_kernels.benchmark --quick "$@" || failed+=("benchmark")
fi

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
