// What a bucket's call does, apart from XLA.
#pragma once

#include <cstdint>
#include <vector>

#include "communicator.h"

namespace jaxcomm {

// How the leaves of a bucket are reduced.
struct Reduction {
  DType dtype;
  Op op;
  int divisor;         // of the sum, for a mean; 1 otherwise
  DType wire;          // what travels: dtype, or a 16-bit float for float32 leaves
  int64_t pack_bytes;  // leaves of at most this size share the staging buffer
  Where where = {};    // compared between ranks of one host
  Algorithm algorithm = kPairwise;  // between hosts, where ranks of a host share memory
};

// In place of an MPI error code: comm->broken says what it was.
constexpr int kBroken = -1;

// Reduces all leaves where they lie. The caller holds comm->mutex. Returns an MPI
// error code, or kBroken.
int AllReduce(Communicator* comm, const Reduction& reduction,
              const std::vector<Leaf>& leaves);

struct Movement {
  Move move;
  DType dtype;       // of a reduce-scatter
  Op op;             // likewise
  int divisor;       // likewise
  int target = -1;   // of a permutation: the rank this one sends to, -1 for none
  int source = -1;   // likewise: the rank it receives from
};

// Moves one leaf of `bytes` bytes per rank: gathered are (bytes) -> (size, bytes),
// scattered (size, bytes) -> (bytes), exchanged (size, bytes) -> (size, bytes), permuted
// (bytes) -> (bytes), where a rank without a source gets zeros. The caller holds
// comm->mutex. Returns an MPI error code.
int MoveLeaf(Communicator* comm, const Movement& movement, const char* from, char* to,
             int64_t bytes);

// Replaces `bytes` bytes by the root's.
int Broadcast(Communicator* comm, int root, char* data, int64_t bytes);

}  // namespace jaxcomm
