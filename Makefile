# Each verb sets up .venv first. Stamp files make the second call quick.
#   make demo        the main job, a few minutes on two CPU cores       (ARGS="--json demo.json")
#   make test        the tests without the slow ones                    (ARGS="-k router")
#   make test-all    all tests, and routing and checkpointing with the oldest transformers
#   make lint        ruff and clang-format; `make format` applies them
#   make bench       every benchmark, JSON lines into build/bench.jsonl (ARGS=--quick)
#   make bench-cpp   the CPU kernels alone, without Python and torch   (ARGS="--isa all")
#   make gpu-check   build the CUDA kernels, test and time them; needs a GPU and nvcc
# PYTHON chooses the interpreter of a new .venv, TORCH torch's version, VENV the folder.

PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
VENV_TF517 ?= .venv-tf517
ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check
SOURCES := $(shell find csrc third_party -type f) CMakeLists.txt setup.py pyproject.toml \
  milora/_version.py
CPP_SOURCES = $(shell find csrc $(wildcard bench/cpp) -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
TF517_TESTS = $(sort $(wildcard tests/test_routing*.py tests/test_checkpointing*.py))

.PHONY: demo test test-all test-slow test-tf517 lint format bench bench-cpp gpu-check clean

demo: $(VENV)/.built
	$(BIN)/milora demo $(ARGS)

test: $(VENV)/.built
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: test test-slow test-tf517

test-slow: $(VENV)/.built
	$(BIN)/python -m pytest -m slow $(ARGS)

# The package is not installed here: the library that .venv built in place serves every torch and
# transformers.
test-tf517: $(VENV)/.built $(VENV_TF517)/.ready
	$(VENV_TF517)/bin/python -m pytest $(TF517_TESTS) $(ARGS)

lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

bench: $(VENV)/.built
	mkdir -p build
	$(BIN)/milora bench --json build/bench.jsonl $(ARGS)

bench-cpp: $(VENV)/.requirements
	PATH="$(abspath $(BIN)):$$PATH" cmake -GNinja -S . -B build/bench -DMILORA_BENCH=ON
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/bench
	for noun in grouped_lora prompt_router; do \
	  build/bench/bench/cpp/bench_$$noun --json build/bench.jsonl $(ARGS) || exit 1; \
	done

gpu-check: $(VENV)/.built-cuda
	PYTHON="$(abspath $(BIN))/python" bench/gpu_check.sh $(ARGS)

clean:
	rm -rf build $(VENV) $(VENV_TF517) milora/lib milora/*.so

# ---- setting up ----

# torch first: the extension is built against it, and nothing later may pick another one.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) torch==$(TORCH)
	touch $@

$(VENV)/.requirements: tests/requirements/test.txt $(VENV)/.torch
	$(BIN)/python $(PIP_INSTALL) torch==$(TORCH) -r $<
	touch $@

$(VENV)/.built: $(SOURCES) $(VENV)/.requirements
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python $(PIP_INSTALL) --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/.cutlass: $(VENV)/.requirements
	$(BIN)/python $(PIP_INSTALL) --no-deps nvidia-cutlass==4.2.0.0
	touch $@

# The same package built with CUDA kernels; it serves the CPU verbs as well.
$(VENV)/.built-cuda: $(SOURCES) $(VENV)/.cutlass
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('gpu-check: torch $(TORCH) sees no GPU here')"
	PATH="$(abspath $(BIN)):$$PATH" MILORA_CUDA=1 \
	  $(BIN)/python $(PIP_INSTALL) --no-build-isolation --no-deps -e .
	touch $@ $(VENV)/.built

$(VENV_TF517)/.ready: tests/requirements/tf517.txt
	$(PYTHON) -m venv $(VENV_TF517)
	$(VENV_TF517)/bin/python $(PIP_INSTALL) torch==$(TORCH)
	$(VENV_TF517)/bin/python $(PIP_INSTALL) torch==$(TORCH) -r $<
	touch $@
