// Element types and operations. Order shared with jaxcomm/native/__init__.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jaxcomm {

enum DType : int {
  kF32, kF64, kBF16, kF16,
  kI8, kI16, kI32, kI64,
  kU8, kU16, kU32, kU64,
  kBool, kC64, kC128,
  kDTypes
};
enum Op : int {
  kSum, kMin, kMax, kProd,
  kMpiOps,
  // Half the sum. Two ranks combine every element exactly once, so this one pass is
  // the whole of their mean.
  kMeanOfTwo = kMpiOps,
  kOps
};

inline constexpr size_t kItemSize[kDTypes] = {4, 8, 2, 2, 1, 2, 4, 8,
                                              1, 2, 4, 8, 1, 8, 16};

}  // namespace jaxcomm
