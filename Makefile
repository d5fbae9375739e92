# Everything sets itself up: `make demo` and `make test` need Python 3.11 or newer, make, and a package index.
PY        ?= python3
VENV      ?= .venv
PIP_TORCH ?= torch==2.13.0
JOBS      ?= 2
OUT       ?= runs/demo
PORT      ?= 8000
BIN       := $(VENV)/bin
PIP       := $(BIN)/python -m pip --disable-pip-version-check install --quiet

export HF_HUB_OFFLINE = 1
# Threads that wait by spinning make training many times slower on cores that are shared.
export OMP_WAIT_POLICY ?= passive
# Without its own files of compiled code Python would compile torch and transformers again in every process.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help setup demo serve-demo test test-slow test-full lint types test-floor test-newest test-vllm bench bench-quality bench-serving docs readme support clean

help:
	@echo "make demo        train a prefix on the embedded model, save, reload, generate, report (OUT=$(OUT))"
	@echo "make serve-demo  train three prompts for the embedded model and serve them (PORT=$(PORT))"
	@echo "make test        lint, types, the fast tests: minutes"
	@echo "make test-slow   the others: servers, processes that are killed, compiled code, every pair of values of the grids"
	@echo "make test-full   all of them, with every cell of the grids: hours"
	@echo "make test-floor  the tests on the lowest supported versions, in their own environment"
	@echo "make test-newest the tests that others' releases break first, on the newest versions that pyproject.toml allows"
	@echo "make test-vllm   the tests of the vLLM engine, in their own environment"
	@echo "make bench       the tables of speed and memory (SPEED=--quick: minutes; SPEED='--device cuda': on a GPU)"
	@echo "make bench-quality  the tables of what the prompts learn: hours"
	@echo "make bench-serving  the tables of the servers: throughput, first token, load and faults"
	@echo "make docs        docs/first-run.md from a real run of the demo"
	@echo "make support     docs/support.md: every language model class of transformers, tried: minutes"
	@echo "make readme      the generated parts of README.md: tables, methods, tree"
	@echo "make clean       remove what the other targets made"

# torch goes first and alone: a requirement without a version may bring another build than the one asked for.
$(VENV)/.run: pyproject.toml constraints.txt
	@echo "installing into $(VENV), once; this takes a minute or more"
	$(PY) -m venv $(VENV)
	$(PIP) '$(PIP_TORCH)'
	$(PIP) -c constraints.txt -e '.[data,serve]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) -c constraints.txt -e '.[data,dev,loops]'
	@touch $@

setup: $(VENV)/.dev

demo: $(VENV)/.run
	$(BIN)/python -m softprompt.demo --out '$(OUT)'

serve-demo: $(VENV)/.run
	$(BIN)/python -m softprompt.serve.demo --port '$(PORT)'

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

test-slow: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal --slow

test-full: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal --full

test-floor:
	$(MAKE) VENV='$(VENV)-floor' floor

# Not called by hand: the same package on the versions of constraints-floor.txt.
.PHONY: floor
floor: $(VENV)/.floor
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

$(VENV)/.floor: pyproject.toml constraints-floor.txt
	$(PY) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints-floor.txt)"
	$(PIP) -c constraints-floor.txt -e '.[data,dev]'
	@touch $@

# What a new release of another library breaks first. Not what `make test` runs on: a release of others stops no one here.
NEWEST_TESTS := $(addprefix tests/test_,conformance.py exactness.py generate.py cache_door.py canary.py seam.py naive.py \
  must_work_caches.py must_work_calls.py must_work_inputs.py must_work_training.py peft_interchange.py loops.py \
  token_scores.py encoder_decoders.py multimodal.py shards.py serve_api.py train.py)
test-newest:
	$(MAKE) VENV='$(VENV)-newest' newest

.PHONY: newest
newest: $(VENV)/.newest
	@$(BIN)/python -m pip --disable-pip-version-check list 2>/dev/null | \
	  grep -iE '^(torch|transformers|tokenizers|accelerate|peft|trl|datasets|safetensors|huggingface_hub|numpy) '
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(NEWEST_TESTS)

$(VENV)/.newest: pyproject.toml
	$(PY) -m venv $(VENV)
	$(PIP) '$(PIP_TORCH)'
	$(PIP) -e '.[data,dev,loops]'
	@touch $@

# vLLM wants versions of its own, and its CPU build names parts that have none for the CPU: so without dependencies.
VLLM_VENV ?= $(VENV)-vllm
test-vllm: $(VLLM_VENV)/.done
	$(VLLM_VENV)/bin/python -m pytest -q -x tests_vllm

$(VLLM_VENV)/.done: pyproject.toml constraints-vllm.txt
	$(PY) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet '$(PIP_TORCH)'
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r constraints-vllm.txt
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -e .
	@touch $@

SPEED        ?=
SPEED_TABLES := step generate prompts loading train cache_door growth

# One process per table, one after the other: two at a time would measure each other.
bench: $(VENV)/.dev
	for table in $(SPEED_TABLES); do $(BIN)/python benchmarks/speed_$$table.py $(SPEED) || exit 1; done
	$(BIN)/python benchmarks/goals.py
	$(BIN)/python scripts/fill_readme.py

bench-quality: $(VENV)/.dev
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/quality_e2e.py --model stories260K --steps 150 --grid-steps 60
	$(BIN)/python benchmarks/quality_e2e.py --model embedded --steps 100 --grid-steps 30 --like stories260K --finalists 1
	$(BIN)/python benchmarks/quality_sst2.py
	$(BIN)/python scripts/fill_readme.py

bench-serving: $(VENV)/.dev $(VLLM_VENV)/.done
	$(BIN)/python benchmarks/serving.py $(SPEED)
	$(BIN)/python benchmarks/serving_load.py $(SPEED)
	$(VLLM_VENV)/bin/python benchmarks/serving_load.py $(SPEED)
	$(VLLM_VENV)/bin/python benchmarks/serving_vllm.py $(SPEED)
	$(BIN)/python scripts/fill_readme.py

docs: $(VENV)/.run
	$(BIN)/python scripts/record_first_run.py
	$(BIN)/python scripts/fill_readme.py

support: $(VENV)/.run
	OMP_NUM_THREADS=1 $(BIN)/python scripts/make_support.py

readme: $(VENV)/.run
	$(BIN)/python scripts/make_support.py --methods
	$(BIN)/python scripts/fill_readme.py

clean:
	rm -rf '$(VENV)' '$(VENV)-floor' '$(VENV)-newest' '$(VENV)-vllm' '$(OUT)' build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
