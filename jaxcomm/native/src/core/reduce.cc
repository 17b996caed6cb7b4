#include "reduce.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "node.h"
#include "rounding.h"
#include "tiers.h"

namespace jaxcomm {
namespace {

class Reducer {
 public:
  Reducer(Communicator* comm, const Reduction& how)
      : comm_(comm), how_(how), kernels_(ChosenKernels()),
        item_(static_cast<int64_t>(kItemSize[how.dtype])),
        wire_item_(static_cast<int64_t>(kItemSize[how.wire])) {
    // Not where float32 becomes float16: that may overflow unless it is divided before.
    const bool narrowed = how.wire == kF16 && how.dtype != kF16;
    if (comm->size == 2 && how.divisor == 2 && how.op == kSum && !narrowed &&
        kernels_.combine[how.wire][kMeanOfTwo] != nullptr) {
      how_.op = kMeanOfTwo;
      how_.divisor = 1;
    }
    // A sum of float16 numbers may overflow where their mean does not: such a mean
    // is summed after an exact division by a power of two that is at least n.
    if (how_.wire == kF16 && how_.divisor > 1) {
      while (reserve_ < how_.divisor) reserve_ *= 2;
    }
  }

  int Add(const Leaf& leaf) {
    if (leaf.count == 0) return 0;
    const bool pack = how_.wire != how_.dtype || leaf.count * item_ <= how_.pack_bytes;
    return pack ? Pack(leaf) : InPlace(leaf.data, leaf.count);
  }

  // Reduces all that was added and has not been reduced yet.
  int Finish() {
    if (const int code = Flush(); code != 0 || queued_.empty()) return code;
    comm_->counters[kSegments] += static_cast<int64_t>(queued_.size());
    const int code =
        comm_->ring->AllReduce(queued_, {how_.dtype, how_.op}, how_.where,
                               [this](const Leaf& segment) { Settle(segment); });
    comm_->counters[kMessages] = comm_->ring->messages();
    comm_->counters[kSent] = comm_->ring->bytes();
    return code;
  }

 private:
  // Reduces what waits in the staging buffer and puts it back where it came from.
  int Flush() {
    if (used_ == 0) return 0;
    const int code = Send(comm_->Staging(), used_ / wire_item_);
    if (code != 0) return code;
    const char* from = comm_->Staging();
    for (const Leaf& part : parts_) {
      Unpack(from, part);
      from += part.count * wire_item_;
    }
    parts_.clear();
    used_ = 0;
    return 0;
  }

  // Reduces n elements where they lie, a cache-sized segment at a time, so that MPI's
  // passes over memory and ours meet in cache.
  int InPlace(char* data, int64_t n) {
    if (comm_->ring != nullptr && comm_->ring->Worth(n * item_)) return Enqueue(data, n);
    const int64_t step = Elements(comm_->segment_bytes, item_);
    for (int64_t start = 0; start < n; start += step) {
      const Leaf segment{data + start * item_, std::min(step, n - start)};
      if (reserve_ > 1) {
        kernels_.scale[how_.dtype](segment.data, segment.count, 1.0f / reserve_);
      }
      if (const int code = Send(segment.data, segment.count); code != 0) return code;
      Settle(segment);
    }
    return 0;
  }

  // Leaves n elements to the ring.
  int Enqueue(char* data, int64_t n) {
    const int64_t step = comm_->ring->SegmentCount(item_);
    for (int64_t start = 0; start < n; start += step) {
      queued_.push_back({data + start * item_, std::min(step, n - start)});
      if (reserve_ > 1) {
        const Leaf& last = queued_.back();
        kernels_.scale[how_.dtype](last.data, last.count, 1.0f / reserve_);
      }
    }
    comm_->counters[kBytes] += n * item_;
    return 0;
  }

  // Makes the sum of a segment what was asked for.
  void Settle(const Leaf& segment) {
    if (reserve_ > 1) {
      kernels_.scale[how_.dtype](segment.data, segment.count, Rest());
    } else if (how_.divisor > 1) {
      kernels_.divide[how_.dtype](segment.data, segment.count, how_.divisor);
    }
  }

  int Pack(const Leaf& leaf) {
    // What is encoded should still be in cache when it is sent.
    const int64_t room = how_.wire == how_.dtype
                             ? comm_->staging_bytes
                             : std::min(comm_->staging_bytes, comm_->segment_bytes);
    for (int64_t start = 0; start < leaf.count;) {
      if (room - used_ < wire_item_) {
        if (const int code = Flush(); code != 0) return code;
      }
      const int64_t count = std::min(leaf.count - start, (room - used_) / wire_item_);
      char* from = leaf.data + start * item_;
      char* to = comm_->Staging() + used_;
      if (how_.wire != how_.dtype) {
        kernels_.encode[how_.wire](reinterpret_cast<const float*>(from), to, count,
                                   1.0f / static_cast<float>(reserve_));
      } else {
        std::memcpy(to, from, static_cast<size_t>(count * item_));
        if (reserve_ > 1) kernels_.scale[how_.dtype](to, count, 1.0f / reserve_);
      }
      parts_.push_back({from, count});
      used_ += count * wire_item_;
      start += count;
    }
    return 0;
  }

  void Unpack(const char* from, const Leaf& part) {
    if (how_.wire != how_.dtype) {
      kernels_.decode[how_.wire](from, reinterpret_cast<float*>(part.data), part.count,
                                 static_cast<float>(reserve_), how_.divisor);
      return;
    }
    if (how_.divisor > 1 && reserve_ == 1) {
      kernels_.divide_copy[how_.dtype](from, part.data, part.count, how_.divisor);
      return;
    }
    std::memcpy(part.data, from, static_cast<size_t>(part.count * item_));
    if (reserve_ > 1) kernels_.scale[how_.dtype](part.data, part.count, Rest());
  }

  int Send(char* data, int64_t n) {
    const int64_t step = Elements(comm_->segment_bytes, wire_item_);
    for (int64_t start = 0; start < n; start += step) {
      const int64_t count = std::min(step, n - start);
      Count(count);
      const int code = Call(data + start * wire_item_, static_cast<int>(count));
      if (code != 0) return code;
    }
    return 0;
  }

  int Call(char* data, int count) {
    if (comm_->ring == nullptr) {
      return comm_->mpi->AllReduce(data, count, how_.wire, how_.op, comm_->handle);
    }
    return comm_->mpi->PatientAllReduce(data, count, how_.wire, how_.op, comm_->handle);
  }

  void Count(int64_t elements) {
    comm_->counters[kMpiAllReduce]++;
    comm_->counters[kBytes] += elements * wire_item_;
  }

  // MPI counts elements in a C int.
  static int64_t Elements(int64_t bytes, int64_t item) {
    return std::clamp<int64_t>(bytes / item, 1, INT32_MAX);
  }

  float Rest() const {
    return static_cast<float>(reserve_) / static_cast<float>(how_.divisor);
  }

  Communicator* comm_;
  Reduction how_;
  const Kernels& kernels_;
  int64_t item_;
  int64_t wire_item_;
  int reserve_ = 1;
  int64_t used_ = 0;
  std::vector<Leaf> parts_;
  std::vector<Leaf> queued_;
};

}  // namespace

Communicator::Communicator(int64_t id, Mpi* mpi, uint64_t handle, int rank, int size,
                           int64_t staging_bytes, int64_t segment_bytes)
    : id(id), mpi(mpi), handle(handle), rank(rank), size(size),
      staging_bytes(staging_bytes), segment_bytes(segment_bytes),
      progress(*ProgressOf(id)) {}

Communicator::~Communicator() {
  if (staging_ != nullptr) munmap(staging_, static_cast<size_t>(staging_bytes));
}

namespace {

void CountBytes(Communicator* comm, const Reduction& reduction,
                const std::vector<Leaf>& leaves) {
  for (const Leaf& leaf : leaves) {
    comm->counters[kBytes] += leaf.count * static_cast<int64_t>(kItemSize[reduction.wire]);
  }
}

int ThroughTiers(Communicator* comm, const Reduction& reduction,
                 const std::vector<Leaf>& leaves) {
  Tiers& tiers = *comm->tiers;
  int stranger = -1;
  const int code = tiers.AllReduce(reduction, leaves, &stranger);
  comm->counters[kSegments] = tiers.segments();
  comm->counters[kMessages] = tiers.messages();
  comm->counters[kSent] = tiers.bytes();
  CountBytes(comm, reduction, leaves);
  if (stranger >= 0) {
    comm->broken =
        AskHowTheyDiffer(comm->id, reduction.where, stranger, tiers.where(stranger));
  } else if (code == kBroken) {
    comm->broken = "jaxcomm: this call has failed on another rank of this host";
  } else if (code != 0) {  // the ranks no longer are in the same segment
    comm->broken = "jaxcomm: an earlier call of this communicator failed: " +
                   comm->mpi->ErrorText(code);
  }
  return code;
}

}  // namespace

int AllReduce(Communicator* comm, const Reduction& reduction,
              const std::vector<Leaf>& leaves) {
  if (comm->size == 1) return 0;
  DefaultRounding scope;
  if (comm->tiers != nullptr) return ThroughTiers(comm, reduction, leaves);
  if (comm->node != nullptr) {
    int stranger = -1;
    comm->counters[kSegments] += comm->node->AllReduce(reduction, leaves, &stranger);
    if (stranger >= 0) {
      comm->broken = AskHowTheyDiffer(comm->id, reduction.where, stranger,
                                      comm->node->where(stranger));
      return kBroken;
    }
    CountBytes(comm, reduction, leaves);
    return 0;
  }
  Reducer reducer(comm, reduction);
  for (const Leaf& leaf : leaves) {
    if (const int code = reducer.Add(leaf); code != 0) return code;
  }
  return reducer.Finish();
}

namespace {

// Elements are reduced and scattered a part at a time: the ranks' blocks of a part lie
// together in the staging buffer, as MPI wants them.
int ReduceScatter(Communicator* comm, const Movement& how, const char* from, char* to,
                  int64_t count) {
  DefaultRounding scope;
  const auto item = static_cast<int64_t>(kItemSize[how.dtype]);
  const int64_t step = std::max<int64_t>(comm->staging_bytes / item / comm->size, 1);
  std::vector<char> many;  // where one element of each rank is more than the buffer holds
  char* blocks = comm->Staging();
  if (step * item * comm->size > comm->staging_bytes) {
    many.resize(static_cast<size_t>(step * item * comm->size));
    blocks = many.data();
  }
  for (int64_t start = 0; start < count; start += step) {
    const int64_t n = std::min(step, count - start);
    char* block = blocks;
    for (int rank = 0; rank < comm->size; ++rank, block += n * item) {
      std::memcpy(block, from + (rank * count + start) * item,
                  static_cast<size_t>(n * item));
    }
    char* out = to + start * item;
    const int code = comm->mpi->ReduceScatter(blocks, out, static_cast<int>(n),
                                              how.dtype, how.op, comm->handle);
    if (code != 0) return code;
    if (how.divisor > 1) ChosenKernels().divide[how.dtype](out, n, how.divisor);
  }
  return 0;
}

}  // namespace

int MoveLeaf(Communicator* comm, const Movement& how, const char* from, char* to,
             int64_t bytes) {
  const int64_t most = comm->piece_bytes;
  comm->counters[kMoved]++;
  comm->counters[kBytes] += bytes;
  if (bytes == 0) return 0;
  const int size = comm->size;
  if (how.move == kReduceScatter) {
    return ReduceScatter(comm, how, from, to,
                         bytes / static_cast<int64_t>(kItemSize[how.dtype]));
  }
  if (how.move == kPermute) {
    if (how.source < 0) std::memset(to, 0, static_cast<size_t>(bytes));
    for (int64_t start = 0; start < bytes; start += most) {
      const int n = static_cast<int>(std::min(most, bytes - start));
      const int code = comm->mpi->Exchange(from + start, how.target, to + start,
                                           how.source, n, comm->handle);
      if (code != 0) return code;
    }
    return 0;
  }
  const bool gather = how.move == kAllGather;
  if (bytes <= most) {
    const int n = static_cast<int>(bytes);
    return gather ? comm->mpi->AllGather(from, to, n, comm->handle)
                  : comm->mpi->AllToAll(from, to, n, comm->handle);
  }
  // Pair by pair: in round k every rank sends to the k-th after it.
  for (int k = 0; k < size; ++k) {
    const int target = (comm->rank + k) % size, source = (comm->rank + size - k) % size;
    for (int64_t start = 0; start < bytes; start += most) {
      const int n = static_cast<int>(std::min(most, bytes - start));
      const int code = comm->mpi->Exchange(from + (gather ? 0 : target * bytes) + start,
                                           target, to + source * bytes + start, source, n,
                                           comm->handle);
      if (code != 0) return code;
    }
  }
  return 0;
}

int Broadcast(Communicator* comm, int root, char* data, int64_t bytes) {
  const int64_t step = comm->piece_bytes;
  for (int64_t start = 0; start < bytes; start += step) {
    const int64_t count = std::min(step, bytes - start);
    comm->counters[kMpiBroadcast]++;
    comm->counters[kBytes] += count;
    const int code = comm->mpi->Broadcast(data + start, static_cast<int>(count), root,
                                          comm->handle);
    if (code != 0) return code;
  }
  return 0;
}

}  // namespace jaxcomm
