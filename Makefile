# Every target makes what it needs: `make serve` and `make test` work on a fresh machine with Python >= 3.11.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# Threads that wait must sleep: two spinning OpenMP threads on one core cost ten times.
export OMP_WAIT_POLICY := passive
export KMP_BLOCKTIME := 0

.PHONY: serve test test-parallel check bench bench-handoff bench-survival bench-overload bench-overlap bench-aborts handoff-faults fault-sim kill-matrix soak docs clean
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

bench-overlap: $(VENV)/dev.stamp  ## how much of a hand-off the prefill hides (benchmarks/overlap.md)
	$(BIN)/python -m diptych.bench.overlap --out benchmarks

bench-survival: $(VENV)/dev.stamp  ## what a killed worker costs
	$(BIN)/python -m diptych.bench.survival --json benchmarks/survival.json
	$(BIN)/python -m diptych.bench.pauses --json benchmarks/pauses.json
	$(BIN)/python -m diptych.bench.races --json benchmarks/races.json

fault-sim: $(VENV)/dev.stamp  ## N=... simulated histories with faults; SEED=... tells one of them
	$(BIN)/python -m diptych.bench.fault_sim -n $(or $(N),2000) $(if $(SEED),--seed $(SEED)) $(ARGS)

kill-matrix: $(VENV)/dev.stamp  ## a signal to each process in every phase of a request, and spoiled connections
	OMP_NUM_THREADS=1 $(BIN)/python -m diptych.bench.faults $(ARGS)

MINUTES ?= 20

soak: $(VENV)/dev.stamp  ## mixed load for MINUTES: memory, descriptors, threads and blocks that do not come back
	OMP_NUM_THREADS=1 $(BIN)/python -m diptych.bench.soak --minutes $(MINUTES) --json benchmarks/soak.json $(ARGS)

bench-overload: $(VENV)/dev.stamp  ## too much load, greedy tenants, slow and stubborn clients
	$(BIN)/python -m diptych.bench.overload --json benchmarks/overload.json

bench-aborts: $(VENV)/dev.stamp  ## how long blocks stay taken when clients hang up
	$(BIN)/python -m diptych.bench.aborts --json benchmarks/aborts.json

handoff-faults: $(VENV)/dev.stamp  ## N injected faults of the KV hand-off: none may be served
	$(BIN)/python tests/transfer/handoff_faults.py --count $(or $(N),10000)

docs: $(VENV)/dev.stamp  ## regenerate what is generated
	$(BIN)/python -m diptych.policy.handoff > docs/handoff.md
	$(BIN)/python tests/fault_table.py > docs/faults.md

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
