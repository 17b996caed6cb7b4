// What Python and this library must agree on. Python reads a part of it and compares the
// rest with its own (jaxcomm/native/constants.py), before it calls anything else.

#include <cstdint>

#include "api.h"
#include "callbacks.h"
#include "communicator.h"
#include "exit.h"
#include "nccl.h"
#include "nccl_abi.h"
#include "node.h"
#include "progress.h"
#include "tiers.h"
#include "timeline.h"
#include "types.h"

namespace jaxcomm {

struct Constant {
  const char* name;  // "group.member" or a name alone; null after the last one
  int64_t value;
};

namespace {

#define JAXCOMM_DTYPE(enumerator, name, bytes) {"dtype." name, enumerator},
#define JAXCOMM_OP(enumerator, name) {"op." name, enumerator},
#define JAXCOMM_MOVE(enumerator, name) {"move." name, enumerator},
#define JAXCOMM_ALGORITHM(enumerator, name) {"algorithm." name, enumerator},
#define JAXCOMM_COUNTER(enumerator, name) {"counter." name, kFirstCounter + enumerator},
#define JAXCOMM_NCCL_COUNTER(enumerator, name) \
  {"nccl_counter." name, kNcclFirstCounter + enumerator},

constexpr Constant kConstants[] = {
    {"abi", kAbi},
    JAXCOMM_DTYPES(JAXCOMM_DTYPE)
    JAXCOMM_OPS(JAXCOMM_OP)
    JAXCOMM_MOVES(JAXCOMM_MOVE)
    JAXCOMM_ALGORITHMS(JAXCOMM_ALGORITHM)
    {"counter.calls", kCallsColumn},
    {"counter.nanoseconds", kNanosecondsColumn},
    JAXCOMM_COUNTERS(JAXCOMM_COUNTER)
    {"nccl_counter.calls", kNcclCallsColumn},
    JAXCOMM_NCCL_COUNTERS(JAXCOMM_NCCL_COUNTER)
    {"nccl_op.sum", kNcclSum},
    {"nccl_op.prod", kNcclProd},
    {"nccl_op.max", kNcclMax},
    {"nccl_op.min", kNcclMin},
    {"nccl_op.avg", kNcclAvg},
    {"exit.stalled", kStalled},
    {"place_bits", kPlaceBits},
    {"progress_columns", Progress::kColumns},
    {"window.control_bytes", Node::kControlBytes},
    {"window.slots", Node::kSlots},
    {"window.max_slot_bytes", Node::kMaxSlotBytes},
    {"tiers.control_bytes", Tiers::kControlBytes},
    {"tiers.slots", Tiers::kSlots},
    {"tiers.max_slot_bytes", Tiers::kMaxSlotBytes},
    {"sizeof.MpiHandles", sizeof(MpiHandles)},
    {"sizeof.Where", sizeof(Where)},
    {"sizeof.Event", sizeof(Event)},
    {"sizeof.NcclUniqueId", sizeof(NcclUniqueId)},
    {nullptr, 0},
};

}  // namespace

JAXCOMM_API const Constant* jaxcomm_constants() { return kConstants; }

}  // namespace jaxcomm
