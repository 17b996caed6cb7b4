// Between the leaves of a bucket and slots of shared memory.
//
// The leaves are walked through as one stream, a slot's worth (a segment) at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "reduce.h"

namespace jaxcomm {

struct Piece {
  char* data;
  int64_t at;  // first element within the segment
  int64_t count;
};

struct Segment {
  int64_t number = 0;
  int64_t count = 0;
  std::vector<Piece> pieces;
};

// Cuts leaves into segments.
class Stream {
 public:
  Stream(const std::vector<Leaf>& leaves, int64_t capacity, int64_t item)
      : leaves_(leaves), capacity_(capacity), item_(item) {}

  bool Next(Segment* segment) {
    segment->count = 0;
    segment->pieces.clear();
    while (leaf_ < leaves_.size() && segment->count < capacity_) {
      const Leaf& leaf = leaves_[leaf_];
      const int64_t n = std::min(leaf.count - start_, capacity_ - segment->count);
      if (n > 0) segment->pieces.push_back({leaf.data + start_ * item_, segment->count, n});
      segment->count += n;
      start_ += n;
      if (start_ == leaf.count) {
        ++leaf_;
        start_ = 0;
      }
    }
    return segment->count > 0;
  }

 private:
  const std::vector<Leaf>& leaves_;
  const int64_t capacity_;
  const int64_t item_;
  size_t leaf_ = 0;
  int64_t start_ = 0;
};

// Copies and adds the elements of a bucket. Slots hold them as they travel.
class Elements {
 public:
  // What is reduced at once: with its counterpart in a slot it fits the first-level cache.
  static constexpr int64_t kBlock = 4096;
  // For a block: what lower ranks' elements, of up to 16 bytes, come to; and 16-bit floats
  // on their way into a slot.
  static constexpr size_t kScratchBytes = kBlock * (16 + 2);

  Elements(const Reduction& how, char* scratch)
      : how_(how), k_(ChosenKernels()),
        item_(static_cast<int64_t>(kItemSize[how.dtype])),
        wire_item_(static_cast<int64_t>(kItemSize[how.wire])),
        encoded_(how.wire != how.dtype),
        wide_((how.wire == kBF16 || how.wire == kF16) &&
              (how.op == kSum || how.op == kProd)),
        scratch_(scratch) {
    // A number beyond float16's range may have a mean within it: such a mean travels
    // divided by a power of two that is at least n.
    if (encoded_) reserve_ = Reserve();
  }

 protected:
  static void Copy(void* to, const void* from, int64_t bytes) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }

  int Reserve() const {
    int reserve = 1;
    while (how_.wire == kF16 && reserve < how_.divisor) reserve *= 2;
    return reserve;
  }

  // Where the p-th of so many parts begins; whole cache lines, so that no two ranks write
  // into one.
  int64_t Bound(const Segment& segment, int p, int parts) const {
    const int64_t line = 64 / wire_item_;
    const int64_t even = segment.count * p / parts;
    return std::min((even + line - 1) / line * line, segment.count);
  }

  template <typename F>
  void ForEach(const Segment& segment, int64_t from, int64_t to, F&& f) const {
    for (const Piece& piece : segment.pieces) {
      const int64_t start = std::max(from, piece.at);
      const int64_t stop = std::min(to, piece.at + piece.count);
      if (start < stop) f(piece.data + (start - piece.at) * item_, start, stop - start);
    }
  }

  // A block at a time: f(leaf, at, n).
  template <typename F>
  void ForEachBlock(const Segment& segment, int64_t from, int64_t to, F&& f) const {
    ForEach(segment, from, to, [&](char* leaf, int64_t at, int64_t n) {
      for (int64_t start = 0; start < n; start += kBlock) {
        f(leaf + start * item_, at + start, std::min(kBlock, n - start));
      }
    });
  }

  // Copies elements of the leaves to where they stand in a slot, encoding them if need be.
  void Put(const Segment& segment, int64_t from, int64_t to, char* slot) {
    ForEach(segment, from, to, [&](char* leaf, int64_t at, int64_t n) {
      char* out = slot + at * wire_item_;
      if (!encoded_) {
        write_(out, leaf, n * item_);
        return;
      }
      for (int64_t start = 0; start < n; start += kBlock) {
        const int64_t count = std::min(kBlock, n - start);
        Encode(leaf + start * item_, count);
        write_(out + start * wire_item_, half(), count * wire_item_);
      }
    });
  }

  // Copies results from a slot to the leaves.
  void Take(const Segment& segment, int64_t from, int64_t to, const char* slot) const {
    ForEach(segment, from, to, [&](char* leaf, int64_t at, int64_t n) {
      const char* in = slot + at * wire_item_;
      if (encoded_) {
        k_.decode[how_.wire](in, reinterpret_cast<float*>(leaf), n, 1.0f, 1);
      } else {
        std::memcpy(leaf, in, static_cast<size_t>(n * item_));
      }
    });
  }

  void Encode(const char* leaf, int64_t n) {
    k_.encode[how_.wire](reinterpret_cast<const float*>(leaf), half(), n,
                         1.0f / static_cast<float>(reserve_));
  }

  // Adds up, or multiplies, n 16-bit floats of every rank in float32, in the order of the
  // ranks: slot(p) holds rank p's, but this rank's own are in the leaf.
  template <typename Slot>
  float* SumWide(const char* leaf, int64_t n, int rank, int size, Slot slot) {
    const auto reserve = static_cast<float>(reserve_);
    if (encoded_) Encode(leaf, n);
    float* sum = reinterpret_cast<float*>(prefix());
    for (int p = 0; p < size; ++p) {
      const char* from = p == rank ? (encoded_ ? half() : leaf) : slot(p);
      if (p == 0) {
        k_.decode[how_.wire](from, sum, n, reserve, 1);
      } else {
        k_.accumulate[how_.wire][how_.op](from, sum, n, reserve);
      }
    }
    return sum;
  }

  char* prefix() { return scratch_; }
  char* half() { return scratch_ + kBlock * 16; }

  const Reduction how_;
  const Kernels& k_;
  const int64_t item_;
  const int64_t wire_item_;
  const bool encoded_;  // float32 leaves travel in 16 bits
  const bool wide_;     // 16-bit floats are added up in float32
  int reserve_ = 1;     // what elements in slots are divided by
  StreamFn write_ = Copy;

 private:
  char* const scratch_;
};

}  // namespace jaxcomm
