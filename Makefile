# What a developer runs. `make` alone lists the targets.
#   PYTHON  interpreter that makes the environment (3.11 or newer)
#   VENV    where the environment is
#   DEVICE  auto | cpu | cuda: which vLLM `make install` takes
PYTHON ?= python3
VENV ?= .venv
DEVICE ?= auto
BIN := $(VENV)/bin
READY := $(VENV)/.installed
SOURCES := vllm_omni tests tools examples benchmarks

export OMP_NUM_THREADS ?= 1
export VLLM_LOGGING_LEVEL ?= WARNING

.PHONY: help install demo lint check test bench docs clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

# The other targets make the environment when there is none; after a change of the dependencies run `make install`.
$(READY):
	@$(PYTHON) tools/install.py --venv $(VENV) --device $(DEVICE)
	@touch $@

install: ## make the environment in .venv, or bring it up to date
	@$(PYTHON) tools/install.py --venv $(VENV) --device $(DEVICE)
	@touch $(READY)

demo: $(READY) ## draw a picture and show it in the terminal
	@$(BIN)/python tools/demo.py

lint: $(READY) ## style of the code: ruff check, ruff format
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

check: lint ## lint and types: mypy (strict) on the package
	$(BIN)/mypy vllm_omni

test: $(READY) ## the test suite (ARGS="tests/cli -x"; -n0: one process); GPU tests only where there is a GPU
	$(BIN)/python -m pytest -n auto $(ARGS)

bench: $(READY) ## measure what HTTP, orchestration and connector cost on this machine, into outputs/
	@mkdir -p outputs
	$(BIN)/python benchmarks/orchestration_overhead.py --json outputs/orchestration_overhead.json
	$(BIN)/python benchmarks/connector.py --json outputs/connector.json
	$(BIN)/python benchmarks/http_overhead.py --json outputs/http_overhead.json
	$(BIN)/python benchmarks/overload.py --json outputs/overload.json --plot outputs/overload.svg

docs: $(READY) ## write the generated pages again
	$(BIN)/python tools/generate_docs.py

clean: ## remove what the other targets made, but not the environment
	rm -rf build dist outputs .mypy_cache .ruff_cache .pytest_cache *.egg-info
