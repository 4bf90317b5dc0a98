#!/bin/sh
# What a GPU does: the tests that need one, then lora-rt beside PEFT and the plain base, in under 25 minutes.
#
#   measure.sh [--tiny] [PART...]     parts: tests 7b 13b train-7b train-13b sampling; all of them by default
#
# Needs no network. Logs and JSON are written as they come, to $OUT (./gpu-figures by default); PYTHON is the interpreter.
# --tiny runs all of it in a few minutes on a CPU, so that nothing is found out on a GPU's time.
set -u
top=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-gpu-figures}
mkdir -p "$out"
tiny=
[ "${1:-}" = --tiny ] && tiny=--tiny && shift
[ $# -gt 0 ] || set -- tests 7b train-7b 13b train-13b sampling
failed=0
"$python" "$top/tests/gpu/measure.py" machine --out "$out" $tiny | tee "$out/machine.log"
for part in "$@"; do
    echo "== $part"
    if [ "$part" = tests ]; then
        chosen=gpu
        [ -n "$tiny" ] && chosen="not gpu"
        "$python" -m pytest "$top/tests/gpu" "$top/tests/forward/test_steps.py" -m "$chosen" -rP \
            --rootdir "$top" >"$out/tests.log" 2>&1 || failed=1
        tail -n 5 "$out/tests.log"
    else
        "$python" "$top/tests/gpu/measure.py" "$part" --out "$out" $tiny >"$out/$part.log" 2>&1 || failed=1
        cat "$out/$part.log"
    fi
done
"$python" "$top/tests/gpu/measure.py" table --out "$out"
exit $failed
