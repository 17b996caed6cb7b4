#!/usr/bin/env bash
# Build jaxcomm on a machine with a GPU and measure it there: no network, two calls of under
# 6 minutes each. Nothing outside a temporary folder changes but the results,
# benchmarks/results/gpu.json and many-cores.json ($OUT/ where OUT is set).
#
#   bash benchmarks/gpu/gpu.sh [--dry] [--call 2] [--only exact1,time2]   (see __main__.py)
#
# Needs Python with jax (and its CUDA plugin), numpy, optax and flax, pip and
# scikit-build-core, and a C++17 compiler. PYTHON chooses the interpreter. The wheels in the
# folder WHEELS are installed beside it: Open MPI's and mpi4py's, for instance.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$(command -v "${PYTHON:-python3}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
arguments="$*"
work=$(mktemp -d "${TMPDIR:-/tmp}/jaxcomm-gpu.XXXXXX")
trap 'rm -rf "$work"' EXIT
log=$work/build.log


# An environment on top of Python's own, which stays as it is, a jaxcomm in it unseen.
prefix=$("$python" -c 'import sys; print(sys.prefix)')
below=$("$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")')
"$python" -m venv --without-pip "$work/python"
python=$work/python/bin/python
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$below" > "$packages/below.pth"
# As an editable installation of the example would: its network is timed.
echo "$root/examples/stemdl" > "$packages/stemdl.pth"
# The checkout itself must not shadow the jaxcomm that is built: what else is imported
# from it is linked to.
mkdir "$work/checkout"
ln -s "$root/benchmarks" "$root/tests" "$work/checkout/"
install=("$python" -m pip install --no-index --no-deps --no-warn-script-location
  --ignore-installed)
if [[ -n ${WHEELS:-} ]]; then
  "${install[@]}" "$WHEELS"/*.whl > "$log" 2>&1 || { tail -20 "$log" >&2; exit 2; }
elif [[ -x $prefix/bin/mpiexec ]]; then
  # Open MPI's wheel and mpi4py look for one another beside Python.
  export JAXCOMM_MPIEXEC=$prefix/bin/mpiexec
  export LD_LIBRARY_PATH=$prefix/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi

by_pip() {
  "${install[@]}" --no-build-isolation \
    --config-settings=build-dir="$work/build" "$root"
}

# What CMakeLists.txt says, for a machine without cmake.
by_compiler() {
  cp -r "$root/jaxcomm" "$packages/"
  local native=$root/jaxcomm/native/src include flags folder
  include=$("$python" -c 'import importlib.util as u
print(u.find_spec("jaxlib").submodule_search_locations[0])')/include
  # Where nothing is measured, the compiler need not take its time.
  flags=(-std=c++17 -O3 -fPIC -fvisibility=hidden)
  [[ " $arguments " == *" --dry "* ]] && flags[1]=-O0
  for folder in core mpi node nccl; do flags+=("-I$native/$folder"); done
  local targets=(baseline)
  [[ $(uname -m) == x86_64 ]] && targets+=(avx2 avx512)
  for target in "${targets[@]}"; do
    local arch=()
    [[ $target == avx2 ]] && arch=(-mavx2)
    [[ $target == avx512 ]] && arch=(-mavx512f -mavx512bw -mavx512vl -mavx512dq
      -mprefer-vector-width=512)
    c++ "${flags[@]}" "${arch[@]}" -ffp-contract=off -fno-math-errno -fno-trapping-math \
      -DJAXCOMM_TARGET="$target" -c "$native/core/kernels.cc" -o "$work/$target.o"
  done
  find "$native" -name '*.cc' ! -name kernels.cc ! -name loopback.cc -print0 |
    (cd "$work" && xargs -0 -n 1 -P "$(nproc)" c++ "${flags[@]}" -isystem "$include" -c)
  c++ -shared -o "$packages/jaxcomm/native/libjaxcomm_native.so" "$work"/*.o -ldl
}

echo "building jaxcomm in $work" >&2
if by_pip >"$log" 2>&1; then
  built="pip"
else
  why=$(grep -v '^ *$' "$log" | tail -1)
  echo "pip failed ($why); trying c++ alone" >&2
  if ! by_compiler >>"$log" 2>&1; then
    tail -40 "$log" >&2
    echo "jaxcomm could not be built by pip nor by c++; the log is above" >&2
    exit 2
  fi
  built="c++ (pip: $why)"
fi
echo "built by $built in $SECONDS s" >&2
cd "$work/checkout"
# A library or profile meant for another build is not for this one.
unset JAXCOMM_NATIVE_LIBRARY
where=$("$python" -c 'import jaxcomm; print(jaxcomm.__file__)')
if [[ $where != "$packages"/* ]]; then
  echo "Python imports another jaxcomm ($where) than was built; uninstall it" >&2
  exit 2
fi
"$python" -m benchmarks.gpu \
  --built "$built" --seconds "$((350 - SECONDS))" "$@"
