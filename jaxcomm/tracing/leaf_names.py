"""Name the leaves of a traced function's reductions.

Internal to `rewrite`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxcomm.planning.planner import Terms


@dataclasses.dataclass
class Reduction:
    """One operand of a psum-like equation; urgent if other collectives wait for it."""

    op: str
    operand: Any
    result: Any
    ready: int
    stage: int
    urgent: bool
    where: str
    terms: Terms
    position: int  # of its equation
    path: str = ""

    @property
    def kind(self) -> tuple[tuple[int, ...], str]:
        """Shape and dtype."""
        return tuple(self.operand.aval.shape), str(self.operand.aval.dtype)


def name_leaves(
    reductions: list[Reduction], inputs: Sequence[tuple[str, tuple[int, ...], str]]
) -> None:
    """Name reductions after the inputs they run parallel to, else after their line.

    lax.pmean(grads) gives one reduction per leaf and no path. Gradients have the
    shapes of parameters, in the same order: a run of reductions from one source line
    that matches a stretch of the inputs takes its names.
    """
    runs: list[list[Reduction]] = []
    for r in reductions:
        if runs and runs[-1][-1].where == r.where:
            runs[-1].append(r)
        else:
            runs.append([r])
    starts: dict[Any, list[int]] = {}
    for k, (_, shape, dtype) in enumerate(inputs):
        starts.setdefault((shape, dtype), []).append(k)
    taken: dict[str, int] = {}
    for run in runs:
        want = [r.kind for r in run]
        at = 0
        while at < len(run):
            start, length = _longest_match(want[at:], inputs, starts)
            # A lone scalar would match any other scalar.
            if length == 1 and not want[at][0]:
                length = 0
            for k in range(length):
                run[at + k].path = inputs[start + k][0]
            if length == 0:
                run[at].path = run[at].where
            at += max(length, 1)
        for r in run:
            taken[r.path] = taken.get(r.path, 0) + 1
            if taken[r.path] > 1:
                r.path = f"{r.path}#{taken[r.path]}"


def _longest_match(
    want: list[Any], inputs: Sequence[Any], starts: dict[Any, list[int]]
) -> tuple[int, int]:
    """Find the stretch of inputs that agrees longest with the front of `want`."""
    best = (0, 0)
    for start in starts.get(want[0], []):
        length = 0
        while (
            length < len(want)
            and start + length < len(inputs)
            and inputs[start + length][1:] == want[length]
        ):
            length += 1
        if length > best[1]:
            best = (start, length)
        if length == len(want):
            break
    return best
