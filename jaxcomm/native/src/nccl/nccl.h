// Collectives over NCCL, on a stream of XLA's. Knows neither XLA nor Python.
//
// libnccl is loaded when it is first asked for: the one that JAX's CUDA plugin uses, or
// any library of its interface. Every call is nonblocking: it may come back in progress
// (since NCCL 2.23 most do), and then the communicator's state is polled, for a bounded
// time. What a call fails in is aborted, so that no rank waits for it; a communicator that
// has failed says so ever after.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "gpu.h"
#include "nccl_abi.h"
#include "types.h"

namespace jaxcomm {

class Nccl {
 public:
  // Loads a library by its path; null with a text in `error`.
  static std::unique_ptr<Nccl> Open(const char* path, std::string* error);
  const NcclFunctions& calls() const { return calls_; }

 private:
  NcclFunctions calls_;  // set by Open, and never changed
};

// One leaf as a call sees it: where it is read, and where its result goes.
struct Operand {
  const void* from;
  void* to;
  int64_t count;  // elements; of a rank, where the ranks have parts
  NcclDType dtype;
};

// A bucket's leaves, and where they are to be reduced. `number` is for texts.
struct Work {
  std::vector<Operand> leaves;
  CudaStream stream;
  int64_t number;
};

// Counters that Python reads: X(enumerator, Python's name).
#define JAXCOMM_NCCL_COUNTERS(X)            \
  X(kNcclCollectives, "nccl_collectives")   \
  X(kNcclBytes, "bytes")                    \
  X(kNcclAgreements, "agreements")
enum NcclCounter : int { JAXCOMM_NCCL_COUNTERS(JAXCOMM_ENUMERATOR) kNcclCounters };
// In what jaxcomm_nccl_counters writes, before them: calls.
enum NcclCounterColumn : int { kNcclCallsColumn, kNcclFirstCounter };

class NcclCommunicator {
 public:
  NcclCommunicator(const Nccl* nccl, const Gpu* gpu, int64_t id, int rank, int size,
                   double timeout)
      : id(id), rank(rank), size(size), nccl_(nccl), gpu_(gpu), timeout_(timeout),
        running_(gpu) {}
  NcclCommunicator(const NcclCommunicator&) = delete;
  NcclCommunicator& operator=(const NcclCommunicator&) = delete;

  // These return "", or what went wrong; where it was a call of NCCL, the communicator has
  // been aborted.
  std::string Join(const NcclUniqueId& unique);
  // Makes `part` this rank's group of a division of the ranks; all call it together.
  std::string Split(int color, NcclCommunicator* part);
  std::string AllReduce(const Work& work, NcclOp op);
  std::string Broadcast(const Work& work, int root);
  std::string AllGather(const Work& work);
  std::string ReduceScatter(const Work& work);
  std::string AllToAll(const Work& work);
  // Sends to `target` and receives from `source`, -1 for neither.
  std::string Permute(const Work& work, int target, int source);

  // Sees to it that NCCL's threads have sent what other ranks wait for; for the end of the
  // process, with nothing under way. NCCL's resources go with the process: to give them
  // back NCCL would wait for other ranks, and for the CUDA graphs that calls stand in, which
  // XLA keeps. For those it would wait here too, so this does nothing then.
  void Finalize(double seconds);

  // Looks for what no call reports: an error in the background, a call that does not come
  // back, a kernel that has run for more than `abort_after` seconds (0: no limit), as where
  // it waits for a rank that does not come. For a thread of its own, several times a second.
  // Returns why the process must end, or "": then the next call fails, if anything did.
  std::string Check(double abort_after);
  std::string failure();

  const int64_t id;  // Python's key
  const int rank;
  const int size;
  // Held for the whole of a collective: one at a time.
  std::mutex mutex;
  // By NcclCounter. Added to by the call that holds `mutex`; Python reads them without it.
  std::atomic<int64_t> counters[kNcclCounters] = {};

 private:
  // While it lives, a call of NCCL is under way.
  struct Entered {
    explicit Entered(NcclCommunicator* comm);
    ~Entered();
    NcclCommunicator* comm;  // whose call it is
  };

  // Runs `call(leaf)` for every leaf in one NCCL group.
  template <typename Call>
  std::string Grouped(const char* name, const Work& work, Call call);
  std::string Finish(const char* name, NcclResult result);
  std::string Fail(const char* name, NcclResult result);
  std::string Why(const std::string& what, NcclResult result) const;
  void Abort(const std::string& why);
  // "what on rank 1 of 2"
  std::string Here(const std::string& what) const;
  std::string NotDone(const std::string& what, double seconds) const;

  const Nccl* nccl_;
  const Gpu* gpu_;
  const double timeout_;  // seconds that a call may stay in progress
  // When the call under way began, in ns of the monotonic clock; 0 for none. Written by the
  // thread that makes it, read by Check's.
  std::atomic<int64_t> entered_{0};
  // Whether a call stands in a graph. Set by the thread that makes it, for good.
  std::atomic<bool> recorded_{false};
  // Filled by the call that holds `mutex`; Check looks through it.
  Running running_;
  // Guards what follows where two threads use it, which are the calls' and Check's.
  std::mutex state_;
  // Null before it is made and after an abort. Only the calls' thread changes it, which may
  // therefore read it without `state_`.
  NcclComm* comm_ = nullptr;
  // Why every later call fails; "" for no reason. Set once, by either thread.
  std::string failure_;
};

}  // namespace jaxcomm
