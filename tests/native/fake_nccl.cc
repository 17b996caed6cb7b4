// A libnccl over host memory, for tests on machines without a GPU.
//
// Ranks are processes of one host. Calls run when they are made, or in GroupEnd; the
// stream is ignored. As with NCCL, calls that ranks do not agree about hang, and only an
// abort from another thread ends them: every rank has to abort for itself. Errors can
// be ordered from outside (fake_nccl_inject.h). Build with
//   c++ -std=c++17 -O2 -shared -fPIC -fvisibility=hidden -o libfake_nccl.so
//     fake_nccl.cc fake_cuda.cc -lrt -pthread
#include <sys/random.h>

#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "fake_cuda.h"
#include "fake_nccl_group.h"

namespace jaxcomm {

// The compiler compares the definitions below with these.
#define FAKE_NCCL_DECLARE(name, result, parameters) \
  extern "C" __attribute__((visibility("default"))) result nccl##name parameters;
JAXCOMM_NCCL_FUNCTIONS(FAKE_NCCL_DECLARE)
#undef FAKE_NCCL_DECLARE

namespace {

NcclResult Move(const char* call, Transfer t) {
  return Run(call, Those(t.comm), [&](Where where) {
    CheckReady(call, t.comm);
    if (t.comm->finalized) {
      Fail(kNcclInvalidUsage, Text(call, "communicator was finalized"));
    }
    if (t.dtype < 0 || t.dtype >= kDTypeCount) {
      Fail(kNcclInvalidArgument, Text(call, "unknown data type"));
    }
    if (t.root < 0 || t.root >= t.comm->size) {
      Fail(kNcclInvalidArgument, Text(call, "no such root or peer"));
    }
    const auto made = t.comm->ops.find(t.op);
    if (made != t.comm->ops.end() && made->second.dtype == t.dtype) {
      t.op = kPreMulSum;
      t.factor = made->second.factor;
      t.device_factor = made->second.device;
    } else if (t.op < kNcclSum || t.op > kNcclAvg) {
      Fail(kNcclInvalidArgument,
           Text(call, "the communicator has no such operation for this data type"));
    }
    const bool reads = t.kind != kRecv && (t.kind != kBroadcast || t.root == t.comm->rank);
    if (t.count > 0 && reads) CheckPointer(call, t.from, "send buffer");
    if (t.count > 0 && t.kind != kSend) CheckPointer(call, t.to, "receive buffer");
    t.group = group.depth > 0 ? groups.load() : 0;
    // NCCL discards empty collectives, without meeting the other ranks.
    if (t.count > 0 || t.kind == kSend || t.kind == kRecv) group.transfers.push_back(t);
    return Submit(where);
  });
}

Transfer Describe(Kind kind, NcclComm* comm, const void* from, void* to, size_t count,
                  int dtype, int op, int root) {
  return {kind,
          comm,
          static_cast<const char*>(from),
          static_cast<char*>(to),
          count,
          dtype,
          op,
          root,
          0,
          nullptr,
          0};
}

// NCCL counts the graphs that its calls stand in, and ends no communicator before them. Here
// they never go, as with those that XLA keeps.
void WaitForGraphs(NcclComm* comm) {
  while (RecordsGraphs() && comm->collectives > 0) Sleep(100000);
}

// NCCL takes the calling thread's device, whichever the caller meant.
void CheckDevice(const char* call) {
  const char* wanted = std::getenv("FAKE_NCCL_WANTS_DEVICE");
  if (wanted && CurrentDevice() != std::atoi(wanted)) {
    Fail(kNcclInvalidUsage, Text(call, "the thread's device is another than was wanted"));
  }
}

bool Blocking(const char* call, const NcclConfig* config, bool otherwise) {
  if (!config) return otherwise;
  // Copies as much as both know, as NCCL does.
  NcclConfig known;
  std::memcpy(&known, config, std::min(config->size, sizeof known));
  if (known.magic != NcclConfig().magic) {
    Fail(kNcclInvalidArgument, Text(call, "the configuration has not been initialized"));
  }
  if (known.blocking == kNcclUndefined) return true;
  if (known.blocking != 0 && known.blocking != 1) {
    Fail(kNcclInvalidArgument, Text(call, "blocking is neither 0 nor 1"));
  }
  return known.blocking == 1;
}

// A unique id joins ranks once. (NCCL's root has gone when all have come.)
bool UsedBefore(const std::string& name, int rank) {
  static std::mutex mutex;
  static std::set<std::pair<std::string, int>> used;
  const std::lock_guard<std::mutex> lock(mutex);
  return !used.insert({name, rank}).second;
}

}  // namespace

NcclResult ncclGetVersion(int* version) {
  return Run("ncclGetVersion", {}, [&](Where) {
    CheckPointer("ncclGetVersion", version, "version");
    *version = Version();
    return kNcclSuccess;
  });
}

const char* ncclGetErrorString(NcclResult result) {
  static constexpr const char* kTexts[] = {
      "no error",         "unhandled CUDA error", "system error", "internal error",
      "invalid argument", "invalid usage",        "remote error", "in progress"};
  return result >= 0 && result <= kNcclInProgress ? kTexts[result] : "unknown result";
}

const char* ncclGetLastError(NcclComm*) { return last_error; }

NcclResult ncclGetUniqueId(NcclUniqueId* id) {
  const char* call = "ncclGetUniqueId";
  return Run(call, {}, [&](Where) {
    CheckPointer(call, id, "id");
    uint64_t random[2];
    if (getrandom(random, sizeof random, 0) != sizeof random) {
      Fail(kNcclSystemError, Text(call, "no random numbers"));
    }
    *id = {};
    std::snprintf(id->internal, sizeof id->internal, "/fake_nccl_%016llx%016llx",
                  static_cast<unsigned long long>(random[0]),
                  static_cast<unsigned long long>(random[1]));
    return kNcclSuccess;
  });
}

NcclResult ncclCommInitRankConfig(NcclComm** out, int ranks, NcclUniqueId id, int rank,
                                  NcclConfig* config) {
  const char* call = "ncclCommInitRankConfig";
  Rules();
  SetGlobalRank(rank);
  auto* comm = new NcclComm;
  comm->rank = rank;
  comm->size = ranks;
  if (out) *out = comm;
  const NcclResult result = Run(call, {comm}, [&](Where where) {
    CheckPointer(call, out, "comm");
    CheckDevice(call);
    if (ranks < 1 || ranks > kMaxRanks || rank < 0 || rank >= ranks) {
      Fail(kNcclInvalidArgument, Text(call, "no such rank"));
    }
    id.internal[sizeof id.internal - 1] = 0;
    comm->name = id.internal;
    if (comm->name.rfind("/fake_nccl_", 0) != 0) {
      Fail(kNcclInvalidArgument, Text(call, "not an id of ncclGetUniqueId"));
    }
    comm->blocking = Blocking(call, config, true);
    if (UsedBefore(comm->name, rank)) {
      Fail(kNcclSystemError, Text(call, "the unique id has been used before"));
    }
    group.foundings.push_back({comm, [comm] { Attach(comm); }});
    return Submit(where);
  });
  if (result != kNcclSuccess && result != kNcclInProgress) {
    if (out) *out = nullptr;
    Bury(comm);
  }
  return result;
}

NcclResult ncclCommSplit(NcclComm* comm, int color, int key, NcclComm** out,
                         NcclConfig* config) {
  const char* call = "ncclCommSplit";
  if (out) *out = nullptr;
  const NcclResult result = Run(call, Those(comm), [&](Where where) {
    CheckReady(call, comm);
    CheckPointer(call, out, "newcomm");
    CheckDevice(call);
    if (color < -1) Fail(kNcclInvalidArgument, Text(call, "the color is negative"));
    auto* part = color < 0 ? nullptr : new NcclComm;
    const bool blocking = Blocking(call, config, comm->blocking);
    if (part) part->blocking = blocking;
    const auto run = [=] {
      const std::string number = std::to_string(comm->collectives);
      const std::vector<int> members = RunSplit(comm, color, key);
      if (!part) return;
      while (members[static_cast<size_t>(++part->rank)] != comm->rank) {
      }
      part->size = static_cast<int>(members.size());
      part->name = comm->name + "_" + number + "." + std::to_string(color);
      Attach(part);
      *out = part;
    };
    group.foundings.push_back({comm, run});
    return Submit(where);
  });
  // NCCL 2.31, src/init.cc: what is still being done is no failure, and not told.
  return result == kNcclInProgress ? kNcclSuccess : result;
}

NcclResult ncclCommFinalize(NcclComm* comm) {
  const char* call = "ncclCommFinalize";
  return Run(call, Those(comm), [&](Where where) {
    CheckReady(call, comm);
    if (comm->finalized) Fail(kNcclInvalidArgument, Text(call, "called before"));
    comm->finalized = true;
    // Nothing is ever under way here; a nonblocking communicator still says so first.
    group.foundings.push_back({comm, [comm] {
                                 Sleep(1000);
                                 WaitForGraphs(comm);
                               }});
    return Submit(where);
  });
}

NcclResult ncclCommDestroy(NcclComm* comm) {
  const char* call = "ncclCommDestroy";
  if (!comm) return kNcclSuccess;
  return Run(call, Those(comm), [&](Where) {
    CheckReady(call, comm);
    Bury(comm);
    return kNcclSuccess;
  });
}

NcclResult ncclCommAbort(NcclComm* comm) {
  const char* call = "ncclCommAbort";
  if (!comm) return kNcclSuccess;
  return Run(call, {}, [&](Where) {
    CheckComm(call, comm);
    comm->aborted = true;
    WaitForGraphs(comm);
    Bury(comm);
    return kNcclSuccess;
  });
}

NcclResult ncclCommGetAsyncError(NcclComm* comm, NcclResult* result) {
  const char* call = "ncclCommGetAsyncError";
  return Run(call, Those(comm), [&](Where) {
    CheckComm(call, comm);
    CheckPointer(call, result, "asyncError");
    *result = AsyncError(comm);
    return kNcclSuccess;
  });
}

NcclResult ncclCommCount(NcclComm* comm, int* count) {
  const char* call = "ncclCommCount";
  return Run(call, Those(comm), [&](Where) {
    CheckReady(call, comm);
    CheckPointer(call, count, "count");
    *count = comm->size;
    return kNcclSuccess;
  });
}

NcclResult ncclCommUserRank(NcclComm* comm, int* rank) {
  const char* call = "ncclCommUserRank";
  return Run(call, Those(comm), [&](Where) {
    CheckReady(call, comm);
    CheckPointer(call, rank, "rank");
    *rank = comm->rank;
    return kNcclSuccess;
  });
}

NcclResult ncclAllReduce(const void* from, void* to, size_t count, NcclDType dtype,
                         NcclOp op, NcclComm* comm, CudaStream) {
  return Move("ncclAllReduce", Describe(kAllReduce, comm, from, to, count, dtype, op, 0));
}

NcclResult ncclBroadcast(const void* from, void* to, size_t count, NcclDType dtype,
                         int root, NcclComm* comm, CudaStream) {
  return Move("ncclBroadcast",
              Describe(kBroadcast, comm, from, to, count, dtype, kNcclSum, root));
}

NcclResult ncclAllGather(const void* from, void* to, size_t count, NcclDType dtype,
                         NcclComm* comm, CudaStream) {
  return Move("ncclAllGather",
              Describe(kAllGather, comm, from, to, count, dtype, kNcclSum, 0));
}

NcclResult ncclReduceScatter(const void* from, void* to, size_t count, NcclDType dtype,
                             NcclOp op, NcclComm* comm, CudaStream) {
  return Move("ncclReduceScatter",
              Describe(kReduceScatter, comm, from, to, count, dtype, op, 0));
}

NcclResult ncclSend(const void* from, size_t count, NcclDType dtype, int peer,
                    NcclComm* comm, CudaStream) {
  return Move("ncclSend",
              Describe(kSend, comm, from, nullptr, count, dtype, kNcclSum, peer));
}

NcclResult ncclRecv(void* to, size_t count, NcclDType dtype, int peer, NcclComm* comm,
                    CudaStream) {
  return Move("ncclRecv",
              Describe(kRecv, comm, nullptr, to, count, dtype, kNcclSum, peer));
}

NcclResult ncclGroupStart() {
  return Run("ncclGroupStart", {}, [&](Where) {
    if (group.depth++ == 0) ++groups;
    return kNcclSuccess;
  });
}

NcclResult ncclGroupEnd() {
  const char* call = "ncclGroupEnd";
  Group work;
  const int depth = group.depth;
  // Whatever happens, this group is over.
  if (depth == 1) std::swap(work, group);
  if (depth > 1) --group.depth;
  return Run(call, CommsOf(work), [&](Where where) {
    if (depth == 0) Fail(kNcclInvalidUsage, Text(call, "not in a group"));
    if (depth > 1) return kNcclSuccess;
    // One of the group's calls has failed: none of them runs.
    if (work.error != kNcclSuccess) throw Failure{work.error};
    work.where = where;
    return Launch(std::move(work));
  });
}

NcclResult ncclRedOpCreatePreMulSum(NcclOp* op, void* scalar, NcclDType dtype,
                                    NcclResidence residence, NcclComm* comm) {
  const char* call = "ncclRedOpCreatePreMulSum";
  return Run(call, Those(comm), [&](Where) {
    CheckReady(call, comm);
    CheckPointer(call, op, "op");
    CheckPointer(call, scalar, "scalar");
    if (dtype < 0 || dtype >= kDTypeCount) {
      Fail(kNcclInvalidArgument, Text(call, "unknown data type"));
    }
    PreMulSum made = {dtype, 0, nullptr};
    if (residence == kNcclScalarHostImmediate) {
      std::memcpy(&made.factor, scalar, kDTypeBytes[dtype]);
    } else {
      made.device = scalar;
    }
    // Unlike any other communicator's, so that a wrong one is noticed.
    static std::atomic<int> number{100};
    *op = static_cast<NcclOp>(number++);
    comm->ops[*op] = made;
    return kNcclSuccess;
  });
}

NcclResult ncclRedOpDestroy(NcclOp op, NcclComm* comm) {
  const char* call = "ncclRedOpDestroy";
  return Run(call, Those(comm), [&](Where) {
    CheckReady(call, comm);
    if (comm->ops.erase(op) == 0) {
      Fail(kNcclInvalidArgument, Text(call, "the communicator has no such operation"));
    }
    return kNcclSuccess;
  });
}

}  // namespace jaxcomm
