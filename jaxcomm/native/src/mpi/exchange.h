// All-reduce between hosts by point-to-point messages, many on their way at once.
//
// MPI's own nonblocking all-reduce moves one way at a time between two ranks in some
// libraries, and waits out a latency for every message in all (docs/performance.md).
// Here a segment goes around a ring of ranks, a block of it per rank: size - 1 steps add
// blocks up, as many hand the sums around, and every step sends and receives at once.
// Two ranks need one step: each sends all it has. Segments are independent, so that
// some travel while others are added or wait.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "callbacks.h"
#include "mpi_binding.h"

namespace jaxcomm {

struct Leaf {
  char* data;
  int64_t count;
};

class Exchange {
 public:
  // A message has at most `message_bytes`, a multiple of 16.
  Exchange(Mpi* mpi, uint64_t comm, int rank, int size, int64_t message_bytes)
      : mpi_(mpi), comm_(comm), rank_(rank), size_(size), message_bytes_(message_bytes) {}

  // Whether a leaf of so many bytes is worth so many messages.
  bool Worth(int64_t bytes) const { return bytes >= size_ * kLeastBlock; }

  // Elements of a segment.
  int64_t SegmentCount(int64_t item) const {
    return message_bytes_ / item * (size_ == 2 ? 1 : size_);
  }

  // Reduces segments, none longer than SegmentCount, where they lie; `settled(segment)`
  // is called when one has its sum. Returns an MPI error code.
  template <typename Settled>
  int AllReduce(const std::vector<Leaf>& segments, DType dtype, Op op, const Where& where,
                Settled settled) {
    Begin(dtype, op, where);
    Patience patience;
    size_t next = 0, done = 0;
    while (done < segments.size()) {
      bool moved = false;
      for (Flight& flight : flights_) {
        if (flight.segment.data == nullptr) {
          if (next == segments.size()) continue;
          if (const int code = Start(&flight, segments[next], next); code != 0) return code;
          ++next;
          moved = true;
        }
        bool over = false;
        if (const int code = Advance(&flight, &moved, &over); code != 0) return code;
        if (over) {
          settled(flight.segment);
          flight.segment.data = nullptr;
          ++done;
        }
      }
      moved ? patience.Renew() : patience.Wait();
    }
    return 0;
  }

 private:
  static constexpr int64_t kLeastBlock = 16 << 10;
  static constexpr int kFlights = 8;

  // A segment on its way.
  struct Flight {
    Leaf segment{nullptr, 0};          // without data where nothing is on its way
    std::unique_ptr<char[]> received;  // of message_bytes_; made at the first use, and kept
    int step = 0;                      // from 0 to Steps() - 1
    int tag = 0;                       // of the first step's messages
    int open = 0;                      // how many of the requests are not done, from the first
    uint64_t requests[2];              // of the step: to receive, and to send
  };

  void Begin(DType dtype, Op op, const Where& where);
  int Start(Flight* flight, const Leaf& segment, size_t number);
  int Advance(Flight* flight, bool* moved, bool* over);
  int Step(Flight* flight);
  void Arrived(Flight* flight);
  Leaf Block(const Leaf& segment, int block) const;
  // Of a step: which block is sent, and which is received.
  int Sent(int step) const { return Around(rank_ - step + (step < size_ - 1 ? 0 : size_)); }
  int Received(int step) const { return Around(Sent(step) - 1); }
  int Around(int block) const { return ((block % size_) + size_) % size_; }
  int Steps() const { return size_ == 2 ? 1 : 2 * (size_ - 1); }

  // All are used by the call that holds the communicator's mutex, and by no other thread.

  Mpi* mpi_;               // the process's
  uint64_t comm_;          // the MPI_Comm
  int rank_;               // within it
  int size_;               // likewise
  int64_t message_bytes_;  // of a message, at most
  // Of the call under way, set by Begin.
  DType dtype_ = kF32;
  Op op_ = kSum;
  int place_ = 0;  // where in the program it is, for its tags
  // Segments on their way at once; none between calls.
  Flight flights_[kFlights];
};

}  // namespace jaxcomm
