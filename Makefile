# `make demo` and `make test` each work alone on a fresh machine; both set up first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.jaxcomm-ready
NATIVE := CMakeLists.txt $(wildcard jaxcomm/native/*.cc jaxcomm/native/*.h)
# What to install besides the package: the oldest JAX in one place, the newest elsewhere.
EXTRAS ?= dev
DEMO_ARGS := $(if $(DEMO_STEPS),--steps $(DEMO_STEPS))
TESTS ?= tests

.PHONY: setup demo test test-mpich lint sanitize bench bench-peers clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   train a small STEMDL network on two MPI ranks; results in out/demo"
	@echo "make test   run all tests on 1, 2 and 4 ranks"
	@echo "make lint   ruff and pyright"
	@echo "make test-mpich  the same native library over MPICH"
	@echo "make sanitize  run the native code under Address-, UB- and ThreadSanitizer"
	@echo "make bench  measure the gradient reduction beside its peers"
	@echo "make bench-peers  the same beside torch.distributed, which it installs first"
	@echo "make setup  make $(VENV) (the others do it when needed)"

setup: $(STAMP)

$(STAMP): pyproject.toml $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxcomm needs Python 3.11 or newer; say make PYTHON=python3.12"; exit 1; }
	@command -v c++ g++ clang++ >/dev/null || \
	  { echo "jaxcomm needs a C++17 compiler (Debian: apt-get install g++)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[$(EXTRAS)]' \
	  --reinstall-package jaxcomm
	@touch $@

demo: $(STAMP)
	$(BIN)/jaxcomm demo $(DEMO_ARGS)

test: $(STAMP)
	$(BIN)/pytest $(TESTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The same library file over MPICH, in an environment of its own.
test-mpich: $(STAMP)
	test -x .venv-mpich/bin/python || $(PYTHON) -m venv .venv-mpich
	$(BIN)/uv pip install --quiet --python .venv-mpich/bin/python --editable . \
	  mpich mpi4py optax flax hypothesis pytest pytest-timeout
	JAXCOMM_NATIVE_LIBRARY=$$($(BIN)/python -c \
	  'from jaxcomm import native; print(native.library_path())') \
	  .venv-mpich/bin/pytest tests/test_conformance.py tests/test_native.py \
	  -k 'not mpi4jax'

sanitize: $(STAMP)
	tests/native/sanitize.sh $(BIN)

bench: $(STAMP)
	$(BIN)/python benchmarks/reduction.py

# Peers that need torch live in an environment of their own.
bench-peers: $(STAMP) .venv-peers/bin/python
	$(BIN)/python benchmarks/reduction.py

.venv-peers/bin/python:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet torch==2.13.0 numpy

clean:
	rm -rf $(VENV) .venv-peers build out
