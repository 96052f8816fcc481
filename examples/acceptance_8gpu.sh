#!/usr/bin/env bash
# Acceptance on 8 GPUs (one node) or 64 (8 nodes): NCCL, bf16, communication overlapped.
#   bash examples/acceptance_8gpu.sh
#   NNODES=8 NODE_RANK=3 MASTER_ADDR=node0 bash examples/acceptance_8gpu.sh   # on every node, RUN on a shared disk
#   DRY_RUN=1 [NNODES=8] bash examples/acceptance_8gpu.sh                     # prints and validates, no GPU
# 1. every layout below trained for 30 steps in bf16: losses within what another seed changes, tokens/s and MFU; 2. save in
# one layout, resume in another; 3. the fp32 equality table of one node's layouts. The first node compares and makes the
# table; a failure there is told at the end, so that the other nodes never wait for runs that it has given up.
# NOT RUN AT THIS SCALE YET: only its dry run has been. Please report what it prints.
# Environment: NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, RUN (output folder), PYTHON. Further arguments are passed on
# to every training run, e.g. --data.mock false --data.train '[data/train]'.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NNODES="${NNODES:-1}"
GPUS_PER_NODE=8
NODE_RANK="${NODE_RANK:-0}"
WORLD_SIZE=$((NNODES * GPUS_PER_NODE))
RUN="${RUN:-runs/acceptance_${WORLD_SIZE}gpu}"
PYTHON="${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"
LAUNCH_ARGS=(
    --nnodes "$NNODES"
    --nproc-per-node "$GPUS_PER_NODE"
    --node-rank "$NODE_RANK"
    --master-addr "${MASTER_ADDR:-localhost}"
    --master-port "${MASTER_PORT:-29500}"
)
declare -A LAYOUTS=(
    [dp]=""
    [tp8]="--parallel.tensor 8"
    [ep8]="--parallel.expert 8"
    [pp4_vpp2]="--parallel.pipeline 4 --parallel.virtual_pipeline 2"
    [tp2_pp2_ep4]="--parallel.tensor 2 --parallel.pipeline 2 --parallel.expert 4"
    [pp2_ep2_etp2]="--parallel.tensor 2 --parallel.pipeline 2 --parallel.expert 2 --parallel.expert_tensor 2"
    # `auto` would gather sequences of this length in both.
    [cp8]="--parallel.context 8 --parallel.context_lightning ring --parallel.context_softmax ring"
    [cp2_tp2_ep4]="--parallel.context 2 --parallel.tensor 2 --parallel.expert 4 --parallel.context_lightning all_gather --parallel.context_softmax all_gather"
)
OTHERS=(tp8 ep8 pp4_vpp2 tp2_pp2_ep4 pp2_ep2_etp2 cp8 cp2_tp2_ep4) # than dp
EXTRA_ARGS=("$@")
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
# Megatron-Core asks for one connection with sequence parallelism, so that communication starts in launch order.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

train() { # train NAME ARGUMENTS...
    local name="$1"
    shift
    local arguments=(--config examples/configs/acceptance.yaml --logging.dir "$RUN/$name" "$@" "${EXTRA_ARGS[@]}")
    echo "== $name"
    if [[ "${DRY_RUN:-0}" == 1 ]]; then
        printf '%q ' "$PYTHON" -m torch.distributed.run "${LAUNCH_ARGS[@]}" -m megatron_m1 pretrain "${arguments[@]}"
        echo
        "$PYTHON" -m megatron_m1 pretrain --dry-run --world-size "$WORLD_SIZE" "${arguments[@]}"
    else
        "$PYTHON" -m torch.distributed.run "${LAUNCH_ARGS[@]}" -m megatron_m1 pretrain "${arguments[@]}"
    fi
}

failed=()
first_node() { # first_node NAME COMMAND...: run on the first node only, and not in a dry run; collects failures
    local name="$1"
    shift
    if [[ "${DRY_RUN:-0}" == 1 ]]; then
        printf '%q ' "$@"
        echo
    elif [[ "$NODE_RANK" == 0 ]]; then
        "$@" || failed+=("$name")
    fi
}

if [[ -e "$RUN" && "${DRY_RUN:-0}" != 1 && "$NODE_RANK" == 0 ]]; then
    echo "$RUN exists; move it away or set RUN to another folder." >&2
    exit 2
fi

for name in dp "${OTHERS[@]}"; do
    read -ra layout <<<"${LAYOUTS[$name]}"
    train "$name" "${layout[@]}"
done
train other_seed --training.seed 4321
first_node "layouts" "$PYTHON" tools/compare_runs.py --reference "$RUN/dp" --band "$RUN/other_seed" \
    "$RUN/dp" "${OTHERS[@]/#/$RUN/}"

read -ra layout <<<"${LAYOUTS[tp2_pp2_ep4]}"
train saved "${layout[@]}" --training.steps 20 --checkpoint.save "$RUN/checkpoints" --checkpoint.every_steps 10
train resumed_same "${layout[@]}" --training.steps 20 --checkpoint.load "$RUN/checkpoints/step_00000010"
for name in ep8 cp8; do
    read -ra layout <<<"${LAYOUTS[$name]}"
    train "resumed_$name" "${layout[@]}" --training.steps 20 --checkpoint.load "$RUN/checkpoints/step_00000010"
done
first_node "resume" "$PYTHON" tools/compare_runs.py --reference "$RUN/saved" --bound 2e-3 --from-step 11 \
    "$RUN"/resumed_{same,ep8,cp8}

echo "== fp32 equality table"
first_node "equality table" "$PYTHON" -m megatron_m1 equality --ranks "$GPUS_PER_NODE"

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "acceptance finished: $RUN"
