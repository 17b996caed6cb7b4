#include "node.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <thread>

namespace jaxcomm {
namespace {

// For how long a call waits before it is left to another thread, which takes as long to
// wake.
constexpr std::chrono::microseconds kMoment{50};
// Below this, a segment is about latency, and ordinary stores are best.
constexpr int64_t kStreamingBytes = 128 << 10;

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int ForcedStores() {
  const char* text = std::getenv("JAXCOMM_STORES");
  if (text == nullptr) return -1;
  return std::strcmp(text, "streaming") == 0 ? 1 : 0;
}

}  // namespace

void StoreChoice::Segment(Clock::time_point now) {
  const double seconds = std::chrono::duration<double>(now - last_).count();
  last_ = now;
  if (fresh_ || settle_ > 0) {
    fresh_ = false;
    settle_ = std::max(settle_ - 1, 0);
    return;
  }
  recent_[observed_++ % kHistory] = seconds;
  if (trial_ && observed_ == kTrial) {
    const double tried = *std::min_element(recent_, recent_ + kTrial);
    trial_ = false;
    // Two ways as fast as each other should not alternate.
    if (tried > 0.9 * home_) Switch();
    decided_ = std::min(tried, home_);
    next_trial_ = now + std::chrono::seconds(1);
    observed_ = 0;
  } else if (!trial_ && observed_ >= kHistory) {
    home_ = *std::min_element(recent_, recent_ + kHistory);
    // What has become much slower is tried again at once.
    const bool due = now >= next_trial_ || (home_ > 1.5 * decided_ && decided_ > 0);
    if (due) {
      trial_ = true;
      decided_ = 0;
      Switch();
    }
  }
}

void StoreChoice::Switch() {
  streaming_ = !streaming_;
  settle_ = kSettle;
  observed_ = 0;
}

Node::Node(std::vector<char*> windows, int rank, int64_t window_bytes, bool crowded)
    : windows_(std::move(windows)),
      rank_(rank),
      size_(static_cast<int>(windows_.size())),
      slot_bytes_(std::min((window_bytes - kControlBytes) / kSlots, kMaxSlotBytes) / 64 *
                  64),
      spins_(crowded ? 0 : 2000),
      forced_(ForcedStores()),
      scratch_(Elements::kScratchBytes) {}

// First without leaving the core, then letting others run, then sleeping: what lasts a
// millisecond is a late rank, and XLA's threads have a use for the core meanwhile.
void Node::Wait(const std::atomic<int64_t>& flag, int64_t value) const {
  for (int spin = 0; spin < spins_; ++spin) {
    if (flag.load(std::memory_order_acquire) >= value) return;
    Pause();
  }
  const auto start = StoreChoice::Clock::now();
  while (flag.load(std::memory_order_acquire) < value) {
    if (StoreChoice::Clock::now() - start < std::chrono::milliseconds(1)) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(30));
    }
  }
}

void Node::Publish(Flag* flag, int64_t number) {
  // Streaming stores are not ordered with others but by a fence.
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
  flag->value.store(number, std::memory_order_release);
}

int Node::Arrived(int64_t number, const Where& where) const {
  int stranger = -1;
  for (int p = 0; p < size_; ++p) {
    Wait(control(p).arrived.value, number);
    if (this->where(p) != where) stranger = p;
  }
  return stranger;
}

int Node::Meet(const Where& where) {
  Control& own = control(rank_);
  own.arrived.where = where;
  Publish(&own.arrived, ++number_);
  const int stranger = Arrived(number_, where);
  if (stranger >= 0) return stranger;
  // Nobody may write where its next call is until all have read where this one is.
  Publish(&own.reduced, number_);
  for (int p = 0; p < size_; ++p) Wait(control(p).reduced.value, number_);
  return -1;
}

bool Node::AllHere() {
  Publish(&control(rank_).here, ++calls_);
  const auto end = StoreChoice::Clock::now() + kMoment;
  for (int p = 0; p < size_; ++p) {
    while (control(p).here.value.load(std::memory_order_acquire) < calls_) {
      if (StoreChoice::Clock::now() > end) return false;
      spins_ > 0 ? Pause() : std::this_thread::yield();
    }
  }
  return true;
}

// One bucket's way through the slots.
class Node::Call : private Elements {
 public:
  Call(Node* node, const Reduction& how)
      : Elements(how, node->scratch_.data()), node_(*node) {
    // The last call's has been read by all: they came to its last segment.
    node->control(node->rank_).arrived.where = how.where;
  }

  void Put(const Segment& segment) {
    const int64_t bytes = segment.count * wire_item_;
    const bool streaming =
        bytes >= kStreamingBytes &&
        (node_.forced_ >= 0
             ? node_.forced_ == 1
             : node_.control(0).streaming.value.load(std::memory_order_relaxed) != 0);
    write_ = streaming ? k_.stream : Copy;
    char* slot = node_.slot(node_.rank_, segment.number);
    // The own part stays where it is.
    Elements::Put(segment, 0, Bound(segment, node_.rank_), slot);
    Elements::Put(segment, Bound(segment, node_.rank_ + 1), segment.count, slot);
    Node::Publish(&node_.control(node_.rank_).arrived, segment.number);
  }

  void Reduce(const Segment& segment) {
    const int64_t from = Bound(segment, node_.rank_), to = Bound(segment, node_.rank_ + 1);
    ForEachBlock(segment, from, to, [&](char* leaf, int64_t at, int64_t n) {
      wide_ ? ReduceWide(segment, leaf, at, n) : ReduceBlock(segment, leaf, at, n);
    });
    Node::Publish(&node_.control(node_.rank_).reduced, segment.number);
  }

  void Take(const Segment& segment) {
    for (int step = 1; step < node_.size_; ++step) {
      const int p = (node_.rank_ + step) % node_.size_;
      node_.Wait(node_.control(p).reduced.value, segment.number);
      Elements::Take(segment, Bound(segment, p), Bound(segment, p + 1),
                     node_.slot(p, segment.number));
    }
  }

 private:
  // Where rank p's part begins.
  int64_t Bound(const Segment& segment, int p) const {
    return Elements::Bound(segment, p, node_.size_);
  }

  const char* slot(const Segment& segment, int p, int64_t at) const {
    return node_.slot(p, segment.number) + at * wire_item_;
  }

  // Elements are combined in the order of the ranks, whoever owns them: results do not
  // depend, even in their last bit, on where a leaf comes to lie in its bucket.
  void ReduceBlock(const Segment& segment, char* leaf, int64_t at, int64_t n) {
    const CombineFn combine = k_.combine[how_.wire][how_.op];
    const int r = node_.rank_;
    char* own = leaf;
    if (encoded_) {
      Encode(leaf, n);
      own = half();
    }
    if (r == 1) {
      combine(slot(segment, 0, at), own, n);
    } else if (r > 1) {
      std::memcpy(prefix(), slot(segment, 0, at), static_cast<size_t>(n * wire_item_));
      for (int p = 1; p < r; ++p) combine(slot(segment, p, at), prefix(), n);
      combine(prefix(), own, n);
    }
    for (int p = r + 1; p < node_.size_; ++p) combine(slot(segment, p, at), own, n);
    if (how_.divisor > 1) k_.divide[how_.wire](own, n, how_.divisor);
    write_(node_.slot(r, segment.number) + at * wire_item_, own, n * wire_item_);
    if (encoded_) k_.decode[how_.wire](own, reinterpret_cast<float*>(leaf), n, 1.0f, 1);
  }

  // Sums and products of 16-bit floats, in float32 and rounded once.
  void ReduceWide(const Segment& segment, char* leaf, int64_t at, int64_t n) {
    float* sum = SumWide(leaf, n, node_.rank_, node_.size_,
                         [&](int p) { return slot(segment, p, at); });
    if (how_.divisor > 1) k_.divide[kF32](sum, n, how_.divisor);
    k_.encode[how_.wire](sum, half(), n, 1.0f);
    write_(node_.slot(node_.rank_, segment.number) + at * wire_item_, half(),
           n * wire_item_);
    if (encoded_) {
      k_.decode[how_.wire](half(), reinterpret_cast<float*>(leaf), n, 1.0f, 1);
    } else {
      std::memcpy(leaf, half(), static_cast<size_t>(n * wire_item_));
    }
  }

  Node& node_;
};

int64_t Node::AllReduce(const Reduction& reduction, const std::vector<Leaf>& leaves,
                        int* stranger) {
  const auto item = static_cast<int64_t>(kItemSize[reduction.dtype]);
  const auto wire_item = static_cast<int64_t>(kItemSize[reduction.wire]);
  const int64_t capacity = slot_bytes_ / wire_item;
  Stream stream(leaves, capacity, item);
  Call call(this, reduction);
  Segment now, next;
  int64_t segments = 0;
  choice_.Begin();
  bool more = stream.Next(&now);
  if (more) {
    now.number = ++number_;
    call.Put(now);
  }
  while (more) {
    if ((*stranger = Arrived(now.number, reduction.where)) >= 0) return segments;
    call.Reduce(now);
    if ((more = stream.Next(&next))) {
      next.number = ++number_;
      call.Put(next);
    }
    call.Take(now);
    if (rank_ == 0 && now.count == capacity && slot_bytes_ >= kStreamingBytes) {
      choice_.Segment(StoreChoice::Clock::now());
      control(0).streaming.value.store(choice_.streaming(), std::memory_order_relaxed);
    }
    std::swap(now, next);
    ++segments;
  }
  return segments;
}

}  // namespace jaxcomm
