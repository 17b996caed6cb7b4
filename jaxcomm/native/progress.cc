#include "progress.h"

#include <map>
#include <memory>
#include <mutex>

#include "api.h"

namespace jaxcomm {
namespace {

std::mutex mutex;
std::map<int64_t, std::unique_ptr<Progress>> all;

}  // namespace

Progress* ProgressOf(int64_t id) {
  std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Progress>& found = all[id];
  if (found == nullptr) found = std::make_unique<Progress>();
  return found.get();
}

// Writes a row for each communicator (Progress::Write). Returns how many.
JAXCOMM_API int64_t jaxcomm_progress(int64_t* out, int64_t capacity) {
  std::lock_guard<std::mutex> lock(mutex);
  int64_t rows = 0;
  for (const auto& [id, progress] : all) {
    if (rows == capacity) break;
    progress->Write(id, out + Progress::kColumns * rows++);
  }
  return rows;
}

// Gives the hash of a communicator's calls up to `number`. Returns 1 if it is known.
JAXCOMM_API int jaxcomm_hash_at(int64_t id, int64_t number, int64_t* hash) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = all.find(id);
  return found != all.end() && found->second->HashAt(number, hash) ? 1 : 0;
}

}  // namespace jaxcomm
