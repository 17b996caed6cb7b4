// When buckets became ready, began and ended; recorded only where it is asked for.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "clock.h"

namespace jaxcomm {

// Words of an event, in the order in which Python reads them.
struct Event {
  int64_t comm;
  int64_t schedule;
  int64_t bucket;
  int64_t kind;  // 0: the operands are there; 1: the collective
  int64_t start_ns;
  int64_t end_ns;
};

class Timeline {
 public:
  static Timeline& Get() {
    static Timeline timeline;
    return timeline;
  }

  void Start() { on_.store(true, std::memory_order_relaxed); }
  bool on() const { return on_.load(std::memory_order_relaxed); }

  void Add(const Event& event) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (events_.size() < kMost) events_.push_back(event);
  }

  // Moves at most `capacity` events to `out`; returns how many.
  int64_t Take(Event* out, int64_t capacity) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto n = std::min<size_t>(events_.size(), static_cast<size_t>(capacity));
    std::copy(events_.begin(), events_.begin() + static_cast<int64_t>(n), out);
    events_.erase(events_.begin(), events_.begin() + static_cast<int64_t>(n));
    return static_cast<int64_t>(n);
  }

 private:
  // 48 MB: what more there is would fill the memory of a long job.
  static constexpr size_t kMost = 1'000'000;

  // Set by Python, for good; read by every call, without the mutex.
  std::atomic<bool> on_{false};
  std::mutex mutex_;
  // What was recorded and not taken yet: added by the threads that make calls, taken by
  // Python's. Guarded by `mutex_`.
  std::vector<Event> events_;
};

// Records the time from its making to its end as one bucket's collective.
class Timed {
 public:
  Timed(int64_t comm, int64_t schedule, int64_t bucket)
      : on_(Timeline::Get().on()),
        event_{comm, schedule, bucket, 1, on_ ? Now() : 0, 0} {}
  ~Timed() {
    if (!on_) return;
    event_.end_ns = Now();
    Timeline::Get().Add(event_);
  }
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 private:
  // Whether the timeline was on when the call began.
  const bool on_;
  // Of this call; used by its thread alone until it is added.
  Event event_;
};

}  // namespace jaxcomm
