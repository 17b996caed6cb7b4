#!/usr/bin/env bash
# Build jaxcomm on a machine with a GPU and measure it there: one command, no network,
# under 8 minutes. Nothing outside a temporary folder changes but the result,
# benchmarks/results/gpu.json ($OUT/gpu.json where OUT is set).
#
#   bash benchmarks/gpu.sh [--dry] [--only exact1,time2]   (see gpu.py)
#
# Needs Python with jax (and its CUDA plugin), numpy and optax, and a C++17 compiler; uses
# pip and scikit-build-core where they are. PYTHON chooses the interpreter.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d "${TMPDIR:-/tmp}/jaxcomm-gpu.XXXXXX")
trap 'rm -rf "$work"' EXIT
site=$work/site
log=$work/build.log

by_pip() {
  "$python" -m pip install --no-index --no-build-isolation --no-deps --no-warn-script-location \
    --config-settings=build-dir="$work/build" --target "$site" "$root"
}

# What CMakeLists.txt says, for a machine without cmake.
by_compiler() {
  mkdir -p "$site" && cp -r "$root/jaxcomm" "$site/"
  local native=$root/jaxcomm/native include flags objects=()
  include=$("$python" -c 'import importlib.util as u
print(u.find_spec("jaxlib").submodule_search_locations[0])')/include
  flags=(-std=c++17 -O3 -fPIC -fvisibility=hidden)
  local targets=(baseline)
  [[ $(uname -m) == x86_64 ]] && targets+=(avx2 avx512)
  for target in "${targets[@]}"; do
    local arch=()
    [[ $target == avx2 ]] && arch=(-mavx2)
    [[ $target == avx512 ]] && arch=(-mavx512f -mavx512bw -mavx512vl -mavx512dq
      -mprefer-vector-width=512)
    c++ "${flags[@]}" "${arch[@]}" -ffp-contract=off -fno-math-errno -fno-trapping-math \
      -DJAXCOMM_TARGET="$target" -c "$native/kernels.cc" -o "$work/$target.o"
    objects+=("$work/$target.o")
  done
  local sources=()
  for source in "$native"/*.cc; do
    [[ $source == */kernels.cc ]] || sources+=("$source")
  done
  c++ "${flags[@]}" -shared -isystem "$include" -o "$site/jaxcomm/native/libjaxcomm_native.so" \
    "${sources[@]}" "${objects[@]}" -ldl
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
# The checkout itself must not shadow what was built.
cd "$work"
# A library or profile meant for another build is not for this one.
unset JAXCOMM_NATIVE_LIBRARY
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
where=$("$python" -c 'import jaxcomm; print(jaxcomm.__file__)')
if [[ $where != "$site"/* ]]; then
  echo "Python imports another jaxcomm ($where) than was built; uninstall it" >&2
  exit 2
fi
"$python" "$root/benchmarks/gpu.py" \
  --built "$built" --seconds "$((450 - SECONDS))" "$@"
