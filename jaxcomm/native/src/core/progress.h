// How far this process is in the calls of a communicator, for the watchdog: written by the
// thread that makes a call, read by another. A call that has begun and not ended is what a
// rank waits in. Of the calls made, a running hash is kept: two ranks whose hashes differ
// at the same call have made different ones.
#pragma once

#include <atomic>
#include <cstdint>

#include "clock.h"

namespace jaxcomm {

class Progress {
 public:
  // Hashes are kept of the last kKept calls, of the last kKept whose number is a multiple
  // of kKept, of that squared, and so on: of some call that was made a second ago, however
  // fast calls are.
  static constexpr int kLevels = 4, kKept = 64;
  static constexpr int kColumns = 5 + 2 * kLevels;

  // Returns the call's number, from 1; the same for the same call on every rank.
  int64_t Begin(int64_t schedule, int64_t bucket) {
    const int64_t number = calls_.load(std::memory_order_relaxed) + 1;
    schedule_.store(schedule, std::memory_order_relaxed);
    bucket_.store(bucket, std::memory_order_relaxed);
    calls_.store(number, std::memory_order_release);
    entered_.store(Now(), std::memory_order_release);
    return number;
  }

  void End() {
    const int64_t entered = entered_.load(std::memory_order_relaxed);
    if (entered == 0) return;
    const int64_t lasted = Now() - entered;
    inside_.store(inside_.load(std::memory_order_relaxed) + lasted, std::memory_order_relaxed);
    entered_.store(0, std::memory_order_release);
  }

  // Nanoseconds spent in calls that have ended, with waiting for other ranks.
  int64_t inside() const { return inside_.load(std::memory_order_relaxed); }

  int64_t calls() const { return calls_.load(std::memory_order_acquire); }

  // Writes a row for Python: the communicator's id, how many calls have begun, and of the
  // last one the schedule, the bucket and when it began, 0 where it has ended; then of
  // each level the last call's number and hash, 0 for none.
  void Write(int64_t id, int64_t* row) const {
    row[4] = entered_.load(std::memory_order_acquire);
    row[0] = id;
    row[1] = calls();
    row[2] = schedule_.load(std::memory_order_relaxed);
    row[3] = bucket_.load(std::memory_order_relaxed);
    int64_t every = 1;
    for (int level = 0; level < kLevels; ++level, every *= kKept) {
      const int64_t number = row[1] / every * every;
      int64_t* mark = row + 5 + 2 * level;
      mark[0] = HashAt(number, &mark[1]) ? number : 0;
    }
  }

  // Gives the hash of all calls up to `number`, if it is still known.
  bool HashAt(int64_t number, int64_t* hash) const {
    if (number <= 0) return false;
    int64_t every = 1;
    for (int level = 0; level < kLevels; ++level, every *= kKept) {
      if (number % every != 0) return false;
      const Mark& mark = marks_[level][number / every % kKept];
      if (mark.number.load(std::memory_order_acquire) != number) continue;
      *hash = mark.hash.load(std::memory_order_acquire);
      if (mark.number.load(std::memory_order_relaxed) == number) return true;
    }
    return false;
  }

  // Adds a call to the hash; not one that was refused.
  void Remember(int64_t number, int64_t schedule, int64_t bucket) {
    constexpr uint64_t kOdd = 0x9E3779B97F4A7C15u;
    hash_ = (hash_ ^ static_cast<uint64_t>(schedule)) * kOdd;
    hash_ = (hash_ ^ (hash_ >> 29) ^ static_cast<uint64_t>(bucket)) * kOdd;
    hash_ ^= hash_ >> 32;
    int64_t every = 1;
    for (int level = 0; level < kLevels && number % every == 0; ++level, every *= kKept) {
      Mark& mark = marks_[level][number / every % kKept];
      mark.number.store(0, std::memory_order_relaxed);
      mark.hash.store(static_cast<int64_t>(hash_ >> 1), std::memory_order_release);
      mark.number.store(number, std::memory_order_release);
    }
  }

 private:
  // A remembered hash. A reader takes it if it finds the same number before and after.
  struct Mark {
    std::atomic<int64_t> number{0};  // the call's; 0 for none, and while `hash` changes
    std::atomic<int64_t> hash{0};    // of all calls up to that one
  };

  // All are written by the thread that makes the call, which holds the communicator's
  // mutex: one at a time. The watchdog's thread reads the atomic ones without it.

  // How many calls have begun; the last one's number.
  std::atomic<int64_t> calls_{0};
  // Of the last call, stored before its number is.
  std::atomic<int64_t> schedule_{0};
  std::atomic<int64_t> bucket_{0};
  // When the call under way began, in ns of the monotonic clock; 0 between calls.
  std::atomic<int64_t> entered_{0};
  // Sum of the times of calls that have ended, in ns.
  std::atomic<int64_t> inside_{0};
  // Of all calls remembered so far; not for readers.
  uint64_t hash_ = 0;
  // By level, then by the number's place among that level's last kKept.
  Mark marks_[kLevels][kKept];
};

// The progress of a communicator; made when first asked for, and kept to the end.
Progress* ProgressOf(int64_t id);

}  // namespace jaxcomm
