#!/usr/bin/env bash
# The comparisons on Fashion-MNIST that experiments/README.md shows. 2 CPU cores: replay 15, trimming 10, spectra 15 min.
#   bash experiments/fashion_mnist.sh DATA_DIR replay|trimming|spectra
set -euo pipefail
cd "$(dirname "$0")/.."
data=$(realpath "$1")
hardjax=${HARDJAX:-.venv/bin/hardjax}
common=(--dataset fashion_mnist --data-dir "$data" --quiet)
case $2 in
  replay)   # hard mini-batch replay: a quarter of the training split, the rest held out
    $hardjax compare "${common[@]}" --model resnet8 --validation 0.75 --epochs 3 --batch-size 128 --learning-rate 0.05 \
      --deltas 1.0 0.2 --controls random fixed --seeds 3 --output runs/fashion_replay ;;
  trimming) # as published but for the length: Adam, weight decay, rate halved after each third
    for norm in none batch; do
      $hardjax compare "${common[@]}" --model mlp --model-option norm=$norm --epochs 15 --optimizer adam \
        --learning-rate 0.001 --weight-decay 1e-4 --schedule step --decay-at 0.333 0.667 --decay-factor 0.5 \
        --methods standard trimmed random-trimmed --seeds 3 --output runs/fashion_trimming_$norm
    done ;;
  spectra)  # as published but for the length and the data: Nesterov, rate divided by 10 at half and three quarters
    for batch in 32 128 512; do
      $hardjax train "${common[@]}" --model resnet8 --epochs 3 --batch-size $batch --learning-rate 0.1 \
        --optimizer nesterov --weight-decay 1e-4 --schedule step --augmentation standard --no-evaluate-train \
        --measure-every 50 --output runs/fashion_spectra_$batch
    done
    for precision in "" --float64; do
      $hardjax measure runs/fashion_spectra_{32,128,512} --batches 4 $precision --output "runs/fashion_spectra$precision"
    done ;;
  *) echo "Expected replay, trimming or spectra, got $2." >&2; exit 2 ;;
esac
