# `make test` and `make demo` do all of the set-up themselves; a second call starts at once.

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := lm,lra,speech,espeak,plots,dev
PYTEST_ARGS ?=
# A change of these rebuilds the kernels.
NATIVE := CMakeLists.txt $(wildcard src/leapformer/ops/native/csrc/*)

.DEFAULT_GOAL := help
.PHONY: help setup test fuzz lint format native demo clean test-native-sanitize

help:
	@echo "make demo    set up, train three small models, write runs/demo/report.html"
	@echo "make test    set up, then ruff, pyright and pytest"
	@echo "make fuzz    set up, then random and damaged input for everything that reads or computes (minutes)"
	@echo "make lint    set up, then ruff and pyright"
	@echo "make format  set up, then let ruff rewrite what it can"
	@echo "make test-native-sanitize   the native kernels' tests with address and undefined-behaviour checks"
	@echo "make native  build the native kernels alone, into the source tree"
	@echo "make setup   set up: $(VENV) with the versions of constraints.txt"
	@echo "make clean   remove $(VENV), caches and build folders (runs/ stays)"

setup: $(STAMP)

# torch comes first and alone, so that its pinned version is what everything after it sees.
$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	@test -n "$(PYTHON)" || { echo "leapformer needs Python 3.11 or newer: none found; set PYTHON=..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Two workers with one thread each: the tests are small, and threads inside them only get in each other's way.
# A file stays with one worker, so that what it prepares once for all of its tests is prepared once.
test: lint
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

# FUZZ_ARGS="readers --seed 7" runs a part of it, or other cases.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

# Needs CMake and a compiler, and no set-up: builds the kernels into the source tree, as an editable install does.
native:
	cmake -S . -B build/native -D LEAPFORMER_IN_PLACE=ON
	cmake --build build/native

demo: $(STAMP)
	$(BIN)/leapformer demo

# The tests of the native kernels with AddressSanitizer and UndefinedBehaviorSanitizer in them. Needs GCC, whose runtimes
# are loaded before Python; Python itself never frees all it has, so leaks are not looked for.
SANITIZERS = $(shell $(CXX) -print-file-name=libasan.so):$(shell $(CXX) -print-file-name=libubsan.so)
test-native-sanitize: $(STAMP)
	cmake -S . -B build/sanitize -D LEAPFORMER_SANITIZE=ON -D CMAKE_BUILD_TYPE=None
	cmake --build build/sanitize -j 3
	LEAPFORMER_NATIVE=$(CURDIR)/build/sanitize/libleapformer_native.so LD_PRELOAD=$(SANITIZERS) \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
	$(BIN)/python -m pytest -n 2 --dist loadfile -p no:cacheprovider tests/ops -k "native or pieces" $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist src/*.egg-info src/leapformer/ops/native/*.so
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
