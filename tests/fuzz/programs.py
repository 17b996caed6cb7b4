"""Random programs that nest and repeat collectives, and what they must compute.

A program is a tree of lists, to be written as JSON and rebuilt on every rank:

  ["call", kind, add]        x -> x + C(x + add) for one of KINDS
  ["seq", [p, ...]]          one after another
  ["drop", rank, p]          p, whose result one rank does not use
  ["work", rank, equations]  computation of one rank alone, Python's or XLA's
  ["scan", length, p], ["loop", length, p], ["cond", which, p, q], ["vmap", p],
  ["grad", p], ["checkpoint", p], ["jit", p]
  ["nest", axis, p]          a decorated function that does p

The state is a vector of whole numbers in float64. After every step it is taken modulo
97, so sums and gradients stay exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from hypothesis import strategies as st
from jax import lax

# A decorated function's, a bare one's, an optimizer's; over all ranks, over all ranks
# again, and over some of them. "psum" is for bodies of decorated functions.
KINDS = (
    "step",
    "bare",
    "mean",
    "optimizer",
    "again",
    "half",
    "half step",
    "pair",
    "max",
)
OWNERS = ("jit", "decorated", "eager")
SIZE = 3
MODULUS = 97.0
# Calls of one run, with those that loops repeat: gradients grow with each.
BUDGET = 14

Program = Sequence[Any]


class Scope:
    """What may be drawn at one place of a program."""

    def __init__(self, budget: int, **flags: bool):
        self.budget = budget
        self.grad = flags.get("grad", False)  # inside a derivative
        self.batch = flags.get("batch", False)  # inside a vmap
        self.axis = flags.get("axis", False)  # an axis that psum may use
        self.drop = flags.get("drop", True)  # whether a rank may drop a result

    def within(self, share: int = 1, **flags: bool) -> Scope:
        now = {k: v for k, v in vars(self).items() if k != "budget"}
        return Scope(self.budget // share, **{**now, **flags})


@st.composite
def programs(draw: st.DrawFn, size: int) -> dict[str, Any]:
    """A program for some ranks, what owns it, and how it is called."""
    owner = draw(st.sampled_from(OWNERS))
    axis = owner == "decorated" and draw(st.booleans())
    scope = Scope(BUDGET, axis=axis, drop=not axis)
    return {
        "size": size,
        "owner": owner,
        "body": draw(_sequence(scope, size, 3)),
        "times": draw(st.integers(1, 3)),
    }


def _sequence(scope: Scope, size: int, depth: int) -> st.SearchStrategy[Program]:
    @st.composite
    def sequence(draw: st.DrawFn) -> Program:
        count = draw(st.integers(1, 3))
        part = scope.within(share=count)
        return ["seq", [draw(_node(part, size, depth)) for _ in range(count)]]

    return sequence()


@st.composite
def _node(draw: st.DrawFn, scope: Scope, size: int, depth: int) -> Program:
    if depth == 0 or scope.budget < 2:
        return draw(_leaf(scope, size))
    kinds = [
        "call",
        "call",
        "work",
        "scan",
        "cond",
        "jit",
        "nest",
        "checkpoint",
        "vmap",
    ]
    # Reverse-mode differentiation knows no while loop. Of a second derivative, or of a
    # batch of them, a rank that drops a result has calls of other shapes: refused.
    kinds += [] if scope.grad else ["loop"]
    if not scope.grad and not (scope.batch and scope.drop):
        kinds.append("grad")
    if scope.drop and not (scope.grad and scope.batch):
        kinds += ["drop", "drop"]
    kind = draw(st.sampled_from(kinds))
    below = depth - 1
    if kind == "call":
        return draw(_leaf(scope, size))
    if kind == "work":
        return ["work", draw(st.integers(0, size - 1)), draw(st.integers(0, 60))]
    if kind in ("scan", "loop"):
        length = draw(st.integers(1, 3))
        body = draw(_sequence(scope.within(share=length), size, below))
        return [kind, length, body]
    if kind == "cond":
        part = scope.within()
        bodies = [draw(_sequence(part, size, below)) for _ in range(2)]
        return ["cond", draw(st.integers(0, 1)), *bodies]
    if kind == "drop":
        return ["drop", draw(st.integers(0, size - 1)), draw(_node(scope, size, below))]
    if kind == "nest":
        axis = draw(st.sampled_from(["batch", "other"]))
        own = draw(st.booleans())
        inner = scope.within(axis=own, drop=scope.drop and not own)
        return ["nest", axis, draw(_sequence(inner, size, below))]
    flags = {"grad": {"grad": True}, "vmap": {"batch": True}}.get(kind, {})
    if kind == "vmap" and scope.grad:
        flags["drop"] = False
    return [kind, draw(_sequence(scope.within(**flags), size, below))]


@st.composite
def _leaf(draw: st.DrawFn, scope: Scope, size: int) -> Program:
    kinds = [k for k in KINDS if not (k == "max" and scope.grad)]
    kinds += ["psum", "psum"] if scope.axis else []
    return ["call", draw(st.sampled_from(kinds)), draw(st.integers(0, 5))]


class Meaning:
    """What the parts of a program are, on ranks or in the reference.

    Attributes:
      calls: by kind, a function of the state; "psum" also of an axis name.
      choose: from a rank, what it uses instead of a result, and that result, to what
        this rank goes on with.
      work: from a rank, a number and the state to the state, unchanged.
      nest: from an axis name and a function to a decorated function.
    """

    def __init__(
        self,
        calls: Mapping[str, Callable[..., Any]],
        choose: Callable[[int, Any, Any], Any],
        work: Callable[[int, int, Any], Any],
        nest: Callable[[str, Callable[[Any], Any]], Callable[[Any], Any]],
    ):
        self.calls, self.choose, self.work, self.nest = calls, choose, work, nest


def build(program: Program, means: Meaning, axis: str) -> Callable[[Any], Any]:
    """Return the function of the state that a program is; `axis` is psum's."""

    def below(p: Program) -> Callable[[Any], Any]:
        return build(p, means, axis)

    kind, *rest = program
    if kind == "call":
        which, add = rest
        call = means.calls[which]
        if which == "psum":
            return lambda x: _modulo(x + call(x + add, axis))
        return lambda x: _modulo(x + call(x + add))
    if kind == "seq":
        parts = [below(p) for p in rest[0]]

        def sequence(x: Any) -> Any:
            for part in parts:
                x = part(x)
            return x

        return sequence
    if kind == "drop":
        rank, inner = rest[0], below(rest[1])
        return lambda x: means.choose(rank, x + 1, inner(x))
    if kind == "work":
        return lambda x: means.work(rest[0], rest[1], x)
    if kind == "scan":
        length, inner = rest[0], below(rest[1])
        return lambda x: lax.scan(
            lambda c, t: (inner(c + t), None), x, jnp.arange(1.0 * length)
        )[0]
    if kind == "loop":
        length, inner = rest[0], below(rest[1])
        return lambda x: lax.fori_loop(0, jnp.int32(length), lambda _, c: inner(c), x)
    if kind == "cond":
        which, inner, other = rest[0], below(rest[1]), below(rest[2])
        return lambda x: lax.cond(jnp.int32(which) > 0, inner, other, x)
    if kind == "vmap":
        inner = below(rest[0])
        return lambda x: _modulo(jax.vmap(inner)(jnp.stack([x, x + 1])).sum(0))
    if kind == "grad":
        inner = below(rest[0])
        weights = jnp.arange(1.0, 1.0 + SIZE)
        return lambda x: _modulo(x + jax.grad(lambda y: jnp.sum(weights * inner(y)))(x))
    if kind == "nest":
        name, inner = rest[0], build(rest[1], means, rest[0])
        return means.nest(name, inner)
    return {"checkpoint": jax.checkpoint, "jit": jax.jit}[kind](below(rest[0]))


def _modulo(x: Any) -> Any:
    """Keep whole numbers small; its derivative is 1."""
    return x - MODULUS * lax.stop_gradient(jnp.floor(x / MODULUS))


def reference(program: Mapping[str, Any], states: Any) -> Any:
    """Return all ranks' results: one rank each, mapped over a named axis by JAX."""
    size, axis = program["size"], "ranks"

    def within(groups: Sequence[Sequence[int]]) -> Callable[[Any], Any]:
        table = jnp.zeros((size, size))
        for group in groups:
            for member in group:
                table = table.at[member, jnp.array(group)].set(1.0)

        def total(x: Any) -> Any:
            every = lax.all_gather(x, axis)
            return jnp.tensordot(table[lax.axis_index(axis)], every, 1)

        return total

    def everyone(x: Any) -> Any:
        return lax.psum(x, axis)

    halves, pairs = within(halves_of(size)), within(pairs_of(size))
    calls: dict[str, Callable[..., Any]] = dict.fromkeys(KINDS, everyone)
    calls |= {"half": halves, "half step": halves, "pair": pairs}
    calls["max"] = lambda x: lax.pmax(lax.stop_gradient(x), axis)
    calls["psum"] = lambda x, _: everyone(x)
    means = Meaning(
        calls,
        lambda rank, own, x: jnp.where(lax.axis_index(axis) == rank, own, x),
        lambda rank, count, x: x,
        lambda name, function: function,
    )
    function = build(program["body"], means, axis)
    return jax.jit(jax.vmap(function, axis_name=axis))(states)


def halves_of(size: int) -> list[list[int]]:
    """Even and odd ranks."""
    return [list(range(k, size, 2)) for k in range(min(2, size))]


def pairs_of(size: int) -> list[list[int]]:
    """The last two ranks, who share a communicator besides; the others are alone."""
    return [[r] for r in range(size - 2)] + [[size - 2, size - 1]]
