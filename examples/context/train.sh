#!/bin/sh
# Trains the four context adapters, then their gates on scenes that no adapter saw: train.sh LORA_RT PYTHON FOLDER
set -eu
lora_rt=$1
python=$2
out=$3
here=$(cd "$(dirname "$0")" && pwd)
"$python" "$here/data.py" "$out/data"
spec=""
for register in logic emotion body archetype; do
    "$lora_rt" train "$register" --mode context --data "$out/data/adapters/$register.jsonl" \
        --target-modules q_proj,k_proj,v_proj,o_proj --r 8 --alpha 16 --dropout 0 --lr 1e-3 --epochs 2 --batch-size 8 \
        --seed 0 --scene-types logic,emotion,body,archetype --licence Apache-2.0 --out "$out/adapters/$register"
    spec="$spec $out/adapters/$register:0.35"
done
# The folder must be absolute, or begin with ./ as every path in a composition does.
"$lora_rt" tune $spec --per scene --data "$out/data/gates.jsonl" --epochs 0.5 --seed 0 --out "$out/fitted"
# What static weights can do at best on the same data, to compare with.
"$lora_rt" tune $spec --per adapter --name context-static --data "$out/data/gates.jsonl" --epochs 0.3 --json >"$out/static.json"
tuned=$("$python" -c 'import json, sys
terms = json.load(open(sys.argv[1]))["terms"]
print(",".join("%s:%.3f" % (term["reference"].rsplit("/", 1)[-1], term["weight"]) for term in terms))' "$out/static.json")
"$python" "$here/report.py" "$out/data" "$out/fitted" logic:0.35,emotion:0.35,body:0.35,archetype:0.35 "$tuned"
