// XLA FFI handlers for platform "cpu", and the C functions Python sets them up with.
//
// Every handler takes the leaves of one bucket and, last, a token; it returns the
// same, each result aliased to its operand. The token's value is never read: it is
// there so that one call's operand is the previous call's result, which fixes the
// order of all calls on every rank (XLA:CPU runs independent calls concurrently).

#include <cstring>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "api.h"
#include "calls.h"
#include "communicator.h"
#include "guard.h"
#include "kernels.h"
#include "node.h"
#include "reduce.h"
#include "rounding.h"
#include "tiers.h"
#include "timeline.h"
#include "xla/ffi/api/c_api.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxcomm {
namespace {

// Guards what follows, not what is in it.
std::mutex registry_mutex;
// Set by the first jaxcomm_open_mpi, before there is a communicator.
std::unique_ptr<Mpi> mpi;
// By Python's keys; nothing is ever removed.
std::map<int64_t, std::unique_ptr<Communicator>> communicators;

Communicator* FindCommunicator(int64_t id) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  auto found = communicators.find(id);
  return found == communicators.end() ? nullptr : found->second.get();
}

// Begins a call; the communicator's mutex is held. Returns "", or why it must not be made.
std::string Begin(Communicator* comm, int64_t schedule, int64_t bucket) {
  const int64_t number = comm->progress.Begin(schedule, bucket);
  if (!comm->broken.empty()) return comm->broken;
  std::string text = comm->agreement.Ask(comm->id, schedule, bucket, number,
                                         &comm->counters[kAgreements]);
  if (text.empty()) comm->progress.Remember(number, schedule, bucket);
  return text;
}

ffi::Error NoCommunicator() {
  return Refused(
      "jaxcomm: this program names a communicator that this process has not created; call "
      "jaxcomm.init() before running it");
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
  std::string text = std::string("jaxcomm: ") + call + " failed on rank " +
                     std::to_string(comm.rank) + " of " + std::to_string(comm.size) +
                     " in bucket " + std::to_string(BucketOf(bucket)) + ": " +
                     comm.mpi->ErrorText(code);
  if (text.find("runcate") != std::string::npos) {
    text +=
        ". A rank came with another size: it runs another program here. "
        "JAXCOMM_CHECK=every names the first call that differs";
  }
  return ffi::Error(ffi::ErrorCode::kInternal, text);
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

// One collective's turn on a communicator and all its partitions. Holding it, the ranks
// have agreed on the schedule.
class Turn {
 public:
  explicit Turn(const Place& place) : comm_(FindCommunicator(place.comm)) {
    if (comm_ == nullptr) {
      error_ = NoCommunicator();
      return;
    }
    lock_ = std::unique_lock<std::mutex>(comm_->mutex);
    progress_ = &comm_->progress;
    std::string text = Begin(comm_, place.schedule, place.bucket);
    if (text.empty() && place.partition != 0) text = Enter(place);
    if (!text.empty()) error_ = Refused(text);
  }

  ~Turn() {
    if (progress_ != nullptr) progress_->End();
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

  const ffi::Error& error() const { return error_; }
  Communicator* comm() const { return comm_; }

 private:
  // Goes on with this rank's group of a partition, which is created at its first use.
  std::string Enter(const Place& place) {
    Communicator* part = FindCommunicator(place.partition);
    if (part == nullptr) {
      std::string text =
          AskForPartition(comm_->id, place.partition, place.groups.data(),
                          static_cast<int64_t>(place.groups.size()));
      if (!text.empty()) return text;
      part = FindCommunicator(place.partition);
    }
    comm_ = part;
    return {};
  }

  // Null where there is none; the partition's once it is entered.
  Communicator* comm_;
  // That of the communicator whose turn it is, also in a partition.
  Progress* progress_ = nullptr;
  // Likewise: its mutex, for as long as this lives.
  std::unique_lock<std::mutex> lock_;
  // Why the call must not be made.
  ffi::Error error_ = ffi::Error::Success();
};

// Makes a call. One that throws may have left the other ranks in the middle of it.
template <typename Work>
int Do(Communicator* comm, const Work& work) {
  try {
    return work(comm);
  } catch (...) {
    comm->broken = "jaxcomm: an earlier call of this communicator failed on this rank";
    throw;
  }
}

void Settle(ffi::Promise* promise, ffi::Error error) {
  error.failure() ? promise->SetError(std::move(error)) : promise->SetAvailable();
}

// Takes a turn and does `work(comm)`, an MPI error code: here, or on the communicator's
// own thread. XLA keeps operands and results until the future says so.
template <typename Work>
ffi::Future InTurn(Place place, const char* what, Work work) {
  ffi::Promise promise;
  ffi::Future future(promise);
  Communicator* comm = FindCommunicator(place.comm);
  auto call = [place = std::move(place), what, work = std::move(work)]() -> ffi::Error {
    Turn turn(place);
    if (turn.error().failure()) return turn.error();
    Timed timed(place.comm, place.schedule, place.bucket);
    const int code = Do(turn.comm(), work);
    if (code == kBroken) return Refused(turn.comm()->broken);
    return code == 0 ? ffi::Error::Success()
                     : MpiFailure(*turn.comm(), code, place.bucket, what);
  };
  if (comm == nullptr || comm->calls == nullptr ||
      (comm->node != nullptr && comm->node->AllHere())) {
    Settle(&promise, call());
  } else {
    comm->calls->Add([comm, promise, call = std::move(call)] {
      ffi::Error error = Guarded(call, [](const char* text) {
        return ffi::Error(ffi::ErrorCode::kInternal, text);
      });
      comm->answers->Add([promise, error = std::move(error)]() mutable {
        Settle(&promise, std::move(error));
      });
    });
  }
  return future;
}

ffi::Future Failed(ffi::Error error) {
  ffi::Promise promise;
  promise.SetError(std::move(error));
  return ffi::Future(promise);
}

ffi::Future Done() {
  ffi::Promise promise;
  promise.SetAvailable();
  return ffi::Future(promise);
}

ffi::Error NoSuchType() {
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "jaxcomm: dtype not supported by mpi");
}

ffi::Future AllReduceCall(ffi::RemainingArgs args, ffi::RemainingRets rets,
                          int64_t comm_id, int64_t schedule, int64_t bucket,
                          int64_t partition, Numbers groups, int64_t op, int64_t divisor,
                          int64_t pack_bytes, int64_t wire, int64_t algorithm) {
  auto leaves = Leaves(args, rets);
  if (leaves.has_error()) return Failed(leaves.error());
  if (leaves->empty()) return Done();
  DType dtype;
  if (!ToDType(args.get<ffi::AnyBuffer>(0)->element_type(), &dtype)) {
    return Failed(NoSuchType());
  }
  const Reduction reduction{dtype, static_cast<Op>(op), static_cast<int>(divisor),
                            wire < 0 ? dtype : static_cast<DType>(wire), pack_bytes,
                            {schedule, bucket},
                            static_cast<Algorithm>(algorithm)};
  return InTurn(Place(comm_id, schedule, bucket, partition, groups), "MPI_Allreduce",
                [reduction, leaves = std::move(*leaves)](Communicator* comm) {
                  return AllReduce(comm, reduction, leaves);
                });
}

ffi::Future BroadcastCall(ffi::RemainingArgs args, ffi::RemainingRets rets,
                          int64_t comm_id, int64_t schedule, int64_t bucket,
                          int64_t partition, Numbers groups, int64_t root) {
  auto leaves = Leaves(args, rets);
  if (leaves.has_error()) return Failed(leaves.error());
  for (size_t i = 0; i < leaves->size(); ++i) {  // bytes are what counts here
    (*leaves)[i].count = static_cast<int64_t>(args.get<ffi::AnyBuffer>(i)->size_bytes());
  }
  return InTurn(Place(comm_id, schedule, bucket, partition, groups), "MPI_Bcast",
                [root, leaves = std::move(*leaves)](Communicator* comm) {
                  for (const Leaf& leaf : leaves) {
                    const int code =
                        Broadcast(comm, static_cast<int>(root), leaf.data, leaf.count);
                    if (code != 0) return code;
                  }
                  return 0;
                });
}

// Gathers, scatters, exchanges or permutes leaves. `permutation` holds pairs of ranks:
// source, target.
ffi::Future MoveCall(ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t comm_id,
                     int64_t schedule, int64_t bucket, int64_t partition, Numbers groups,
                     int64_t move, int64_t divisor, Numbers permutation) {
  struct Part {
    const char* from;
    char* to;
    int64_t bytes;
    DType dtype;
  };
  const auto kind = static_cast<Move>(move);
  std::vector<Part> parts;
  for (size_t i = 0; i + 1 < args.size(); ++i) {
    auto arg = args.get<ffi::AnyBuffer>(i);
    auto ret = rets.get<ffi::AnyBuffer>(i);
    if (arg.has_error()) return Failed(arg.error());
    if (ret.has_error()) return Failed(ret.error());
    DType dtype = kF32;
    if (kind == kReduceScatter && !ToDType(arg->element_type(), &dtype)) {
      return Failed(NoSuchType());
    }
    parts.push_back({static_cast<const char*>(arg->untyped_data()),
                     static_cast<char*>((*ret)->untyped_data()),
                     static_cast<int64_t>(arg->size_bytes()), dtype});
  }
  return InTurn(
      Place(comm_id, schedule, bucket, partition, groups), "a collective",
      [kind, divisor, parts = std::move(parts),
       pairs = std::vector<int64_t>(permutation.begin(), permutation.end())](
          Communicator* comm) {
        Movement movement{kind, kF32, kSum, static_cast<int>(divisor)};
        for (size_t i = 0; i + 1 < pairs.size(); i += 2) {
          if (pairs[i] == comm->rank) movement.target = static_cast<int>(pairs[i + 1]);
          if (pairs[i + 1] == comm->rank) movement.source = static_cast<int>(pairs[i]);
        }
        // Of one rank: what all of them gather, or scatter among them.
        const int64_t share = kind == kAllGather || kind == kPermute ? 1 : comm->size;
        for (const Part& part : parts) {
          movement.dtype = part.dtype;
          const int code =
              MoveLeaf(comm, movement, part.from, part.to, part.bytes / share);
          if (code != 0) return code;
        }
        return 0;
      });
}

// Records that the operands are there. Its result, a zero, is added to the token.
ffi::Error MarkCall(ffi::RemainingArgs, ffi::Result<ffi::BufferR0<ffi::U32>> out,
                    int64_t comm_id, int64_t schedule, int64_t bucket) {
  const int64_t now = Now();
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
// them takes its place in the order, and asks for the agreement before it runs. Where ranks
// share memory it lets none pass that has come from another bucket: MPI, given buffers of
// different sizes, may write beyond them. A second gate, of bucket -1, tells that the
// foreign call has ended.
ffi::Error Gate(ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t comm_id,
                int64_t schedule, int64_t bucket) {
  auto leaves = Leaves(args, rets);
  if (leaves.has_error()) return leaves.error();
  Communicator* comm = FindCommunicator(comm_id);
  if (comm == nullptr) return NoCommunicator();
  std::lock_guard<std::mutex> lock(comm->mutex);
  if (bucket < 0) {
    comm->progress.End();
    return ffi::Error::Success();
  }
  std::string text = Begin(comm, schedule, bucket);
  if (text.empty() && comm->node != nullptr) {
    const Where where{schedule, bucket};
    if (const int stranger = comm->node->Meet(where); stranger >= 0) {
      text = comm->broken =
          AskHowTheyDiffer(comm->id, where, stranger, comm->node->where(stranger));
    }
  }
  if (text.empty()) return ffi::Error::Success();
  comm->progress.End();
  return Refused(text);
}

}  // namespace

JAXCOMM_API XLA_FFI_Error* jaxcomm_mpi_all_reduce(XLA_FFI_CallFrame*);
JAXCOMM_API XLA_FFI_Error* jaxcomm_mpi_broadcast(XLA_FFI_CallFrame*);
JAXCOMM_API XLA_FFI_Error* jaxcomm_mpi_move(XLA_FFI_CallFrame*);
JAXCOMM_API XLA_FFI_Error* jaxcomm_mark(XLA_FFI_CallFrame*);
JAXCOMM_API XLA_FFI_Error* jaxcomm_rank(XLA_FFI_CallFrame*);
JAXCOMM_API XLA_FFI_Error* jaxcomm_gate(XLA_FFI_CallFrame*);

JAXCOMM_HANDLER(jaxcomm_mpi_all_reduce, AllReduceCall,
                JAXCOMM_COLLECTIVE(ffi::Ffi::Bind())
                    .Attr<int64_t>("op")
                    .Attr<int64_t>("divisor")
                    .Attr<int64_t>("pack_bytes")
                    .Attr<int64_t>("wire")
                    .Attr<int64_t>("algorithm"));

JAXCOMM_HANDLER(jaxcomm_mpi_broadcast, BroadcastCall,
                JAXCOMM_COLLECTIVE(ffi::Ffi::Bind()).Attr<int64_t>("root"));

JAXCOMM_HANDLER(jaxcomm_mpi_move, MoveCall,
                JAXCOMM_COLLECTIVE(ffi::Ffi::Bind())
                    .Attr<int64_t>("move")
                    .Attr<int64_t>("divisor")
                    .Attr<Numbers>("permutation"));

JAXCOMM_HANDLER(jaxcomm_mark, MarkCall,
                ffi::Ffi::Bind()
                    .RemainingArgs()
                    .Ret<ffi::BufferR0<ffi::U32>>()
                    .Attr<int64_t>("comm")
                    .Attr<int64_t>("schedule")
                    .Attr<int64_t>("bucket"));

JAXCOMM_HANDLER(jaxcomm_rank, RankCall,
                ffi::Ffi::Bind()
                    .Ret<ffi::BufferR0<ffi::S32>>()
                    .Attr<int64_t>("comm"));

JAXCOMM_HANDLER(jaxcomm_gate, Gate,
                ffi::Ffi::Bind()
                    .RemainingArgs()
                    .RemainingRets()
                    .Attr<int64_t>("comm")
                    .Attr<int64_t>("schedule")
                    .Attr<int64_t>("bucket"));

// Binds to the MPI in this process. Returns 0, or 1 with a text in `error`.
JAXCOMM_API int jaxcomm_open_mpi(const char* library, int handle_bytes,
                                 const MpiHandles* handles, char* error,
                                 int64_t capacity) {
  return Told(error, capacity, [&] {
    std::string text;
    std::unique_ptr<Mpi> opened = OpenMpi(library, handle_bytes, *handles, &text);
    std::lock_guard<std::mutex> lock(registry_mutex);
    if (opened && !mpi) mpi = std::move(opened);
    return text;
  });
}

// `own_thread`: whether its calls are made on a thread of its own; ranks may differ in
// that. `ring`: whether large leaves go around a ring. Returns as jaxcomm_open_mpi.
JAXCOMM_API int jaxcomm_create_communicator(int64_t id, uint64_t handle, int rank, int size,
                                            int64_t staging_bytes, int64_t segment_bytes,
                                            int own_thread, int ring, char* error,
                                            int64_t capacity) {
  return Told(error, capacity, [&] {
    auto comm = std::make_unique<Communicator>(id, mpi.get(), handle, rank, size,
                                               staging_bytes, segment_bytes);
    if (own_thread != 0) {
      comm->answers = std::make_unique<Worker>(FlushSubnormals);
      comm->calls = std::make_unique<Worker>();  // ends before what it answers through
    }
    if (ring != 0) {
      std::vector<int> members(static_cast<size_t>(size));
      std::iota(members.begin(), members.end(), 0);
      comm->ring = std::make_unique<Exchange>(mpi.get(), handle, std::move(members), rank,
                                              segment_bytes);
    }
    std::lock_guard<std::mutex> lock(registry_mutex);
    communicators[id] = std::move(comm);
    return std::string();
  });
}

// Lets the ranks of a communicator, all on one host, reduce through shared memory:
// `windows` are their addresses in this process, each of `bytes` zero-filled bytes. Without
// windows they do not. Returns as jaxcomm_open_mpi.
JAXCOMM_API int jaxcomm_share_memory(int64_t id, char* const* windows, int64_t bytes,
                                     int crowded, char* error, int64_t capacity) {
  return Told(error, capacity, [&] {
    Communicator* comm = FindCommunicator(id);
    comm->node = windows == nullptr
                     ? nullptr
                     : std::make_unique<Node>(
                           std::vector<char*>(windows, windows + comm->size), comm->rank,
                           bytes, crowded != 0);
    return std::string();
  });
}

// Lets the ranks of a communicator, on several hosts, reduce through the memory that ranks
// of a host share, and between hosts: `hosts` has every rank's host, numbered in the order
// of their first ranks; `windows` are as in jaxcomm_share_memory, of the `locals` ranks of
// this host. Without windows they do not. Returns as jaxcomm_open_mpi.
JAXCOMM_API int jaxcomm_join_hosts(int64_t id, const int* hosts, char* const* windows,
                                   int locals, int64_t bytes, char* error,
                                   int64_t capacity) {
  return Told(error, capacity, [&] {
    Communicator* comm = FindCommunicator(id);
    comm->tiers = windows == nullptr
                      ? nullptr
                      : std::make_unique<Tiers>(
                            mpi.get(), comm->handle, comm->rank,
                            std::vector<int>(hosts, hosts + comm->size),
                            std::vector<char*>(windows, windows + locals), bytes);
    return std::string();
  });
}

// The MPI_Op that reduces elements of `dtype`, for calls that are not ours.
JAXCOMM_API uint64_t jaxcomm_op_handle(int dtype, int op) {
  return mpi->OpHandle(static_cast<DType>(dtype), static_cast<Op>(op));
}

JAXCOMM_API const char* jaxcomm_kernels() { return ChosenKernels().name; }

JAXCOMM_API void jaxcomm_lock_mpi() { LockMpi(); }
JAXCOMM_API void jaxcomm_unlock_mpi() { UnlockMpi(); }

// The mean of one float32 leaf as a bucket's call computes it, for measuring without XLA.
// Returns as jaxcomm_open_mpi.
JAXCOMM_API int jaxcomm_all_reduce_float(int64_t id, void* data, int64_t count,
                                         int64_t pack_bytes, char* error,
                                         int64_t capacity) {
  return Told(error, capacity, [&] {
    Communicator* comm = FindCommunicator(id);
    std::lock_guard<std::mutex> lock(comm->mutex);
    const Reduction sum{kF32, kSum, comm->size, kF32, pack_bytes};
    const int code = AllReduce(comm, sum, {{static_cast<char*>(data), count}});
    return code == 0 ? "" : comm->mpi->ErrorText(code);
  });
}

// For tests: leaves above `bytes`, not above 1 GiB, are moved and broadcast in pieces.
// All ranks say the same, between calls.
JAXCOMM_API void jaxcomm_limit_pieces(int64_t id, int64_t bytes) {
  if (Communicator* comm = FindCommunicator(id); comm != nullptr) comm->piece_bytes = bytes;
}

JAXCOMM_API void jaxcomm_set_agree(AgreeFn agree, DifferFn differ) {
  agree_callback = agree;
  differ_callback = differ;
}

// Lets every later call on a communicator fail.
JAXCOMM_API void jaxcomm_refuse(int64_t id, const char* why) {
  Communicator* comm = FindCommunicator(id);
  if (comm != nullptr) comm->agreement.Refuse(why);
}

// Whether every call is compared across ranks before it is made, or every schedule once.
JAXCOMM_API void jaxcomm_check_every_call(int every) { check_every_call = every != 0; }

JAXCOMM_API void jaxcomm_set_partition(PartitionFn callback) {
  partition_callback = callback;
}

JAXCOMM_API void jaxcomm_timeline_start() { Timeline::Get().Start(); }

// Moves recorded events to `out`, which has room for `capacity`; returns how many.
JAXCOMM_API int64_t jaxcomm_timeline_take(Event* out, int64_t capacity) {
  return Timeline::Get().Take(out, capacity);
}

// Writes how many calls of a communicator have begun, their time, and its counters, to
// out[kFirstCounter + kCounters]. Returns 0 if it exists.
JAXCOMM_API int jaxcomm_counters(int64_t id, int64_t* out) {
  const auto find = [id] { return FindCommunicator(id); };
  const auto none = [](const char*) -> Communicator* { return nullptr; };
  Communicator* comm = Guarded(find, none);
  if (comm == nullptr) return 1;
  out[kCallsColumn] = comm->progress.calls();
  out[kNanosecondsColumn] = comm->progress.inside();
  for (int i = 0; i < kCounters; ++i) out[kFirstCounter + i] = comm->counters[i];
  return 0;
}

}  // namespace jaxcomm
