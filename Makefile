# The two commands: `make demo` and `make test`. Everything else serves those who change the code.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# A strict editable install shows only the files that were there when it was made.
SOURCES := $(shell git ls-files -co --exclude-standard core plugins registry)
REGISTERS := logic emotion body archetype
# The tests of a file share what they have made, so a file stays with one process; tests/conftest.py orders the files.
# What pytest makes of the tests and Python of the modules is kept, whatever the caller's Python keeps: 20 s of each later run.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: demo test quick check format docs registers architectures load report clean

demo: $(VENV)/installed
	$(BIN)/lora-rt compose emotion:0.7 logic:0.3 --compare --seed 3 -p "rain, tin roof, unpaid bill"
	$(BIN)/lora-rt scene "Rope burn across both palms; the fingers had gone numb."
	$(BIN)/lora-rt compose registers --seed 3 -p "Rope burn across both palms; the fingers had gone numb."

test: $(VENV)/ready
	$(PYTEST)

# Without a plugin that takes seconds to import, and whose tests are slow ones.
quick: $(VENV)/ready
	$(PYTEST) -p no:schemathesis -m "not slow"

check: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/support/readme.py

format: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/ready
	$(BIN)/python tests/support/readme.py --write

# Retrains the four registers that ship with the package and the composition that leads them (about 20 minutes on two
# cores). BASE=... trains them for another base, into the folder OUT.
BASE ?= default
OUT ?= registers-of-another-base
registers: $(VENV)/ready
	for register in $(REGISTERS); do \
		BASE=$(BASE) sh examples/registers/train.sh $(BIN)/lora-rt $$register \
			$$([ $(BASE) = default ] || echo $(OUT)/$$register) || exit 1; done
	[ $(BASE) != default ] || $(BIN)/python examples/context/registers.py

# Every causal architecture of the installed transformers against PEFT (half an hour on two cores), and the table beside their results.
architectures: $(VENV)/ready
	$(BIN)/python tests/support/architectures/table.py --workers 2
	$(BIN)/python tests/support/readme.py --write

# Every answer of a server under load against the one given alone: 10,000 requests of a tiny base, 300 of the default one.
load: $(VENV)/ready
	SERVE_REQUESTS=10000 SERVE_AT_ONCE=32 $(BIN)/pytest -s tests/serving/test_load.py
	SERVE_REQUESTS=300 SERVE_AT_ONCE=32 SERVE_PRECISION=int4 \
		SERVE_BASE=$$($(BIN)/python -c "import lora_rt; print(lora_rt.prepare(precision='int4'))") $(BIN)/pytest -s tests/serving/test_load.py

# Measures the registers, what precisions cost them, the bridge, the composition `registers` and routers (hours on two
# cores). Most of what was done is kept, in out/ and in the home: a run that was cut off goes on. SEEDS=3 trains each of
# them under two more seeds.
SEEDS ?= 1
report: $(VENV)/ready
	$(BIN)/pip install --quiet --progress-bar off --disable-pip-version-check --constraint constraints.txt scikit-learn
	$(BIN)/python examples/registers/report.py --seeds $(SEEDS)
	$(BIN)/python examples/registers/precisions.py
	$(BIN)/python examples/bridge/report.py --seeds $(SEEDS)
	$(BIN)/python examples/context/scenes.py --seeds $(SEEDS)
	$(BIN)/python examples/context/data.py out/context
	$(BIN)/python examples/context/router.py out/context --seeds $(SEEDS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# What a user needs.
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --progress-bar off --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

# What a developer needs; a plain install of the sources must not shadow the strict one.
$(VENV)/ready: pyproject.toml constraints.txt $(SOURCES) | $(VENV)/bin/python
	$(BIN)/pip install --quiet --progress-bar off --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' --config-settings editable_mode=strict
	touch $@
