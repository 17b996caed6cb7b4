// What the handlers over MPI and those over NCCL have in common.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace jaxcomm {

using Numbers = xla::ffi::Span<const int64_t>;

// What every collective's call says besides its leaves.
struct Place {
  int64_t comm;
  int64_t schedule;
  int64_t bucket;
  int64_t partition;
  std::vector<int64_t> groups;

  Place(int64_t comm, int64_t schedule, int64_t bucket, int64_t partition, Numbers groups)
      : comm(comm), schedule(schedule), bucket(bucket), partition(partition),
        groups(groups.begin(), groups.end()) {}
};

// Binds what a Place is made of; `binding` is what comes before, such as a stream.
#define JAXCOMM_COLLECTIVE(binding) \
  binding                           \
      .RemainingArgs()              \
      .RemainingRets()              \
      .Attr<int64_t>("comm")        \
      .Attr<int64_t>("schedule")    \
      .Attr<int64_t>("bucket")      \
      .Attr<int64_t>("partition")   \
      .Attr<Numbers>("groups")

inline xla::ffi::Error Refused(const std::string& text) {
  return xla::ffi::Error(xla::ffi::ErrorCode::kFailedPrecondition, text);
}

// Gives Python a text, cut to what it has room for. Returns whether there is one.
inline int Tell(const std::string& text, char* to, int64_t capacity) {
  if (text.empty()) return 0;
  if (capacity > 0) {
    std::strncpy(to, text.c_str(), static_cast<size_t>(capacity - 1));
    to[capacity - 1] = '\0';
  }
  return 1;
}

}  // namespace jaxcomm
