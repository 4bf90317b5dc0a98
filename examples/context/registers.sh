#!/bin/sh
# Fits the composition `registers` over the four adapters that ship, as it ships: registers.sh LORA_RT PYTHON [BASE]
# The gates are fitted over a float32 base, where a step is fastest on most processors; they do not depend on the precision.
# The classifier does: four bits shift the states that it reads, so it is fitted over int4, where most will use it.
set -eu
lora_rt=$1
python=$2
base=${3:-default}
here=$(cd "$(dirname "$0")" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" "$here/data.py" "$scratch"
fit() {
    "$lora_rt" tune logic:0.25 emotion:0.25 body:0.25 archetype:0.25 --per scene --base "$base" \
        --data "$scratch/prompts.jsonl" --prompts "$scratch/everyday.jsonl" --lr 0.12 --seed 0 "$@"
}
fit --name registers --precision float32 --epochs 0.3
[ "$base" = default ] || exit 0
fit --name registers-int4 --precision int4 --epochs 0.01
out=$here/../../registry/shipped/registers
mkdir -p "$out"
"$python" - "$out" <<'PYTHON'
import hashlib, json, sys
from pathlib import Path
from safetensors.torch import load_file, save
from lora_rt.registry.registry import Registry

mixes, out = Registry().compositions.folder, Path(sys.argv[1])
made, told = (json.loads((mixes / f"{name}.json").read_text()) for name in ("registers", "registers-int4"))
state, other = (load_file(mixes / f"{name}.safetensors") for name in ("registers", "registers-int4"))
content = save({**state, "registrar": other["registrar"]})
made["state"] = hashlib.sha256(content).hexdigest()
made["metrics"]["registered"] = told["metrics"]["registered"]
(out / "mode.safetensors").write_bytes(content)
(out / "composition.json").write_text(json.dumps(made, indent=2) + "\n")
PYTHON
"$lora_rt" rm registers -y
"$lora_rt" rm registers-int4 -y
