#!/usr/bin/env bash
# Pretrain, continually pretrain or lengthen the context of MiniMax-M1 456B with torchrun. Run it on every node:
#   NODE_RANK=0 MASTER_ADDR=node0 DATA=/data/train bash examples/pretrain_456b.sh              # 32 nodes of 8 GPUs
#   NNODES=64 NODE_RANK=3 MASTER_ADDR=node0 STAGE=continual LOAD=/ckpt/m1 bash examples/pretrain_456b.sh
#   NNODES=64 NODE_RANK=0 MASTER_ADDR=node0 STAGE=context_1m bash examples/pretrain_456b.sh
#   DRY_RUN=1 bash examples/pretrain_456b.sh                                                   # anywhere, no GPU
# Environment: STAGE (pretrain|continual|context_32k|context_128k|context_512k|context_1m), LAYOUT (such as 32k_256gpu, see
# stages_456b.sh), NNODES, GPUS_PER_NODE, NODE_RANK, MASTER_ADDR, MASTER_PORT, DATA (prefixes, comma-separated), VALID, TOKENIZER,
# RUN (folder of checkpoints and logs), LOAD (weights to start from; by default those of the stage before), PYTHON. Further
# arguments are passed on, e.g. --training.steps 20.
# A run that finds RUN/checkpoints/latest resumes from it. Not yet run at this scale.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STAGE="${STAGE:-pretrain}"
NNODES="${NNODES:-32}"
GPUS_PER_NODE="${GPUS_PER_NODE:-8}"
NODE_RANK="${NODE_RANK:-0}"
MASTER_ADDR="${MASTER_ADDR:-localhost}"
MASTER_PORT="${MASTER_PORT:-29500}"
RUN="${RUN:-runs/m1_456b_${STAGE}}"
PYTHON="${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"
WORLD_SIZE=$((NNODES * GPUS_PER_NODE))

source examples/stages_456b.sh

LAUNCH_ARGS=(
    --nnodes "$NNODES"
    --nproc-per-node "$GPUS_PER_NODE"
    --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR"
    --master-port "$MASTER_PORT"
)
DATA_ARGS=(
    --data.train "[${DATA:-data/train}]"
    --data.valid "[${VALID:-data/valid}]"
    --data.tokenizer "${TOKENIZER:-data/tokenizer}"
)
OUTPUT_ARGS=(
    --checkpoint.save "$RUN/checkpoints"
    --logging.dir "$RUN/logs"
)
if [[ -e "$RUN/checkpoints/latest" ]]; then
    OUTPUT_ARGS+=(--checkpoint.load "$RUN/checkpoints")
elif [[ -n "$LOAD" ]]; then
    OUTPUT_ARGS+=(--checkpoint.load "$LOAD" --checkpoint.weights_only true)
fi
TRAIN_ARGS=("${CONFIG_ARGS[@]}" "${DATA_ARGS[@]}" "${OUTPUT_ARGS[@]}" "$@")

if [[ "${DRY_RUN:-0}" == 1 ]]; then
    printf '%q ' "$PYTHON" -m torch.distributed.run "${LAUNCH_ARGS[@]}" -m megatron_m1 pretrain "${TRAIN_ARGS[@]}"
    echo
    exec "$PYTHON" -m megatron_m1 pretrain --dry-run --world-size "$WORLD_SIZE" "${TRAIN_ARGS[@]}"
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
# Megatron-Core asks for one connection with sequence parallelism, so that communication starts in launch order.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# How long torchrun waits on SIGTERM for the end of the step (by the estimate over half an hour at 1M) and the checkpoint.
if [[ "$("$PYTHON" -m torch.distributed.run --help)" == *--shutdown-timeout* ]]; then
    LAUNCH_ARGS+=(--shutdown-timeout "${SHUTDOWN_TIMEOUT_S:-5400}")
else
    echo "This torchrun has no --shutdown-timeout: it kills the ranks 30 s after a SIGTERM, before they save. To end a run with a" \
        "checkpoint give it --training.exit_after_s SECONDS." >&2
fi
exec "$PYTHON" -m torch.distributed.run "${LAUNCH_ARGS[@]}" -m megatron_m1 pretrain "${TRAIN_ARGS[@]}"
