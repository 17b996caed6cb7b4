// What a bucket's call does, apart from XLA: reduce or broadcast leaves over MPI.
#pragma once

#include <cstdint>
#include <vector>

#include "communicator.h"

namespace jaxcomm {

struct Leaf {
  char* data;
  int64_t count;
};

// How the leaves of a bucket are reduced.
struct Reduction {
  DType dtype;
  Op op;
  int divisor;         // of the sum, for a mean; 1 otherwise
  DType wire;          // what travels: dtype, or a 16-bit float for float32 leaves
  int64_t pack_bytes;  // leaves of at most this size share the staging buffer
};

// Reduces all leaves where they lie. The caller holds comm->mutex. Returns an MPI
// error code.
int AllReduce(Communicator* comm, const Reduction& reduction,
              const std::vector<Leaf>& leaves);

// Replaces `bytes` bytes by the root's.
int Broadcast(Communicator* comm, int root, char* data, int64_t bytes);

}  // namespace jaxcomm
