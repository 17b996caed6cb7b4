// Reduction between ranks of one host, through memory that they share.
//
// Every rank has a window that all can see: two flags and three slots. The leaves of a
// bucket are walked through as one stream, a slot's worth (a segment) at a time, and
// of each segment rank r owns the r-th part:
//
//   put     copy what other ranks own of this rank's segment into its slot; `arrived`
//   reduce  combine the own part with all other ranks' slots, write the result to the
//           leaf and to the own slot; `reduced`
//   take    copy the parts that others own from their slots to the leaf
//
// Segment k + 1 is put before segment k is taken, so no rank waits for one that is just
// as fast. Then three slots are enough: when every rank has arrived with segment k, all
// have taken segment k - 2, whose slot segment k + 1 is put into.
//
// A part is computed by its owner alone, so results are equal on all ranks bit by bit.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "reduce.h"
#include "slots.h"

namespace jaxcomm {

// Tells with which stores slots are best filled. Between cores that share a cache,
// ordinary stores: the reader finds the data there. Between cores that do not, a line
// that one core has written reaches the other very slowly, and streaming stores, which
// go past the caches, win by several times (docs/performance.md). On a virtual machine
// this changes while a job runs, so both are timed now and then.
class StoreChoice {
 public:
  using Clock = std::chrono::steady_clock;

  bool streaming() const { return streaming_; }
  // A call begins: the time until its first segment is somebody's lateness.
  void Begin() { fresh_ = true; }
  // A whole segment has been taken.
  void Segment(Clock::time_point now);

 private:
  void Switch();

  static constexpr int kHistory = 8, kTrial = 4, kSettle = 2;
  bool streaming_ = false;  // what is in use now
  bool trial_ = false;      // whether that is being tried out
  bool fresh_ = true;       // whether the call's first segment is still to come
  int settle_ = 0;          // segments until the last change shows
  int observed_ = 0;        // segments timed since the last change
  double recent_[kHistory] = {};       // seconds of the last ones, round and round
  double home_ = 0;                    // seconds of a segment before the trial
  double decided_ = 0;                 // seconds of a segment when last decided
  Clock::time_point last_ = {};        // when the last segment had been taken
  Clock::time_point next_trial_ = {};  // when the other kind is tried again
};

class Node {
 public:
  static constexpr int64_t kControlBytes = 4096;
  static constexpr int kSlots = 3;
  // Three of these lie within the second-level cache of most processors.
  static constexpr int64_t kMaxSlotBytes = 512 << 10;

  // `windows`: every rank's, of `window_bytes` zero-filled bytes. `crowded`: there are
  // more ranks than cores, so that a waiting rank must let others run.
  Node(std::vector<char*> windows, int rank, int64_t window_bytes, bool crowded);

  // Reduces all leaves where they lie; returns the number of segments. Where a rank has
  // come from another bucket nothing is reduced, that rank stands in `stranger`, and no
  // further call may be made.
  int64_t AllReduce(const Reduction& reduction, const std::vector<Leaf>& leaves,
                    int* stranger);
  // Waits until all ranks have come, before a call that is not ours. Returns -1, or one
  // that comes from another bucket: then no further call may be made.
  int Meet(const Where& where);
  // A call begins. Tells whether the other ranks have come to it too, after a moment: then
  // none of them keeps this one waiting.
  bool AllHere();
  // What the last call of a rank was.
  Where where(int rank) const { return control(rank).arrived.where; }

 private:
  // In a rank's window: written by that rank, read by all. The value is stored last, with
  // release.
  struct alignas(128) Flag {
    std::atomic<int64_t> value;
    Where where;  // of `arrived`: what the segment is part of; in the flag's own line
  };
  struct Control {
    Flag arrived;    // the last segment that the rank has put into its slot
    Flag reduced;    // the last segment of which it has reduced its part
    Flag streaming;  // whether slots are filled by streaming stores; rank 0's counts
    Flag here;       // how many calls of the rank have begun
  };
  class Call;

  Control& control(int rank) const {
    return *reinterpret_cast<Control*>(windows_[static_cast<size_t>(rank)]);
  }
  char* slot(int rank, int64_t number) const {
    return windows_[static_cast<size_t>(rank)] + kControlBytes +
           number % kSlots * slot_bytes_;
  }
  void Wait(const std::atomic<int64_t>& flag, int64_t value) const;
  static void Publish(Flag* flag, int64_t number);
  // Waits until all ranks have arrived with a segment. Returns one that comes from
  // elsewhere than `where`, or -1.
  int Arrived(int64_t number, const Where& where) const;

  // What is not constant is used by the call that holds the communicator's mutex, but for
  // `calls_`: that is counted before the call takes it.

  const std::vector<char*> windows_;  // by rank; Python keeps them mapped
  const int rank_;
  const int size_;
  const int64_t slot_bytes_;  // a multiple of 64
  const int spins_;           // looks at a flag before the core is left to others
  const int forced_;          // JAXCOMM_STORES: 0 ordinary, 1 streaming, -1 as timed
  int64_t number_ = 0;        // of the last segment; the same on all ranks between calls
  int64_t calls_ = 0;         // how many have begun, by AllHere
  StoreChoice choice_;        // rank 0's counts
  std::vector<char> scratch_;  // of Elements
};

}  // namespace jaxcomm
