#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace jaxcomm {

Kernels Kernels_baseline();
#ifdef __x86_64__
Kernels Kernels_avx2();
Kernels Kernels_avx512();
#endif

namespace {

// JAXCOMM_KERNELS=baseline|avx2|avx512 overrides the choice, for tests; asking for
// more than the processor has gives what it has.
Kernels Choose() {
#ifdef __x86_64__
  const char* wanted = std::getenv("JAXCOMM_KERNELS");
  const auto allowed = [wanted](const char* name) {
    return wanted == nullptr || std::strcmp(wanted, name) == 0;
  };
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && allowed("avx512")) return Kernels_avx512();
  if (avx2 && (allowed("avx2") || allowed("avx512"))) return Kernels_avx2();
#endif
  return Kernels_baseline();
}

}  // namespace

const Kernels& ChosenKernels() {
  static const Kernels chosen = Choose();
  return chosen;
}

}  // namespace jaxcomm
