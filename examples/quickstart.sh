#!/usr/bin/env bash
# From a bare machine with Python 3.12 to a small MiniMax-M1 that has learned from real text and writes some:
#   bash examples/quickstart.sh
# Trains on the sources of the running Python's standard library, on 2 CPU processes, or on up to 2 GPUs where there are
# any. Everything lands in runs/quickstart; a rerun starts over. Environment (for short trials):
#   QUICKSTART_OUT        output folder (runs/quickstart)
#   QUICKSTART_STEPS      optimizer steps (300)
#   QUICKSTART_MEGABYTES  text used at most (all: 10)
# Arguments go to the training command, e.g. --optimizer.lr 1e-3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh

OUT="${QUICKSTART_OUT:-runs/quickstart}"
STEPS="${QUICKSTART_STEPS:-300}"
MEGABYTES="${QUICKSTART_MEGABYTES:-1000}"
read -r GPUS CORES < <("$PYTHON" -c 'import os, torch; print(torch.cuda.device_count(), os.cpu_count())')
RANKS=$((GPUS == 1 ? 1 : 2))
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
if [[ -d "$OUT" && ! -e "$OUT/.quickstart" ]]; then
    echo "error: $OUT exists and is not from a quickstart; set QUICKSTART_OUT to another folder." >&2
    exit 1
fi
mkdir -p "$OUT"
touch "$OUT/.quickstart"
rm -rf "${OUT:?}"/{checkpoints,log,hf}

stage "text: the standard library's sources, split by file"
"$PYTHON" tools/standard_library_text.py --output "$OUT/text" --max-megabytes "$MEGABYTES"

stage "tokenizer: byte-level BPE"
"$PYTHON" tools/train_tokenizer.py --input-list "$OUT/text/train.txt" --vocab-size 4096 --output "$OUT/tokenizer" --overwrite

stage "token files"
for split in train valid; do
    "$PYTHON" tools/preprocess_data.py --input-list "$OUT/text/$split.txt" --tokenizer "$OUT/tokenizer" \
        --output-prefix "$OUT/data/$split" --workers 2 --append-eod --overwrite
done

stage "pretraining: $STEPS steps"
launch pretrain --config examples/configs/tiny_cpu.yaml \
    --training.steps "$STEPS" --training.global_batch 8 --optimizer.lr 4e-3 \
    --data.train "[$OUT/data/train]" --data.valid "[$OUT/data/valid]" --data.tokenizer "$OUT/tokenizer" \
    --checkpoint.save "$OUT/checkpoints" --logging.dir "$OUT/log" --logging.every_steps 10 --evaluation.every_steps 50 "$@"

stage "export to Hugging Face format"
"$PYTHON" tools/convert_checkpoint.py export --checkpoint "$OUT/checkpoints" --hf "$OUT/hf" --format minimax_m1 \
    --tokenizer "$OUT/tokenizer"

stage "generation"
cat >"$OUT/prompts.jsonl" <<'PROMPTS'
{"text": "import os\nimport sys\n\n\ndef "}
{"text": "class Error(Exception):\n    \"\"\""}
PROMPTS
launch generate --checkpoint "$OUT/checkpoints" --prompts "$OUT/prompts.jsonl" --output "$OUT/completions.jsonl" \
    --max-new-tokens 96 --temperature 0.7 --top-p 0.9 --seed 1

stage "done"
"$PYTHON" tools/plot_metrics.py "$OUT/log" --output "$OUT/loss.png"
"$PYTHON" - "$OUT/prompts.jsonl" "$OUT/completions.jsonl" <<'SAMPLE'
import json
import sys

prompt, completion = (json.loads(open(path, encoding="utf-8").readline())["text"] for path in sys.argv[1:])
print(f"sample, after the prompt {prompt!r}:\n{completion}\n")
SAMPLE
echo "loss curve    $OUT/loss.png"
echo "metrics       $OUT/log/metrics.jsonl (or: tensorboard --logdir $OUT/log)"
echo "checkpoint    $OUT/checkpoints/$(<"$OUT/checkpoints/latest")"
echo "Hugging Face  $OUT/hf"
echo "completions   $OUT/completions.jsonl"
