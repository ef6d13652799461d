#!/usr/bin/env bash
# What does replaying the hardest mini-batches do? Scanned digits, a small network, 10 paired seeds, on any CPU.
#   bash scripts/demo.sh [FOLDER]    the folder is runs/demo if none is given
#   PUBLISH=1 bash scripts/demo.sh   also copies picture and rows to where README.md and experiments/README.md show them
source "$(dirname "$0")/setup.sh" ""
overwrite=()
if [ $# -eq 0 ]; then overwrite=(--overwrite); fi   # of its own folder alone
folder=${1:-runs/demo}
.venv/bin/hardjax compare --dataset digits --model mlp --epochs 30 --batch-size 32 --learning-rate 0.01 \
  --deltas 1.0 0.5 0.2 --controls random fixed --seeds 10 --output "$folder" "${overwrite[@]}"
if [ -n "${PUBLISH:-}" ]; then
  cp "$folder/comparison.png" experiments/results/digits_comparison.png
  cp "$folder/summary.json" experiments/results/digits_replay.json
fi
