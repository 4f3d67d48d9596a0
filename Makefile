# Every target makes what it needs: `make serve` and `make test` work on a fresh machine with Python >= 3.11.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# Threads that wait must sleep: two spinning OpenMP threads on one core cost ten times.
export OMP_WAIT_POLICY := passive
export KMP_BLOCKTIME := 0

.PHONY: serve test test-parallel check bench bench-handoff bench-survival handoff-faults docs clean
.DEFAULT_GOAL := serve

serve: $(VENV)/run.stamp  ## serve the built-in model (MODEL=..., ARGS="--prefill 2" to change that)
	$(BIN)/diptych serve $(MODEL) $(ARGS)

test: $(VENV)/dev.stamp  ## the default test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

test-parallel: $(VENV)/dev.stamp  ## every cut of a model, with its rank processes (some minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(ARGS)

check: $(VENV)/dev.stamp  ## lint, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/dev.stamp  ## engine, serving and interference figures (benchmarks/)
	$(BIN)/python -m diptych.bench.all --out benchmarks

bench-handoff: $(VENV)/dev.stamp  ## KV hand-off rates beside memcpy and raw sockets (benchmarks/handoff.md)
	$(BIN)/python -m diptych.bench.handoff_bench --out benchmarks

bench-survival: $(VENV)/dev.stamp  ## what a killed worker costs
	$(BIN)/python -m diptych.bench.survival --json benchmarks/survival.json

handoff-faults: $(VENV)/dev.stamp  ## N injected faults of the KV hand-off: none may be served
	$(BIN)/python tests/transfer/handoff_faults.py --count $(or $(N),10000)

docs: $(VENV)/dev.stamp  ## regenerate what is generated
	$(BIN)/python -m diptych.policy.handoff > docs/handoff.md

# torch comes first and alone, so that the pinned (CPU) build is there before anything asks for "some torch".
$(VENV)/torch.stamp: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	touch $@

$(VENV)/run.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis
