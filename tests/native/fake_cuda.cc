// The few functions of CUDA's driver that jaxcomm calls, over host memory: part of the
// library that fake_nccl.cc makes, for tests on machines without a GPU. The environment:
//
//   FAKE_CUDA_STOPS     "the stream" runs so many event records and no more, as where a
//                       kernel waits for a rank that does not come
//   FAKE_CUDA_RECORDS=1 every stream records into a graph
//
// A device's UUID is made of what CUDA_VISIBLE_DEVICES says of it; where that is not set,
// every process has a device of its own.
#include "fake_cuda.h"

#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#define FAKE_CUDA extern "C" __attribute__((visibility("default"))) int

namespace jaxcomm {
namespace {

constexpr int kSuccess = 0, kInvalidValue = 1, kInvalidDevice = 101, kInvalidContext = 201,
              kNotReady = 600;

struct Event {
  int64_t number = 0;
};
std::atomic<int64_t> recorded{0};
constexpr int kDevices = 8;
int primary[kDevices];  // their addresses are the devices' contexts
thread_local std::vector<int> current;

bool HasContext() { return !current.empty(); }

}  // namespace

int CurrentDevice() { return current.empty() ? -1 : current.back(); }

bool RecordsGraphs() {
  const char* says = std::getenv("FAKE_CUDA_RECORDS");
  return says != nullptr && std::strcmp(says, "1") == 0;
}

FAKE_CUDA cuInit(unsigned flags) { return flags == 0 ? kSuccess : kInvalidValue; }

FAKE_CUDA cuDeviceGet(int* device, int ordinal) {
  if (ordinal < 0 || ordinal >= kDevices) return kInvalidDevice;
  *device = ordinal;
  return kSuccess;
}

FAKE_CUDA cuDeviceGetUuid_v2(char* uuid, int device) {
  const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
  std::string name;
  if (visible != nullptr && visible[0] != '\0') {
    std::istringstream list(visible);
    for (int k = 0; k <= device; ++k) {
      if (!std::getline(list, name, ',')) return kInvalidDevice;
    }
  } else {
    name = "process " + std::to_string(getpid()) + ", " + std::to_string(device);
  }
  std::memset(uuid, 0, 16);
  std::memcpy(uuid, name.data(), name.size() < 16 ? name.size() : 16);
  return kSuccess;
}

FAKE_CUDA cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &primary[device];
  return kSuccess;
}

FAKE_CUDA cuCtxPushCurrent_v2(void* context) {
  for (int device = 0; device < kDevices; ++device) {
    if (context != &primary[device]) continue;
    current.push_back(device);
    return kSuccess;
  }
  return kInvalidContext;
}

FAKE_CUDA cuCtxPopCurrent_v2(void** context) {
  if (!HasContext()) return kInvalidContext;
  *context = &primary[current.back()];
  current.pop_back();
  return kSuccess;
}

FAKE_CUDA cuMemsetD8Async(uintptr_t to, unsigned char byte, size_t count, void*) {
  // As CUDA does: an empty array may have no address.
  if (to == 0) return kInvalidValue;
  if (!HasContext()) return kInvalidContext;
  std::memset(reinterpret_cast<void*>(to), byte, count);
  return kSuccess;
}

FAKE_CUDA cuMemsetD32Async(uintptr_t to, unsigned word, size_t count, void*) {
  if (to == 0) return kInvalidValue;
  if (!HasContext()) return kInvalidContext;
  for (size_t k = 0; k < count; ++k) {
    std::memcpy(reinterpret_cast<char*>(to) + 4 * k, &word, sizeof word);
  }
  return kSuccess;
}

FAKE_CUDA cuStreamIsCapturing(void*, int* status) {
  *status = RecordsGraphs() ? 1 : 0;
  return kSuccess;
}

FAKE_CUDA cuThreadExchangeStreamCaptureMode(int* mode) {
  return *mode >= 0 && *mode <= 2 ? kSuccess : kInvalidValue;
}

FAKE_CUDA cuEventCreate(void** event, unsigned) {
  if (!HasContext()) return kInvalidContext;
  *event = new Event;
  return kSuccess;
}

FAKE_CUDA cuEventRecord(void* event, void*) {
  if (!HasContext()) return kInvalidContext;
  // CUDA would record it into the graph, and then it could not be asked for.
  if (RecordsGraphs()) return kInvalidValue;
  static_cast<Event*>(event)->number = ++recorded;
  return kSuccess;
}

FAKE_CUDA cuEventQuery(void* event) {
  if (!HasContext()) return kInvalidContext;
  const char* stops = std::getenv("FAKE_CUDA_STOPS");
  const int64_t runs = stops ? std::atoll(stops) : INT64_MAX;
  return static_cast<Event*>(event)->number <= runs ? kSuccess : kNotReady;
}

}  // namespace jaxcomm
