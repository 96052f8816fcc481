#!/usr/bin/env bash
# Every rank of the 456B layouts, and its layers from 8K to a million tokens, on one H200; about eight minutes in all.
#   bash benchmarks/run_gpu_long_context.sh [any_rank_32k] [layers] [any_rank_1m]
# Without arguments all three. OUT: folder of the results (default benchmarks/results); LIMIT_S: seconds for all parts together.
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-benchmarks/results}
LIMIT_S=${LIMIT_S:-570}
PYTHON=${PYTHON:-python}
export CUDA_DEVICE_MAX_CONNECTIONS=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"
failed=0

# any_rank NAME RANKS SECONDS_PER_RANK ROUNDS: one rank of each distinct stage, so many in all.
any_rank() {
  local left=$(((LIMIT_S - SECONDS - 10) / $2))
  "$PYTHON" -m benchmarks.any_rank --config examples/configs/m1_456b.yaml --config "examples/configs/m1_456b_$1.yaml" \
    --world-size 512 --micro-batches 4 --rounds "$4" --time-limit-s $((left < $3 ? left : $3)) \
    --output "$OUT/any_rank_$1.json" || failed=1
}

layers() {
  local left=$((LIMIT_S - SECONDS - 10)) own=190
  "$PYTHON" -m benchmarks.long_context --time-limit-s $((left < own ? left : own)) --resume \
    --output "$OUT/long_context.json" || failed=1
}

[ $# -gt 0 ] || set -- any_rank_32k layers any_rank_1m
for part in "$@"; do
  echo "== $part at $SECONDS s"
  case $part in
    any_rank_32k) any_rank 32k_512gpu 3 70 3 ;;
    layers) layers ;;
    any_rank_1m) any_rank 1m_512gpu 3 100 1 ;;
    *) echo "no part $part: any_rank_32k, layers, any_rank_1m" >&2; exit 2 ;;
  esac
done
echo "== done at $SECONDS s"
exit $failed
