#include "nccl.h"

#include <dlfcn.h>

#include <cstring>
#include <thread>

namespace jaxcomm {
namespace {

constexpr std::chrono::microseconds kPoll{20};

int64_t Now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

constexpr int kItem[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};  // by NcclDType

class Gpu final : public Device {
 public:
  bool Open(std::string* error) {
    void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (driver != nullptr) {
      zero_ = reinterpret_cast<decltype(zero_)>(dlsym(driver, "cuMemsetD8Async"));
      set_ = reinterpret_cast<decltype(set_)>(dlsym(driver, "cuMemsetD32Async"));
    }
    if (zero_ != nullptr && set_ != nullptr) return true;
    *error = "the CUDA driver's library, libcuda.so.1, cannot be used";
    return false;
  }

  bool Zero(void* to, int64_t bytes, CudaStream stream) override {
    return zero_(reinterpret_cast<uintptr_t>(to), 0, static_cast<size_t>(bytes), stream) == 0;
  }
  bool Set(void* to, uint32_t word, CudaStream stream) override {
    return set_(reinterpret_cast<uintptr_t>(to), word, 1, stream) == 0;
  }

 private:
  // CUdeviceptr is an unsigned integer as wide as a pointer, CUresult an int.
  int (*zero_)(uintptr_t, unsigned char, size_t, CudaStream) = nullptr;
  int (*set_)(uintptr_t, unsigned, size_t, CudaStream) = nullptr;
};

class Host final : public Device {
 public:
  bool Zero(void* to, int64_t bytes, CudaStream) override {
    std::memset(to, 0, static_cast<size_t>(bytes));
    return true;
  }
  bool Set(void* to, uint32_t word, CudaStream) override {
    std::memcpy(to, &word, sizeof word);
    return true;
  }
};

}  // namespace

std::unique_ptr<Device> OpenGpu(std::string* error) {
  auto gpu = std::make_unique<Gpu>();
  if (!gpu->Open(error)) return nullptr;
  return gpu;
}

std::unique_ptr<Device> HostMemory() { return std::make_unique<Host>(); }

std::unique_ptr<Nccl> Nccl::Open(const char* path, std::string* error) {
  // Where JAX has loaded it already, this finds the same copy.
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* why = dlerror();
    *error = why ? why : path;
    return nullptr;
  }
  auto nccl = std::make_unique<Nccl>();
#define JAXCOMM_NCCL_LOAD(name, result, parameters)                                    \
  nccl->calls_.name =                                                                  \
      reinterpret_cast<decltype(nccl->calls_.name)>(dlsym(library, "nccl" #name));     \
  if (nccl->calls_.name == nullptr) {                                                  \
    *error = "it has no nccl" #name "; jaxcomm needs NCCL 2.18 or newer";              \
    return nullptr;                                                                    \
  }
  JAXCOMM_NCCL_FUNCTIONS(JAXCOMM_NCCL_LOAD)
#undef JAXCOMM_NCCL_LOAD
  return nccl;
}

NcclCommunicator::~NcclCommunicator() {
  if (comm_ == nullptr) return;
  // A communicator with work under way would wait for its peers here: bounded by Finish.
  const std::string failed = Finish("ncclCommFinalize", nccl_->calls().CommFinalize(comm_));
  if (failed.empty() && comm_ != nullptr) nccl_->calls().CommDestroy(comm_);
}

std::string NcclCommunicator::Join(const NcclUniqueId& unique) {
  NcclConfig config;
  config.blocking = 0;
  const NcclResult result =
      nccl_->calls().CommInitRankConfig(&comm_, size, unique, rank, &config);
  return Finish("ncclCommInitRankConfig", result);
}

std::string NcclCommunicator::Split(int color, NcclCommunicator* part) {
  NcclConfig config;
  config.blocking = 0;
  NcclComm* made = nullptr;
  const NcclResult result =
      nccl_->calls().CommSplit(comm_, color, part->rank, &made, &config);
  // The parent knows when it is done; until then there is no child to ask.
  std::string failed = Finish("ncclCommSplit", result);
  if (!failed.empty()) return failed;
  part->comm_ = made;
  return part->Finish("ncclCommSplit", kNcclInProgress);
}

template <typename Call>
std::string NcclCommunicator::Grouped(const char* name, const std::vector<Operand>& leaves,
                                      Call call) {
  if (std::string failed = failure(); !failed.empty()) return failed;
  const NcclFunctions& nccl = nccl_->calls();
  entered_ = Now();
  struct Left {
    std::atomic<int64_t>* entered;
    ~Left() { *entered = 0; }
  } left{&entered_};
  NcclResult result = nccl.GroupStart();
  if (result != kNcclSuccess) return Fail("ncclGroupStart", result);
  for (const Operand& leaf : leaves) {
    if (leaf.count == 0) continue;
    counters[kNcclCollectives]++;
    counters[kNcclBytes] += leaf.count * kItem[leaf.dtype];
    result = call(leaf);
    if (result != kNcclSuccess && result != kNcclInProgress) break;
  }
  // A group must end, also after a failure, or the next one would be inside it.
  const NcclResult ended = nccl.GroupEnd();
  if (result != kNcclSuccess && result != kNcclInProgress) return Fail(name, result);
  return Finish(name, ended);
}

std::string NcclCommunicator::AllReduce(const std::vector<Operand>& leaves, NcclOp op,
                                        CudaStream stream) {
  return Grouped("ncclAllReduce", leaves, [&](const Operand& leaf) {
    return nccl_->calls().AllReduce(leaf.from, leaf.to, static_cast<size_t>(leaf.count),
                                    leaf.dtype, op, comm_, stream);
  });
}

std::string NcclCommunicator::Broadcast(const std::vector<Operand>& leaves, int root,
                                        CudaStream stream) {
  return Grouped("ncclBroadcast", leaves, [&](const Operand& leaf) {
    return nccl_->calls().Broadcast(leaf.from, leaf.to, static_cast<size_t>(leaf.count),
                                    leaf.dtype, root, comm_, stream);
  });
}

std::string NcclCommunicator::AllGather(const std::vector<Operand>& leaves,
                                        CudaStream stream) {
  return Grouped("ncclAllGather", leaves, [&](const Operand& leaf) {
    return nccl_->calls().AllGather(leaf.from, leaf.to, static_cast<size_t>(leaf.count),
                                    leaf.dtype, comm_, stream);
  });
}

std::string NcclCommunicator::ReduceScatter(const std::vector<Operand>& leaves,
                                            CudaStream stream) {
  return Grouped("ncclReduceScatter", leaves, [&](const Operand& leaf) {
    return nccl_->calls().ReduceScatter(leaf.from, leaf.to,
                                        static_cast<size_t>(leaf.count), leaf.dtype,
                                        kNcclSum, comm_, stream);
  });
}

std::string NcclCommunicator::AllToAll(const std::vector<Operand>& leaves,
                                       CudaStream stream) {
  const NcclFunctions& nccl = nccl_->calls();
  return Grouped("ncclSend and ncclRecv", leaves, [&](const Operand& leaf) {
    const auto count = static_cast<size_t>(leaf.count);
    const size_t bytes = count * static_cast<size_t>(kItem[leaf.dtype]);
    for (int peer = 0; peer < size; ++peer) {
      const size_t at = static_cast<size_t>(peer) * bytes;
      NcclResult result = nccl.Send(static_cast<const char*>(leaf.from) + at, count,
                                    leaf.dtype, peer, comm_, stream);
      if (result != kNcclSuccess && result != kNcclInProgress) return result;
      result = nccl.Recv(static_cast<char*>(leaf.to) + at, count, leaf.dtype, peer, comm_,
                         stream);
      if (result != kNcclSuccess && result != kNcclInProgress) return result;
    }
    return kNcclSuccess;
  });
}

std::string NcclCommunicator::Permute(const std::vector<Operand>& leaves, int target,
                                      int source, Device* device, CudaStream stream) {
  const NcclFunctions& nccl = nccl_->calls();
  if (source < 0) {
    for (const Operand& leaf : leaves) {
      if (!device->Zero(leaf.to, leaf.count * kItem[leaf.dtype], stream)) {
        return "memory on the device could not be set to zero";
      }
    }
  }
  return Grouped("ncclSend and ncclRecv", leaves, [&](const Operand& leaf) {
    const auto count = static_cast<size_t>(leaf.count);
    NcclResult result = kNcclSuccess;
    if (target >= 0) {
      result = nccl.Send(leaf.from, count, leaf.dtype, target, comm_, stream);
    }
    if (source >= 0 && (result == kNcclSuccess || result == kNcclInProgress)) {
      result = nccl.Recv(leaf.to, count, leaf.dtype, source, comm_, stream);
    }
    return result;
  });
}

// Waits until what returned `result` is done. The stream may be used again only then.
std::string NcclCommunicator::Finish(const char* name, NcclResult result) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_);
  while (result == kNcclInProgress) {
    {
      std::lock_guard<std::mutex> lock(state_);
      if (!failure_.empty()) return failure_;
      NcclResult now = kNcclSuccess;
      const NcclResult asked = nccl_->calls().CommGetAsyncError(comm_, &now);
      result = asked == kNcclSuccess ? now : asked;
    }
    if (result != kNcclInProgress) break;
    if (std::chrono::steady_clock::now() > until) {
      Abort(NotDone(name));
      return failure();
    }
    std::this_thread::sleep_for(kPoll);
  }
  return result == kNcclSuccess ? std::string() : Fail(name, result);
}

std::string NcclCommunicator::NotDone(const char* name) const {
  return std::string(name) + " was not done after " +
         std::to_string(static_cast<int>(timeout_)) + " s on rank " +
         std::to_string(rank) + " of " + std::to_string(size) +
         ": another rank has not come, or NCCL found no way to it";
}

std::string NcclCommunicator::Fail(const char* name, NcclResult result) {
  const char* last = nccl_->calls().GetLastError(comm_);
  std::string why = std::string(name) + " failed on rank " + std::to_string(rank) + " of " +
                    std::to_string(size) + ": " + nccl_->calls().GetErrorString(result);
  if (last != nullptr && last[0] != '\0') why += std::string(" (") + last + ")";
  Abort(why);
  return failure();
}

void NcclCommunicator::Check() {
  const int64_t entered = entered_;
  if (entered != 0 && 1e-9 * static_cast<double>(Now() - entered) > timeout_) {
    Abort(NotDone("a collective"));
    return;
  }
  std::string why;
  {
    std::lock_guard<std::mutex> lock(state_);
    if (comm_ == nullptr || !failure_.empty()) return;
    NcclResult now = kNcclSuccess;
    const NcclResult asked = nccl_->calls().CommGetAsyncError(comm_, &now);
    if (asked != kNcclSuccess) now = asked;
    if (now == kNcclSuccess || now == kNcclInProgress) return;
    const char* last = nccl_->calls().GetLastError(comm_);
    why = std::string("NCCL failed in the background on rank ") + std::to_string(rank) +
          " of " + std::to_string(size) + ": " + nccl_->calls().GetErrorString(now);
    if (last != nullptr && last[0] != '\0') why += std::string(" (") + last + ")";
  }
  Abort(why);
}

void NcclCommunicator::Abort(const std::string& why) {
  std::lock_guard<std::mutex> lock(state_);
  if (!failure_.empty()) return;
  failure_ = why + ". The communicator has been aborted; the job must be started again";
  if (comm_ != nullptr) nccl_->calls().CommAbort(comm_);
  comm_ = nullptr;
}

std::string NcclCommunicator::failure() {
  std::lock_guard<std::mutex> lock(state_);
  return failure_;
}

}  // namespace jaxcomm
