"""What a transport is: how the buckets of a schedule become custom calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from jaxcomm.errors import UnsupportedDtypeError


@dataclasses.dataclass(frozen=True)
class Call:
    """One bucket's custom call, as static as its HLO.

    Attributes:
      comm: key of the communicator; the same on every rank.
      size: its number of ranks.
      op: "mean", "sum", "min", "max", "prod" or "broadcast".
      digest: 63 bits that name the schedule in the cross-rank check; 0 for none.
      bucket: the bucket's number in its schedule.
      pack_bytes: leaves of at most this many bytes are packed.
      root: sending rank of a broadcast; -1 otherwise.
    """

    comm: int
    size: int
    op: str
    digest: int
    bucket: int
    pack_bytes: int
    root: int


class Transport(Protocol):
    """Lowers buckets. A transport knows arrays and ranks, but no pytrees."""

    name: str

    def check(self, op: str, dtype: str, path: str) -> None:
        """Raise UnsupportedDtypeError if a leaf cannot be reduced this way."""
        ...

    def lower(self, ctx: Any, call: Call, values: Sequence[Any]) -> Sequence[Any]:
        """Emit the bucket's custom calls.

        Args:
          ctx: JAX's lowering context; its last aval is the token's.
          call: what to do.
          values: IR values of the leaves and, last, of the token, which is either
            an HLO token (ordered effect) or a uint32 scalar (ordered by data).

        Returns:
          As many IR values, in the same order.
        """
        ...


def check_dtype(
    transport: str, supported: Sequence[str], op: str, dtype: str, path: str
) -> None:
    """Shared check: broadcast moves bytes, so it takes any dtype."""
    if op != "broadcast" and dtype not in supported:
        raise UnsupportedDtypeError(
            f"leaf {path}: dtype {dtype} cannot be reduced with op={op!r} over "
            f"transport {transport!r}; it reduces {', '.join(supported)}. "
            "Cast the leaf first."
        )
