// The call under way on a communicator, for the watchdog: written by the thread that makes
// it, read by another. A call that has begun and not ended is what a rank waits in.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace jaxcomm {

class Progress {
 public:
  static constexpr int kColumns = 5;

  // Returns the call's number, from 1; the same for the same call on every rank.
  int64_t Begin(int64_t schedule, int64_t bucket) {
    const int64_t number = calls_.load(std::memory_order_relaxed) + 1;
    calls_.store(number, std::memory_order_relaxed);
    schedule_.store(schedule, std::memory_order_relaxed);
    bucket_.store(bucket, std::memory_order_relaxed);
    entered_.store(std::chrono::steady_clock::now().time_since_epoch().count(),
                   std::memory_order_release);
    return number;
  }

  void End() { entered_.store(0, std::memory_order_release); }

  int64_t calls() const { return calls_.load(std::memory_order_relaxed); }

  // Writes a row for Python: the communicator's id, how many calls have begun, and of the
  // last one the schedule, the bucket and when it began, 0 where it has ended.
  void Write(int64_t id, int64_t* row) const {
    row[4] = entered_.load(std::memory_order_acquire);
    row[0] = id;
    row[1] = calls_.load(std::memory_order_relaxed);
    row[2] = schedule_.load(std::memory_order_relaxed);
    row[3] = bucket_.load(std::memory_order_relaxed);
  }

 private:
  std::atomic<int64_t> calls_{0};
  std::atomic<int64_t> schedule_{0};
  std::atomic<int64_t> bucket_{0};
  std::atomic<int64_t> entered_{0};  // ns of the monotonic clock
};

}  // namespace jaxcomm
