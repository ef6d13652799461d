#!/usr/bin/env bash
# What does replaying the hardest mini-batches do? Scanned digits, a small network, 3 seeds, on any CPU.
source "$(dirname "$0")/setup.sh" ""
overwrite=()
if [ $# -eq 0 ]; then overwrite=(--overwrite); fi   # of its own folder alone
exec .venv/bin/hardjax compare --dataset digits --model mlp --epochs 30 --batch-size 32 --learning-rate 0.01 \
  --deltas 1.0 0.8 0.5 0.2 --controls random fixed --seeds 3 --output "${1:-runs/demo}" "${overwrite[@]}"
