#include "gpu.h"

#include <dlfcn.h>

#include <algorithm>

#include "clock.h"

namespace jaxcomm {

std::unique_ptr<Gpu> Gpu::Open(const char* path, int ordinal, std::string* error) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* why = dlerror();
    *error = std::string("the CUDA driver's library cannot be loaded: ") + (why ? why : path);
    return nullptr;
  }
  auto driver = std::make_shared<CudaFunctions>();
#define JAXCOMM_CUDA_LOAD(name, symbol, parameters)                                    \
  driver->name = reinterpret_cast<decltype(driver->name)>(dlsym(library, #symbol));     \
  if (driver->name == nullptr) {                                                       \
    *error = std::string(path) + " has no " #symbol "; the driver is too old for CUDA 12"; \
    return nullptr;                                                                    \
  }
  JAXCOMM_CUDA_FUNCTIONS(JAXCOMM_CUDA_LOAD)
#undef JAXCOMM_CUDA_LOAD
  auto gpu = std::make_unique<Gpu>();
  int device = 0, code = driver->Init(0);
  if (code == kCudaSuccess) code = driver->DeviceGet(&device, ordinal);
  // XLA's own context: there is one primary context of a device in a process.
  if (code == kCudaSuccess) code = driver->Retain(&gpu->context_, device);
  if (code != kCudaSuccess) {
    *error = "the CUDA driver does not give GPU " + std::to_string(ordinal) +
             ": error " + std::to_string(code);
    return nullptr;
  }
  gpu->driver_ = std::move(driver);
  return gpu;
}

Gpu::Current::Current(const Gpu* gpu)
    : gpu_(gpu), pushed_(gpu->driver_->Push(gpu->context_) == kCudaSuccess) {}

Gpu::Current::~Current() {
  void* popped = nullptr;
  if (pushed_) gpu_->driver_->Pop(&popped);
}

bool Gpu::Zero(void* to, int64_t bytes, CudaStream stream) const {
  const auto at = reinterpret_cast<uintptr_t>(to);
  return driver_->Zero(at, 0, static_cast<size_t>(bytes), stream) == kCudaSuccess;
}

bool Gpu::Set(void* to, uint32_t word, CudaStream stream) const {
  return driver_->Set(reinterpret_cast<uintptr_t>(to), word, 1, stream) == kCudaSuccess;
}

bool Gpu::Records(CudaStream stream) const {
  int status = 0;
  return driver_->IsCapturing(stream, &status) == kCudaSuccess && status != 0;
}

void Gpu::AllowWhileRecording() const {
  int mode = kCudaCaptureRelaxed;
  driver_->ExchangeMode(&mode);
}

CudaEvent Gpu::NewEvent() const {
  CudaEvent event = nullptr;
  return driver_->EventCreate(&event, kCudaEventNoTiming) == kCudaSuccess ? event : nullptr;
}

bool Gpu::Mark(CudaEvent event, CudaStream stream) const {
  return event != nullptr && driver_->EventRecord(event, stream) == kCudaSuccess;
}

Gpu::State Gpu::Ask(CudaEvent event) const {
  const int code = driver_->EventQuery(event);
  return code == kCudaSuccess ? kPassed : code == kCudaNotReady ? kAhead : kUnknown;
}

void Running::Begin(int64_t bucket, CudaStream stream) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    next_ = {};
    if (!spare_.empty()) {
      next_ = spare_.back();
      spare_.pop_back();
    }
  }
  if (next_.begin == nullptr) next_.begin = gpu_->NewEvent();
  if (next_.end == nullptr) next_.end = gpu_->NewEvent();
  next_.bucket = gpu_->Mark(next_.begin, stream) ? bucket : -1;
}

void Running::End(bool put, CudaStream stream) {
  put = put && next_.bucket >= 0 && gpu_->Mark(next_.end, stream);
  std::lock_guard<std::mutex> lock(mutex_);
  if (put) {
    put_.push_back(next_);
  } else {
    spare_.push_back(next_);
  }
}

int64_t Running::Late(double seconds) {
  const int64_t now = Now();
  const double passed = std::min(Seconds(now - looked_), 1.0);
  looked_ = now;
  while (true) {
    Kernel first;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (put_.empty()) return -1;
      first = put_.front();  // this thread alone takes it away
    }
    // What cannot be asked for has failed, which XLA reports.
    if (gpu_->Ask(first.end) == Gpu::kAhead) {
      if (gpu_->Ask(first.begin) != Gpu::kAhead) has_run_ += passed;
      return has_run_ > seconds ? first.bucket : -1;
    }
    has_run_ = 0;
    std::lock_guard<std::mutex> lock(mutex_);
    spare_.push_back(first);
    put_.pop_front();
  }
}

bool Running::any() {
  std::lock_guard<std::mutex> lock(mutex_);
  return !put_.empty();
}

}  // namespace jaxcomm
