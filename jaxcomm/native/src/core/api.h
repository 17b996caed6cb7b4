// What Python calls by name: the library hides all else.
#pragma once

namespace jaxcomm {

// Raised with every change of a function's parameters or of what they mean, together with
// ABI in jaxcomm/native/constants.py.
inline constexpr int kAbi = 2;

}  // namespace jaxcomm

#define JAXCOMM_API extern "C" __attribute__((visibility("default")))
