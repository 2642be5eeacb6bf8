#!/usr/bin/env bash
# The figures of docs/cifar10.md: pre-train, then k-NN and linear probe on the test images, which nothing else reads.
# Usage: scripts/reproduce_cifar10.sh DIR     DIR/train/CLASS/* and DIR/test/CLASS/*
set -euo pipefail
root=${1:?the folder that holds train/CLASS/* and test/CLASS/*}
cd "$(dirname "$0")/.."
run=runs/pretrain_micro_cifar10

mae pretrain --config pretrain/micro_cifar10 --data.root "$root" --ckpt_path last
mae knn --encoder "$run" --data.root "$root" --data.val_dir test --pool both
mae linprobe --mode cached --cached.pools '[both]' --model.encoder "$run" --data.root "$root" --data.val_dir test \
    --run_dir runs/probe_micro_cifar10_both
mae linprobe --mode cached --model.encoder "$run" --data.root "$root" --data.val_dir test \
    --run_dir runs/probe_micro_cifar10
