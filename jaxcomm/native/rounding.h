// The processor's rounding, for as long as an object lives.
#pragma once

#include <cfenv>

namespace jaxcomm {

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
  std::fenv_t saved_;
};

}  // namespace jaxcomm
