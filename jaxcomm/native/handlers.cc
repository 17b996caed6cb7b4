// XLA FFI handlers for platform "cpu", and the C functions Python sets them up with.
//
// Every handler takes the leaves of one bucket and, last, a token; it returns the
// same, each result aliased to its operand. The token's value is never read: it is
// there so that one call's operand is the previous call's result, which fixes the
// order of all calls on every rank (XLA:CPU runs independent calls concurrently).

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "communicator.h"
#include "kernels.h"
#include "node.h"
#include "reduce.h"
#include "timeline.h"
#include "xla/ffi/api/c_api.h"
#include "xla/ffi/api/ffi.h"

#define JAXCOMM_API extern "C" __attribute__((visibility("default")))

namespace ffi = xla::ffi;

namespace jaxcomm {
namespace {

std::mutex registry_mutex;
std::unique_ptr<Mpi> mpi;
std::map<int64_t, std::unique_ptr<Communicator>> communicators;
AgreeFn agree_callback = nullptr;
PartitionFn partition_callback = nullptr;

Communicator* FindCommunicator(int64_t id) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  auto found = communicators.find(id);
  return found == communicators.end() ? nullptr : found->second.get();
}

ffi::Error NoCommunicator() {
  return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                    "jaxcomm: this program names a communicator that this process "
                    "has not created; call jaxcomm.init() before running it");
}

bool ToDType(ffi::DataType type, DType* out) {
  switch (type) {
    case ffi::F32: *out = kF32; return true;
    case ffi::F64: *out = kF64; return true;
    case ffi::BF16: *out = kBF16; return true;
    case ffi::F16: *out = kF16; return true;
    case ffi::S8: *out = kI8; return true;
    case ffi::S16: *out = kI16; return true;
    case ffi::S32: *out = kI32; return true;
    case ffi::S64: *out = kI64; return true;
    case ffi::U8: *out = kU8; return true;
    case ffi::U16: *out = kU16; return true;
    case ffi::U32: *out = kU32; return true;
    case ffi::U64: *out = kU64; return true;
    case ffi::PRED: *out = kBool; return true;
    case ffi::C64: *out = kC64; return true;
    case ffi::C128: *out = kC128; return true;
    default: return false;
  }
}

ffi::Error MpiFailure(const Communicator& comm, int code, int64_t bucket,
                      const char* call) {
  return ffi::Error(ffi::ErrorCode::kInternal,
                    std::string("jaxcomm: ") + call + " failed on rank " +
                        std::to_string(comm.rank) + " of " + std::to_string(comm.size) +
                        " in bucket " + std::to_string(bucket) + ": " +
                        comm.mpi->ErrorText(code));
}

// The leaves of one call: results, holding the operands' values. XLA honours the
// aliases and the copies never happen; they keep the call right if it ever does not.
ffi::ErrorOr<std::vector<Leaf>> Leaves(ffi::RemainingArgs args, ffi::RemainingRets rets) {
  if (args.size() != rets.size() || args.size() == 0) {
    return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kInvalidArgument,
                                      "jaxcomm: operands and results differ in number"));
  }
  std::vector<Leaf> leaves;
  leaves.reserve(args.size() - 1);
  for (size_t i = 0; i + 1 < args.size(); ++i) {
    auto arg = args.get<ffi::AnyBuffer>(i);
    auto ret = rets.get<ffi::AnyBuffer>(i);
    if (arg.has_error()) return ffi::Unexpected(arg.error());
    if (ret.has_error()) return ffi::Unexpected(ret.error());
    char* data = static_cast<char*>((*ret)->untyped_data());
    const size_t bytes = arg->size_bytes();
    if (data != arg->untyped_data() && bytes > 0) {
      std::memcpy(data, arg->untyped_data(), bytes);
    }
    leaves.push_back({data, static_cast<int64_t>(arg->element_count())});
  }
  return leaves;
}

using Numbers = ffi::Span<const int64_t>;

// One collective's turn on a communicator and all its partitions. Holding it, the ranks
// have agreed on the schedule.
class Turn {
 public:
  Turn(int64_t comm_id, int64_t schedule, int64_t partition, Numbers groups)
      : comm_(FindCommunicator(comm_id)) {
    if (comm_ == nullptr) {
      error_ = NoCommunicator();
      return;
    }
    lock_ = std::unique_lock<std::mutex>(comm_->mutex);
    comm_->counters[kCalls]++;
    std::string text = comm_->Agree(schedule, agree_callback);
    if (text.empty() && partition != 0) text = Enter(partition, groups);
    if (!text.empty()) error_ = ffi::Error(ffi::ErrorCode::kFailedPrecondition, text);
  }

  const ffi::Error& error() const { return error_; }
  Communicator* comm() const { return comm_; }

 private:
  // Goes on with this rank's group of a partition, which is created at its first use.
  std::string Enter(int64_t partition, Numbers groups) {
    Communicator* part = FindCommunicator(partition);
    if (part == nullptr) {
      char text[8192] = {};
      if (partition_callback == nullptr ||
          partition_callback(comm_->id, partition, groups.begin(),
                             static_cast<int64_t>(groups.size()), text, sizeof text) != 0) {
        return text[0] ? text : "jaxcomm: a subgroup could not be created";
      }
      part = FindCommunicator(partition);
    }
    comm_ = part;
    return {};
  }

  Communicator* comm_;
  std::unique_lock<std::mutex> lock_;
  ffi::Error error_ = ffi::Error::Success();
};

ffi::Error AllReduceCall(ffi::RemainingArgs args, ffi::RemainingRets rets,
                         int64_t comm_id, int64_t schedule, int64_t bucket,
                         int64_t partition, Numbers groups, int64_t op, int64_t divisor,
                         int64_t pack_bytes, int64_t wire) {
  auto leaves = Leaves(args, rets);
  if (leaves.has_error()) return leaves.error();
  if (leaves->empty()) return ffi::Error::Success();
  DType dtype;
  if (!ToDType(args.get<ffi::AnyBuffer>(0)->element_type(), &dtype)) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented, "jaxcomm: dtype not supported by mpi");
  }
  const Reduction reduction{dtype, static_cast<Op>(op), static_cast<int>(divisor),
                            wire < 0 ? dtype : static_cast<DType>(wire), pack_bytes};

  Turn turn(comm_id, schedule, partition, groups);
  if (turn.error().failure()) return turn.error();
  Timed timed(comm_id, schedule, bucket);
  const int code = AllReduce(turn.comm(), reduction, *leaves);
  return code == 0 ? ffi::Error::Success()
                   : MpiFailure(*turn.comm(), code, bucket, "MPI_Allreduce");
}

ffi::Error BroadcastCall(ffi::RemainingArgs args, ffi::RemainingRets rets,
                         int64_t comm_id, int64_t schedule, int64_t bucket,
                         int64_t partition, Numbers groups, int64_t root) {
  auto leaves = Leaves(args, rets);
  if (leaves.has_error()) return leaves.error();

  Turn turn(comm_id, schedule, partition, groups);
  if (turn.error().failure()) return turn.error();
  Timed timed(comm_id, schedule, bucket);
  for (size_t i = 0; i < leaves->size(); ++i) {
    const auto bytes = static_cast<int64_t>(args.get<ffi::AnyBuffer>(i)->size_bytes());
    const int code =
        Broadcast(turn.comm(), static_cast<int>(root), (*leaves)[i].data, bytes);
    if (code != 0) return MpiFailure(*turn.comm(), code, bucket, "MPI_Bcast");
  }
  return ffi::Error::Success();
}

// Gathers, scatters, exchanges or permutes leaves. `permutation` holds pairs of ranks:
// source, target.
ffi::Error MoveCall(ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t comm_id,
                    int64_t schedule, int64_t bucket, int64_t partition, Numbers groups,
                    int64_t move, int64_t divisor, Numbers permutation) {
  Turn turn(comm_id, schedule, partition, groups);
  if (turn.error().failure()) return turn.error();
  Timed timed(comm_id, schedule, bucket);
  Communicator* comm = turn.comm();
  Movement movement{static_cast<Move>(move), kF32, kSum, static_cast<int>(divisor)};
  for (size_t i = 0; i + 1 < permutation.size(); i += 2) {
    if (permutation[i] == comm->rank) movement.target = static_cast<int>(permutation[i + 1]);
    if (permutation[i + 1] == comm->rank) movement.source = static_cast<int>(permutation[i]);
  }
  for (size_t i = 0; i + 1 < args.size(); ++i) {
    auto arg = args.get<ffi::AnyBuffer>(i);
    auto ret = rets.get<ffi::AnyBuffer>(i);
    if (arg.has_error()) return arg.error();
    if (ret.has_error()) return ret.error();
    const bool reduces = movement.move == kReduceScatter;
    if (reduces && !ToDType(arg->element_type(), &movement.dtype)) {
      return ffi::Error(ffi::ErrorCode::kUnimplemented, "jaxcomm: dtype not supported by mpi");
    }
    // Of one rank: what all of them gather, or scatter among them.
    const bool whole = movement.move == kAllGather || movement.move == kPermute;
    const auto bytes = static_cast<int64_t>(arg->size_bytes()) / (whole ? 1 : comm->size);
    const int code = MoveLeaf(comm, movement, static_cast<const char*>(arg->untyped_data()),
                              static_cast<char*>((*ret)->untyped_data()), bytes);
    if (code != 0) return MpiFailure(*comm, code, bucket, "a collective");
  }
  return ffi::Error::Success();
}

// Records that the operands are there. Its result, a zero, is added to the token.
ffi::Error MarkCall(ffi::RemainingArgs, ffi::Result<ffi::BufferR0<ffi::U32>> out,
                    int64_t comm_id, int64_t schedule, int64_t bucket) {
  const int64_t now = Timeline::Now();
  Timeline::Get().Add({comm_id, schedule, bucket, 0, now, now});
  *out->typed_data() = 0;
  return ffi::Error::Success();
}

// This rank's number. The program must not hold it: it is the same on every rank.
ffi::Error RankCall(ffi::Result<ffi::BufferR0<ffi::S32>> out, int64_t comm_id) {
  Communicator* comm = FindCommunicator(comm_id);
  if (comm == nullptr) return NoCommunicator();
  *out->typed_data() = comm->rank;
  return ffi::Error::Success();
}

// Moves nothing: ties the leaves to the token, so that a foreign custom call on
// them takes its place in the order, and asks for the agreement before it runs.
ffi::Error Gate(ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t comm_id,
                int64_t schedule) {
  auto leaves = Leaves(args, rets);
  if (leaves.has_error()) return leaves.error();
  if (schedule == 0) return ffi::Error::Success();
  Communicator* comm = FindCommunicator(comm_id);
  if (comm == nullptr) return NoCommunicator();
  std::lock_guard<std::mutex> lock(comm->mutex);
  if (std::string error = comm->Agree(schedule, agree_callback); !error.empty()) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition, error);
  }
  return ffi::Error::Success();
}

void SetError(const std::string& text, char* error, int64_t capacity) {
  if (capacity <= 0) return;
  std::strncpy(error, text.c_str(), static_cast<size_t>(capacity - 1));
  error[capacity - 1] = '\0';
}

}  // namespace

JAXCOMM_API XLA_FFI_Error* jaxcomm_mpi_all_reduce(XLA_FFI_CallFrame*);
JAXCOMM_API XLA_FFI_Error* jaxcomm_mpi_broadcast(XLA_FFI_CallFrame*);
JAXCOMM_API XLA_FFI_Error* jaxcomm_mpi_move(XLA_FFI_CallFrame*);
JAXCOMM_API XLA_FFI_Error* jaxcomm_mark(XLA_FFI_CallFrame*);
JAXCOMM_API XLA_FFI_Error* jaxcomm_rank(XLA_FFI_CallFrame*);
JAXCOMM_API XLA_FFI_Error* jaxcomm_gate(XLA_FFI_CallFrame*);

// What every collective's call starts with.
#define JAXCOMM_COLLECTIVE()        \
  ffi::Ffi::Bind()                  \
      .RemainingArgs()              \
      .RemainingRets()              \
      .Attr<int64_t>("comm")        \
      .Attr<int64_t>("schedule")    \
      .Attr<int64_t>("bucket")      \
      .Attr<int64_t>("partition")   \
      .Attr<Numbers>("groups")

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcomm_mpi_all_reduce, AllReduceCall,
                              JAXCOMM_COLLECTIVE()
                                  .Attr<int64_t>("op")
                                  .Attr<int64_t>("divisor")
                                  .Attr<int64_t>("pack_bytes")
                                  .Attr<int64_t>("wire"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcomm_mpi_broadcast, BroadcastCall,
                              JAXCOMM_COLLECTIVE().Attr<int64_t>("root"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcomm_mpi_move, MoveCall,
                              JAXCOMM_COLLECTIVE()
                                  .Attr<int64_t>("move")
                                  .Attr<int64_t>("divisor")
                                  .Attr<Numbers>("permutation"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcomm_mark, MarkCall,
                              ffi::Ffi::Bind()
                                  .RemainingArgs()
                                  .Ret<ffi::BufferR0<ffi::U32>>()
                                  .Attr<int64_t>("comm")
                                  .Attr<int64_t>("schedule")
                                  .Attr<int64_t>("bucket"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcomm_rank, RankCall,
                              ffi::Ffi::Bind()
                                  .Ret<ffi::BufferR0<ffi::S32>>()
                                  .Attr<int64_t>("comm"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcomm_gate, Gate,
                              ffi::Ffi::Bind()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("comm")
                                  .Attr<int64_t>("schedule"));

// Binds to the MPI in this process. Returns 0, or 1 with a text in `error`.
JAXCOMM_API int jaxcomm_open_mpi(const char* library, int handle_bytes,
                                 const MpiHandles* handles, char* error,
                                 int64_t capacity) {
  std::string text;
  std::unique_ptr<Mpi> opened = OpenMpi(library, handle_bytes, *handles, &text);
  if (!opened) {
    SetError(text, error, capacity);
    return 1;
  }
  std::lock_guard<std::mutex> lock(registry_mutex);
  if (!mpi) mpi = std::move(opened);
  return 0;
}

JAXCOMM_API void jaxcomm_create_communicator(int64_t id, uint64_t handle, int rank,
                                             int size, int64_t staging_bytes,
                                             int64_t segment_bytes) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  communicators[id] = std::make_unique<Communicator>(id, mpi.get(), handle, rank, size,
                                                     staging_bytes, segment_bytes);
}

// Lets the ranks of a communicator, all on one host, reduce through shared memory:
// `windows` are their addresses in this process, each of `bytes` zero-filled bytes.
JAXCOMM_API void jaxcomm_share_memory(int64_t id, char* const* windows, int64_t bytes,
                                      int crowded) {
  Communicator* comm = FindCommunicator(id);
  comm->node = std::make_unique<Node>(std::vector<char*>(windows, windows + comm->size),
                                      comm->rank, bytes, crowded != 0);
}

// The MPI_Op that reduces elements of `dtype`, for calls that are not ours.
JAXCOMM_API uint64_t jaxcomm_op_handle(int dtype, int op) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  return mpi->OpHandle(static_cast<DType>(dtype), static_cast<Op>(op));
}

JAXCOMM_API const char* jaxcomm_kernels() { return ChosenKernels().name; }

JAXCOMM_API void jaxcomm_lock_mpi() { LockMpi(); }
JAXCOMM_API void jaxcomm_unlock_mpi() { UnlockMpi(); }

// The mean of one float32 leaf as a bucket's call computes it, for measuring without XLA.
JAXCOMM_API int jaxcomm_all_reduce_float(int64_t id, void* data, int64_t count,
                                         int64_t pack_bytes) {
  Communicator* comm = FindCommunicator(id);
  if (comm == nullptr) return 1;
  std::lock_guard<std::mutex> lock(comm->mutex);
  const Reduction sum{kF32, kSum, comm->size, kF32, pack_bytes};
  return AllReduce(comm, sum, {{static_cast<char*>(data), count}});
}

JAXCOMM_API void jaxcomm_set_agree(AgreeFn callback) { agree_callback = callback; }

JAXCOMM_API void jaxcomm_set_partition(PartitionFn callback) {
  partition_callback = callback;
}

JAXCOMM_API void jaxcomm_timeline_start() { Timeline::Get().Start(); }

// Moves recorded events to `out`, which has room for `capacity`; returns how many.
JAXCOMM_API int64_t jaxcomm_timeline_take(Event* out, int64_t capacity) {
  return Timeline::Get().Take(out, capacity);
}

// Copies the counters of a communicator to out[kCounters]. Returns 0 if it exists.
JAXCOMM_API int jaxcomm_counters(int64_t id, int64_t* out) {
  Communicator* comm = FindCommunicator(id);
  if (comm == nullptr) return 1;
  for (int i = 0; i < kCounters; ++i) out[i] = comm->counters[i];
  return 0;
}

}  // namespace jaxcomm
