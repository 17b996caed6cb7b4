// Collectives over NCCL, on a stream of XLA's. Knows neither XLA nor Python.
//
// libnccl is loaded when it is first asked for: the one that JAX's CUDA plugin uses, or
// any library of its interface. Every call is nonblocking: it may come back in progress
// (since NCCL 2.23 most do), and then the communicator's state is polled, for a bounded
// time. What fails is aborted, so that no rank waits for it, and says so ever after.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "gpu.h"
#include "nccl_abi.h"

namespace jaxcomm {

class Nccl {
 public:
  // Loads a library by its path; null with a text in `error`.
  static std::unique_ptr<Nccl> Open(const char* path, std::string* error);
  const NcclFunctions& calls() const { return calls_; }

 private:
  NcclFunctions calls_;
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

// Counters that Python reads; order shared with jaxcomm/native/nccl.py.
enum NcclCounter : int { kNcclCollectives, kNcclBytes, kNcclAgreements, kNcclCounters };

class NcclCommunicator {
 public:
  NcclCommunicator(const Nccl* nccl, const Gpu* gpu, int64_t id, int rank, int size,
                   double timeout)
      : id(id), rank(rank), size(size), nccl_(nccl), gpu_(gpu), timeout_(timeout),
        running_(gpu) {}
  NcclCommunicator(const NcclCommunicator&) = delete;
  NcclCommunicator& operator=(const NcclCommunicator&) = delete;

  // These return "", or what went wrong; then the communicator has been aborted.
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

  // Gives NCCL its resources back, within some seconds; nothing may be under way. Does
  // nothing where calls stand in CUDA graphs: NCCL would wait for the end of those, and XLA
  // keeps them as long as the process.
  void Close(double seconds);

  // Says what has failed since the last call, if no call will: an error in the background,
  // a kernel that waits for ranks that do not come, a call that does not come back. For a
  // thread of its own.
  std::string Check();
  std::string failure();

  const int64_t id;
  const int rank;
  const int size;
  std::mutex mutex;  // held for the whole of a collective
  std::atomic<int64_t> counters[kNcclCounters] = {};

 private:
  // Runs `call(leaf)` for every leaf in one NCCL group.
  template <typename Call>
  std::string Grouped(const char* name, const Work& work, Call call);
  std::string Finish(const char* name, NcclResult result, double seconds);
  std::string Fail(const char* name, NcclResult result);
  void Abort(const std::string& why);
  // "what on rank 1 of 2"
  std::string Here(const std::string& what) const;
  std::string NotDone(const std::string& what) const;

  const Nccl* nccl_;
  const Gpu* gpu_;
  const double timeout_;
  std::atomic<int64_t> entered_{0};  // when the call under way began; 0 for none
  std::atomic<bool> recorded_{false};  // whether a call stands in a graph
  Running running_;
  std::mutex state_;  // guards what follows: Check runs on a thread of its own
  NcclComm* comm_ = nullptr;
  std::string failure_;
};

}  // namespace jaxcomm
