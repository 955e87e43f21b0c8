#!/bin/bash
# Fine-tuning on this machine, three CPU ranks. From the root of a clone, after `make demo` has fetched a model:
#
#   source .venv/bin/activate
#   export CHECKPOINT=... TRAIN_DATA=... SAVE=...
#   examples/laptop.sh examples/recipes/laptop-cpu.args [more flags of pretrain_peft.py]
#
# RANKS (default 3) is the number of processes: TP x PP x DP of the recipe.

set -euo pipefail

: "${1:?usage: examples/laptop.sh RECIPE.args [flags]}"
: "${CHECKPOINT:?the Hugging Face folder of the base model}"
: "${TRAIN_DATA:?a file of JSON lines}"
: "${SAVE:?the folder for checkpoints and metrics}"

command -v torchrun >/dev/null || {
    echo "torchrun is not on PATH: activate the environment first (source .venv/bin/activate)" >&2
    exit 1
}

mapfile -t recipe < <(sed 's/#.*//' "$1" | xargs -n 1)
shift

export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE # the ranks share the cores
exec torchrun --nproc-per-node "${RANKS:-3}" pretrain_peft.py \
    --pretrained-checkpoint "$CHECKPOINT" \
    --train-data-path "$TRAIN_DATA" \
    --save "$SAVE" \
    "${recipe[@]}" "$@"
