#!/usr/bin/env bash
# Ranks on the GPUs of one machine, over NCCL: tests, the table of layouts, attention with its messages and without, training steps.
#   bash benchmarks/run_multi_gpu.sh [context] [equality] [train] [tests] [tests_layouts] [train_LAYOUT ...]
# Without arguments the first four, about eight minutes on 4 GPUs (estimated). train: all layouts named in TRAIN, below.
# GPUS: how many (default 4); OUT: folder of the results (default benchmarks/results); LIMIT_S: seconds for all parts together.
# A part that fails or passes its time is told at the end, and the exit code is 1.
cd "$(dirname "$0")/.." || exit 1
GPUS=${GPUS:-4}
OUT=${OUT:-benchmarks/results}
LIMIT_S=${LIMIT_S:-590}
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=1 PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} CUBLAS_WORKSPACE_CONFIG=:4096:8 NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
TRAIN=(cp4 cp2_tp2 cp2_ep2)
declare -A LAYOUTS=(
  [cp4]=""
  [cp4_gather]="--parallel.context_lightning all_gather --parallel.context_softmax all_gather"
  [cp2_tp2]="--parallel.context 2 --parallel.tensor 2"
  [cp2_ep2]="--parallel.context 2 --parallel.expert 2 --training.global_batch 2"
  [cp4_256k]="--training.seq_length 262144 --training.steps 3"
  [cp4_ep4_512k]="--parallel.expert 4 --training.seq_length 524288 --training.steps 2"
)
mkdir -p "$OUT"
failed=()

# part NAME SECONDS COMMAND...: output to $OUT/NAME.log, its end to here; ended after SECONDS, or what is left of LIMIT_S.
# (torchrun takes up to 30 s to end ranks that wait for others.)
part() {
  local name=$1 left=$((LIMIT_S - SECONDS - 5)) own=$2
  shift 2
  local limit=$((left < own ? left : own))
  if ((limit < 5)); then
    echo "== $name: no time left"
    failed+=("$name")
    return
  fi
  local begun=$SECONDS
  timeout -k 35 "$limit" "$@" >"$OUT/$name.log" 2>&1
  local code=$?
  echo "== $name: exit code $code after $((SECONDS - begun)) of at most $limit s"
  ((code == 0)) || failed+=("$name")
}

# pytests NAME SECONDS FILES...: counts also where the time was up.
pytests() {
  local name=$1
  part "$name" "$2" "$PYTHON" -m pytest -v --tb=short -p no:cacheprovider -n 0 --timeout=150 "${@:3}"
  [ -e "$OUT/$name.log" ] || return
  for word in PASSED FAILED SKIPPED ERROR; do echo -n "$(grep -cE "^tests.* $word" "$OUT/$name.log") $word  "; done
  echo
  grep -E "^(FAILED|ERROR|SKIPPED)" "$OUT/$name.log" | cut -c1-200 | tail -20
}

tests() {
  pytests multi_gpu_tests 180 tests/multi_gpu tests/distributed/test_ring_attention.py \
    tests/distributed/test_context_overlap.py tests/distributed/test_message_order.py
}

tests_layouts() { pytests multi_gpu_layouts 240 tests/distributed/test_context_parallel.py; }

equality() {
  part multi_gpu_equality 150 "$PYTHON" -m megatron_m1 equality --ranks "$GPUS" --layout-limit-s 60 --time-limit-s 135 \
    --only ${ONLY:-"TP2+SP" "PP2, VPP2" "TP2xEP2" "CP4" "CP2xTP2" "CP2xPP2" "CP2xDP2" "CP2xEP2"}
  cut -c1-130 "$OUT/multi_gpu_equality.log" | grep -E "^(TP|PP|DP|EP|ETP|CP|layout|recompute|all within|failed)" | grep -v "left out: GPUs"
  return 0
}

context() {
  local ranks=(1)
  ((GPUS < 2)) || ranks+=(2)
  ((GPUS < 4)) || ranks+=(4)
  part context_gpus 175 "$PYTHON" -m benchmarks.context_gpus --ranks "${ranks[@]}" --output "$OUT/context_gpus.json"
  grep -E "^(link|lightning|softmax|[0-9]+ rows)" "$OUT/context_gpus.log" | cut -c1-220
}

# train_layout NAME: steps of benchmarks/configs/context_4gpu.yaml, metrics in $OUT/train_NAME/metrics.jsonl
train_layout() {
  local layout
  read -ra layout <<<"${LAYOUTS[$1]}"
  # Core asks for one connection with sequence parallelism, so that communication starts in launch order.
  [[ $1 != *tp* ]] || export CUDA_DEVICE_MAX_CONNECTIONS=1
  part "train_$1" 90 "$PYTHON" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node "$GPUS" -m megatron_m1 pretrain \
    --config benchmarks/configs/context_4gpu.yaml --logging.dir "$OUT/train_$1" "${layout[@]}"
  unset CUDA_DEVICE_MAX_CONNECTIONS
  grep -E "ranks on|^step|[Ee]rror" "$OUT/train_$1.log" | cut -c1-250 | tail -8
}

[ $# -gt 0 ] || set -- context equality train tests
for name in "$@"; do
  case $name in
    tests | tests_layouts | equality | context) "$name" ;;
    train) for layout in "${TRAIN[@]}"; do train_layout "$layout"; done ;;
    train_*)
      [[ -v LAYOUTS[${name#train_}] ]] || { echo "no layout ${name#train_}: ${!LAYOUTS[*]}" >&2; exit 2; }
      train_layout "${name#train_}"
      ;;
    *) echo "no part $name: context, equality, train, tests, tests_layouts, train_LAYOUT" >&2; exit 2 ;;
  esac
done
if ((${#failed[@]})); then
  echo "== failed: ${failed[*]}; $SECONDS s in all"
  exit 1
fi
echo "== all passed; $SECONDS s in all"
