// All-reduce between hosts by point-to-point messages, many on their way at once.
//
// MPI's own nonblocking all-reduce moves one way at a time between two ranks in some
// libraries, and waits out a latency for every message in all (docs/performance.md).
// Here members, one rank each, reduce segments that are independent, so that some travel
// while others are added or wait. A segment is reduced in one of three ways:
//
//   ring      a block of it per member goes around: size - 1 steps add blocks up, as many
//             hand the sums around
//   pairwise  every member gets its block from all others, adds it up, and gives them the
//             sum: two steps, and as many bytes and messages as a ring
//   doubling  members exchange all they have, with one and then with the sums of 2, 4, 8
//             others: log2(size) steps, each of as many bytes as the segment has
//
// Pairwise and doubling combine an element in the same order wherever it lies, a tree over
// the members in their order: which of the two is taken shows in no bit. In a ring the
// order depends on the block. Two members always exchange all they have.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "callbacks.h"
#include "mpi_binding.h"

namespace jaxcomm {

struct Leaf {
  char* data;
  int64_t count;
};

// What becomes of the members' elements.
struct Sum {
  DType dtype;        // in which they travel
  Op op;
  bool wide = false;  // 16-bit floats are added up in float32, and rounded once; not in a ring
  int reserve = 1;    // of wide elements: what they were divided by before they travel
  int divisor = 1;    // of the result; not in a ring
};

class Exchange {
 public:
  // A segment on its way.
  struct Flight {
    Leaf segment{nullptr, 0};        // without data where nothing is on its way
    std::vector<char> received;      // kept from one segment to the next, as all that follow
    std::vector<float> wide;         // 16-bit elements that are being added up
    std::vector<uint64_t> requests;  // of the step
    size_t open = 0;                 // how many of them are not done, from the first
    int step = 0;                    // from 0 to Steps() - 1
    int tag = 0;                     // of the first step's messages
  };

  // `members`: their ranks in `comm`; this one is the `place`-th. A message of a ring has
  // at most `message_bytes`, a multiple of 16.
  Exchange(Mpi* mpi, uint64_t comm, std::vector<int> members, int place,
           int64_t message_bytes)
      : mpi_(mpi), comm_(comm), members_(std::move(members)), place_(place),
        size_(static_cast<int>(members_.size())), message_bytes_(message_bytes) {
    while (2 * half_ <= size_) half_ *= 2;
  }

  // Whether a leaf of so many bytes is worth a ring's messages.
  bool Worth(int64_t bytes) const { return bytes >= size_ * kLeastBlock; }

  // Elements of a segment of a ring.
  int64_t SegmentCount(int64_t item) const {
    return message_bytes_ / item * (size_ == 2 ? 1 : size_);
  }

  // Reduces segments, none longer than SegmentCount, where they lie; `settled(segment)`
  // is called when one has its sum. Returns an MPI error code.
  template <typename Settled>
  int AllReduce(const std::vector<Leaf>& segments, const Sum& sum, const Where& where,
                Settled settled) {
    Begin(sum, kRing, where);
    flights_.resize(kFlights);
    // After a failed call: nothing of it is on its way any more that could be helped.
    for (Flight& flight : flights_) flight.segment.data = nullptr;
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
        const Leaf segment = flight.segment;
        bool over = false;
        if (const int code = Advance(&flight, &moved, &over); code != 0) return code;
        if (over) {
          settled(segment);
          ++done;
        }
      }
      moved ? patience.Renew() : patience.Wait();
    }
    return 0;
  }

  // The same a segment at a time, for who has more to do. A call begins; all its segments
  // are started in the same order by all members, and numbered.
  void Begin(const Sum& sum, Algorithm algorithm, const Where& where);
  int Start(Flight* flight, const Leaf& segment, size_t number);
  // Goes on with a flight; `over` if its segment has the result and the flight is free.
  int Advance(Flight* flight, bool* moved, bool* over);

  // Messages and bytes sent since the process began; read by other threads too.
  int64_t messages() const { return messages_.load(std::memory_order_relaxed); }
  int64_t bytes() const { return bytes_.load(std::memory_order_relaxed); }

 private:
  static constexpr int64_t kLeastBlock = 16 << 10;
  static constexpr int kFlights = 8;

  int Step(Flight* flight);
  int Send(Flight* flight, int member, const Leaf& what);
  int Receive(Flight* flight, int member, const Leaf& what);
  int StepOfRing(Flight* flight);
  int StepPairwise(Flight* flight);
  int StepDoubling(Flight* flight);
  void Arrived(Flight* flight);
  void AddPairwise(Flight* flight);
  void AddDoubling(Flight* flight);
  void AddUp(std::vector<char*>* parts, DType dtype, int64_t n) const;
  void Finish(float* wide, char* to, int64_t n) const;
  Leaf Block(const Leaf& segment, int block) const;
  char* Received(Flight* flight, int64_t bytes) const;
  int64_t item() const { return static_cast<int64_t>(kItemSize[sum_.dtype]); }
  int Steps() const;

  // Of a ring's step: which block is sent, and which is received.
  int RingSent(int step) const {
    return Around(place_ - step + (step < size_ - 1 ? 0 : size_));
  }
  int RingReceived(int step) const { return Around(RingSent(step) - 1); }
  int Around(int block) const { return ((block % size_) + size_) % size_; }

  // Of the tree: the first 2 * Extra() members are paired up, so that as many sums are left
  // as the largest power of two, `half_`, that there are members.
  int Extra() const { return size_ - half_; }
  int MemberOf(int node) const { return node < Extra() ? 2 * node : node + Extra(); }
  // Which member this one exchanges with in a step of doubling, -1 for none; and whether
  // it sends, or receives.
  struct Partner {
    int member = -1;
    bool sends = false, receives = false;
  };
  Partner PartnerIn(int step) const;

  // All but the counts are used by the call that holds the communicator's mutex, and by no
  // other thread.

  Mpi* mpi_;                  // the process's
  uint64_t comm_;             // the MPI_Comm
  std::vector<int> members_;  // ranks within it
  int place_;                 // of this process among the members
  int size_;                  // how many there are
  int half_ = 1;              // the largest power of two that is not above `size_`
  int64_t message_bytes_;     // of a ring's message, at most
  // Of the call under way, set by Begin.
  Sum sum_{kF32, kSum};
  Algorithm algorithm_ = kRing;
  int site_ = 0;  // where in the program it is, for its tags
  // Of AllReduce: segments on their way at once; none between calls.
  std::vector<Flight> flights_;
  std::atomic<int64_t> messages_{0}, bytes_{0};
};

}  // namespace jaxcomm
