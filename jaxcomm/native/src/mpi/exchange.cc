#include "exchange.h"

#include <algorithm>

#include "kernels.h"

namespace jaxcomm {

void Exchange::Begin(DType dtype, Op op, const Where& where) {
  dtype_ = dtype;
  op_ = op;
  const auto mixed = (static_cast<uint64_t>(where.schedule) ^
                      static_cast<uint64_t>(where.bucket) * 0x9E3779B97F4A7C15u);
  place_ = static_cast<int>(mixed * 0x9E3779B97F4A7C15u >> 48);
  // After a failed call: nothing of it is on its way any more that could be helped.
  for (Flight& flight : flights_) flight.segment.data = nullptr;
}

int Exchange::Start(Flight* flight, const Leaf& segment, size_t number) {
  if (flight->received == nullptr) {
    flight->received.reset(new char[static_cast<size_t>(message_bytes_)]);
  }
  flight->segment = segment;
  flight->step = 0;
  // Messages of one tag arrive in the order in which they were sent, so tags may come
  // again; MPI promises that those below 32,768 exist.
  // From where in the program they are is in the tag, as far as there is room: a call that
  // meets another is left waiting, and found out, where it would take the other's numbers.
  const int tags = 32768 / Steps();
  const int places = std::clamp(tags / kFlights, 1, 64);
  const int each = tags / places;
  flight->tag = (place_ % places * each + static_cast<int>(number % each)) * Steps();
  return Step(flight);
}

int Exchange::Advance(Flight* flight, bool* moved, bool* over) {
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
    *over = true;
    return 0;
  }
  return Step(flight);
}

int Exchange::Step(Flight* flight) {
  const auto item = static_cast<int64_t>(kItemSize[dtype_]);
  const bool all = size_ == 2;
  const Leaf out = all ? flight->segment : Block(flight->segment, Sent(flight->step));
  Leaf in = all ? flight->segment : Block(flight->segment, Received(flight->step));
  if (flight->step < size_ - 1) in.data = flight->received.get();
  const int code = mpi_->StartExchange(
      out.data, static_cast<int>(out.count * item), Around(rank_ + 1), in.data,
      static_cast<int>(in.count * item), Around(rank_ - 1), flight->tag + flight->step,
      comm_, flight->requests);
  if (code == 0) flight->open = 2;
  return code;
}

// Adds up what a step has brought, if it is not a sum already.
void Exchange::Arrived(Flight* flight) {
  if (flight->step >= size_ - 1) return;
  const Leaf block = size_ == 2 ? flight->segment
                                : Block(flight->segment, Received(flight->step));
  ChosenKernels().combine[dtype_][op_](flight->received.get(), block.data, block.count);
}

Leaf Exchange::Block(const Leaf& segment, int block) const {
  const int64_t start = segment.count * block / size_;
  const int64_t end = segment.count * (block + 1) / size_;
  return {segment.data + start * static_cast<int64_t>(kItemSize[dtype_]), end - start};
}

}  // namespace jaxcomm
