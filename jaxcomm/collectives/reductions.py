"""The collectives that users call, eagerly or inside jitted functions.

A call plans its tree, or finds the plan of an equal one, and runs the schedule
(`primitives`).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm import compat
from jaxcomm.errors import (
    InvalidOptionError,
    InvalidTreeError,
    UnsupportedDtypeError,
)
from jaxcomm.planning import planner
from jaxcomm.planning.planner import Groups, Terms
from jaxcomm.planning.schedule import LeafSpec, Schedule
from jaxcomm.ranks.communicator import Communicator
from jaxcomm.startup import world
from jaxcomm.tracing import primitives
from jaxcomm.tracing.primitives import run_schedule

Tree = TypeVar("Tree")


def all_reduce(
    tree: Tree,
    *,
    op: str = "mean",
    comm: Communicator | None = None,
    groups: Groups = None,
    bucket_bytes: int | None = None,
    wire_dtype: str | None = None,
    weight: Any = None,
) -> Tree:
    """Reduce every leaf of a tree over all ranks.

    Works on concrete arrays and inside `jit`, `grad`, `vmap`, `scan`, `cond`,
    `while_loop`, `checkpoint`, `custom_jvp` and `custom_vjp`. Its derivative is that
    of `lax.psum` under `pmap`: the all-reduce of the cotangents.

    Args:
      tree: arrays of equal structure, shapes and dtypes on all ranks; any shape, also
        0-d and zero-size; `None` and empty subtrees pass through.
      op: "mean", "sum", "min", "max" or "prod". A mean is the sum divided by the
        number of ranks; for integers the quotient is rounded toward zero.
      comm: the ranks that take part; all by default.
      groups: None, a number of buckets per dtype, a function from leaf path to label,
        or regular expressions. A named group is exactly one bucket per dtype.
      bucket_bytes: fill buckets up to this size; None leaves it to the cost model.
      wire_dtype: "bfloat16" or "float16": float32 leaves travel as 16 bits and every
        addition is done in float32 and rounded to 16 bits. Half the bytes, for an error
        of at most ((1 + u)^(n + 1) - 1) times the sum (for a mean, the mean) of the n
        ranks' absolute values, where u is 2^-8 for bfloat16 and 2^-11 for float16; for
        float16 add n * 2^-24, and note that a sum beyond 65,504 is infinite (a mean
        never is). Other leaves travel as they are.
      weight: a real number, each rank its own, traced or not: with op "mean" the result
        is sum(weight * leaf) / sum(weight), and zeros where all weights are 0. A rank
        of weight 0 adds nothing, even if its leaves are NaN. Floating and complex
        leaves only; 16-bit floats are added in float32.

    Returns:
      A tree of the same structure, shapes and dtypes, bitwise equal on all ranks.

    Raises:
      InvalidTreeError: a leaf is not an array.
      UnsupportedDtypeError: a leaf's dtype cannot be reduced by this op.
      InvalidOptionError: an option has an unusable value.
      ScheduleMismatchError: the ranks' trees or options differ; nothing was sent.
        Inside a user's own `jit` it arrives as jax.errors.JaxRuntimeError with the
        same text.
      StallError: a rank did not come to compare within `timeout`; likewise.
      BrokenCommunicatorError: there was a StallError before.

    Example:
      >>> grads = {"w": jnp.ones(3), "b": jnp.ones(())}
      >>> jaxcomm.all_reduce(grads)["w"]
      Array([1., 1., 1.], dtype=float32)
      >>> int(jaxcomm.all_reduce(1, op="sum")) == jaxcomm.size()
      True
      >>> jax.jit(jaxcomm.all_reduce)(grads)["b"]
      Array(1., dtype=float32)
    """
    comm = comm or world()
    if weight is not None:
        from jaxcomm.collectives import weighted

        return weighted.mean(
            tree,
            weight,
            op=op,
            comm=comm,
            groups=groups,
            bucket_bytes=bucket_bytes,
            wire_dtype=wire_dtype,
        )
    leaves, treedef = jax.tree.flatten(tree)
    key = _plan_key(leaves, treedef, comm, op, groups, bucket_bytes, wire_dtype)
    schedule = planner.find(key) if key is not None else None
    if schedule is None:
        planner.check_options(groups=groups, bucket_bytes=bucket_bytes, op=op)
        paths, leaves, treedef = flatten(tree)
        specs = leaf_specs(paths, leaves)
        for spec in specs:
            comm.backend.check(op, spec.dtype, spec.path)
        schedule = planner.make_schedule(
            specs,
            op=op,
            size=comm.size,
            groups=groups,
            bucket_bytes=bucket_bytes,
            wire_dtype=wire_dtype,
            costs=comm.costs,
            hosts=comm.tier_hosts,
        )
        if key is not None:
            planner.keep(key, schedule)
    return jax.tree.unflatten(treedef, run_schedule(leaves, comm, schedule))


def cache_clear() -> None:
    """Forget all cached schedules, and the programs of eager collectives.

    Equal calls plan equal schedules again. Functions that were compiled keep theirs:
    `DataParallel.clear_cache` and `jax.clear_caches` are for those.

    Example:
      >>> jaxcomm.cache_clear()
      >>> jaxcomm.cache_info().currsize
      0
    """
    planner.cache_clear()
    primitives.cache_clear()


def broadcast(tree: Tree, *, root: int = 0, comm: Communicator | None = None) -> Tree:
    """Give every rank the root's values.

    Args:
      tree: arrays of any dtype, typed PRNG keys included; structure, shapes and dtypes
        are equal on all ranks.
      root: the rank whose values are sent.
      comm: the ranks that take part; all by default.

    Returns:
      A tree of the same structure, shapes and dtypes.

    Raises:
      InvalidOptionError: `root` is not a rank of `comm`.
      InvalidTreeError, ScheduleMismatchError: as `all_reduce`.

    Example:
      >>> jaxcomm.broadcast({"w": jnp.arange(3) + jaxcomm.rank()}, root=0)
      {'w': Array([0, 1, 2], dtype=int32)}
    """
    comm = comm or world()
    if not isinstance(root, int) or not 0 <= root < comm.size:
        raise InvalidOptionError(
            f"root={root!r}; give a rank from 0 to {comm.size - 1}"
        )
    paths, leaves, treedef = flatten(tree)
    data = [words_of(x) for x in leaves]
    specs = leaf_specs(paths, data)
    for spec in specs:
        comm.backend.check("broadcast", spec.dtype, spec.path)
    schedule = planner.make_schedule(
        specs, op="broadcast", size=comm.size, terms=Terms(root=root), costs=comm.costs
    )
    sent = run_schedule(data, comm, schedule)
    out = [like_key(y, x) for y, x in zip(sent, leaves, strict=True)]
    return jax.tree.unflatten(treedef, out)


def plan(
    tree: Any,
    *,
    groups: Groups = None,
    bucket_bytes: int | None = None,
    wire_dtype: str | None = None,
    op: str = "mean",
    size: int | None = None,
) -> Schedule:
    """Return the schedule that `all_reduce` would use, without running anything.

    Args:
      tree: arrays or ShapeDtypeStructs.
      groups: as in `all_reduce`.
      bucket_bytes: as in `all_reduce`.
      wire_dtype: as in `all_reduce`.
      op: as in `all_reduce`.
      size: number of ranks; this process's by default.

    Returns:
      The schedule; the same object for equal arguments.

    Raises:
      InvalidTreeError, UnsupportedDtypeError, InvalidOptionError: as `all_reduce`.

    Example:
      >>> tree = {"w": jax.ShapeDtypeStruct((1024, 1024), "float32")}
      >>> schedule = jaxcomm.plan(tree, size=16)
      >>> schedule.nbytes, len(schedule.buckets), schedule.size
      (4194304, 1, 16)
    """
    planner.check_options(groups=groups, bucket_bytes=bucket_bytes, op=op)
    paths, leaves, _ = flatten(tree, abstract=True)
    specs = leaf_specs(paths, leaves)
    for spec in specs:
        world().backend.check(op, spec.dtype, spec.path)
    return planner.make_schedule(
        specs,
        op=op,
        size=world().size if size is None else size,
        groups=groups,
        bucket_bytes=bucket_bytes,
        wire_dtype=wire_dtype,
        costs=world().costs,
        hosts=world().tier_hosts if size in (None, world().size) else 1,
    )


_shape_and_dtype = operator.attrgetter("shape", "dtype")


def _plan_key(
    leaves: Sequence[Any],
    treedef: Any,
    comm: Communicator,
    op: str,
    groups: Groups,
    bucket_bytes: int | None,
    wire_dtype: str | None,
) -> Any:
    """Return what decides a plan, or None where it cannot be told cheaply.

    To find a plan by it costs no walk over the leaves' paths.
    """
    if groups is not None and not isinstance(groups, int):
        return None  # a function's answers may change
    if not all(map(_is_array_type, set(map(type, leaves)))):
        return None  # to be converted or refused
    avals = tuple(map(_shape_and_dtype, leaves))
    options = (op, groups, type(groups), bucket_bytes, type(bucket_bytes), wire_dtype)
    try:
        hash(key := (treedef, avals, comm, options))
    except TypeError:
        return None
    return key


@functools.cache
def _is_array_type(kind: type) -> bool:
    return issubclass(kind, jax.Array | compat.Tracer)


def flatten(tree: Any, *, abstract: bool = False) -> tuple[list[str], list[Any], Any]:
    """Return paths, arrays and treedef; raise InvalidTreeError for a non-array."""
    found, treedef = jax.tree_util.tree_flatten_with_path(tree)
    paths = [jax.tree_util.keystr(path) or "(root)" for path, _ in found]
    leaves = []
    for path, (_, leaf) in zip(paths, found, strict=True):
        if isinstance(leaf, bool | int | float | complex | np.ndarray | np.generic):
            leaf = _to_array(path, leaf)
        shaped = abstract and hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        if not shaped and not isinstance(leaf, jax.Array):
            raise InvalidTreeError(
                f"leaf {path} is not an array but {type(leaf).__name__}: {leaf!r:.80}. "
                "Pass arrays only: split other values off first (for instance with "
                "equinox.partition), or convert them with jnp.asarray."
            )
        leaves.append(leaf)
    return paths, leaves, treedef


def leaf_specs(paths: Sequence[str], leaves: Sequence[Any]) -> tuple[LeafSpec, ...]:
    """Describe leaves whose ready order is unknown.

    Backpropagation yields the gradients of the last layers first, so the guess is
    the reverse of the leaves' order.
    """
    names: dict[Any, str] = {}  # a dtype's name is slow to find
    specs = []
    for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        dtype = leaf.dtype
        if dtype not in names:
            if jnp.issubdtype(dtype, jax.dtypes.extended):
                raise UnsupportedDtypeError(
                    f"leaf {path}: dtype {dtype} cannot be reduced; reduce arrays of "
                    "numbers (broadcast takes PRNG keys)"
                )
            names[dtype] = str(dtype)
        specs.append(
            LeafSpec(path, tuple(leaf.shape), names[dtype], len(leaves) - 1 - i)
        )
    return tuple(specs)


def words_of(leaf: Any) -> Any:
    """Return the words of an array of typed PRNG keys; any other array as it is."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def like_key(words: Any, leaf: Any) -> Any:
    """Undo `words_of`, where `leaf` is of typed keys."""
    if not _is_key(leaf):
        return words
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_array(path: str, leaf: Any) -> Any:
    try:
        return jnp.asarray(leaf)
    except (TypeError, ValueError) as error:
        raise InvalidTreeError(
            f"leaf {path}: {type(leaf).__name__} of dtype "
            f"{getattr(leaf, 'dtype', '?')} is not an array JAX can hold: {error}"
        ) from error
