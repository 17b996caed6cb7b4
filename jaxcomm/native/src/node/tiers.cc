#include "tiers.h"

#include <algorithm>
#include <utility>

namespace jaxcomm {
namespace {

// Messages between hosts should not become smaller by it that a segment has many parts.
constexpr int64_t kLeastMessage = 16 << 10;

std::vector<int> RanksOf(const std::vector<int>& hosts, int host) {
  std::vector<int> ranks;
  for (size_t rank = 0; rank < hosts.size(); ++rank) {
    if (hosts[rank] == host) ranks.push_back(static_cast<int>(rank));
  }
  return ranks;
}

int NumberOfHosts(const std::vector<int>& hosts) {
  return *std::max_element(hosts.begin(), hosts.end()) + 1;
}

int Lanes(const std::vector<int>& hosts) {
  int64_t lanes = static_cast<int64_t>(hosts.size());
  for (int host = 0; host < NumberOfHosts(hosts); ++host) {
    lanes = std::min<int64_t>(lanes, std::count(hosts.begin(), hosts.end(), host));
  }
  return static_cast<int>(lanes);
}

int NumberAmong(const std::vector<int>& ranks, int rank) {
  return static_cast<int>(std::find(ranks.begin(), ranks.end(), rank) - ranks.begin());
}

// The ranks of a lane, one for every host; of a rank in none, those of the last.
std::vector<int> LaneOf(const std::vector<int>& hosts, int lane) {
  const int last = Lanes(hosts) - 1;
  std::vector<int> ranks;
  for (int host = 0; host < NumberOfHosts(hosts); ++host) {
    ranks.push_back(RanksOf(hosts, host)[static_cast<size_t>(std::min(lane, last))]);
  }
  return ranks;
}

}  // namespace

Tiers::Tiers(Mpi* mpi, uint64_t comm, int rank, const std::vector<int>& hosts,
             std::vector<char*> windows, int64_t window_bytes)
    : locals_(RanksOf(hosts, hosts[static_cast<size_t>(rank)])),
      windows_(std::move(windows)),
      local_(NumberAmong(locals_, rank)),
      lanes_(Lanes(hosts)),
      least_part_(kLeastMessage * NumberOfHosts(hosts)),
      slot_bytes_(std::min((window_bytes - kControlBytes) / kSlots, kMaxSlotBytes) / 64 *
                  64),
      exchange_(mpi, comm, LaneOf(hosts, local_), hosts[static_cast<size_t>(rank)],
                slot_bytes_),
      flights_(kSlots),
      scratch_(Elements::kScratchBytes) {}

Where Tiers::where(int rank) const {
  return control(NumberAmong(locals_, rank)).arrived.where;
}

// One bucket's way.
class Tiers::Call : private Elements {
 public:
  Call(Tiers* tiers, const Reduction& how, const std::vector<Leaf>& leaves)
      : Elements(how, tiers->scratch_.data()), t_(*tiers), own_(t_.control(t_.local_)),
        stream_(leaves, t_.slot_bytes_ / wire_item_, item_), segments_(kSlots),
        put_(t_.number_), summed_(put_), taken_(put_) {
    // The last call's has been read by all: every segment of it has been taken.
    own_.arrived.where = how.where;
    // Also what lies in slots as it is may be too large when it is added up.
    if (wide_) wire_reserve_ = Reserve();
    t_.exchange_.Begin({how.wire, how.op, wide_, wire_reserve_, how.divisor},
                       how.algorithm, how.where);
    for (Exchange::Flight& flight : t_.flights_) flight.segment.data = nullptr;
    more_ = stream_.Next(&next_);
  }

  // Does whatever can be done without waiting. Returns as AllReduce.
  int Go(bool* moved) {
    while (more_ && Room()) {
      Put();
      *moved = true;
      if (const int code = Fly(moved); code != 0) return code;
    }
    while (summed_ < put_ && Arrived(summed_ + 1)) {
      if (stranger_ >= 0) return kBroken;
      if (const int code = Sum(); code != 0) return code;
      *moved = true;
    }
    if (const int code = Fly(moved); code != 0) return code;
    while (taken_ < put_ && Settled(taken_ + 1)) {
      Take();
      *moved = true;
    }
    return 0;
  }

  bool Over() const { return !more_ && taken_ == put_; }
  int64_t last() const { return put_; }
  int stranger() const { return stranger_; }

  // Whether another rank of the host has failed in this call, or in an earlier one.
  bool OthersFailed() {
    for (int p = 0; p < size(); ++p) {
      if (t_.control(p).failed.value.load(std::memory_order_acquire) == 0) continue;
      Compare(p);
      return true;
    }
    return false;
  }

 private:
  int size() const { return static_cast<int>(t_.windows_.size()); }
  Segment& segment(int64_t number) {
    return segments_[static_cast<size_t>(number % kSlots)];
  }
  // Small segments take fewer lanes: the same ones on all hosts.
  int Parts(const Segment& segment) const {
    return static_cast<int>(
        std::clamp<int64_t>(segment.count * wire_item_ / t_.least_part_, 1, t_.lanes_));
  }
  int64_t Bound(const Segment& segment, int p) const {
    return Elements::Bound(segment, p, Parts(segment));
  }

  // Whether all have taken what was in the next segment's slot.
  bool Room() {
    for (int p = 0; p < size(); ++p) {
      if (t_.control(p).taken.value.load(std::memory_order_acquire) < put_ + 1 - kSlots) {
        return false;
      }
    }
    return true;
  }

  void Put() {
    std::swap(segment(++put_), next_);
    Segment& now = segment(put_);
    now.number = put_;
    char* slot = t_.slot(t_.local_, put_);
    const int own = t_.local_, parts = Parts(now);
    // The own part stays where it is.
    Elements::Put(now, 0, own < parts ? Bound(now, own) : now.count, slot);
    if (own < parts) Elements::Put(now, Bound(now, own + 1), now.count, slot);
    own_.arrived.value.store(put_, std::memory_order_release);
    more_ = stream_.Next(&next_);
  }

  // Whether this rank can add up its part of a segment, if it has one: all of the host's
  // ranks have put theirs. They wait for the sum before they go on to the next call, so
  // that where they are is safe to read; but they wait for none of a rank without a part.
  bool Arrived(int64_t number) {
    if (t_.local_ >= Parts(segment(number))) return true;
    for (int p = 0; p < size(); ++p) {
      if (t_.control(p).arrived.value.load(std::memory_order_acquire) < number) {
        return false;
      }
    }
    for (int p = 0; p < size(); ++p) Compare(p);
    return true;
  }

  void Compare(int p) {
    if (t_.control(p).arrived.where != how_.where) {
      stranger_ = t_.locals_[static_cast<size_t>(p)];
    }
  }

  // Adds up the own part, in the own slot, and sends it on its way.
  int Sum() {
    const Segment& now = segment(++summed_);
    if (t_.local_ >= Parts(now)) return 0;
    if (InPlace(now)) return Start(now, {now.pieces[0].data, now.count});
    const int64_t from = Bound(now, t_.local_), to = Bound(now, t_.local_ + 1);
    ForEachBlock(now, from, to, [&](char* leaf, int64_t at, int64_t n) {
      const auto slot = [&](int p) { return t_.slot(p, now.number) + at * wire_item_; };
      char* sum = slot(t_.local_);
      if (wide_) {
        float* wide = SumWide(leaf, n, t_.local_, size(), slot);
        k_.encode[how_.wire](wide, sum, n, 1.0f / static_cast<float>(wire_reserve_));
        return;
      }
      if (encoded_) Encode(leaf, n);
      for (int p = 0; p < size(); ++p) {
        const char* part = p != t_.local_ ? slot(p) : encoded_ ? half() : leaf;
        if (p == 0) {
          std::memcpy(sum, part, static_cast<size_t>(n * wire_item_));
        } else {
          k_.combine[how_.wire][how_.op](part, sum, n);
        }
      }
    });
    const Leaf part{t_.slot(t_.local_, now.number) + from * wire_item_, to - from};
    return Start(now, part);
  }

  int Start(const Segment& segment, const Leaf& part) {
    return t_.exchange_.Start(&Flight(segment.number), part,
                              static_cast<size_t>(segment.number));
  }

  // Whether a segment can travel from where it lies: nobody else of the host adds to it.
  bool InPlace(const Segment& segment) const {
    return size() == 1 && segment.pieces.size() == 1 && !encoded_ && wire_reserve_ == 1;
  }

  Exchange::Flight& Flight(int64_t number) {
    return t_.flights_[static_cast<size_t>(number % kSlots)];
  }

  int Fly(bool* moved) {
    for (int64_t number = taken_ + 1; number <= summed_; ++number) {
      if (Flight(number).segment.data == nullptr) continue;
      bool over = false;
      const int code = t_.exchange_.Advance(&Flight(number), moved, &over);
      if (code != 0) return code;
      if (over) {
        own_.settled[number % kSlots].value.store(number, std::memory_order_release);
      }
    }
    return 0;
  }

  bool Settled(int64_t number) {
    for (int p = 0; p < Parts(segment(number)); ++p) {
      const Flag& settled = t_.control(p).settled[number % kSlots];
      if (settled.value.load(std::memory_order_acquire) < number) return false;
    }
    return true;
  }

  void Take() {
    const Segment& now = segment(taken_ + 1);
    for (int p = 0; p < Parts(now) && !InPlace(now); ++p) {
      Elements::Take(now, Bound(now, p), Bound(now, p + 1), t_.slot(p, now.number));
    }
    own_.taken.value.store(++taken_, std::memory_order_release);
  }

  Tiers& t_;
  Control& own_;
  Stream stream_;
  std::vector<Segment> segments_;  // by slot
  int wire_reserve_ = 1;           // what sums between hosts are divided by
  Segment next_;                   // to put
  bool more_ = false;              // whether there is one
  // The last segment that has been put, added up within the host, and taken.
  int64_t put_, summed_, taken_;
  int stranger_ = -1;
};

int Tiers::AllReduce(const Reduction& reduction, const std::vector<Leaf>& leaves,
                     int* stranger) {
  Call call(this, reduction, leaves);
  Patience patience;
  int code = 0;
  while (code == 0 && !call.Over()) {
    bool moved = false;
    code = call.Go(&moved);
    if (moved) {
      patience.Renew();
    } else if (code == 0) {
      if (call.OthersFailed()) code = kBroken;
      patience.Wait();
    }
  }
  number_ = call.last();
  *stranger = call.stranger();
  if (code != 0) {
    control(local_).failed.value.store(1, std::memory_order_release);
  }
  return code;
}

}  // namespace jaxcomm
