// The fake NCCL's communicators: how ranks find each other and wait for each other.
//
// A communicator is one segment of POSIX shared memory, named after the unique id. It
// holds, for every rank, what it is about to do and two halves of a buffer to do it
// with, and for every pair of ranks a channel for Send and Recv. The first rank makes
// the segment, the last to attach unlinks it.
#pragma once

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../../jaxcomm/native/src/nccl/nccl_abi.h"

namespace jaxcomm {

inline constexpr int kMaxRanks = 32;
inline constexpr size_t kHalfBytes = 128 << 10;
inline constexpr size_t kRingBytes = 32 << 10;

// What a rank does next, for all others to compare.
struct Call {
  int kind;
  int dtype;
  int op;    // or a split's key
  int root;  // or a split's color
  uint64_t count;
  uint64_t factor;  // PreMulSum's, may differ between ranks
};

struct alignas(64) RankState {
  std::atomic<uint32_t> present;
  std::atomic<uint32_t> arrived;  // counts barriers
  std::atomic<uint32_t> bell;     // counts what happened on this rank's channels
  Call calls[2];
};

struct Segment {
  std::atomic<uint32_t> joined;
  RankState ranks[kMaxRanks];
};

struct Channel {
  alignas(64) std::atomic<uint64_t> written;
  alignas(64) std::atomic<uint64_t> read;
  alignas(64) char ring[kRingBytes];
};
static_assert(std::atomic<uint32_t>::is_always_lock_free &&
              std::atomic<uint64_t>::is_always_lock_free);

struct PreMulSum {
  int dtype;
  uint64_t factor;
  const void* device;  // read the factor from here when the collective runs
};

// Never freed, so that a stale pointer is an error and not a crash.
struct NcclComm {
  int rank = -1;
  int size = 0;
  bool blocking = true;
  bool finalized = false;
  std::string name;
  char* memory = nullptr;

  std::atomic<bool> dead{false};
  std::atomic<bool> aborted{false};
  std::atomic<int> active{0};  // threads at work
  std::atomic<bool> busy{false};
  std::atomic<int> state{kNcclSuccess};     // what CommGetAsyncError tells,
  std::atomic<int> poisoned{kNcclSuccess};  // unless this is an error

  std::map<int, PreMulSum> ops;
  uint64_t collectives = 0;
  uint64_t turns = 0;  // of the buffer's halves

  Segment& segment() const { return *reinterpret_cast<Segment*>(memory); }
  RankState& at(int p) const { return segment().ranks[p]; }
  RankState& self() const { return at(rank); }
  char* half(int p, uint64_t turn) const {
    return memory + sizeof(Segment) + (2 * static_cast<size_t>(p) + turn % 2) * kHalfBytes;
  }
  Channel& channel(int from, int to) const {
    const auto n = static_cast<size_t>(size);
    return reinterpret_cast<Channel*>(
        memory + sizeof(Segment) +
        2 * n * kHalfBytes)[static_cast<size_t>(from) * n + static_cast<size_t>(to)];
  }
  size_t bytes() const {
    const auto n = static_cast<size_t>(size);
    return sizeof(Segment) + 2 * n * kHalfBytes + n * n * sizeof(Channel);
  }
};

// Carries a result to the edge of the library.
struct Failure {
  NcclResult result;
};

// NCCL's last error is one text for the whole process, whatever the communicator.
// Texts are kept for ever, for callers hold pointers to them.
inline std::atomic<const char*> last_error{""};

inline void SetError(const std::string& text) { last_error = strdup(text.c_str()); }

[[noreturn]] inline void Fail(NcclResult result, const std::string& text) {
  SetError(text);
  throw Failure{result};
}

// The communicators that this thread works for; if one is aborted, so is the work.
inline thread_local std::vector<NcclComm*> working_for;

inline void CheckAborted() {
  for (const NcclComm* comm : working_for) {
    if (comm->aborted) Fail(kNcclInternalError, "communicator aborted during a call");
  }
}

class Working {
 public:
  explicit Working(const std::vector<NcclComm*>& comms) : before_(working_for) {
    for (NcclComm* comm : comms) {
      ++comm->active;
      working_for.push_back(comm);
    }
  }
  ~Working() {
    while (working_for.size() > before_.size()) {
      --working_for.back()->active;
      working_for.pop_back();
    }
  }
  Working(const Working&) = delete;
  Working& operator=(const Working&) = delete;

 private:
  const std::vector<NcclComm*> before_;
};

inline void Sleep(int64_t microseconds) {
  const timespec time = {0, 1000 * microseconds};
  nanosleep(&time, nullptr);
}

inline void Wake(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// Until the word is another, or some milliseconds have passed.
inline void Nap(std::atomic<uint32_t>* word, uint32_t seen) {
  CheckAborted();
  const timespec limit = {0, 5'000'000};
  syscall(SYS_futex, word, FUTEX_WAIT, seen, &limit, nullptr, 0);
}

[[noreturn]] inline void Hang() {
  for (;;) {
    CheckAborted();
    Sleep(1000);
  }
}

inline void Barrier(NcclComm* comm) {
  const uint32_t mine = ++comm->self().arrived;
  Wake(&comm->self().arrived);
  for (int p = 0; p < comm->size; ++p) {
    std::atomic<uint32_t>* word = &comm->at(p).arrived;
    for (int tries = 0;; ++tries) {
      const uint32_t seen = *word;
      if (static_cast<int32_t>(seen - mine) >= 0) break;
      if (tries < 20) {
        std::this_thread::yield();
      } else {
        Nap(word, seen);
      }
    }
  }
}

// Names that not all ranks have attached to yet; unlinked if the process ends first.
class PendingNames {
 public:
  ~PendingNames() {
    for (const std::string& name : names_) shm_unlink(name.c_str());
  }
  void Add(const std::string& name) {
    const std::lock_guard<std::mutex> lock(mutex_);
    names_.insert(name);
  }
  void Remove(const std::string& name) {
    const std::lock_guard<std::mutex> lock(mutex_);
    names_.erase(name);
  }

 private:
  std::mutex mutex_;
  std::set<std::string> names_;
};

inline PendingNames pending_names;

// Makes or finds the segment and waits for all ranks.
inline void Attach(NcclComm* comm) {
  const char* name = comm->name.c_str();
  const auto bytes = static_cast<off_t>(comm->bytes());
  int file = shm_open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (file >= 0) {
    // Until it has its size, others wait; then all of it is zero, as it has to be.
    if (ftruncate(file, bytes) != 0) Fail(kNcclSystemError, "cannot size shared memory");
  } else {
    file = shm_open(name, O_RDWR | O_CLOEXEC, 0);
    if (file < 0) Fail(kNcclSystemError, "cannot open the communicator's shared memory");
    struct stat found = {};
    while (fstat(file, &found) == 0 && found.st_size == 0) {
      CheckAborted();
      Sleep(100);
    }
    if (found.st_size != bytes) {
      close(file);
      Fail(kNcclInternalError, "ranks disagree about the number of ranks");
    }
  }
  pending_names.Add(comm->name);
  void* memory = mmap(nullptr, comm->bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (memory == MAP_FAILED) Fail(kNcclSystemError, "cannot map shared memory");
  comm->memory = static_cast<char*>(memory);
  if (comm->self().present.exchange(1) != 0) {
    Fail(kNcclInternalError, "rank " + std::to_string(comm->rank) + " attached twice");
  }
  std::atomic<uint32_t>* joined = &comm->segment().joined;
  const auto all = static_cast<uint32_t>(comm->size);
  if (++*joined == all) shm_unlink(name);
  Wake(joined);
  try {
    for (uint32_t seen; (seen = *joined) < all;) Nap(joined, seen);
  } catch (const Failure&) {
    shm_unlink(name);
    throw;
  }
  pending_names.Remove(comm->name);
}

inline void Detach(NcclComm* comm) {
  if (comm->memory) munmap(comm->memory, comm->bytes());
  comm->memory = nullptr;
}

}  // namespace jaxcomm
