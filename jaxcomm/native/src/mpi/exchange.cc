#include "exchange.h"

#include <cstring>

#include "kernels.h"

namespace jaxcomm {

void Exchange::Begin(const Sum& sum, Algorithm algorithm, const Where& where) {
  sum_ = sum;
  algorithm_ = size_ == 2 ? kDoubling : algorithm;
  const auto mixed = (static_cast<uint64_t>(where.schedule) ^
                      static_cast<uint64_t>(where.bucket) * 0x9E3779B97F4A7C15u);
  site_ = static_cast<int>(mixed * 0x9E3779B97F4A7C15u >> 48);
}

int Exchange::Steps() const {
  if (algorithm_ == kRing) return 2 * (size_ - 1);
  if (algorithm_ == kPairwise) return 2;
  int steps = Extra() > 0 ? 2 : 0;
  for (int distance = 1; distance < half_; distance *= 2) ++steps;
  return steps;
}

int Exchange::Start(Flight* flight, const Leaf& segment, size_t number) {
  flight->segment = segment;
  flight->step = 0;
  // Messages of one tag arrive in the order in which they were sent, so tags may come
  // again; MPI promises that those below 32,768 exist.
  // From where in the program they are is in the tag, as far as there is room: a call that
  // meets another is left waiting, and found out, where it would take the other's numbers.
  const int tags = std::max(32768 / Steps(), 1);
  const int sites = std::clamp(tags / kFlights, 1, 64);
  const int each = tags / sites;
  flight->tag = (site_ % sites * each + static_cast<int>(number % each)) * Steps();
  if (algorithm_ == kDoubling && sum_.wide) {
    flight->wide.resize(static_cast<size_t>(segment.count));
    ChosenKernels().decode[sum_.dtype](segment.data, flight->wide.data(), segment.count,
                                       static_cast<float>(sum_.reserve), 1);
  }
  return Step(flight);
}

int Exchange::Advance(Flight* flight, bool* moved, bool* over) {
  while (true) {
    while (flight->open > 0) {
      bool done = false;
      const int code = mpi_->Test(&flight->requests[flight->open - 1], &done);
      if (code != 0) return code;
      if (!done) return 0;
      --flight->open;
    }
    *moved = true;
    Arrived(flight);
    if (++flight->step == Steps()) {
      flight->segment.data = nullptr;
      *over = true;
      return 0;
    }
    if (const int code = Step(flight); code != 0) return code;
    // A step in which this member has nothing to do is over at once.
    if (flight->open > 0) return 0;
  }
}

int Exchange::Step(Flight* flight) {
  flight->requests.clear();
  const int code = algorithm_ == kRing       ? StepOfRing(flight)
                   : algorithm_ == kPairwise ? StepPairwise(flight)
                                             : StepDoubling(flight);
  flight->open = flight->requests.size();
  return code;
}

int Exchange::Send(Flight* flight, int member, const Leaf& what) {
  const auto bytes = static_cast<int>(what.count);
  flight->requests.emplace_back();
  messages_.fetch_add(1, std::memory_order_relaxed);
  bytes_.fetch_add(bytes, std::memory_order_relaxed);
  return mpi_->StartSend(what.data, bytes, members_[static_cast<size_t>(member)],
                         flight->tag + flight->step, comm_, &flight->requests.back());
}

int Exchange::Receive(Flight* flight, int member, const Leaf& what) {
  flight->requests.emplace_back();
  return mpi_->StartReceive(what.data, static_cast<int>(what.count),
                            members_[static_cast<size_t>(member)],
                            flight->tag + flight->step, comm_, &flight->requests.back());
}

// A block's elements, or a segment's, in bytes.
Leaf Exchange::Block(const Leaf& segment, int block) const {
  const int64_t start = segment.count * block / size_;
  const int64_t end = segment.count * (block + 1) / size_;
  return {segment.data + start * item(), (end - start) * item()};
}

char* Exchange::Received(Flight* flight, int64_t bytes) const {
  if (flight->received.size() < static_cast<size_t>(bytes)) {
    flight->received.resize(static_cast<size_t>(bytes));
  }
  return flight->received.data();
}

int Exchange::StepOfRing(Flight* flight) {
  Leaf in = Block(flight->segment, RingReceived(flight->step));
  if (flight->step < size_ - 1) in.data = Received(flight, in.count);
  if (const int code = Receive(flight, Around(place_ - 1), in); code != 0) return code;
  return Send(flight, Around(place_ + 1), Block(flight->segment, RingSent(flight->step)));
}

int Exchange::StepPairwise(Flight* flight) {
  const bool adding = flight->step == 0;
  const Leaf own = Block(flight->segment, place_);
  char* received = adding ? Received(flight, (size_ - 1) * own.count) : nullptr;
  for (int k = 1; k < size_; ++k) {
    const int from = Around(place_ - k);
    Leaf in = Block(flight->segment, from);
    if (adding) in = {received + (k - 1) * own.count, own.count};
    if (const int code = Receive(flight, from, in); code != 0) return code;
  }
  for (int k = 1; k < size_; ++k) {
    const int to = Around(place_ + k);
    const Leaf out = adding ? Block(flight->segment, to) : own;
    if (const int code = Send(flight, to, out); code != 0) return code;
  }
  return 0;
}

Exchange::Partner Exchange::PartnerIn(int step) const {
  const bool paired = place_ < 2 * Extra(), second = paired && place_ % 2 == 1;
  if (Extra() > 0) {
    const bool first_step = step == 0, last_step = step == Steps() - 1;
    if (first_step || last_step) {
      // The second of a pair gives what it has, and gets the result.
      if (!paired) return {};
      const bool sends = second == first_step;
      return {second ? place_ - 1 : place_ + 1, sends, !sends};
    }
    if (second) return {};
    --step;
  }
  const int node = paired ? place_ / 2 : place_ - Extra();
  return {MemberOf(node ^ 1 << step), true, true};
}

int Exchange::StepDoubling(Flight* flight) {
  const Partner partner = PartnerIn(flight->step);
  Leaf all{flight->segment.data, flight->segment.count * item()};
  if (sum_.wide) {
    all = {reinterpret_cast<char*>(flight->wide.data()),
           flight->segment.count * static_cast<int64_t>(sizeof(float))};
  }
  if (partner.receives) {
    Leaf in = all;
    const bool result = !partner.sends && flight->step > 0;
    if (!result) in.data = Received(flight, all.count);
    if (const int code = Receive(flight, partner.member, in); code != 0) return code;
  }
  return partner.sends ? Send(flight, partner.member, all) : 0;
}

// Adds up what a step has brought, if it is not a sum already.
void Exchange::Arrived(Flight* flight) {
  if (algorithm_ == kDoubling) {
    AddDoubling(flight);
  } else if (algorithm_ == kPairwise) {
    if (flight->step == 0) AddPairwise(flight);
  } else if (flight->step < size_ - 1) {
    const Leaf block = Block(flight->segment, RingReceived(flight->step));
    ChosenKernels().combine[sum_.dtype][sum_.op](flight->received.data(), block.data,
                                                 block.count / item());
  }
}

void Exchange::AddPairwise(Flight* flight) {
  const Leaf own = Block(flight->segment, place_);
  const int64_t n = own.count / item();
  std::vector<char*> parts(static_cast<size_t>(size_), own.data);
  for (int k = 1; k < size_; ++k) {
    parts[static_cast<size_t>(Around(place_ - k))] =
        flight->received.data() + (k - 1) * own.count;
  }
  if (!sum_.wide) {
    AddUp(&parts, sum_.dtype, n);
    if (place_ > 0) std::memcpy(own.data, parts[0], static_cast<size_t>(own.count));
    if (sum_.divisor > 1) ChosenKernels().divide[sum_.dtype](own.data, n, sum_.divisor);
    return;
  }
  flight->wide.resize(static_cast<size_t>(size_ * n));
  for (int member = 0; member < size_; ++member) {
    float* to = flight->wide.data() + member * n;
    char*& part = parts[static_cast<size_t>(member)];
    ChosenKernels().decode[sum_.dtype](part, to, n, static_cast<float>(sum_.reserve), 1);
    part = reinterpret_cast<char*>(to);
  }
  AddUp(&parts, kF32, n);
  Finish(flight->wide.data(), own.data, n);
}

// Combines all members' n elements, as doubling does; the result is the first's.
void Exchange::AddUp(std::vector<char*>* parts, DType dtype, int64_t n) const {
  const CombineFn combine = ChosenKernels().combine[dtype][sum_.op];
  const auto part = [&](int member) { return (*parts)[static_cast<size_t>(member)]; };
  for (int pair = 0; pair < Extra(); ++pair) {
    combine(part(2 * pair + 1), part(2 * pair), n);
  }
  for (int distance = 1; distance < half_; distance *= 2) {
    for (int node = 0; node < half_; node += 2 * distance) {
      combine(part(MemberOf(node + distance)), part(MemberOf(node)), n);
    }
  }
}

void Exchange::AddDoubling(Flight* flight) {
  const DType dtype = sum_.wide ? kF32 : sum_.dtype;
  const int64_t n = flight->segment.count;
  char* own = sum_.wide ? reinterpret_cast<char*>(flight->wide.data())
                        : flight->segment.data;
  const Partner partner = PartnerIn(flight->step);
  const bool result = !partner.sends && flight->step > 0;
  if (partner.receives && !result) {
    const CombineFn combine = ChosenKernels().combine[dtype][sum_.op];
    char* other = flight->received.data();
    if (place_ < partner.member) {
      combine(other, own, n);
    } else {  // in the same order as the other member: NaNs are equal on all, too
      combine(own, other, n);
      std::memcpy(own, other, static_cast<size_t>(n) * kItemSize[dtype]);
    }
  }
  if (flight->step + 1 < Steps()) return;
  if (sum_.wide) {
    Finish(flight->wide.data(), flight->segment.data, n);
  } else if (sum_.divisor > 1) {
    ChosenKernels().divide[dtype](own, n, sum_.divisor);
  }
}

// Makes a wide sum what was asked for.
void Exchange::Finish(float* wide, char* to, int64_t n) const {
  if (sum_.divisor > 1) {
    ChosenKernels().divide[kF32](wide, n, sum_.divisor);
  }
  ChosenKernels().encode[sum_.dtype](wide, to, n, 1.0f);
}

}  // namespace jaxcomm
