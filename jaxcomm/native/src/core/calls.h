// What the handlers over MPI and those over NCCL have in common.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "guard.h"
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

inline XLA_FFI_Error* NewError(const XLA_FFI_Api* api, const char* text) {
  XLA_FFI_Error_Create_Args args{};
  args.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
  args.errc = XLA_FFI_Error_Code_INTERNAL;
  args.message = text;
  return api->XLA_FFI_Error_Create(&args);
}

// Defines a handler as XLA_FFI_DEFINE_HANDLER_SYMBOL does, but nothing it throws, in
// XLA's decoding of its operands or in ours, gets out.
#define JAXCOMM_HANDLER(name, impl, ...)                                    \
  extern "C" XLA_FFI_Error* name(XLA_FFI_CallFrame* frame) {                \
    return jaxcomm::Guarded(                                                \
        [frame] {                                                           \
          XLA_FFI_DEFINE_HANDLER(handler, impl, ##__VA_ARGS__);             \
          return (*handler)(frame);                                         \
        },                                                                  \
        [frame](const char* text) {                                         \
          return jaxcomm::NewError(frame->api, text);                       \
        });                                                                 \
  }                                                                         \
  static_assert(true, "a semicolon follows")

}  // namespace jaxcomm
