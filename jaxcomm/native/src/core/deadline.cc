// Ends this process if what Python waits in does not come back in time. A thread of
// Python could not: MPI_Init holds the interpreter for as long as it waits.

#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>

#include "api.h"
#include "exit.h"
#include "guard.h"
#include "stacks.h"

namespace jaxcomm {
namespace {

// Never destroyed: a thread may still wait when the process ends.
// Guards `current` and `last`.
std::mutex& mutex = *new std::mutex;
// Signalled when a deadline is lifted; the threads of deadlines wait for it.
std::condition_variable& changed = *new std::condition_variable;
int64_t current = 0;  // number of the deadline that is set; 0 for none
int64_t last = 0;     // number of the last one that was ever set
// Written by Python's main thread before the end, and read by it at the end.
struct End {
  double seconds = 0;  // from the end of the interpreter
  std::string text;    // for standard error
  int code = 0;        // the exit code
  pid_t process = 0;   // that asked for it; 0 where none did
};
End& at_end = *new End;

}  // namespace

// After so many seconds, unless it is lifted before, writes `text` to standard error and
// exits with `code`.
// Returns 1 with the text in `error` if it could not be set, else 0.
JAXCOMM_API int jaxcomm_set_deadline(double seconds, const char* text, int code, char* error,
                                     int64_t capacity) {
  return Told(error, capacity, [&] {
    std::lock_guard<std::mutex> lock(mutex);
    current = ++last;
    const auto end =
        std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    std::thread([number = current, end, code, text = std::string(text)] {
      std::unique_lock<std::mutex> lock(mutex);
      if (!changed.wait_until(lock, end, [number] { return current != number; })) {
        EndProcess(text + "Its native threads are at\n" + NativeStacks(2), code);
      }
    }).detach();
    return std::string();
  });
}

// What jaxcomm_end sets. Returns as jaxcomm_set_deadline.
JAXCOMM_API int jaxcomm_prepare_end(double seconds, const char* text, int code, char* error,
                                    int64_t capacity) {
  return Told(error, capacity, [&] {
    at_end = {seconds, text, code, getpid()};
    return std::string();
  });
}

// For Py_AtExit: sets the deadline of the process's last steps, but not of a forked one's.
JAXCOMM_API void jaxcomm_end() {
  if (at_end.process == getpid()) {
    // Without it the process ends all the same, if the others do.
    jaxcomm_set_deadline(at_end.seconds, at_end.text.c_str(), at_end.code, nullptr, 0);
  }
}

JAXCOMM_API void jaxcomm_lift_deadline() {
  std::lock_guard<std::mutex> lock(mutex);
  current = 0;
  changed.notify_all();
}

}  // namespace jaxcomm
