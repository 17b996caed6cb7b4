#pragma once

#include <chrono>
#include <cstdint>

namespace jaxcomm {

// Nanoseconds of the monotonic clock: the same in all processes of a host.
inline int64_t Now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

inline double Seconds(int64_t nanoseconds) { return 1e-9 * static_cast<double>(nanoseconds); }

}  // namespace jaxcomm
