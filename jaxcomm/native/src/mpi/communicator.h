// One communicator as the handlers see it: an MPI communicator, a staging buffer
// for small leaves, counters, and the schedules its ranks have agreed on.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "callbacks.h"
#include "exchange.h"
#include "mpi_binding.h"
#include "progress.h"
#include "worker.h"

namespace jaxcomm {

// Counters that Python reads: X(enumerator, Python's name).
// clang-format off
#define JAXCOMM_COUNTERS(X)                                                                \
  X(kMpiAllReduce, "mpi_all_reduce")    X(kMpiBroadcast, "mpi_broadcast")                  \
  X(kBytes, "bytes")                    X(kAgreements, "agreements")                       \
  X(kSegments, "segments")              X(kMoved, "moved")                                 \
  X(kMessages, "messages")              X(kSent, "sent")
// clang-format on
enum Counter : int { JAXCOMM_COUNTERS(JAXCOMM_ENUMERATOR) kCounters };
// In what jaxcomm_counters writes, before them: calls, and the time in calls.
enum CounterColumn : int { kCallsColumn, kNanosecondsColumn, kFirstCounter };

class Node;
class Tiers;

class Communicator {
 public:
  Communicator(int64_t id, Mpi* mpi, uint64_t handle, int rank, int size,
               int64_t staging_bytes, int64_t segment_bytes);
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  // Mapped on first use and kept: fresh pages would fault on every call, and from
  // malloc the buffer would come to lie between leaves of a running step and divide
  // the heap, so that later steps need a larger one. Throws where there is no memory.
  char* Staging() {
    if (staging_ == nullptr) {
      void* pages = mmap(nullptr, static_cast<size_t>(staging_bytes),
                         PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (pages == MAP_FAILED) {
        throw std::runtime_error(
            "jaxcomm: no memory for the staging buffer of " + std::to_string(staging_bytes) +
            " bytes. Let it be smaller, by init(staging_bytes=...) or JAXCOMM_STAGING_BYTES, "
            "or give the ranks more memory (`ulimit -v`)");
      }
      staging_ = static_cast<char*>(pages);
    }
    return staging_;
  }

  const int64_t id;             // Python's key
  Mpi* const mpi;               // the process's; lives as long as it
  const uint64_t handle;        // the MPI_Comm
  const int rank;               // within it
  const int size;               // likewise
  const int64_t staging_bytes;  // a multiple of 16, the largest element
  const int64_t segment_bytes;  // likewise; of a message, where leaves are cut into some
  // What MPI moves or broadcasts at once: it counts bytes in a C int. Tests make it small,
  // between calls.
  int64_t piece_bytes = int64_t{1} << 30;
  // Written by the call that holds `mutex`; the watchdog's thread reads it.
  Progress& progress;
  // Set when it is created, where calls must not hold a thread of XLA's that others have a
  // use for while they wait: one thread makes the calls, and another tells XLA that they are
  // done, because what comes next in the program then runs on that thread.
  std::unique_ptr<Worker> answers;
  std::unique_ptr<Worker> calls;
  // Set when it is created, where large leaves wait for a network. Used under `mutex`.
  std::unique_ptr<Exchange> ring;
  // Likewise, where the ranks are on several hosts and some share one: set by Python before
  // the first call. All-reduces then go this way alone.
  std::unique_ptr<Tiers> tiers;
  // Set by Python before the first call, where all ranks are on one host. Used under
  // `mutex`, but for AllHere().
  std::unique_ptr<Node> node;
  // Asked under `mutex`; refused by any thread.
  Agreement agreement;
  // Held for the whole of a call: one collective at a time.
  std::mutex mutex;
  // How the ranks have lost each other, for the call that finds out; later ones are
  // refused by `agreement`. Guarded by `mutex`.
  std::string broken;
  // By Counter. Added to by the call that holds `mutex`; Python reads them without it.
  std::atomic<int64_t> counters[kCounters] = {};

 private:
  // Of `staging_bytes`, null before its first use. Used under `mutex`.
  char* staging_ = nullptr;
};

}  // namespace jaxcomm
