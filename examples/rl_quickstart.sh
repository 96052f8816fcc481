#!/usr/bin/env bash
# A small MiniMax-M1 that reinforcement learning teaches to sort digits, from a bare machine with Python 3.12:
#   bash examples/rl_quickstart.sh
# A supervised start on demonstrations, half of them wrong, then CISPO on verified rewards, on 2 CPU processes, or on up to 2
# GPUs where there are any. Everything lands in runs/rl_quickstart; a rerun starts over. Environment (for short trials):
#   RL_QUICKSTART_TASK        sort, or reasoning_gym: puzzles about families, verified by that package
#   RL_QUICKSTART_OUT         output folder (runs/rl_quickstart; runs/rl_reasoning_gym)
#   RL_QUICKSTART_RANKS       processes
#   RL_QUICKSTART_DEMONSTRATIONS   lines that the start learns from (20000)
#   RL_QUICKSTART_START       steps of the supervised start (300)
#   RL_QUICKSTART_STEPS       generation batches of CISPO (60; 40); 0: only the start, for the rl command by hand
# Arguments go to the rl command, e.g. --rl.algorithm grpo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${RL_QUICKSTART_TASK:-sort}" in
    sort) CONFIG=examples/configs/rl_tiny_cpu.yaml OUT=runs/rl_quickstart VOCABULARY=257 STEPS=60 ;;
    reasoning_gym) CONFIG=examples/configs/rl_reasoning_gym_cpu.yaml OUT=runs/rl_reasoning_gym VOCABULARY=640 STEPS=40 ;;
    *)
        echo "error: RL_QUICKSTART_TASK=$RL_QUICKSTART_TASK must be sort or reasoning_gym." >&2
        exit 2
        ;;
esac
OUT="${RL_QUICKSTART_OUT:-$OUT}"
if [[ -d "$OUT" && ! -e "$OUT/.rl_quickstart" ]]; then
    echo "error: $OUT exists and is not from an rl_quickstart; set RL_QUICKSTART_OUT to another folder." >&2
    exit 1
fi
# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh

DEMONSTRATIONS="${RL_QUICKSTART_DEMONSTRATIONS:-20000}"
START="${RL_QUICKSTART_START:-300}"
STEPS="${RL_QUICKSTART_STEPS:-$STEPS}"
read -r GPUS CORES < <("$PYTHON" -c 'import os, torch; print(torch.cuda.device_count(), os.cpu_count())')
RANKS="${RL_QUICKSTART_RANKS:-$((GPUS == 1 || CORES == 1 ? 1 : 2))}"
# More threads than cores would wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((CORES > RANKS ? CORES / RANKS : 1))}"

stage() {
    printf '\n== %s  [%d:%02d]\n' "$1" $((SECONDS / 60)) $((SECONDS % 60))
}

launch() { # launch COMMAND ARGUMENTS...: `python -m megatron_m1 COMMAND` on every rank
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$RANKS" -m megatron_m1 "$@"
}

SECONDS=0
echo "$RANKS processes on $( ((GPUS)) && echo GPU || echo CPU), output in $OUT"
mkdir -p "$OUT"
touch "$OUT/.rl_quickstart"
rm -rf "${OUT:?}"/{start,checkpoints,log,journal}

stage "demonstrations: half of them wrong, no held-out prompt among them"
"$PYTHON" tools/rl_demonstrations.py --config "$CONFIG" --output "$OUT/demonstrations.jsonl" \
    --count "$DEMONSTRATIONS" --right-share 0.5
"$PYTHON" tools/train_tokenizer.py --input "$OUT/demonstrations.jsonl" --vocab-size "$VOCABULARY" --output "$OUT/tokenizer" --overwrite
"$PYTHON" tools/preprocess_data.py --input "$OUT/demonstrations.jsonl" --tokenizer "$OUT/tokenizer" \
    --output-prefix "$OUT/data" --workers 2 --append-eod --overwrite

stage "supervised start: $START steps"
launch pretrain --config "$CONFIG" --training.steps "$START" --training.micro_batch 8 \
    --optimizer.lr 4e-3 --optimizer.eps 1e-8 --schedule.kind cosine --schedule.warmup_steps 10 \
    --moe.aux_loss micro_batch --data.train "[$OUT/data]" --data.tokenizer "$OUT/tokenizer" \
    --checkpoint.load null --checkpoint.weights_only false --checkpoint.save "$OUT/start" --checkpoint.every_steps 0 \
    --logging.dir null --logging.every_steps 50

if ((STEPS == 0)); then
    stage "done"
    echo "start         $OUT/start/$(<"$OUT/start/latest")"
    exit 0
fi
stage "CISPO: $STEPS generation batches"
launch rl --config "$CONFIG" --training.steps "$STEPS" --data.tokenizer "$OUT/tokenizer" \
    --checkpoint.load "$OUT/start" --checkpoint.weights_only true --checkpoint.save "$OUT/checkpoints" \
    --logging.dir "$OUT/log" --rl.journal "$OUT/journal" "$@"

stage "done"
"$PYTHON" tools/plot_rl.py "$OUT/log" --output "$OUT/reward.png"
echo "reward curve  $OUT/reward.png"
echo "metrics       $OUT/log/metrics.jsonl (or: tensorboard --logdir $OUT/log)"
echo "rollouts      $OUT/log/rollouts"
echo "samples       $OUT/journal"
echo "checkpoint    $OUT/checkpoints/$(<"$OUT/checkpoints/latest")"
