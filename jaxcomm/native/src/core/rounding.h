// The processor's rounding, for as long as an object lives.
#pragma once

#include <cfenv>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace jaxcomm {

// Makes a thread round as XLA's do, for one that goes on with a program: subnormal numbers
// are zero. Else it would depend on which thread did the work what a rank gets.
inline void FlushSubnormals() {
#if defined(__x86_64__)
  constexpr unsigned kFlushResults = 1u << 15, kFlushOperands = 1u << 6;
  _mm_setcsr(_mm_getcsr() | kFlushResults | kFlushOperands);
#elif defined(__aarch64__)
  uint64_t control;
  asm volatile("mrs %0, fpcr" : "=r"(control));
  asm volatile("msr fpcr, %0" : : "r"(control | uint64_t{1} << 24));
#endif
}

// XLA's threads may flush subnormal numbers to zero, and the thread that runs a call
// need not be of the same kind on every rank. Ranks compute the same sum, so they must
// round alike.
class DefaultRounding {
 public:
  DefaultRounding() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultRounding() { std::fesetenv(&saved_); }

 private:
  // The thread's own, to be put back.
  std::fenv_t saved_;
};

}  // namespace jaxcomm
