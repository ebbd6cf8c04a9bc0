# fastllm: `make help` lists what there is. Everything installs into $(VENV); nothing else is touched.
PYTHON ?= python3
VENV ?= .venv
# Which torch. The default is what CI tests. On a GPU node `make TORCH=torch` takes the newest CUDA build;
# TORCH_INDEX=URL names another index to take it from (PyTorch's CPU index, for instance).
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# Native kernels in the wheel: OFF (seconds to build), ON or AUTO (needs nvcc; minutes).
FASTLLM_CUDA ?= OFF
JOBS ?= 2

BIN := $(VENV)/bin
ACTIVATE := PATH="$(abspath $(BIN)):$$PATH"
PIP := $(BIN)/python -m pip --disable-pip-version-check
PACKAGES := planner data convert train
NATIVE_SOURCES := CMakeLists.txt pyproject.toml $(shell find cpp cmake -type f -not -name '*.md' -not -path '*__pycache__*' 2>/dev/null)
PROJECTS := $(PACKAGES:%=packages/fastllm-%/pyproject.toml)

ctest = export $(ACTIVATE) && cmake --preset $(1) && cmake --build --preset $(1) -j $(JOBS) && ctest --preset $(1)

.DEFAULT_GOAL := help
.PHONY: help install test lint format quickstart test-cpp test-asan test-cuda test-emulate test-cutlass test-nvme torch-versions bench gpu-check clean distclean

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) TORCH_INDEX=$(TORCH_INDEX) FASTLLM_CUDA=$(FASTLLM_CUDA) JOBS=$(JOBS)"

# --- installation: one stamp per layer, so that a second `make` reinstalls nothing ---------------

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), fastllm needs Python 3.11 to 3.13" >&2; \
	  echo "hint: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make a virtual environment" >&2; \
	  echo "hint: sudo apt install python3-venv" >&2; exit 2; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || { \
	  echo "error: the C headers of $(PYTHON) are missing" >&2; \
	  echo "hint: sudo apt install python3-dev" >&2; exit 2; }
	@command -v g++ >/dev/null || { \
	  echo "error: no C++ compiler" >&2; echo "hint: sudo apt install g++" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-torch: $(VENV)/.stamp-venv
	$(PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	@touch $@

$(VENV)/.stamp-core: $(VENV)/.stamp-venv $(NATIVE_SOURCES)
	$(PIP) install -q --force-reinstall --no-deps -C cmake.define.FASTLLM_CUDA=$(FASTLLM_CUDA) .
	@touch $@

$(VENV)/.stamp-packages: $(VENV)/.stamp-torch $(VENV)/.stamp-core $(PROJECTS)
	$(PIP) install -q $(PACKAGES:%=-e packages/fastllm-%)
	@touch $@

$(VENV)/.stamp-%: requirements/%.txt $(VENV)/.stamp-packages
	$(PIP) install -q -r $<
	@touch $@

$(VENV)/.stamp-test: requirements/test.txt requirements/test-data.txt $(VENV)/.stamp-packages
	$(PIP) install -q -r requirements/test.txt
	$(PIP) install -q --no-deps -r requirements/test-data.txt
	@touch $@

install: $(VENV)/.stamp-packages  ## .venv with the four tools and the native core

# --- the two commands ----------------------------------------------------------------------------

quickstart: $(VENV)/.stamp-packages $(VENV)/.stamp-quickstart  ## the five steps for real, about 5 minutes on 2 cores
	$(ACTIVATE) $(BIN)/python examples/quickstart/run.py $(ARGS)

test: $(VENV)/.stamp-test $(VENV)/.stamp-lint  ## every test: Python, C++, C++ under ASan/UBSan, emulated kernels, lint
	$(MAKE) --no-print-directory lint test-cpp test-asan test-emulate $(if $(shell command -v nvcc),test-cuda)
	$(ACTIVATE) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-cpp: $(VENV)/.stamp-test  ## C++ unit tests (ctest)
	$(call ctest,cpu)

test-asan: $(VENV)/.stamp-test  ## C++ unit tests under AddressSanitizer and UBSan
	$(call ctest,asan)

test-cuda: $(VENV)/.stamp-test  ## compile the CUDA kernels; registers, spills, instructions (needs nvcc, no GPU)
	$(call ctest,cuda)
	$(ACTIVATE) $(BIN)/python scripts/ptxas_table.py --check
	$(ACTIVATE) $(BIN)/python scripts/sass_gate.py

test-emulate: $(VENV)/.stamp-test  ## CUDA kernels, as source, on the CPU under the checking emulator
	$(call ctest,emulate)

test-cutlass: $(VENV)/.stamp-test  ## every matrix product's PTX, float16 too, under the checker (needs nvcc; minutes)
	$(ACTIVATE) FASTLLM_GEMM_PRESET=emulate-ptx-all $(BIN)/python -m pytest -n 0 tests/ops/test_gemm.py $(ARGS)
	$(ACTIVATE) $(BIN)/python scripts/ptxas_table.py --check --all
	$(ACTIVATE) $(BIN)/python scripts/sass_gate.py --all

test-nvme: $(VENV)/.stamp-test  ## offload to files (needs libaio-dev; DeepSpeed compiles for minutes)
	$(ACTIVATE) FASTLLM_TEST_NVME=1 $(BIN)/python -m pytest -n 0 tests/train/test_nvme.py $(ARGS)

# --- the rest ------------------------------------------------------------------------------------

lint: $(VENV)/.stamp-lint  ## ruff, pyright, clang-format, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'cpp/*.hpp' 'cpp/*.cpp' 'cpp/*.cu' 'cpp/*.cuh' 'cpp/*.h' | grep -v third_party)
	$(ACTIVATE) $(BIN)/lint-imports --no-cache

format: $(VENV)/.stamp-lint  ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'cpp/*.hpp' 'cpp/*.cpp' 'cpp/*.cu' 'cpp/*.cuh' 'cpp/*.h' | grep -v third_party)

torch-versions: $(VENV)/.stamp-venv  ## the operators' tests on one wheel under two versions of torch (downloads 3 GB)
	$(BIN)/python scripts/torch_versions.py --calls $(if $(TORCH_INDEX),--index $(TORCH_INDEX)) $(ARGS)

bench: $(VENV)/.stamp-test  ## the benchmarks that run on a CPU; results on stdout
	@for file in $(filter-out %/bench_gpu.py,$(wildcard benchmarks/bench_*.py benchmarks/*/bench_*.py)); do \
	  echo "== $$file"; $(ACTIVATE) $(BIN)/python $$file || exit 1; done

gpu-check: $(VENV)/.stamp-test  ## on an NVIDIA GPU: build for it, test, compute-sanitizer, benchmark
	@$(ACTIVATE) $(BIN)/python scripts/gpu_check.py $(ARGS)

clean:  ## build trees and caches; keeps .venv and runs/
	rm -rf build .pytest_cache .ruff_cache .hypothesis .import_linter_cache

distclean: clean  ## also .venv and runs/
	rm -rf $(VENV) runs
