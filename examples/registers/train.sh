#!/bin/sh
# Trains one of the four registers as it ships: train.sh LORA_RT REGISTER [OUT]
set -eu
lora_rt=$1
register=$2
here=$(dirname "$0")
out=${3:-$here/../../registry/shipped/$register}
rm -rf "$out"
"$lora_rt" train "$register" --mode output-only \
    --data "$here/train/$register.jsonl" --held-out "$here/heldout/$register.jsonl" \
    --target-modules all-linear --r 8 --alpha 16 --dropout 0 --lr 1e-3 --epochs 3 --batch-size 8 --seed 0 \
    --scene-types "$register" --licence Apache-2.0 --out "$out"
