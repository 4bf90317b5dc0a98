#!/bin/sh
# Trains the bridge as it ships: train.sh LORA_RT [OUT]
# A one-direction adapter to compare it with: train.sh LORA_RT OUT --option compress-weight=0
set -eu
lora_rt=$1
here=$(dirname "$0")
out=${2:-$here/../../registry/shipped/bridge}
[ $# -lt 2 ] || shift
shift
rm -rf "$out"
"$lora_rt" train bridge --mode bridge \
    --data "$here/train.jsonl" --held-out "$here/heldout.jsonl" \
    --target-modules all-linear --r 8 --alpha 16 --dropout 0 --lr 1e-3 --epochs 2 --batch-size 8 --seed "${SEED:-0}" \
    --licence Apache-2.0 --out "$out" "$@"
