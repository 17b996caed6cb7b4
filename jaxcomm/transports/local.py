"""Transport of a single rank: every collective is the identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxcomm.transports.base import Call, check_dtype


class Local:
    """One rank: nothing travels."""

    name = "local"

    def check(self, op: str, dtype: str, path: str) -> None:
        """Refuse what several ranks would refuse, so that code stays portable."""
        check_dtype(self.name, op, dtype, path)

    def lower(self, ctx: Any, call: Call, values: Sequence[Any]) -> Sequence[Any]:
        """Return the operands."""
        return values
