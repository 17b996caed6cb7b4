#!/usr/bin/env bash
# Run the native code under AddressSanitizer with UBSan, and under ThreadSanitizer:
# first alone, then (without ThreadSanitizer, which knows nothing of XLA's threads) as
# the library that the conformance suite loads. Usage: sanitize.sh VENV/bin
set -euo pipefail
bin=$(cd "$1" && pwd)
cd "$(dirname "$0")/../.."
source=jaxcomm/native/src
include="-I$source/core -I$source/mpi -I$source/node -I$source/nccl"
build=build/sanitize
rm -rf $build
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
# PMIx maps its shared store where the sanitizers keep theirs; the other store will do.
export PMIX_MCA_gds=hash
# UCX hooks madvise, which ThreadSanitizer calls before a thread is ready for it.
export UCX_MEM_EVENTS=n OMPI_MCA_pml=ob1 OMPI_MCA_osc=^ucx
# MPI and Python keep what they allocate; only our own accesses are of interest.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:exitcode=66:verify_asan_link_order=0
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=66

targets=(baseline)
if [ "$(uname -m)" = x86_64 ]; then targets+=(avx2 avx512); fi
declare -A flags=([baseline]="" [avx2]="-mavx2"
  [avx512]="-mavx512f -mavx512bw -mavx512vl -mavx512dq")

compile() {  # compile NAME SANITIZERS: the driver, and our objects
  local out=$build/$1 common="$include -std=c++17 -g -O1 -fPIC -fno-omit-frame-pointer -fsanitize=$2"
  mkdir -p "$out"
  local target
  for target in "${targets[@]}"; do
    # shellcheck disable=SC2086
    c++ $common -ffp-contract=off ${flags[$target]} -DJAXCOMM_TARGET=$target \
      -c $source/core/kernels.cc -o "$out/kernels_$target.o" &
  done
  local file
  for file in core/{constants,deadline,progress,reduce,stacks,tiers,dispatch} mpi/{mpi_binding,exchange} node/{node,tiers}; do
    # shellcheck disable=SC2086
    c++ $common -c $source/$file.cc -o "$out/${file##*/}.o" &
  done
  wait
  # shellcheck disable=SC2086
  "$bin/mpicxx" $common tests/native/driver.cc "$out"/*.o -ldl -pthread \
    -o "$out/driver"
}

for kind in thread address,undefined; do
  name=${kind%%,*}
  echo "== driver under $kind, 2 ranks, 2 threads, 2 communicators"
  compile "$name" "$kind"
  for target in "${targets[@]}"; do
    JAXCOMM_KERNELS=$target "$bin/mpiexec" -n 2 --bind-to none --oversubscribe \
      "$build/$name/driver"
  done
done

jaxlib=$("$bin/python" -c \
  "import importlib.util as u; print(u.find_spec('jaxlib').submodule_search_locations[0])")
# shellcheck disable=SC2086
c++ $include -std=c++17 -g -O1 -fPIC -fno-omit-frame-pointer -fsanitize=address,undefined \
  -isystem "$jaxlib/include" -fvisibility=hidden -shared \
  $source/mpi/handlers.cc $source/nccl/{gpu,nccl,nccl_handlers}.cc \
  $build/address/{constants,deadline,exchange,mpi_binding,node,progress,reduce,stacks,dispatch,kernels_*}.o -ldl \
  -o $build/libjaxcomm_native.so
# Of NCCL's and CUDA's interface; its own memory is not of interest.
c++ -std=c++17 -O2 -shared -fPIC -fvisibility=hidden tests/native/fake_*.cc -lrt -pthread \
  -o $build/libfake_nccl.so
export JAXCOMM_NCCL_LIBRARY=$PWD/$build/libfake_nccl.so JAXCOMM_NCCL_HOST_MEMORY=1
results=$build/results.json
for transport in mpi nccl; do
  echo "== conformance over $transport, 2 ranks, with the library under address,undefined"
  rm -f "$results"
  JAXCOMM_NATIVE_LIBRARY=$PWD/$build/libjaxcomm_native.so \
  LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so) $(c++ -print-file-name=libstdc++.so)" \
    "$bin/python" -m jaxcomm run -n 2 --timeout 1500 -m tests.programs.conformance "$results" $transport
  "$bin/python" - "$results" <<'PYTHON'
import json, sys
found = json.load(open(sys.argv[1]))
errors = [text for text in found.values() if text and not text.startswith("skipped: ")]
print(f"{len(found)} checks, {len(errors)} failed", *errors, sep="\n")
sys.exit(bool(errors) or not found)
PYTHON
done
