// The part of NCCL's C ABI that we call, declared anew.
//
// The library is built with neither CUDA nor NCCL present and loads libnccl.so.2 when
// it runs. Everything here is in NCCL 2.18 and has not changed since: compared with the
// nccl.h of every release by tests/native/check_nccl_abi.py.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>

namespace jaxcomm {

struct NcclComm;  // opaque

using CudaStream = void*;

struct NcclUniqueId {
  char internal[128];
};

// Later releases have results from 8 on (8 counted the results before it was one), so
// ask GetErrorString for the text of any number.
enum NcclResult : int {
  kNcclSuccess = 0,
  kNcclUnhandledCudaError = 1,
  kNcclSystemError = 2,
  kNcclInternalError = 3,
  kNcclInvalidArgument = 4,
  kNcclInvalidUsage = 5,
  kNcclRemoteError = 6,
  kNcclInProgress = 7,
};

enum NcclDType : int {
  kNcclInt8 = 0,
  kNcclUint8 = 1,
  kNcclInt32 = 2,
  kNcclUint32 = 3,
  kNcclInt64 = 4,
  kNcclUint64 = 5,
  kNcclFloat16 = 6,
  kNcclFloat32 = 7,
  kNcclFloat64 = 8,
  kNcclBfloat16 = 9,
};

// Numbers above these name what RedOpCreatePreMulSum has made.
enum NcclOp : int {
  kNcclSum = 0,
  kNcclProd = 1,
  kNcclMax = 2,
  kNcclMin = 3,
  kNcclAvg = 4,
};

// Where PreMulSum finds its factor, and when it is read: in memory that the device
// sees, while the collective runs; or in host memory, before the creating call returns.
enum NcclResidence : int {
  kNcclScalarDevice = 0,
  kNcclScalarHostImmediate = 1,
};

// Leaves an option to NCCL.
inline constexpr int kNcclUndefined = INT_MIN;

// Version 2.18 of ncclConfig_t. NCCL only ever appends fields. A library copies `size`
// bytes of what it is given (no more than it knows), wants `magic`, and takes fields that
// came after `version` from its defaults; so this layout is valid for every later
// library as long as size and version both are 2.18's. They must agree: what is padding
// here became a field in 2.25 (trafficClass), which a later version number would bring
// to life.
struct NcclConfig {
  size_t size = sizeof(NcclConfig);
  unsigned magic = 0xcafebeef;
  unsigned version = 21801;
  int blocking = kNcclUndefined;
  int cga_cluster_size = kNcclUndefined;
  int min_ctas = kNcclUndefined;
  int max_ctas = kNcclUndefined;
  const char* net_name = nullptr;
  int split_share = kNcclUndefined;
  int padding = kNcclUndefined;
};
static_assert(sizeof(void*) == 8 && sizeof(NcclConfig) == 48);

// X(name, result, parameters) for every function, where nccl<name> is the symbol.
// clang-format off
#define JAXCOMM_NCCL_FUNCTIONS(X)                                                          \
  X(GetVersion, NcclResult, (int* version))                                                \
  X(GetErrorString, const char*, (NcclResult result))                                      \
  X(GetLastError, const char*, (NcclComm* comm))                                           \
  X(GetUniqueId, NcclResult, (NcclUniqueId* id))                                           \
  X(CommInitRankConfig, NcclResult,                                                        \
    (NcclComm** comm, int ranks, NcclUniqueId id, int rank, NcclConfig* config))           \
  X(CommSplit, NcclResult,                                                                 \
    (NcclComm* comm, int color, int key, NcclComm** part, NcclConfig* config))             \
  X(CommFinalize, NcclResult, (NcclComm* comm))                                            \
  X(CommDestroy, NcclResult, (NcclComm* comm))                                             \
  X(CommAbort, NcclResult, (NcclComm* comm))                                               \
  X(CommGetAsyncError, NcclResult, (NcclComm* comm, NcclResult* result))                   \
  X(CommCount, NcclResult, (NcclComm* comm, int* count))                                   \
  X(CommUserRank, NcclResult, (NcclComm* comm, int* rank))                                 \
  X(AllReduce, NcclResult,                                                                 \
    (const void* from, void* to, size_t count, NcclDType dtype, NcclOp op, NcclComm* comm, \
     CudaStream stream))                                                                   \
  X(Broadcast, NcclResult,                                                                 \
    (const void* from, void* to, size_t count, NcclDType dtype, int root, NcclComm* comm,  \
     CudaStream stream))                                                                   \
  X(AllGather, NcclResult,                                                                 \
    (const void* from, void* to, size_t count, NcclDType dtype, NcclComm* comm,            \
     CudaStream stream))                                                                   \
  X(ReduceScatter, NcclResult,                                                             \
    (const void* from, void* to, size_t count, NcclDType dtype, NcclOp op, NcclComm* comm, \
     CudaStream stream))                                                                   \
  X(Send, NcclResult,                                                                      \
    (const void* from, size_t count, NcclDType dtype, int peer, NcclComm* comm,            \
     CudaStream stream))                                                                   \
  X(Recv, NcclResult,                                                                      \
    (void* to, size_t count, NcclDType dtype, int peer, NcclComm* comm,                    \
     CudaStream stream))                                                                   \
  X(GroupStart, NcclResult, ())                                                            \
  X(GroupEnd, NcclResult, ())                                                              \
  X(RedOpCreatePreMulSum, NcclResult,                                                      \
    (NcclOp* op, void* scalar, NcclDType dtype, NcclResidence residence, NcclComm* comm))  \
  X(RedOpDestroy, NcclResult, (NcclOp op, NcclComm* comm))
// clang-format on

// What the loader fills in.
struct NcclFunctions {
#define JAXCOMM_NCCL_POINTER(name, result, parameters) result(*name) parameters = nullptr;
  JAXCOMM_NCCL_FUNCTIONS(JAXCOMM_NCCL_POINTER)
#undef JAXCOMM_NCCL_POINTER
};

}  // namespace jaxcomm
