#!/bin/sh
# Fits the composition `registers` over the four adapters that ship, as it ships: registers.sh LORA_RT PYTHON [BASE]
# It is fitted over a float32 base, where a step is fastest on most processors; the gates do not depend on the precision.
set -eu
lora_rt=$1
python=$2
base=${3:-default}
here=$(cd "$(dirname "$0")" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" "$here/data.py" "$scratch"
"$lora_rt" tune logic:0.25 emotion:0.25 body:0.25 archetype:0.25 --per scene --name registers \
    --base "$base" --precision float32 --data "$scratch/prompts.jsonl" --prompts "$scratch/everyday.jsonl" \
    --epochs 0.3 --lr 0.12 --seed 0
[ "$base" = default ] || exit 0
out=$here/../../registry/shipped/registers
mkdir -p "$out"
"$python" - "$out" <<'PYTHON'
import shutil, sys
from pathlib import Path
from lora_rt.registry.registry import Registry

mixes, out = Registry().compositions.folder, Path(sys.argv[1])
shutil.copyfile(mixes / "registers.json", out / "composition.json")
shutil.copyfile(mixes / "registers.safetensors", out / "mode.safetensors")
PYTHON
"$lora_rt" rm registers -y
