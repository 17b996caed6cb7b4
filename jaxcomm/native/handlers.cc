// XLA FFI handlers for platform "cpu", and the C functions Python sets them up with.
//
// Every handler takes the leaves of one bucket and, last, a token; it returns the
// same, each result aliased to its operand. The token's value is never read: it is
// there so that one call's operand is the previous call's result, which fixes the
// order of all calls on every rank (XLA:CPU runs independent calls concurrently).

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "communicator.h"
#include "mpi.h"
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
    case ffi::S8: *out = kI8; return true;
    case ffi::S16: *out = kI16; return true;
    case ffi::S32: *out = kI32; return true;
    case ffi::S64: *out = kI64; return true;
    case ffi::U8: *out = kU8; return true;
    case ffi::U16: *out = kU16; return true;
    case ffi::U32: *out = kU32; return true;
    case ffi::U64: *out = kU64; return true;
    default: return false;
  }
}

// Divides by n in place, as the last touch while the segment is still in cache.
// Multiplying by 1/n is exact when n is a power of two and many times faster than
// dividing; otherwise divide, so that the result is always sum / n correctly
// rounded. Integers round toward zero.
template <typename T>
void Divide(T* data, int64_t n, int divisor) {
  if constexpr (std::is_floating_point_v<T>) {
    if ((divisor & (divisor - 1)) == 0) {
      const T factor = T(1) / static_cast<T>(divisor);
      for (int64_t i = 0; i < n; ++i) data[i] *= factor;
      return;
    }
  }
  const T d = static_cast<T>(divisor);
  for (int64_t i = 0; i < n; ++i) data[i] /= d;
}

void Divide(void* data, int64_t n, DType dtype, int divisor) {
  switch (dtype) {
    case kF32: return Divide(static_cast<float*>(data), n, divisor);
    case kF64: return Divide(static_cast<double*>(data), n, divisor);
    case kI8: return Divide(static_cast<int8_t*>(data), n, divisor);
    case kI16: return Divide(static_cast<int16_t*>(data), n, divisor);
    case kI32: return Divide(static_cast<int32_t*>(data), n, divisor);
    case kI64: return Divide(static_cast<int64_t*>(data), n, divisor);
    case kU8: return Divide(static_cast<uint8_t*>(data), n, divisor);
    case kU16: return Divide(static_cast<uint16_t*>(data), n, divisor);
    case kU32: return Divide(static_cast<uint32_t*>(data), n, divisor);
    case kU64: return Divide(static_cast<uint64_t*>(data), n, divisor);
    case kDTypes: return;
  }
}

// The all-reduce of one bucket: dtype, op and divisor are the same for all leaves.
class Reduction {
 public:
  Reduction(Communicator* comm, DType dtype, Op op, int divisor)
      : comm_(comm), dtype_(dtype), op_(op), divisor_(divisor),
        item_(static_cast<int64_t>(kItemSize[dtype])) {}

  // Reduces n elements where they lie, a cache-sized segment at a time, so that
  // MPI's passes and ours meet in cache. Returns an MPI error code.
  int InPlace(char* data, int64_t n) {
    const int64_t step = std::max<int64_t>(1, comm_->segment_bytes / item_);
    for (int64_t start = 0; start < n; start += step) {
      const int64_t count = std::min(step, n - start);
      char* segment = data + start * item_;
      comm_->counters[kMpiAllReduce]++;
      comm_->counters[kBytes] += count * item_;
      const int code = comm_->mpi->AllReduce(segment, static_cast<int>(count), dtype_,
                                             op_, comm_->handle);
      if (code != 0) return code;
      if (divisor_ > 1) Divide(segment, count, dtype_, divisor_);
    }
    return 0;
  }

 private:
  Communicator* comm_;
  DType dtype_;
  Op op_;
  int divisor_;
  int64_t item_;
};

// A run of small leaves that share the staging buffer, reduced when it is full.
class Pack {
 public:
  Pack(Communicator* comm, Reduction* reduction, int64_t item)
      : comm_(comm), reduction_(reduction), item_(item) {}

  int Add(char* leaf, int64_t bytes) {
    if (used_ + bytes > comm_->staging_bytes) {
      if (const int code = Flush(); code != 0) return code;
    }
    if (bytes > comm_->staging_bytes) return reduction_->InPlace(leaf, bytes / item_);
    std::memcpy(comm_->Staging() + used_, leaf, static_cast<size_t>(bytes));
    parts_.push_back({leaf, bytes});
    used_ += bytes;
    return 0;
  }

  int Flush() {
    if (used_ == 0) return 0;
    if (const int code = reduction_->InPlace(comm_->Staging(), used_ / item_); code != 0) {
      return code;
    }
    const char* from = comm_->Staging();
    for (const Part& part : parts_) {
      std::memcpy(part.leaf, from, static_cast<size_t>(part.bytes));
      from += part.bytes;
    }
    parts_.clear();
    used_ = 0;
    return 0;
  }

 private:
  struct Part {
    char* leaf;
    int64_t bytes;
  };
  Communicator* comm_;
  Reduction* reduction_;
  int64_t item_;
  int64_t used_ = 0;
  std::vector<Part> parts_;
};

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
struct Leaf {
  char* data;
  int64_t count;
  int64_t bytes;
  ffi::DataType type;
};

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
    Leaf leaf{static_cast<char*>((*ret)->untyped_data()),
              static_cast<int64_t>(arg->element_count()),
              static_cast<int64_t>(arg->size_bytes()), arg->element_type()};
    if (leaf.data != arg->untyped_data() && leaf.bytes > 0) {
      std::memcpy(leaf.data, arg->untyped_data(), static_cast<size_t>(leaf.bytes));
    }
    leaves.push_back(leaf);
  }
  return leaves;
}

ffi::Error AllReduce(ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t comm_id,
                     int64_t schedule, int64_t bucket, int64_t op, int64_t divisor,
                     int64_t pack_bytes) {
  Communicator* comm = FindCommunicator(comm_id);
  if (comm == nullptr) return NoCommunicator();
  auto leaves = Leaves(args, rets);
  if (leaves.has_error()) return leaves.error();
  if (leaves->empty()) return ffi::Error::Success();
  DType dtype;
  if (!ToDType((*leaves)[0].type, &dtype)) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented, "jaxcomm: dtype not supported by mpi");
  }

  std::lock_guard<std::mutex> lock(comm->mutex);
  comm->counters[kCalls]++;
  if (std::string error = comm->Agree(schedule, agree_callback); !error.empty()) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition, error);
  }
  Reduction reduction(comm, dtype, static_cast<Op>(op), static_cast<int>(divisor));
  Pack pack(comm, &reduction, static_cast<int64_t>(kItemSize[dtype]));
  int code = 0;
  for (const Leaf& leaf : *leaves) {
    if (leaf.bytes == 0) continue;
    code = leaf.bytes <= pack_bytes ? pack.Add(leaf.data, leaf.bytes)
                                    : reduction.InPlace(leaf.data, leaf.count);
    if (code != 0) break;
  }
  if (code == 0) code = pack.Flush();
  return code == 0 ? ffi::Error::Success()
                   : MpiFailure(*comm, code, bucket, "MPI_Allreduce");
}

ffi::Error Broadcast(ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t comm_id,
                     int64_t schedule, int64_t bucket, int64_t root) {
  Communicator* comm = FindCommunicator(comm_id);
  if (comm == nullptr) return NoCommunicator();
  auto leaves = Leaves(args, rets);
  if (leaves.has_error()) return leaves.error();

  std::lock_guard<std::mutex> lock(comm->mutex);
  comm->counters[kCalls]++;
  if (std::string error = comm->Agree(schedule, agree_callback); !error.empty()) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition, error);
  }
  constexpr int64_t kStep = int64_t{1} << 30;  // below INT_MAX, the count's type
  for (const Leaf& leaf : *leaves) {
    for (int64_t start = 0; start < leaf.bytes; start += kStep) {
      const int64_t count = std::min(kStep, leaf.bytes - start);
      comm->counters[kMpiBroadcast]++;
      comm->counters[kBytes] += count;
      const int code = comm->mpi->Broadcast(leaf.data + start, static_cast<int>(count),
                                            static_cast<int>(root), comm->handle);
      if (code != 0) return MpiFailure(*comm, code, bucket, "MPI_Bcast");
    }
  }
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
JAXCOMM_API XLA_FFI_Error* jaxcomm_gate(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcomm_mpi_all_reduce, AllReduce,
                              ffi::Ffi::Bind()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("comm")
                                  .Attr<int64_t>("schedule")
                                  .Attr<int64_t>("bucket")
                                  .Attr<int64_t>("op")
                                  .Attr<int64_t>("divisor")
                                  .Attr<int64_t>("pack_bytes"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcomm_mpi_broadcast, Broadcast,
                              ffi::Ffi::Bind()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("comm")
                                  .Attr<int64_t>("schedule")
                                  .Attr<int64_t>("bucket")
                                  .Attr<int64_t>("root"));

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

JAXCOMM_API void jaxcomm_set_agree(AgreeFn callback) { agree_callback = callback; }

// Copies the counters of a communicator to out[kCounters]. Returns 0 if it exists.
JAXCOMM_API int jaxcomm_counters(int64_t id, int64_t* out) {
  Communicator* comm = FindCommunicator(id);
  if (comm == nullptr) return 1;
  for (int i = 0; i < kCounters; ++i) out[i] = comm->counters[i];
  return 0;
}

}  // namespace jaxcomm
