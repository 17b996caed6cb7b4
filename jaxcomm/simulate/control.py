"""Control traffic: what ranks tell each other besides gradients, by design.

Closed forms for a training step in which every tensor becomes ready within
`cycles` negotiation cycles. Message counts and sizes follow Horovod's source (commit
2626dc87, 2026-06): `Controller::ComputeResponseList`, `MPIController`,
`ResponseCache`, and the FlatBuffers schema of `message.fbs`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

# A serialised Request: 4-dimensional tensor, 40-character name.
REQUEST_BYTES = 132
# Of the bit vector, beside one bit per cached tensor: shutdown, uncached, invalid.
STATUS_BITS = 3


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Control traffic of one design.

    Attributes:
      design: its name.
      once: control messages of the whole job before the first reduction.
      per_step: control messages of the whole job in every step; not those of watchdogs,
        which come once a second or less.
      bytes_into_rank_0: control bytes that rank 0 receives in every step.
      rounds_per_step: dependent message latencies in every step.
    """

    design: str
    once: int
    per_step: int
    bytes_into_rank_0: int
    rounds_per_step: int


def designs(ranks: int, tensors: int, cycles: int = 1) -> list[Traffic]:
    """Count the control traffic of each design.

    Args:
      ranks: number of processes, 1 or more.
      tensors: gradient tensors per step.
      cycles: negotiation cycles in which a step's tensors become ready.

    Returns:
      Coordinator and workers, response cache, static schedule. A tree collective over
      N ranks counts N - 1 messages one way and ceil(log2 N) rounds; an all-reduce by
      recursive doubling N ceil(log2 N) messages.
    """
    return list(_designs(ranks, tensors, cycles))


def _designs(ranks: int, tensors: int, cycles: int) -> Iterator[Traffic]:
    others = ranks - 1
    rounds = math.ceil(math.log2(ranks)) if ranks > 1 else 0
    # Gather(sizes), Gatherv(requests), Bcast(size), Bcast(responses). The gatherv is
    # linear at the root.
    yield Traffic(
        "coordinator and workers",
        once=0,
        per_step=4 * others * cycles,
        bytes_into_rank_0=others * (tensors * REQUEST_BYTES + 4 * cycles),
        rounds_per_step=(3 * rounds + others) * cycles,
    )
    words = math.ceil((tensors + STATUS_BITS) / 64)
    yield Traffic(
        "response cache",
        once=4 * others * cycles,
        per_step=ranks * rounds * cycles,
        bytes_into_rank_0=8 * words * rounds * cycles,
        rounds_per_step=rounds * cycles,
    )
    yield Traffic(
        "static schedule (jaxcomm)",
        once=ranks * rounds,
        per_step=0,
        bytes_into_rank_0=0,
        rounds_per_step=0,
    )
