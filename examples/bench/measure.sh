#!/bin/sh
# The first table of README.md here, and of "Speed" in the top one: one run of `lora-rt bench` on this machine, kept beside this file.
# Takes up to an hour where the base alone is slow; REPEATS=2 shortens it. Let the machine be idle: its load is printed with the figures.
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
"$PYTHON" -m lora_rt bench --repeats "${REPEATS:-3}" --json > examples/bench/report.json.new
mv examples/bench/report.json.new examples/bench/report.json
"$PYTHON" tests/support/readme.py --write
