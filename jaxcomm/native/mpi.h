// MPI without mpi.h: entry points and handles found at run time.
//
// The library is built with no MPI present. Python hands over the path of the
// libmpi that mpi4py has loaded and the value of every handle it needs. Handles
// are pointers in Open MPI (8 bytes) and ints in MPICH (4 bytes); both are kept
// here as 64-bit words and narrowed at the call by a template on the handle type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace jaxcomm {

// Order shared with jaxcomm/native/__init__.py.
enum DType : int { kF32, kF64, kI8, kI16, kI32, kI64, kU8, kU16, kU32, kU64, kDTypes };
enum Op : int { kSum, kMin, kMax, kProd, kOps };

inline constexpr size_t kItemSize[kDTypes] = {4, 8, 1, 2, 4, 8, 1, 2, 4, 8};

// The two collectives the handlers need, whatever the MPI behind them.
class Mpi {
 public:
  virtual ~Mpi() = default;
  // In-place all-reduce of n elements (n <= INT_MAX). Returns an MPI error code.
  virtual int AllReduce(void* data, int n, DType dtype, Op op, uint64_t comm) const = 0;
  virtual int Broadcast(void* bytes, int n, int root, uint64_t comm) const = 0;
  virtual std::string ErrorText(int code) const = 0;
};

struct MpiHandles {
  uint64_t dtype[kDTypes];
  uint64_t byte;
  uint64_t op[kOps];
  uint64_t in_place;
};

// Binds to `library` (a path or soname already loaded in this process). Returns
// null and sets `error` when it is not loaded or lacks an entry point.
std::unique_ptr<Mpi> OpenMpi(const char* library, int handle_bytes,
                             const MpiHandles& handles, std::string* error);

}  // namespace jaxcomm
