#include "progress.h"

#include <map>
#include <memory>
#include <mutex>

#include "api.h"
#include "guard.h"

namespace jaxcomm {
namespace {

// Guards `all`, not what is in it.
std::mutex mutex;
// By the communicators' ids; added to by ProgressOf alone, and nothing is ever removed.
std::map<int64_t, std::unique_ptr<Progress>> all;

}  // namespace

Progress* ProgressOf(int64_t id) {
  std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Progress>& found = all[id];
  if (found == nullptr) found = std::make_unique<Progress>();
  return found.get();
}

// Writes a row for each communicator (Progress::Write), at most `capacity` of them.
// Returns how many communicators there are.
JAXCOMM_API int64_t jaxcomm_progress(int64_t* out, int64_t capacity) {
  const auto write = [&] {
    std::lock_guard<std::mutex> lock(mutex);
    int64_t rows = 0;
    for (const auto& [id, progress] : all) {
      if (rows < capacity) progress->Write(id, out + Progress::kColumns * rows);
      ++rows;
    }
    return rows;
  };
  return Guarded(write, [](const char*) { return int64_t{0}; });
}

// Gives the hash of a communicator's calls up to `number`. Returns 1 if it is known.
JAXCOMM_API int jaxcomm_hash_at(int64_t id, int64_t number, int64_t* hash) {
  const auto look = [&] {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = all.find(id);
    return found != all.end() && found->second->HashAt(number, hash) ? 1 : 0;
  };
  return Guarded(look, [](const char*) { return 0; });
}

}  // namespace jaxcomm
