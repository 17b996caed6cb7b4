// One communicator as the handlers see it: an MPI communicator, a staging buffer
// for small leaves, counters, and the schedules its ranks have agreed on.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <unordered_set>

#include "mpi_binding.h"
#include "ring.h"
#include "worker.h"

namespace jaxcomm {

// Asks Python to compare schedule `digest` across the ranks of communicator `id`.
// Returns 0 when all agree; otherwise writes a NUL-terminated text to `error`.
using AgreeFn = int (*)(int64_t id, int64_t digest, char* error, int64_t capacity);

// Asks Python to create communicator `partition`: for this rank, the group among
// `groups` (each its size, then its ranks within communicator `id`) that it is in.
// Returns as AgreeFn.
using PartitionFn = int (*)(int64_t id, int64_t partition, const int64_t* groups,
                         int64_t length, char* error, int64_t capacity);

// Counters that Python reads; order shared with jaxcomm/native/__init__.py.
enum Counter : int {
  kCalls, kMpiAllReduce, kMpiBroadcast, kBytes, kAgreements, kSegments, kMoved,
  kCounters
};

class Node;

class Communicator {
 public:
  Communicator(int64_t id, Mpi* mpi, uint64_t handle, int rank, int size,
               int64_t staging_bytes, int64_t segment_bytes)
      : id(id), mpi(mpi), handle(handle), rank(rank), size(size),
        staging_bytes(staging_bytes), segment_bytes(segment_bytes) {}

  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  // Mapped on first use and kept: fresh pages would fault on every call, and from
  // malloc the buffer would come to lie between leaves of a running step and divide
  // the heap, so that later steps need a larger one.
  char* Staging() {
    if (staging_ == nullptr) {
      void* pages = mmap(nullptr, static_cast<size_t>(staging_bytes),
                         PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (pages == MAP_FAILED) throw std::bad_alloc();
      staging_ = static_cast<char*>(pages);
    }
    return staging_;
  }

  // Empty when the ranks agree on `digest`; asks at most once per digest.
  std::string Agree(int64_t digest, AgreeFn agree) {
    if (digest == 0 || agreed_.count(digest)) return {};
    char text[8192] = {};
    counters[kAgreements]++;
    if (agree == nullptr || agree(id, digest, text, sizeof text) != 0) {
      return text[0] ? text : "the cross-rank schedule check failed";
    }
    agreed_.insert(digest);
    return {};
  }

  const int64_t id;
  Mpi* const mpi;
  const uint64_t handle;
  const int rank;
  const int size;
  const int64_t staging_bytes;  // a multiple of 16, the largest element
  const int64_t segment_bytes;  // likewise
  // Set where collectives wait for a network: one thread makes the MPI calls, so that
  // XLA's may compute meanwhile, and another tells XLA that they are done, because what
  // comes next in the program then runs on that thread.
  std::unique_ptr<Worker> answers;
  std::unique_ptr<Worker> calls;
  std::unique_ptr<Ring> ring;   // likewise, for large leaves
  std::unique_ptr<Node> node;   // set where all ranks are on one host
  std::mutex mutex;  // held for the whole of a call: one collective at a time
  std::atomic<int64_t> counters[kCounters] = {};

 private:
  char* staging_ = nullptr;
  std::unordered_set<int64_t> agreed_;
};

}  // namespace jaxcomm
