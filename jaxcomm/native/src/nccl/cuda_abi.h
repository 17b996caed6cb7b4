// The part of the CUDA driver's C ABI that we call, declared anew.
//
// The library is built without CUDA and loads libcuda.so.1 when it runs. Compared with a
// cuda.h, where there is one, by tests/native/test_nccl_abi.py. A CUdevice is an int, a
// CUdeviceptr an integer as wide as a pointer, enumerations are ints and all other types
// pointers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jaxcomm {

using CudaStream = void*;
using CudaEvent = void*;

inline constexpr int kCudaSuccess = 0;
inline constexpr int kCudaNotReady = 600;
inline constexpr int kCudaCaptureRelaxed = 2;
inline constexpr unsigned kCudaEventNoTiming = 2;

// X(name, symbol, parameters) for every function; all return a CUresult.
// clang-format off
#define JAXCOMM_CUDA_FUNCTIONS(X)                                                        \
  X(Init, cuInit, (unsigned flags))                                                      \
  X(DeviceGet, cuDeviceGet, (int* device, int ordinal))                                  \
  X(Retain, cuDevicePrimaryCtxRetain, (void** context, int device))                      \
  X(Push, cuCtxPushCurrent_v2, (void* context))                                          \
  X(Pop, cuCtxPopCurrent_v2, (void** context))                                           \
  X(Zero, cuMemsetD8Async,                                                               \
    (uintptr_t to, unsigned char byte, size_t count, CudaStream stream))                 \
  X(Set, cuMemsetD32Async,                                                               \
    (uintptr_t to, unsigned word, size_t count, CudaStream stream))                      \
  X(IsCapturing, cuStreamIsCapturing, (CudaStream stream, int* status))                  \
  X(ExchangeMode, cuThreadExchangeStreamCaptureMode, (int* mode))                        \
  X(EventCreate, cuEventCreate, (CudaEvent* event, unsigned flags))                      \
  X(EventRecord, cuEventRecord, (CudaEvent event, CudaStream stream))                    \
  X(EventQuery, cuEventQuery, (CudaEvent event))
// clang-format on

// What the loader fills in.
struct CudaFunctions {
#define JAXCOMM_CUDA_POINTER(name, symbol, parameters) int(*name) parameters = nullptr;
  JAXCOMM_CUDA_FUNCTIONS(JAXCOMM_CUDA_POINTER)
#undef JAXCOMM_CUDA_POINTER
};

}  // namespace jaxcomm
