// Element types, operations, moves and algorithms. Python has the same names in the same order, and
// compares them when it loads the library (constants.cc).
#pragma once

#include <cstddef>
#include <cstdint>

namespace jaxcomm {

// X(enumerator, Python's name, bytes)
// clang-format off
#define JAXCOMM_DTYPES(X)                                                                  \
  X(kF32, "float32", 4)      X(kF64, "float64", 8)                                         \
  X(kBF16, "bfloat16", 2)    X(kF16, "float16", 2)                                         \
  X(kI8, "int8", 1)          X(kI16, "int16", 2)                                           \
  X(kI32, "int32", 4)        X(kI64, "int64", 8)                                           \
  X(kU8, "uint8", 1)         X(kU16, "uint16", 2)                                          \
  X(kU32, "uint32", 4)       X(kU64, "uint64", 8)                                          \
  X(kBool, "bool", 1)        X(kC64, "complex64", 8)       X(kC128, "complex128", 16)
// X(enumerator, Python's name), as all that follow
#define JAXCOMM_OPS(X) X(kSum, "sum") X(kMin, "min") X(kMax, "max") X(kProd, "prod")
// What moves data between ranks without adding it up, or not all of it to all.
#define JAXCOMM_MOVES(X)                                                                   \
  X(kAllGather, "all_gather")    X(kReduceScatter, "reduce_scatter")                       \
  X(kAllToAll, "all_to_all")     X(kPermute, "permute")
// How the ranks of several hosts add up (mpi/exchange.h).
#define JAXCOMM_ALGORITHMS(X) \
  X(kRing, "ring") X(kPairwise, "pairwise") X(kDoubling, "doubling")
// clang-format on

#define JAXCOMM_ENUMERATOR(enumerator, ...) enumerator,

enum DType : int { JAXCOMM_DTYPES(JAXCOMM_ENUMERATOR) kDTypes };
enum Move : int { JAXCOMM_MOVES(JAXCOMM_ENUMERATOR) kMoves };
enum Algorithm : int { JAXCOMM_ALGORITHMS(JAXCOMM_ENUMERATOR) kAlgorithms };
enum Op : int {
  JAXCOMM_OPS(JAXCOMM_ENUMERATOR)
  kMpiOps,
  // Half the sum. Two ranks combine every element exactly once, so this one pass is
  // the whole of their mean.
  kMeanOfTwo = kMpiOps,
  kOps
};

#define JAXCOMM_BYTES(enumerator, name, bytes) bytes,
inline constexpr size_t kItemSize[kDTypes] = {JAXCOMM_DTYPES(JAXCOMM_BYTES)};
#undef JAXCOMM_BYTES

}  // namespace jaxcomm
