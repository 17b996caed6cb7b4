// XLA FFI handlers over NCCL: for platform "CUDA" on XLA's stream, and for platform "cpu"
// on host memory, where a library that reduces there stands in for NCCL.
//
// As in handlers.cc, every handler takes the leaves of one bucket and, last, a token.

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "api.h"
#include "callbacks.h"
#include "calls.h"
#include "exit.h"
#include "gpu.h"
#include "guard.h"
#include "nccl.h"
#include "progress.h"
#include "rounding.h"
#include "types.h"
#include "xla/ffi/api/c_api.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxcomm {
namespace {

// Nothing here is ever destroyed: threads, ours and NCCL's, may use it to the last.
// Guards `members`, and the opening of the two libraries.
std::mutex& registry_mutex = *new std::mutex;
// Set by jaxcomm_nccl_open before there is a communicator, and never changed.
Nccl* nccl = nullptr;
Gpu* gpu = nullptr;
double abort_after = 0;  // for how many seconds a kernel may run; 0 for no limit

struct Member {
  NcclCommunicator comm;
  Agreement agreement;  // asked under comm.mutex; refused by any thread
  Progress* progress;   // written under comm.mutex; the watchdog's thread reads it
};
// By Python's keys; nothing is ever removed.
std::map<int64_t, Member*>& members = *new std::map<int64_t, Member*>;

Member* Find(int64_t id) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  auto found = members.find(id);
  return found == members.end() ? nullptr : found->second;
}

std::vector<Member*> All() {
  std::vector<Member*> all;
  std::lock_guard<std::mutex> lock(registry_mutex);
  for (auto& entry : members) all.push_back(entry.second);
  return all;
}

// Looks after all communicators, for what no call reports. Where work is under way it ends
// the process: programs have been promised results, and would give wrong ones.
class Monitor {
 public:
  void Start() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (started_) return;
    started_ = true;
    std::thread([this] {
      Guarded([this] { Run(); }, [](const char* text) {
        EndProcess("jaxcomm: nothing watches NCCL any more, so this process ends: " +
                       std::string(text) + "\n",
                   kStalled);
      });
    }).detach();
  }
  // Waits for it, but not for ever: the driver may not come back.
  void Stop() {
    std::unique_lock<std::mutex> lock(mutex_);
    stop_ = true;
    changed_.notify_all();
    changed_.wait_for(lock, std::chrono::seconds(2), [this] { return !started_; });
  }

 private:
  void Run() {
    const Gpu::Current current(gpu);
    gpu->AllowWhileRecording();
    std::unique_lock<std::mutex> lock(mutex_);
    const std::chrono::milliseconds pause(100);
    while (!changed_.wait_for(lock, pause, [this] { return stop_; })) {
      lock.unlock();
      for (Member* member : All()) {
        const std::string failed = member->comm.Check(abort_after);
        if (failed.empty()) continue;
        EndProcess("jaxcomm: " + failed + ". What is under way here cannot be finished, so " +
                       "this process ends; the job must be started again\n",
                   kStalled);
      }
      lock.lock();
    }
    started_ = false;
    changed_.notify_all();
  }

  // Guards the two flags; not held while communicators are looked at.
  std::mutex mutex_;
  // Signalled when either changes.
  std::condition_variable changed_;
  bool started_ = false;  // whether its thread runs; that takes it back at its end
  bool stop_ = false;     // set by Stop, for good
};
Monitor& monitor = *new Monitor;

ffi::Error Failure(const std::string& text, int64_t bucket) {
  return ffi::Error(ffi::ErrorCode::kInternal,
                    "jaxcomm, bucket " + std::to_string(BucketOf(bucket)) + ": " + text);
}

ffi::Error NotCreated() {
  return Refused(
      "jaxcomm: this program names a communicator that this process has not created; "
      "call jaxcomm.init(\"nccl\") before running it");
}

// NCCL's type for XLA's, and how many of them an element is. Types that are only moved
// travel as bytes.
bool ToNccl(ffi::DataType type, NcclDType* out, int64_t* times) {
  *times = 1;
  switch (type) {
    case ffi::F16: *out = kNcclFloat16; return true;
    case ffi::BF16: *out = kNcclBfloat16; return true;
    case ffi::F32: *out = kNcclFloat32; return true;
    case ffi::F64: *out = kNcclFloat64; return true;
    case ffi::S8: *out = kNcclInt8; return true;
    case ffi::U8: *out = kNcclUint8; return true;
    case ffi::PRED: *out = kNcclUint8; return true;
    case ffi::S32: *out = kNcclInt32; return true;
    case ffi::U32: *out = kNcclUint32; return true;
    case ffi::S64: *out = kNcclInt64; return true;
    case ffi::U64: *out = kNcclUint64; return true;
    case ffi::C64: *out = kNcclFloat32; *times = 2; return true;
    case ffi::C128: *out = kNcclFloat64; *times = 2; return true;
    default: return false;
  }
}

// Takes a turn on the communicator, or on this rank's group of a partition, and does
// `work(member)`, which returns what went wrong, or "".
template <typename Work>
ffi::Error InTurn(const Place& place, Work work) {
  Member* member = Find(place.comm);
  if (member == nullptr) return NotCreated();
  std::lock_guard<std::mutex> lock(member->comm.mutex);
  const int64_t number = member->progress->Begin(place.schedule, place.bucket);
  struct Ended {
    Progress* progress;
    ~Ended() { progress->End(); }
  } ended{member->progress};
  std::string text =
      member->agreement.Ask(place.comm, place.schedule, place.bucket, number,
                            &member->comm.counters[kNcclAgreements]);
  if (text.empty() && place.partition != 0 && Find(place.partition) == nullptr) {
    text = AskForPartition(place.comm, place.partition, place.groups.data(),
                           static_cast<int64_t>(place.groups.size()));
  }
  if (!text.empty()) return Refused(text);
  member->progress->Remember(number, place.schedule, place.bucket);
  if (place.partition != 0) member = Find(place.partition);
  const Gpu::Current current(gpu);
  text = work(&member->comm);
  return text.empty() ? ffi::Error::Success() : Failure(text, place.bucket);
}

// Fills in the leaves of a call. `share`: of how many ranks' parts a leaf's operand (or,
// where it is larger, its result) consists.
ffi::Error Operands(ffi::RemainingArgs args, ffi::RemainingRets rets, bool bytes,
                    int64_t share, Work* work) {
  if (args.size() != rets.size() || args.size() == 0) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                      "jaxcomm: operands and results differ in number");
  }
  for (size_t i = 0; i + 1 < args.size(); ++i) {
    auto arg = args.get<ffi::AnyBuffer>(i);
    auto ret = rets.get<ffi::AnyBuffer>(i);
    if (arg.has_error()) return arg.error();
    if (ret.has_error()) return ret.error();
    NcclDType dtype = kNcclInt8;
    int64_t times = 1;
    if (!bytes && !ToNccl(arg->element_type(), &dtype, &times)) {
      return ffi::Error(ffi::ErrorCode::kUnimplemented, "jaxcomm: dtype not known to NCCL");
    }
    const auto whole = static_cast<int64_t>(
        bytes ? arg->size_bytes() : arg->element_count() * static_cast<size_t>(times));
    work->leaves.push_back({arg->untyped_data(), (*ret)->untyped_data(), whole / share, dtype});
  }
  return ffi::Error::Success();
}

ffi::Error AllReduceCall(CudaStream stream, ffi::RemainingArgs args,
                         ffi::RemainingRets rets, int64_t comm, int64_t schedule,
                         int64_t bucket, int64_t partition, Numbers groups, int64_t op) {
  Work work{{}, stream, BucketOf(bucket)};
  if (auto error = Operands(args, rets, false, 1, &work); error.failure()) return error;
  return InTurn(Place(comm, schedule, bucket, partition, groups), [&](NcclCommunicator* on) {
    return on->AllReduce(work, static_cast<NcclOp>(op));
  });
}

ffi::Error BroadcastCall(CudaStream stream, ffi::RemainingArgs args,
                         ffi::RemainingRets rets, int64_t comm, int64_t schedule,
                         int64_t bucket, int64_t partition, Numbers groups, int64_t root) {
  Work work{{}, stream, BucketOf(bucket)};
  if (auto error = Operands(args, rets, true, 1, &work); error.failure()) return error;
  return InTurn(Place(comm, schedule, bucket, partition, groups), [&](NcclCommunicator* on) {
    return on->Broadcast(work, static_cast<int>(root));
  });
}

ffi::Error MoveCall(CudaStream stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
                    int64_t comm, int64_t schedule, int64_t bucket, int64_t partition,
                    Numbers groups, int64_t move, int64_t ranks, Numbers permutation) {
  Work work{{}, stream, BucketOf(bucket)};
  const bool parts = move == kReduceScatter || move == kAllToAll;
  auto error = Operands(args, rets, move != kReduceScatter, parts ? ranks : 1, &work);
  if (error.failure()) return error;
  return InTurn(Place(comm, schedule, bucket, partition, groups), [&](NcclCommunicator* on) {
    if (move == kAllGather) return on->AllGather(work);
    if (move == kReduceScatter) return on->ReduceScatter(work);
    if (move == kAllToAll) return on->AllToAll(work);
    int target = -1, source = -1;
    for (size_t i = 0; i + 1 < permutation.size(); i += 2) {
      if (permutation[i] == on->rank) target = static_cast<int>(permutation[i + 1]);
      if (permutation[i + 1] == on->rank) source = static_cast<int>(permutation[i]);
    }
    return on->Permute(work, target, source);
  });
}

// This rank's number. The program must not hold it: it is the same on every rank.
ffi::Error RankCall(CudaStream stream, ffi::Result<ffi::BufferR0<ffi::S32>> out,
                    int64_t comm) {
  Member* member = Find(comm);
  if (member == nullptr) return NotCreated();
  const Gpu::Current current(gpu);
  if (!gpu->Set(out->untyped_data(), static_cast<uint32_t>(member->comm.rank), stream)) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                      "jaxcomm: this rank's number could not be written");
  }
  return ffi::Error::Success();
}

// The same on host memory: there is no stream.
template <auto kCall, typename... Arguments>
ffi::Error OnHost(Arguments... arguments) {
  DefaultRounding scope;
  return kCall(nullptr, arguments...);
}

#define JAXCOMM_GPU ffi::Ffi::Bind().Ctx<ffi::PlatformStream<CudaStream>>()

}  // namespace

// The handlers of a collective, for a GPU and for host memory.
#define JAXCOMM_DEFINE(name, call, attributes, ...)                                    \
  JAXCOMM_API XLA_FFI_Error* jaxcomm_nccl_##name(XLA_FFI_CallFrame*);                  \
  JAXCOMM_API XLA_FFI_Error* jaxcomm_nccl_host_##name(XLA_FFI_CallFrame*);             \
  JAXCOMM_HANDLER(jaxcomm_nccl_##name, call,                                           \
                  JAXCOMM_COLLECTIVE(JAXCOMM_GPU) attributes);                         \
  JAXCOMM_HANDLER(                                                                     \
      jaxcomm_nccl_host_##name,                                                        \
      (OnHost<call, ffi::RemainingArgs, ffi::RemainingRets, int64_t, int64_t, int64_t, \
              int64_t, Numbers, __VA_ARGS__>),                                         \
      JAXCOMM_COLLECTIVE(ffi::Ffi::Bind()) attributes)

// The same on a GPU, to be recorded into CUDA graphs: those replay NCCL's kernels without
// calling the handler.
#define JAXCOMM_DEFINE_RECORDED(name, call, attributes)                                \
  JAXCOMM_API XLA_FFI_Error* jaxcomm_nccl_graph_##name(XLA_FFI_CallFrame*);            \
  JAXCOMM_HANDLER(jaxcomm_nccl_graph_##name, call,                                     \
                  JAXCOMM_COLLECTIVE(JAXCOMM_GPU) attributes,                          \
                  {ffi::Traits::kCmdBufferCompatible})

JAXCOMM_DEFINE(all_reduce, AllReduceCall, .Attr<int64_t>("op"), int64_t);
JAXCOMM_DEFINE_RECORDED(all_reduce, AllReduceCall, .Attr<int64_t>("op"));
JAXCOMM_DEFINE(broadcast, BroadcastCall, .Attr<int64_t>("root"), int64_t);
JAXCOMM_DEFINE_RECORDED(broadcast, BroadcastCall, .Attr<int64_t>("root"));
JAXCOMM_DEFINE(move, MoveCall,
               .Attr<int64_t>("move").Attr<int64_t>("ranks").Attr<Numbers>("permutation"),
               int64_t, int64_t, Numbers);

JAXCOMM_API XLA_FFI_Error* jaxcomm_nccl_rank(XLA_FFI_CallFrame*);
JAXCOMM_API XLA_FFI_Error* jaxcomm_nccl_host_rank(XLA_FFI_CallFrame*);
JAXCOMM_HANDLER(jaxcomm_nccl_rank, RankCall,
                JAXCOMM_GPU.Ret<ffi::BufferR0<ffi::S32>>().Attr<int64_t>("comm"),
                {ffi::Traits::kCmdBufferCompatible});
JAXCOMM_HANDLER(
    jaxcomm_nccl_host_rank,
    (OnHost<RankCall, ffi::Result<ffi::BufferR0<ffi::S32>>, int64_t>),
    ffi::Ffi::Bind().Ret<ffi::BufferR0<ffi::S32>>().Attr<int64_t>("comm"));

// These return 0, or 1 with a text in `error`.

// `driver` is the path of CUDA's driver, `ordinal` this process's device, and `limit` for how
// many seconds a kernel may run, 0 for no limit.
JAXCOMM_API int jaxcomm_nccl_open(const char* path, const char* driver, int ordinal,
                                  double limit, char* error, int64_t capacity) {
  return Told(error, capacity, [&] {
    std::lock_guard<std::mutex> lock(registry_mutex);
    std::string text;
    if (nccl != nullptr) return text;
    abort_after = limit;
    auto opened = Nccl::Open(path, &text);
    if (opened) {
      gpu = Gpu::Open(driver, ordinal, &text).release();
      if (gpu) nccl = opened.release();
    }
    return text;
  });
}

JAXCOMM_API int jaxcomm_nccl_version() {
  int version = 0;
  if (nccl) nccl->calls().GetVersion(&version);
  return version;
}

JAXCOMM_API int jaxcomm_nccl_unique_id(NcclUniqueId* out, char* error, int64_t capacity) {
  return Told(error, capacity, [&]() -> std::string {
    const NcclResult result = nccl->calls().GetUniqueId(out);
    if (result == kNcclSuccess) return {};
    return std::string("ncclGetUniqueId: ") + nccl->calls().GetErrorString(result);
  });
}

JAXCOMM_API int jaxcomm_nccl_join(int64_t id, const NcclUniqueId* unique, int rank,
                                  int size, double timeout, char* error,
                                  int64_t capacity) {
  return Told(error, capacity, [&] {
    // Kept also where this fails: NCCL may still write to it.
    auto* member = new Member{{nccl, gpu, id, rank, size, timeout}, {}, ProgressOf(id)};
    std::string text = member->comm.Join(*unique);
    if (text.empty()) {
      std::lock_guard<std::mutex> lock(registry_mutex);
      members[id] = member;
    }
    if (text.empty()) monitor.Start();
    return text;
  });
}

// Makes communicator `part` of the ranks of `id` that give the same `color`; `rank` and
// `size` are this one's place among them.
JAXCOMM_API int jaxcomm_nccl_split(int64_t id, int64_t part, int color, int rank, int size,
                                   double timeout, char* error, int64_t capacity) {
  return Told(error, capacity, [&] {
    auto* member =
        new Member{{nccl, gpu, part, rank, size, timeout}, {}, ProgressOf(part)};
    std::string text = Find(id)->comm.Split(color, &member->comm);
    if (text.empty()) {
      std::lock_guard<std::mutex> lock(registry_mutex);
      members[part] = member;
    }
    return text;
  });
}

// Lets every later call on a communicator fail.
JAXCOMM_API void jaxcomm_nccl_refuse(int64_t id, const char* why) {
  Member* member = Find(id);
  if (member != nullptr) member->agreement.Refuse(why);
}

JAXCOMM_API int jaxcomm_nccl_counters(int64_t id, int64_t* out) {
  const auto none = [](const char*) -> Member* { return nullptr; };
  Member* member = Guarded([id] { return Find(id); }, none);
  if (member == nullptr) return 1;
  out[kNcclCallsColumn] = member->progress->calls();
  for (int i = 0; i < kNcclCounters; ++i) {
    out[kNcclFirstCounter + i] = member->comm.counters[i];
  }
  return 0;
}

// For the end of the process: nothing may be under way. Returns so many seconds after the
// monitor has stopped at the latest, with NCCL's threads still at it.
JAXCOMM_API void jaxcomm_nccl_close(double seconds) {
  const auto close = [seconds] {
    monitor.Stop();
    auto done = std::make_shared<std::promise<void>>();
    const std::future<void> ended = done->get_future();
    std::thread([done, seconds] {
      // What fails here the end of the process does.
      const auto finalize = [&] {
        for (Member* member : All()) member->comm.Finalize(seconds);
        done->set_value();
      };
      Guarded(finalize, [](const char*) {});
    }).detach();
    ended.wait_for(std::chrono::duration<double>(seconds));
  };
  Guarded(close, [](const char*) {});
}

}  // namespace jaxcomm
