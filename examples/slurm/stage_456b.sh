#!/usr/bin/env bash
# What every 456B job does once Slurm has started it; pretrain_456b.sbatch, continual_456b.sbatch, context_456b.sbatch and
# rl_456b.sbatch set STAGE and REQUEUE_AFTER_S and say how they are used. It runs in the checkout, on the first node of the job.
set -euo pipefail
STAGE="${STAGE:?start pretrain_456b.sbatch, continual_456b.sbatch, context_456b.sbatch or rl_456b.sbatch}"
GPUS_PER_NODE="${GPUS_PER_NODE:-8}"
NODES="${SLURM_JOB_NUM_NODES:-${NODES:-32}}"
WORLD_SIZE=$((NODES * GPUS_PER_NODE))
RUN="${RUN:-runs/m1_456b_${STAGE}}"
PYTHON="${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"

source examples/stages_456b.sh
DATA_ARGS=(--data.tokenizer "${TOKENIZER:-data/tokenizer}")
OUTPUT_ARGS=(
    --checkpoint.save "$RUN/checkpoints"
    --logging.dir "$RUN/logs"
)
if [[ "$STAGE" == rl ]]; then
    OUTPUT_ARGS+=(--rl.journal "$RUN/journal")
else
    DATA_ARGS+=(--data.train "[${DATA:-data/train}]" --data.valid "[${VALID:-data/valid}]")
fi
if [[ -e "$RUN/checkpoints/latest" ]]; then
    OUTPUT_ARGS+=(--checkpoint.load "$RUN/checkpoints")
elif [[ -n "$LOAD" ]]; then
    OUTPUT_ARGS+=(--checkpoint.load "$LOAD" --checkpoint.weights_only true)
fi
COMMAND=("$PYTHON" -m megatron_m1 "$([[ "$STAGE" == rl ]] && echo rl || echo pretrain)" "${CONFIG_ARGS[@]}" "${DATA_ARGS[@]}" "${OUTPUT_ARGS[@]}" "$@")
LAUNCH_ARGS=(
    --nodes "$NODES"
    --ntasks-per-node "$GPUS_PER_NODE"
    --kill-on-bad-exit=1
)

if [[ "${DRY_RUN:-0}" == 1 ]]; then
    printf '%q ' srun "${LAUNCH_ARGS[@]}" "${COMMAND[@]}"
    echo
    exec "${COMMAND[@]}" --dry-run --world-size "$WORLD_SIZE"
fi

MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
export MASTER_ADDR MASTER_PORT WORLD_SIZE
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
# Megatron-Core asks for one connection with sequence parallelism, so that communication starts in launch order.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# One Slurm task per GPU, without torchrun between them: SIGTERM reaches the ranks themselves, which then save and exit.
# shellcheck disable=SC2016 # expanded by each task
srun "${LAUNCH_ARGS[@]}" bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' rank "${COMMAND[@]}" &
step=$!
time_is_up=0
requeue=""
# shellcheck disable=SC2329 # called by the trap
stop_and_requeue() {
    time_is_up=1
    kill -TERM "$step" # srun forwards it to every task
    # A step or a generation batch may outlast the job: what is lost with it is what came after the last checkpoint, and in RL not
    # even that, since finished samples are on disk.
    (sleep "$REQUEUE_AFTER_S" && scontrol requeue "$SLURM_JOB_ID") &
    requeue=$!
}
trap stop_and_requeue USR1
status=0
wait "$step" || status=$?
if [[ "$time_is_up" == 1 ]]; then
    status=0
    wait "$step" || status=$? # the first wait was ended by the signal
    kill "$requeue" 2>/dev/null || true
    if [[ "$status" == 0 ]]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"
