// MPI without mpi.h: entry points and handles found at run time.
//
// The library is built with no MPI present. Python hands over the path of the
// libmpi that mpi4py has loaded and the value of every handle it needs. Handles
// are pointers in Open MPI (8 bytes) and ints in MPICH (4 bytes); both are kept
// here as 64-bit words and narrowed at the call by a template on the handle type.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>

#include "types.h"

namespace jaxcomm {

// How a thread waits for what MPI brings. MPI moves on only while it is called; but what
// is not there at once is on its way, and XLA's threads have a use for the core.
class Patience {
 public:
  void Renew() { start_ = std::chrono::steady_clock::now(); }
  void Wait() {
    if (std::chrono::steady_clock::now() - start_ < kSoon) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(kNap);
    }
  }

 private:
  static constexpr std::chrono::microseconds kSoon{50}, kNap{50};
  // When something came last; used by the waiting thread alone.
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// The collectives the handlers need, whatever the MPI behind them. All return MPI
// error codes.
class Mpi {
 public:
  virtual ~Mpi() = default;
  // In-place all-reduce of n elements (n <= INT_MAX).
  virtual int AllReduce(void* data, int n, DType dtype, Op op, uint64_t comm) = 0;
  // The same with sleep while waiting, for others have work for this core.
  virtual int PatientAllReduce(void* data, int n, DType dtype, Op op, uint64_t comm) = 0;
  virtual int Broadcast(void* bytes, int n, int root, uint64_t comm) = 0;
  // n bytes of every rank to every rank.
  virtual int AllGather(const void* from, void* to, int n, uint64_t comm) = 0;
  // n bytes of every rank to each other rank.
  virtual int AllToAll(const void* from, void* to, int n, uint64_t comm) = 0;
  // Rank r gets the r-th n elements of the ranks' reduced data.
  virtual int ReduceScatter(const void* from, void* to, int n, DType dtype, Op op,
                            uint64_t comm) = 0;
  // Sends n bytes to `target` and receives n from `source`; -1 for neither.
  virtual int Exchange(const void* from, int target, void* to, int source, int n,
                       uint64_t comm) = 0;
  // Starts to send n bytes to `target`, or to receive n from `source`; gives a request.
  virtual int StartSend(const void* from, int n, int target, int tag, uint64_t comm,
                        uint64_t* request) = 0;
  virtual int StartReceive(void* to, int n, int source, int tag, uint64_t comm,
                           uint64_t* request) = 0;
  virtual int Test(uint64_t* request, bool* done) = 0;
  virtual std::string ErrorText(int code) = 0;
  // The MPI_Op that reduces this type: MPI's own, or one of ours.
  virtual uint64_t OpHandle(DType dtype, Op op) = 0;
};

struct MpiHandles {
  uint64_t dtype[kDTypes];
  uint64_t byte;
  uint64_t op[kMpiOps];
  uint64_t in_place;
  // Whether threads must take turns in MPI (MPI_THREAD_SERIALIZED).
  uint64_t serialized;
};

// Binds to `library` (a path or soname already loaded in this process). Returns
// null and sets `error` when it is not loaded or lacks an entry point.
std::unique_ptr<Mpi> OpenMpi(const char* library, int handle_bytes,
                             const MpiHandles& handles, std::string* error);

// Under MPI_THREAD_SERIALIZED, held around every MPI call of this process, by Python
// too. No blocking call is made while it is held.
void LockMpi();
void UnlockMpi();

}  // namespace jaxcomm
