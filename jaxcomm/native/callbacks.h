// What Python is asked while a program runs.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <unordered_set>

namespace jaxcomm {

// Asks Python to compare schedule `digest` across the ranks of communicator `id`.
// Returns 0 when all agree; otherwise writes a NUL-terminated text to `error`.
using AgreeFn = int (*)(int64_t id, int64_t digest, char* error, int64_t capacity);

// Asks Python to create communicator `partition`: for this rank, the group among
// `groups` (each its size, then its ranks within communicator `id`) that it is in.
// Returns as AgreeFn.
using PartitionFn = int (*)(int64_t id, int64_t partition, const int64_t* groups,
                            int64_t length, char* error, int64_t capacity);

inline AgreeFn agree_callback = nullptr;
inline PartitionFn partition_callback = nullptr;

// The schedules that the ranks of a communicator have agreed on.
class Agreement {
 public:
  // Empty when the ranks agree on `digest`; asks at most once per digest, and counts.
  std::string Ask(int64_t id, int64_t digest, std::atomic<int64_t>* asked) {
    if (digest == 0 || agreed_.count(digest)) return {};
    char text[8192] = {};
    ++*asked;
    if (agree_callback == nullptr || agree_callback(id, digest, text, sizeof text) != 0) {
      return text[0] ? text : "the cross-rank schedule check failed";
    }
    agreed_.insert(digest);
    return {};
  }

 private:
  std::unordered_set<int64_t> agreed_;
};

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
