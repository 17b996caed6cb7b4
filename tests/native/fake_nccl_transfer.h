// The fake NCCL's collectives, and its Send and Recv.
//
// Collectives go through the ranks' buffers a half at a time. A rank puts its data into
// a half and meets the others at a barrier; then all read. The next turn takes the other
// half, so nobody overwrites what a slower rank still reads: when all have met again,
// all have finished reading.
//
// A group's Sends and Recvs advance together, each as far as its channel lets it, so
// their order does not matter. As in NCCL, no Send is done before it has been received.
#pragma once

#include <algorithm>
#include <cstring>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "fake_nccl_inject.h"
#include "fake_nccl_memory.h"
#include "fake_nccl_numbers.h"

namespace jaxcomm {

enum Kind { kAllReduce, kBroadcast, kAllGather, kReduceScatter, kSplit, kSend, kRecv };

inline constexpr const char* kKindNames[] = {
    "ncclAllReduce", "ncclBroadcast", "ncclAllGather", "ncclReduceScatter",
    "ncclCommSplit", "ncclSend",      "ncclRecv"};

struct Transfer {
  Kind kind;
  NcclComm* comm;
  const char* from;
  char* to;
  size_t count;
  int dtype;
  int op;    // kPreMulSum for all that were made
  int root;  // or peer
  uint64_t factor;
  const void* device_factor;
  int group;  // the group's number in this process, 0 outside
};

// One collective of one communicator. The ranks' calls are compared when they first
// meet. Where they differ NCCL hangs, or worse; this one hangs.
class Collective {
 public:
  Collective(NcclComm* comm, const Call& call)
      : comm_(comm), parity_(comm->collectives++ % 2) {
    // Others may still be reading the call before this one, but not the one before that.
    comm->self().calls[parity_] = call;
  }

  void Meet() {
    Barrier(comm_);
    if (compared_) return;
    compared_ = true;
    for (int p = 0; p < comm_->size; ++p) {
      const Call &a = call(p), &b = call(comm_->rank);
      if (a.kind != b.kind) Hang();
      // The colors and keys of a split are each rank's own.
      if (a.kind == kSplit) continue;
      if (a.dtype != b.dtype || a.op != b.op || a.root != b.root || a.count != b.count) {
        Hang();
      }
    }
  }

  const Call& call(int p) const { return comm_->at(p).calls[parity_]; }

 private:
  NcclComm* const comm_;
  const uint64_t parity_;
  bool compared_ = false;
};

inline void RunCollective(const Transfer& t) {
  NcclComm* comm = t.comm;
  const size_t item = kDTypeBytes[t.dtype];
  const auto ranks = static_cast<size_t>(comm->size);
  const auto self = static_cast<size_t>(comm->rank);
  Call call = {t.kind, t.dtype, t.op, t.root, t.count, t.factor};
  if (t.device_factor) std::memcpy(&call.factor, t.device_factor, item);
  Collective collective(comm, call);

  const size_t blocks = t.kind == kReduceScatter ? ranks : 1;
  const size_t step = kHalfBytes / item / blocks;
  std::vector<const char*> parts(ranks);
  std::vector<uint64_t> factors(ranks);
  for (size_t start = 0; start < t.count; start += step) {
    const size_t n = std::min(step, t.count - start), bytes = n * item;
    const uint64_t turn = comm->turns++;
    const auto half = [&](size_t p) { return comm->half(static_cast<int>(p), turn); };
    const auto source = [&](size_t block) {
      return t.from + (block * t.count + start) * item;
    };
    char* const to = t.to + start * item;
    if (t.kind != kBroadcast || t.root == comm->rank) {
      for (size_t b = 0; b < blocks; ++b) {
        std::memcpy(half(self) + b * bytes, source(b), bytes);
      }
    }
    collective.Meet();
    for (size_t p = 0; p < ranks; ++p) {
      factors[p] = collective.call(static_cast<int>(p)).factor;
    }
    // Where rank p's share of an all-reduce begins.
    const auto share = [&](size_t p) { return n * p / ranks * item; };
    switch (t.kind) {
      case kAllReduce:
        for (size_t p = 0; p < ranks; ++p) parts[p] = half(p) + share(self);
        Reduce(t.dtype, t.op, parts, factors, half(self) + share(self),
               (share(self + 1) - share(self)) / item);
        Barrier(comm);
        for (size_t p = 0; p < ranks; ++p) {
          std::memcpy(to + share(p), half(p) + share(p), share(p + 1) - share(p));
        }
        break;
      case kReduceScatter:
        for (size_t p = 0; p < ranks; ++p) parts[p] = half(p) + self * bytes;
        Reduce(t.dtype, t.op, parts, factors, to, n);
        break;
      case kAllGather:
        for (size_t p = 0; p < ranks; ++p) {
          std::memcpy(to + p * t.count * item, half(p), bytes);
        }
        break;
      default:
        std::memcpy(to, half(static_cast<size_t>(t.root)), bytes);
    }
  }
}

// A Send or Recv on its way.
class Passage {
 public:
  explicit Passage(const Transfer& t)
      : t_(t),
        sends_(t.kind == kSend),
        channel_(sends_ ? t.comm->channel(t.comm->rank, t.root)
                        : t.comm->channel(t.root, t.comm->rank)),
        mine_{t.count * kDTypeBytes[t.dtype], static_cast<uint64_t>(t.dtype)} {}

  bool done() const { return done_; }
  const Transfer& transfer() const { return t_; }

  // Moves what can be moved; tells whether anything has been.
  bool Advance() {
    const bool moved = sends_ ? Put() : Take();
    if (moved) {
      std::atomic<uint32_t>* bell = &t_.comm->at(t_.root).bell;
      ++*bell;
      Wake(bell);
    }
    return moved;
  }

 private:
  struct Header {
    uint64_t bytes;
    uint64_t dtype;
  };

  bool Put() {
    const uint64_t read = channel_.read;
    uint64_t at = channel_.written;
    const uint64_t before = at;
    if (!opened_ && at - read + sizeof(Header) <= kRingBytes) {
      Copy(at, reinterpret_cast<char*>(&mine_), sizeof(Header), true);
      at += sizeof(Header);
      opened_ = true;
    }
    if (opened_) {
      const size_t n = std::min(mine_.bytes - moved_, kRingBytes - (at - read));
      Copy(at, const_cast<char*>(t_.from) + moved_, n, true);
      at += n;
      moved_ += n;
      channel_.written = at;
      done_ = moved_ == mine_.bytes && read == at;
    }
    return at != before;
  }

  bool Take() {
    const uint64_t written = channel_.written;
    uint64_t at = channel_.read;
    const uint64_t before = at;
    if (!opened_ && written - at >= sizeof(Header)) {
      Header theirs;
      Copy(at, reinterpret_cast<char*>(&theirs), sizeof(Header), false);
      if (theirs.bytes != mine_.bytes || theirs.dtype != mine_.dtype) Hang();
      at += sizeof(Header);
      opened_ = true;
    }
    if (opened_) {
      const size_t n = std::min(mine_.bytes - moved_, written - at);
      Copy(at, t_.to + moved_, n, false);
      at += n;
      moved_ += n;
      channel_.read = at;
      done_ = moved_ == mine_.bytes;
    }
    return at != before;
  }

  void Copy(uint64_t position, char* data, size_t n, bool into_ring) {
    const size_t at = position % kRingBytes, first = std::min(n, kRingBytes - at);
    char* const ring = channel_.ring;
    if (n == 0) return;
    if (into_ring) {
      std::memcpy(ring + at, data, first);
      std::memcpy(ring, data + first, n - first);
    } else {
      std::memcpy(data, ring + at, first);
      std::memcpy(data + first, ring, n - first);
    }
  }

  const Transfer t_;
  const bool sends_;
  Channel& channel_;
  Header mine_;
  bool opened_ = false;
  bool done_ = false;
  size_t moved_ = 0;
};

inline void RunPassages(std::vector<Passage> passages) {
  const auto finished = [&] {
    return std::all_of(passages.begin(), passages.end(),
                       [](const Passage& p) { return p.done(); });
  };
  while (!finished()) {
    std::atomic<uint32_t>* bell = nullptr;
    uint32_t seen = 0;
    bool moved = false;
    // Messages of one channel keep their order.
    std::set<std::tuple<NcclComm*, int, Kind>> waiting;
    for (Passage& passage : passages) {
      const Transfer& t = passage.transfer();
      if (passage.done() || waiting.count({t.comm, t.root, t.kind})) continue;
      if (!bell) {
        bell = &t.comm->self().bell;
        seen = *bell;
      }
      moved |= passage.Advance();
      if (passage.done()) {
        moved = true;
      } else {
        waiting.insert({t.comm, t.root, t.kind});
      }
    }
    if (!moved) Nap(bell, seen);
  }
}

inline void LogTransfer(const Transfer& t) {
  std::string with = "-";
  if (t.kind == kAllReduce || t.kind == kReduceScatter) with = kOpNames[t.op];
  if (t.kind == kBroadcast) with = "root=" + std::to_string(t.root);
  if (t.kind == kSend || t.kind == kRecv) with = "peer=" + std::to_string(t.root);
  Log(std::string(kKindNames[t.kind]) + " " + std::to_string(t.count) + " " +
      kDTypeNames[t.dtype] + " " + with + " group=" + std::to_string(t.group));
}

// Runs what a group holds: collectives in their order, then all Sends and Recvs.
inline void RunTransfers(const std::vector<Transfer>& transfers) {
  std::vector<Passage> passages;
  for (const Transfer& t : transfers) {
    if (t.kind == kSend || t.kind == kRecv) {
      passages.emplace_back(t);
    } else {
      RunCollective(t);
      LogTransfer(t);
    }
  }
  RunPassages(passages);
  for (const Passage& passage : passages) LogTransfer(passage.transfer());
}

// The ranks of the parent that form this rank's new communicator, in its order.
inline std::vector<int> RunSplit(NcclComm* parent, int color, int key) {
  Collective collective(parent, {kSplit, 0, key, color, 0, 0});
  collective.Meet();
  std::vector<int> members;
  for (int p = 0; p < parent->size; ++p) {
    if (collective.call(p).root == color) members.push_back(p);
  }
  std::stable_sort(members.begin(), members.end(), [&](int a, int b) {
    return collective.call(a).op < collective.call(b).op;
  });
  return members;
}

}  // namespace jaxcomm
