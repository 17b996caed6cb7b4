// Collectives over NCCL, on a stream of XLA's. Knows neither XLA nor Python.
//
// libnccl is loaded when it is first asked for: the one that JAX's CUDA plugin uses, or
// any library of its interface. Every call is nonblocking: it may come back in progress
// (since NCCL 2.23 most do), and then the communicator's state is polled, for a bounded
// time. What fails is aborted, so that no rank waits for it, and says so ever after.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "nccl_abi.h"

namespace jaxcomm {

// What is done on a stream besides NCCL's calls.
class Device {
 public:
  virtual ~Device() = default;
  virtual bool Zero(void* to, int64_t bytes, CudaStream stream) = 0;
  virtual bool Set(void* to, uint32_t word, CudaStream stream) = 0;
};

// The GPU, through the driver's library; null with a text where there is none.
std::unique_ptr<Device> OpenGpu(std::string* error);
// Host memory, for a library that reduces there.
std::unique_ptr<Device> HostMemory();

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

// Counters that Python reads; order shared with jaxcomm/native/nccl.py.
enum NcclCounter : int { kNcclCollectives, kNcclBytes, kNcclAgreements, kNcclCounters };

class NcclCommunicator {
 public:
  NcclCommunicator(const Nccl* nccl, int64_t id, int rank, int size, double timeout)
      : id(id), rank(rank), size(size), nccl_(nccl), timeout_(timeout) {}
  ~NcclCommunicator();
  NcclCommunicator(const NcclCommunicator&) = delete;
  NcclCommunicator& operator=(const NcclCommunicator&) = delete;

  // These return "", or what went wrong; then the communicator has been aborted.
  std::string Join(const NcclUniqueId& unique);
  // Makes `part` this rank's group of a division of the ranks; all call it together.
  std::string Split(int color, NcclCommunicator* part);
  std::string AllReduce(const std::vector<Operand>& leaves, NcclOp op, CudaStream stream);
  std::string Broadcast(const std::vector<Operand>& leaves, int root, CudaStream stream);
  std::string AllGather(const std::vector<Operand>& leaves, CudaStream stream);
  std::string ReduceScatter(const std::vector<Operand>& leaves, CudaStream stream);
  std::string AllToAll(const std::vector<Operand>& leaves, CudaStream stream);
  // Sends to `target` and receives from `source`, -1 for neither.
  std::string Permute(const std::vector<Operand>& leaves, int target, int source,
                      Device* device, CudaStream stream);

  // Asks NCCL whether something failed in the background, or a call does not come back;
  // aborts if so. For a thread of its own.
  void Check();
  void Abort(const std::string& why);
  std::string failure();

  const int64_t id;
  const int rank;
  const int size;
  std::mutex mutex;  // held for the whole of a collective
  std::atomic<int64_t> counters[kNcclCounters] = {};

 private:
  // Runs `call(leaf)` for every leaf in one NCCL group.
  template <typename Call>
  std::string Grouped(const char* name, const std::vector<Operand>& leaves, Call call);
  std::string Finish(const char* name, NcclResult result);
  std::string Fail(const char* name, NcclResult result);
  std::string NotDone(const char* name) const;

  const Nccl* nccl_;
  const double timeout_;
  std::atomic<int64_t> entered_{0};  // when the call under way began; 0 for none
  std::mutex state_;  // guards what follows: Check runs on a thread of its own
  NcclComm* comm_ = nullptr;
  std::string failure_;
};

}  // namespace jaxcomm
