#include "nccl.h"

#include <dlfcn.h>

#include <chrono>
#include <future>
#include <thread>

#include "clock.h"

namespace jaxcomm {
namespace {

constexpr std::chrono::microseconds kPoll{20};
constexpr int64_t kSpin = 200'000;  // ns

// How long an abort may delay the call that failed, and how long after its timeout a call
// may take to say so.
constexpr double kPatience = 3;
constexpr int kItem[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};  // by NcclDType

}  // namespace

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

NcclCommunicator::Entered::Entered(NcclCommunicator* comm) : comm(comm) {
  comm->entered_ = Now();
}

NcclCommunicator::Entered::~Entered() { comm->entered_ = 0; }

std::string NcclCommunicator::Join(const NcclUniqueId& unique) {
  const Gpu::Current current(gpu_);
  NcclConfig config;
  config.blocking = 0;
  const NcclResult result =
      nccl_->calls().CommInitRankConfig(&comm_, size, unique, rank, &config);
  return Finish("ncclCommInitRankConfig", result);
}

std::string NcclCommunicator::Split(int color, NcclCommunicator* part) {
  const Gpu::Current current(gpu_);
  const Entered entered(this);
  NcclConfig config;
  config.blocking = 0;
  NcclResult result =
      nccl_->calls().CommSplit(comm_, color, part->rank, &part->comm_, &config);
  // It returns success while its thread is still at it (NCCL 2.31, src/init.cc). The parent
  // knows when it is done; until then there is no child to ask.
  if (result == kNcclSuccess) result = kNcclInProgress;
  const std::string failed = Finish("ncclCommSplit", result);
  return failed.empty() ? part->Finish("ncclCommSplit", kNcclInProgress) : failed;
}

template <typename Call>
std::string NcclCommunicator::Grouped(const char* name, const Work& work, Call call) {
  if (std::string failed = failure(); !failed.empty()) return failed;
  const NcclFunctions& nccl = nccl_->calls();
  const Entered entered(this);
  const bool records = gpu_->Records(work.stream);
  if (records) {
    recorded_ = true;
  } else {
    running_.Begin(work.number, work.stream);
  }
  const auto done = [&](std::string failed) {
    if (!records) running_.End(failed.empty(), work.stream);
    return failed;
  };
  NcclResult result = nccl.GroupStart();
  if (result != kNcclSuccess) return done(Fail("ncclGroupStart", result));
  for (const Operand& leaf : work.leaves) {
    if (leaf.count == 0) continue;
    counters[kNcclCollectives]++;
    counters[kNcclBytes] += leaf.count * kItem[leaf.dtype];
    result = call(leaf);
    if (result != kNcclSuccess && result != kNcclInProgress) break;
  }
  // A group must end, also after a failure, or the next one would be inside it.
  const NcclResult ended = nccl.GroupEnd();
  if (result != kNcclSuccess && result != kNcclInProgress) return done(Fail(name, result));
  return done(Finish(name, ended));
}

std::string NcclCommunicator::AllReduce(const Work& work, NcclOp op) {
  return Grouped("ncclAllReduce", work, [&](const Operand& leaf) {
    return nccl_->calls().AllReduce(leaf.from, leaf.to, static_cast<size_t>(leaf.count),
                                    leaf.dtype, op, comm_, work.stream);
  });
}

std::string NcclCommunicator::Broadcast(const Work& work, int root) {
  return Grouped("ncclBroadcast", work, [&](const Operand& leaf) {
    return nccl_->calls().Broadcast(leaf.from, leaf.to, static_cast<size_t>(leaf.count),
                                    leaf.dtype, root, comm_, work.stream);
  });
}

std::string NcclCommunicator::AllGather(const Work& work) {
  return Grouped("ncclAllGather", work, [&](const Operand& leaf) {
    return nccl_->calls().AllGather(leaf.from, leaf.to, static_cast<size_t>(leaf.count),
                                    leaf.dtype, comm_, work.stream);
  });
}

std::string NcclCommunicator::ReduceScatter(const Work& work) {
  return Grouped("ncclReduceScatter", work, [&](const Operand& leaf) {
    return nccl_->calls().ReduceScatter(leaf.from, leaf.to,
                                        static_cast<size_t>(leaf.count), leaf.dtype,
                                        kNcclSum, comm_, work.stream);
  });
}

std::string NcclCommunicator::AllToAll(const Work& work) {
  const NcclFunctions& nccl = nccl_->calls();
  return Grouped("ncclSend and ncclRecv", work, [&](const Operand& leaf) {
    const auto count = static_cast<size_t>(leaf.count);
    const size_t bytes = count * static_cast<size_t>(kItem[leaf.dtype]);
    for (int peer = 0; peer < size; ++peer) {
      const size_t at = static_cast<size_t>(peer) * bytes;
      NcclResult result = nccl.Send(static_cast<const char*>(leaf.from) + at, count,
                                    leaf.dtype, peer, comm_, work.stream);
      if (result != kNcclSuccess && result != kNcclInProgress) return result;
      result = nccl.Recv(static_cast<char*>(leaf.to) + at, count, leaf.dtype, peer, comm_,
                         work.stream);
      if (result != kNcclSuccess && result != kNcclInProgress) return result;
    }
    return kNcclSuccess;
  });
}

std::string NcclCommunicator::Permute(const Work& work, int target, int source) {
  const NcclFunctions& nccl = nccl_->calls();
  if (source < 0) {
    for (const Operand& leaf : work.leaves) {
      const int64_t bytes = leaf.count * kItem[leaf.dtype];
      if (bytes != 0 && !gpu_->Zero(leaf.to, bytes, work.stream)) {
        return "memory on the device could not be set to zero";
      }
    }
  }
  return Grouped("ncclSend and ncclRecv", work, [&](const Operand& leaf) {
    const auto count = static_cast<size_t>(leaf.count);
    NcclResult result = kNcclSuccess;
    if (target >= 0) {
      result = nccl.Send(leaf.from, count, leaf.dtype, target, comm_, work.stream);
    }
    if (source >= 0 && (result == kNcclSuccess || result == kNcclInProgress)) {
      result = nccl.Recv(leaf.to, count, leaf.dtype, source, comm_, work.stream);
    }
    return result;
  });
}

void NcclCommunicator::Finalize(double seconds) {
  if (comm_ == nullptr || recorded_ || !failure().empty()) return;
  const Gpu::Current current(gpu_);
  const int64_t begun = Now();
  NcclResult result = nccl_->calls().CommFinalize(comm_);
  while (result == kNcclInProgress && Seconds(Now() - begun) < seconds) {
    std::this_thread::sleep_for(kPoll);
    if (nccl_->calls().CommGetAsyncError(comm_, &result) != kNcclSuccess) return;
  }
}

// Waits until what returned `result` is done. The stream may be used again only then.
std::string NcclCommunicator::Finish(const char* name, NcclResult result) {
  const int64_t begun = Now();
  while (result == kNcclInProgress) {
    NcclResult now = kNcclSuccess;
    {
      std::lock_guard<std::mutex> lock(state_);
      if (!failure_.empty()) return failure_;
      const NcclResult asked = nccl_->calls().CommGetAsyncError(comm_, &now);
      result = asked == kNcclSuccess ? now : asked;
    }
    if (result != kNcclInProgress) break;
    const int64_t waited = Now() - begun;
    if (Seconds(waited) > timeout_) {
      Abort(NotDone(name, timeout_));
      return failure();
    }
    // Putting kernels on a stream takes NCCL's thread microseconds, connecting much more.
    if (waited < kSpin) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(kPoll);
    }
  }
  return result == kNcclSuccess ? std::string() : Fail(name, result);
}

std::string NcclCommunicator::Here(const std::string& what) const {
  return what + " on rank " + std::to_string(rank) + " of " + std::to_string(size);
}

std::string NcclCommunicator::NotDone(const std::string& what, double seconds) const {
  return Here(what + " was not done after " + std::to_string(static_cast<int>(seconds)) +
              " s") +
         ": another rank has not come, or NCCL found no way to it";
}

std::string NcclCommunicator::Why(const std::string& what, NcclResult result) const {
  std::string why = Here(what) + ": " + nccl_->calls().GetErrorString(result);
  const char* last = nccl_->calls().GetLastError(comm_);
  if (last != nullptr && last[0] != '\0') why += std::string(" (") + last + ")";
  return why;
}

std::string NcclCommunicator::Fail(const char* name, NcclResult result) {
  Abort(Why(std::string(name) + " failed", result));
  return failure();
}

std::string NcclCommunicator::Check(double abort_after) {
  if (const int64_t entered = entered_; entered != 0) {
    const bool late = Seconds(Now() - entered) > timeout_ + kPatience;
    return late ? NotDone("a collective", timeout_) : "";
  }
  std::string why;
  {
    std::lock_guard<std::mutex> lock(state_);
    if (comm_ == nullptr) return "";
    NcclResult now = kNcclSuccess;
    if (failure_.empty()) {
      const NcclResult asked = nccl_->calls().CommGetAsyncError(comm_, &now);
      if (asked != kNcclSuccess) now = asked;
    }
    if (now != kNcclSuccess && now != kNcclInProgress) {
      why = Why("NCCL failed in the background", now);
    }
  }
  const int64_t late = running_.Late(abort_after);
  if (!why.empty()) {
    if (running_.any() || recorded_) return why;
    // Nothing runs, so nothing has to be aborted, and a call may just begin.
    std::lock_guard<std::mutex> lock(state_);
    if (failure_.empty()) failure_ = why + ". The job must be started again";
    return "";
  }
  if (late < 0 || abort_after == 0) return "";
  return NotDone("bucket " + std::to_string(late) + " began on the GPU and", abort_after);
}

void NcclCommunicator::Abort(const std::string& why) {
  entered_ = 0;  // what is late now is the abort
  NcclComm* aborted = nullptr;
  {
    std::lock_guard<std::mutex> lock(state_);
    if (!failure_.empty()) return;
    failure_ = why + ". The communicator has been aborted; the job must be started again";
    std::swap(aborted, comm_);
  }
  if (aborted == nullptr) return;
  // NCCL ends the kernels first; then it waits for graphs with its calls in them to go,
  // which they may never.
  auto done = std::make_shared<std::promise<void>>();
  const std::future<void> ended = done->get_future();
  std::thread([done, aborted, abort = nccl_->calls().CommAbort] {
    abort(aborted);
    done->set_value();
  }).detach();
  ended.wait_for(std::chrono::duration<double>(kPatience));
}

std::string NcclCommunicator::failure() {
  std::lock_guard<std::mutex> lock(state_);
  return failure_;
}

}  // namespace jaxcomm
