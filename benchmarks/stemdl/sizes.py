"""What the STEMDL benchmark trains: shapes as in examples/stemdl/README.md."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """One network's inputs, the same for every number of ranks.

    Attributes:
      scan: probes along each side of the scan; scan^2 patterns are one sample.
      pixels: side of the detector and of the label.
      batch: samples per rank.
      calls: steps of one timed block.
    """

    scan: int
    pixels: int
    batch: int
    calls: int


SIZES = {
    "tiny": Size(4, 32, 8, 10),
    "small": Size(8, 64, 4, 3),
    "medium": Size(8, 128, 1, 1),
    # For tests: in seconds.
    "toy": Size(2, 16, 2, 4),
}
