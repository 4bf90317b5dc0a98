#!/bin/sh
# Trains one of the four registers as it ships: [BASE=...] [SEED=...] train.sh LORA_RT REGISTER [OUT]
# Hidden sizes, template and precision are those of the base; nothing else changes with it.
set -eu
lora_rt=$1
register=$2
here=$(dirname "$0")
out=${3:-$here/../../registry/shipped/$register}
if [ "${BASE:-default}" != default ] && [ $# -lt 3 ]; then
    echo "say where the registers of another base go: train.sh LORA_RT REGISTER OUT" >&2
    exit 2
fi
rm -rf "$out"
"$lora_rt" train "$register" --mode output-only \
    --data "$here/train/$register.jsonl" --held-out "$here/heldout/$register.jsonl" \
    --target-modules all-linear --r 8 --alpha 16 --dropout 0 --lr 1e-3 --epochs 3 --batch-size 8 --seed "${SEED:-0}" --base "${BASE:-default}" \
    --scene-types "$register" --licence Apache-2.0 --out "$out"
