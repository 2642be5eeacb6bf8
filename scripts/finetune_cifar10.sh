#!/usr/bin/env bash
# Fine-tuning against training from scratch, 3 seeds, with 4,000 and with 400 labels: the table of docs/cifar10.md.
# Finished runs are left out, stopped ones go on.
# Usage: scripts/finetune_cifar10.sh DIR [ENCODER]     DIR/train/CLASS/* and DIR/test/CLASS/*
set -euo pipefail
root=$(realpath "${1:?the folder that holds train/CLASS/* and test/CLASS/*}")
encoder=$(realpath "${2:-runs/pretrain_micro_cifar10}")
cd "$(dirname "$0")/.."

run() { # NAME SEED SETTING...
    local folder=runs/finetune_cifar10/$1_seed$2 seed=$2
    shift 2
    [ -e "$folder/results.json" ] || mae finetune "$@" --data.root "$root" --run_dir "$folder" --ckpt_path last \
        --seed_everything "$seed" --data.subset_seed "$seed"
}

few=(--data.labels_per_class 40 --trainer.max_epochs 30 --trainer.check_val_every_n_epoch 30)
for seed in 0 1 2; do
    run pretrained_4000 $seed --config finetune/micro_cifar10 --model.encoder "$encoder"
    run scratch_4000 $seed --config finetune/micro_cifar10_scratch
    run pretrained_400 $seed --config finetune/micro_cifar10 --model.encoder "$encoder" "${few[@]}"
    run scratch_400 $seed --config finetune/micro_cifar10_scratch "${few[@]}"
done
grep -H '"acc1"' runs/finetune_cifar10/*/results.json
