// Reduction between ranks of several hosts, some of which share a host.
//
// The ranks of a host share memory as in node.h. Of a segment of the bucket the p-th lane
// owns the p-th part; a lane has one rank on every host, so there are as many as the host
// with the fewest ranks has. Then
//
//   put     every rank copies its segment into its slot
//   sum     a lane's rank adds up its part over the host's ranks, in their own order
//   wire    the ranks of a lane reduce the sums between hosts (mpi/exchange.h)
//   take    every rank copies the parts from the lanes' slots to the leaves
//
// Several segments are under way at once, each in another slot and another stage. Nobody
// waits in one stage while there is something to do in another: MPI moves on only while it
// is called.
//
// Elements are combined in an order that depends on the ranks' hosts alone: within a host
// in the order of the ranks, then between hosts as Exchange says, hosts being in the order
// of their first ranks.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "exchange.h"
#include "reduce.h"
#include "slots.h"

namespace jaxcomm {

class Tiers {
 public:
  static constexpr int64_t kControlBytes = 4096;
  static constexpr int kSlots = 8;
  static constexpr int64_t kMaxSlotBytes = 4 << 20;

  // `hosts`: by rank, the number of its host, as the order of their first ranks has it.
  // `windows`: of this host's ranks, each of `window_bytes` zero-filled bytes.
  Tiers(Mpi* mpi, uint64_t comm, int rank, const std::vector<int>& hosts,
        std::vector<char*> windows, int64_t window_bytes);

  // Reduces all leaves where they lie. Returns an MPI error code, or kBroken. Then no
  // further call may be made; with kBroken, `stranger` is a rank that has come from
  // elsewhere, or -1 where another rank of this host has failed.
  int AllReduce(const Reduction& reduction, const std::vector<Leaf>& leaves, int* stranger);
  // What the last call of a rank was.
  Where where(int rank) const;

  // Segments that went this way, and what this rank has sent to other hosts.
  int64_t segments() const { return number_; }
  int64_t messages() const { return exchange_.messages(); }
  int64_t bytes() const { return exchange_.bytes(); }

 private:
  // In a rank's window: written by that rank, read by all of the host. The value is stored
  // last, with release.
  struct alignas(128) Flag {
    std::atomic<int64_t> value;
    Where where;  // of `arrived`: what the segment is part of; in the flag's own line
  };
  struct Control {
    Flag arrived;          // the last segment that the rank has put into its slot
    Flag taken;            // the last segment of which it has all results
    Flag failed;           // whether its last call has failed
    Flag settled[kSlots];  // the segment of which its slot holds the result of its part
  };
  static_assert(sizeof(Control) <= kControlBytes);
  class Call;

  Control& control(int local) const {
    return *reinterpret_cast<Control*>(windows_[static_cast<size_t>(local)]);
  }
  char* slot(int local, int64_t number) const {
    return windows_[static_cast<size_t>(local)] + kControlBytes +
           number % kSlots * slot_bytes_;
  }

  // What is not constant is used by the call that holds the communicator's mutex.

  const std::vector<int> locals_;      // this host's ranks
  const std::vector<char*> windows_;   // theirs; Python keeps them mapped
  const int local_;                    // this rank's number among them
  const int lanes_;                    // ranks of the host with the fewest
  const int64_t least_part_;           // less than so many bytes are not divided further
  const int64_t slot_bytes_;           // a multiple of 64
  Exchange exchange_;                  // of this rank's lane, if it is in one
  std::vector<Exchange::Flight> flights_;  // by slot
  std::vector<char> scratch_;          // of Elements
  int64_t number_ = 0;  // of the last segment; the same on all ranks between calls
};

}  // namespace jaxcomm
