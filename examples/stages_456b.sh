# shellcheck shell=bash
# Sourced by pretrain_456b.sh and slurm/stage_456b.sh in the checkout. From STAGE, WORLD_SIZE and, if set, LOAD and LAYOUT it makes
# LOAD (the weights to start from) and CONFIG_ARGS. LAYOUT is a length and a number of GPUs, such as 32k_256gpu; pretrain and
# continual take the layout of m1_456b.yaml without it.
case "$STAGE" in
    pretrain) previous="" ;;
    continual) previous=checkpoints/minimax_m1 ;; # written by tools/convert_checkpoint.py import
    context_32k) previous=runs/m1_456b_pretrain/checkpoints ;;
    context_128k) previous=runs/m1_456b_context_32k/checkpoints ;;
    context_512k) previous=runs/m1_456b_context_128k/checkpoints ;;
    context_1m) previous=runs/m1_456b_context_512k/checkpoints ;;
    rl) previous=checkpoints/minimax_m1_sft ;; # a supervised start, written by tools/convert_checkpoint.py import
    *)
        echo "STAGE=$STAGE must be pretrain, continual, context_32k, context_128k, context_512k, context_1m or rl." >&2
        exit 2
        ;;
esac
LOAD="${LOAD:-$previous}"
if [[ "$STAGE" == context_* ]]; then
    LAYOUT="${LAYOUT:-${STAGE#context_}_${WORLD_SIZE}gpu}"
fi
CONFIG_ARGS=(--config examples/configs/m1_456b.yaml)
if [[ -n "${LAYOUT:-}" ]]; then
    if [[ ! -e "examples/configs/m1_456b_${LAYOUT}.yaml" ]]; then
        echo "LAYOUT=$LAYOUT has no examples/configs/m1_456b_${LAYOUT}.yaml; write one from tools/plan_layout.py --gpus $WORLD_SIZE" >&2
        exit 2
    fi
    CONFIG_ARGS+=(--config "examples/configs/m1_456b_${LAYOUT}.yaml")
fi
# shellcheck disable=SC2034 # read by the scripts that source this
CONFIG_ARGS+=(--config "examples/configs/m1_456b_${STAGE}.yaml")
