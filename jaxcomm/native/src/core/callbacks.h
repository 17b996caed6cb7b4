// What Python is asked while a program runs.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <unordered_set>

namespace jaxcomm {

// Asks Python to compare schedule `digest` across the ranks of communicator `id`, and
// where every call is checked, which of its buckets and which of its calls this is, counted;
// `bucket` is -1 otherwise. Returns 0 when all agree; else writes a NUL-terminated text to
// `error`.
using AgreeFn = int (*)(int64_t id, int64_t digest, int64_t bucket, int64_t number,
                        char* error, int64_t capacity);

// A call's place in the program: the bucket of its schedule in the lower bits, and above
// them which of the communicator's calls in the program it is, because a program may have
// several calls of one schedule. Wherever ranks compare a "bucket", it is this.
inline constexpr int kPlaceBits = 32;
inline int64_t BucketOf(int64_t place) {
  return place < 0 ? place : place & ((int64_t{1} << kPlaceBits) - 1);
}

// Where a rank is: a place in a program that has a schedule.
struct Where {
  int64_t schedule = 0;
  int64_t bucket = 0;

  bool operator!=(const Where& other) const {
    return schedule != other.schedule || bucket != other.bucket;
  }
};

// Asks Python for the text of an error: rank `rank` came to the same call of communicator
// `id` from another place of the program than this one.
using DifferFn = void (*)(int64_t id, const Where* own, int64_t rank, const Where* other,
                          char* error, int64_t capacity);

// Asks Python to create communicator `partition`: for this rank, the group among
// `groups` (each its size, then its ranks within communicator `id`) that it is in.
// Returns as AgreeFn.
using PartitionFn = int (*)(int64_t id, int64_t partition, const int64_t* groups,
                            int64_t length, char* error, int64_t capacity);

// Set by Python in init(), before the first call is made; read by the threads that make
// calls.
inline AgreeFn agree_callback = nullptr;
inline bool check_every_call = false;
inline DifferFn differ_callback = nullptr;
inline PartitionFn partition_callback = nullptr;

// The schedules that the ranks of a communicator have agreed on.
class Agreement {
 public:
  // Empty when the ranks agree on `digest`; asks at most once per digest, unless every
  // call is checked, and counts.
  std::string Ask(int64_t id, int64_t digest, int64_t bucket, int64_t number,
                  std::atomic<int64_t>* asked) {
    if (refused_) {
      std::lock_guard<std::mutex> lock(mutex_);
      return why_;
    }
    if (digest == 0 || (agreed_.count(digest) && !check_every_call)) return {};
    char text[8192] = {};
    ++*asked;
    if (!check_every_call) bucket = number = -1;
    if (agree_callback == nullptr ||
        agree_callback(id, digest, bucket, number, text, sizeof text) != 0) {
      return text[0] ? text : "the cross-rank schedule check failed";
    }
    agreed_.insert(digest);
    return {};
  }

  // Lets every later call fail, whatever was agreed on; from any thread.
  void Refuse(const std::string& why) {
    std::lock_guard<std::mutex> lock(mutex_);
    why_ = why;
    refused_ = true;
  }

 private:
  // Digests of which it is known that all ranks have them. Used by the calls only, one at
  // a time, which the communicator's mutex sees to.
  std::unordered_set<int64_t> agreed_;
  // Set by Refuse, after `why_`, for good; lets Ask do without `mutex_` until then.
  std::atomic<bool> refused_{false};
  // Guards `why_`. Refuse cannot take the communicator's: a call holds that, and may last.
  std::mutex mutex_;
  // What every later call fails with.
  std::string why_;
};

// Says how the ranks' calls differ.
inline std::string AskHowTheyDiffer(int64_t id, const Where& own, int64_t rank,
                                    const Where& other) {
  char text[8192] = {};
  if (differ_callback != nullptr) {
    differ_callback(id, &own, rank, &other, text, sizeof text);
  }
  return text[0] ? text : "jaxcomm: the ranks are in different calls";
}

// Returns "", or why the partition could not be created.
inline std::string AskForPartition(int64_t id, int64_t partition, const int64_t* groups,
                                   int64_t length) {
  char text[8192] = {};
  if (partition_callback == nullptr ||
      partition_callback(id, partition, groups, length, text, sizeof text) != 0) {
    return text[0] ? text : "jaxcomm: a subgroup could not be created";
  }
  return {};
}

}  // namespace jaxcomm
