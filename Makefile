# Headrace. `make` lists the targets. Everything is installed into .venv by this file and setup.cfg.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

MODEL ?= smollm2-135m-instruct
PRECISION ?= w8a16
MAX_LEN ?=
KV ?=
CALIB ?=
DIALECT ?=
OPTIMIZE ?=
# The name in the default OUT, as export/artifact/identity.py has it: only the suffix of a weight file goes, so that Llama-3.2-1B
# and Llama-3.2-3B stay apart.
NAME := $(shell basename "$$(case '$(MODEL)' in (.|./|..|../|*/..|*/../) realpath '$(MODEL)';; (*) echo '$(MODEL)';; esac)" \
    | sed -E 's/(.)\.(gguf|safetensors)$$/\1/I' | tr A-Z a-z)
OUT ?= artifacts/$(NAME)-$(PRECISION)$(if $(KV),-kv-$(KV))
ARTIFACT ?= $(OUT)
PORT ?= 8000
JOBS ?= $(shell [ "$$(nproc)" -gt 1 ] && echo 2 || echo 1)
TARGET ?= tensorrt-rtx
DEVICE ?= cpu
GPU ?=
# What runs models here: the extras of setup.cfg to install, like cpu, cuda, or cpu,rtx. By default what is installed.
EXTRA ?= $(or $(shell cat '$(VENV)/.installed' 2>/dev/null),cpu)

EXPORT_FLAGS = --precision $(PRECISION) --out '$(OUT)' $(if $(MAX_LEN),--max-len $(MAX_LEN)) $(if $(KV),--kv $(KV)) \
    $(if $(DIALECT),--dialect '$(DIALECT)') $(if $(CALIB),--calibration-text '$(CALIB)') $(if $(OPTIMIZE),--optimize-for $(OPTIMIZE))

# Whole files go to the workers, in the order that tests/conftest.py gives them: the longest first.
PARALLEL = $(if $(filter-out 1,$(JOBS)),--numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder)
FAST_TIERS = tests/unit tests/engine tests/http --ignore tests/http/process

.PHONY: help run test test-fast test-gpu lint bench bench-gpu export engine native bundle serve setup clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10
	@echo 'variables: MODEL PRECISION KV OUT MAX_LEN DIALECT CALIB OPTIMIZE ARTIFACT TARGET GPU DEVICE EXTRA PORT JOBS PYTHON'

run: $(VENV)/.installed  ## set up, export the default model, serve it and ask it something
	@$(BIN)/headrace export '$(MODEL)' $(EXPORT_FLAGS) --if-missing
	@exec $(BIN)/headrace serve '$(OUT)' --port $(PORT) --ask 'What is the capital of Japan?'

test: $(VENV)/.tested  ## set up what the tests need and run them, JOBS files at a time
	@$(BIN)/python -m pytest $(PARALLEL)

test-fast: $(VENV)/.tested  ## the tests of units, engine and HTTP alone: no graph parity, server process, GPU or real weights
	@$(BIN)/python -m pytest $(PARALLEL) $(FAST_TIERS)

test-gpu: $(VENV)/.tested  ## the tests that need a GPU; they say so and skip where there is none
	@$(BIN)/python -m pytest -m gpu -rs

lint: $(VENV)/.linted  ## ruff and mypy, as CI runs them
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --diff --quiet . || (echo 'run: $(BIN)/ruff format .'; exit 1)
	@$(BIN)/mypy

bench: $(VENV)/.installed  ## speed and memory of an artifact: make bench ARTIFACT=...
	@$(BIN)/headrace bench '$(ARTIFACT)'

bench-gpu: $(VENV)/.installed  ## TensorRT against ORT CUDA and other servers, where there is a GPU: make bench-gpu ARTIFACT=...
	@$(BIN)/python -m benchmarks.versus_gpu '$(ARTIFACT)'

export: $(VENV)/.installed  ## write an artifact: make export MODEL=... PRECISION=... KV=... OUT=... MAX_LEN=... CALIB=...
	@$(BIN)/headrace export '$(MODEL)' $(EXPORT_FLAGS)

engine: $(VENV)/.installed  ## compile an artifact for TensorRT: make engine ARTIFACT=... TARGET=... GPU=...
	@$(BIN)/python -c 'import tensorrt_rtx' 2>/dev/null || [ '$(TARGET)' != tensorrt-rtx ] || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[rtx]'
	@$(BIN)/headrace engine '$(ARTIFACT)' --target '$(TARGET)' $(if $(GPU),--gpu '$(GPU)') \
	  $(if $(filter-out file default,$(origin MODEL)),--model '$(MODEL)')

native: $(VENV)/.installed  ## compile the native operators, for --device native: needs g++ or clang++
	@$(BIN)/python -m runtime.native.build

bundle: $(VENV)/.installed  ## pack an artifact for a device: make bundle ARTIFACT=... DEVICE=jetson-orin|jetson-thor|rtx|cpu
	@$(BIN)/python -c 'import uv' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bundle]'
	@$(BIN)/python deploy/bundle.py '$(ARTIFACT)' --device '$(DEVICE)' --out dist

serve: $(VENV)/.installed  ## serve an artifact: make serve ARTIFACT=... PORT=...
	@exec $(BIN)/headrace serve '$(ARTIFACT)' --port $(PORT)

setup: $(VENV)/.installed  ## create the virtual environment and install

# The file holds the extras that were installed. Other extras install anew: onnxruntime and onnxruntime-gpu overwrite
# each other's files, so both go first.
ifneq ($(shell cat $(VENV)/.installed 2>/dev/null),$(EXTRA))
.PHONY: $(VENV)/.installed
endif

$(VENV)/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || (echo 'Headrace needs Python 3.11 or newer; say make PYTHON=/path/to/python3.11'; exit 2)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || (echo 'no venv module: install python3-venv'; exit 2)
	@echo 'installing into $(VENV) ...'
	@[ ! -s $@ ] || [ "$$(cat $@)" = '$(EXTRA)' ] || $(BIN)/python -m pip uninstall --quiet --yes onnxruntime onnxruntime-gpu
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRA)]'
	@echo '$(EXTRA)' > $@

$(VENV)/.linted: $(VENV)/.installed
	@echo 'installing what the checkers need ...'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[lint]'
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	@echo 'installing what the tests need ...'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRA),test,oracle]'
	@touch $@

clean:  ## remove the virtual environment and caches; artifacts stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
