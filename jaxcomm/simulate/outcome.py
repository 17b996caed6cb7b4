"""What a design did in one step."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One step, in seconds from its beginning.

    Attributes:
      end: when the last gradient is reduced on all ranks.
      compute: when the slowest rank has computed.
      control: how long the control plane worked on this step's gradients.
      messages: control messages of the whole job, idle cycles included; a mean where
        they come once in a while.
      waited: mean time of a gradient between being ready everywhere and being released.
      reductions: rounds of negotiation, or buckets where nothing is negotiated.
    """

    end: float
    compute: float
    control: float = 0.0
    messages: float = 0
    waited: float = 0.0
    reductions: int = 0

    @property
    def seconds(self) -> float:
        """The whole step."""
        return max(self.end, self.compute)

    @property
    def exposed(self) -> float:
        """Communication that no computation hides."""
        return max(self.end - self.compute, 0.0)
