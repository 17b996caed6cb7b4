// A GPU, through CUDA's driver: what is done on a stream besides NCCL's calls, and which
// collectives run there.
//
// libcuda is loaded when it is first asked for; any library of its interface will do.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_abi.h"

namespace jaxcomm {

class Gpu {
 public:
  // `ordinal`: the device's number in this process. Null with a text in `error` where it
  // cannot be used.
  static std::unique_ptr<Gpu> Open(const char* driver, int ordinal, std::string* error);

  // Makes this thread's calls of CUDA and of NCCL concern this GPU, while it lives. NCCL
  // takes the thread's device for a new communicator's.
  class Current {
   public:
    explicit Current(const Gpu* gpu);
    ~Current();
    Current(const Current&) = delete;

   private:
    const Gpu* gpu_;
    const bool pushed_;  // whether there is something to take away at the end
  };

  bool Zero(void* to, int64_t bytes, CudaStream stream) const;
  bool Set(void* to, uint32_t word, CudaStream stream) const;
  // Whether what is put on the stream is recorded into a graph rather than run.
  bool Records(CudaStream stream) const;
  // Lets this thread ask for events while another records a graph.
  void AllowWhileRecording() const;

  CudaEvent NewEvent() const;  // null where there is none
  bool Mark(CudaEvent event, CudaStream stream) const;
  enum State { kPassed, kAhead, kUnknown };
  State Ask(CudaEvent event) const;

 private:
  // Both are set by Open and never change: any thread may use them.
  std::shared_ptr<const CudaFunctions> driver_;
  void* context_ = nullptr;  // the device's primary context, which JAX uses too
};

// The collectives that were put on a stream and have not been seen to end there. A call
// of NCCL returns long before: where another rank is gone, its kernel may wait for ever,
// and neither NCCL nor XLA says so.
class Running {
 public:
  explicit Running(const Gpu* gpu) : gpu_(gpu) {}

  // Around the calls that put a collective on a stream. `bucket` is for texts.
  void Begin(int64_t bucket, CudaStream stream);
  void End(bool put, CudaStream stream);

  // The bucket of a collective that has run for more than `seconds`, -1 for none. What waits
  // behind other work has not begun. For a thread of its own, several times a second: a
  // process that was stopped for a while does not count that time.
  int64_t Late(double seconds);
  bool any();

 private:
  struct Kernel {
    CudaEvent begin = nullptr;  // passed when it has begun
    CudaEvent end = nullptr;    // passed when it has ended
    int64_t bucket = 0;         // -1 where `begin` could not be put on the stream
  };

  const Gpu* gpu_;
  // The one between Begin and End; of the thread that makes the call.
  Kernel next_;
  // When Late looked last, and for how long it has seen the first of put_ run; of the thread
  // that calls Late.
  int64_t looked_ = 0;
  double has_run_ = 0;
  // Guards what follows.
  std::mutex mutex_;
  // On the stream and not seen to end, in order: End adds at the back, and Late alone takes
  // away at the front.
  std::deque<Kernel> put_;
  // Whose events may be used again.
  std::vector<Kernel> spare_;
};

}  // namespace jaxcomm
