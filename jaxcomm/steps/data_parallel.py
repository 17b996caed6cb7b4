"""`data_parallel`: a function of one rank's data becomes a step of all ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast, overload

import jax
import jax.numpy as jnp

from jaxcomm import compat
from jaxcomm.collectives import replication
from jaxcomm.errors import InvalidOptionError, JaxcommError, ReplicationError
from jaxcomm.planning import planner
from jaxcomm.planning.planner import Groups
from jaxcomm.planning.schedule import Schedule
from jaxcomm.ranks import agreement, threads, topology
from jaxcomm.ranks.communicator import Communicator
from jaxcomm.startup import world
from jaxcomm.steps import replicas
from jaxcomm.steps.stages import Lowered, Traced
from jaxcomm.tracing import rewrite
from jaxcomm.tracing.predicates import kept_equal
from jaxcomm.tracing.primitives import new_token
from jaxcomm.tracing.reading import Reader

log = logging.getLogger(__name__)


class DataParallel:
    """A jitted function whose collectives run on a static schedule.

    Call it like the function it wraps. Every rank passes its own data and gets its
    own results; what went through a collective is equal on all ranks.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        axis_name: str,
        comm: Communicator | None = None,
        groups: Groups = None,
        bucket_bytes: int | None = None,
        wire_dtype: str | None = None,
        donate_argnums: int | Sequence[int] = (),
        static_argnums: int | Sequence[int] = (),
        allow_divergent: bool = False,
        check_replicas: bool | int | None = None,
    ):
        functools.update_wrapper(self, fn)
        self._fn = fn
        self._axis_name = axis_name
        self._comm = comm
        self._groups = groups
        self._bucket_bytes = bucket_bytes
        self._wire_dtype = wire_dtype
        self._allow_divergent = allow_divergent
        self._replicas = replicas.Check(check_replicas)
        self._seen: Signature | None = None  # of the last trace's arguments
        self._schedules: list[Schedule] = []  # of all traces
        # Whether a program was traced that has not run: its first run is waited for.
        self._unchecked = False
        self._call = _Call()
        # Fingerprints of schedules whose predicates' arguments were compared.
        self._compared: set[str] = set()
        # Comparisons for programs that were traced ahead of a call: which leaves they
        # take, of what shapes and dtypes, and the comparison.
        self._postponed: list[tuple[Any, Any, Callable[[], None]]] = []

        # jit reads argument names from the signature, which a bound method cannot take.
        @functools.wraps(fn)
        def program(*args: Any, **kwargs: Any) -> Any:
            return self._trace(args, kwargs, new_token())

        @functools.wraps(fn)
        def part(*args: Any, **kwargs: Any) -> Any:
            return self._as_part(args, kwargs)

        # As a program of its own, its calls are chained by a token and have no effect.
        self._program = jax.jit(
            program, donate_argnums=donate_argnums, static_argnums=static_argnums
        )
        # As part of another, its calls have the effect that orders all calls of that
        # one. Inlined, so that each use has its own calls there; what they are given
        # may be needed again, so nothing is donated.
        self._part = jax.jit(part, static_argnums=static_argnums, inline=True)

    @property
    def schedule(self) -> Schedule:
        """The schedule of the last trace.

        Raises:
          JaxcommError: the function has not been traced yet.
        """
        if not self._schedules:
            raise JaxcommError(
                f"{_name(self._fn)} has no schedule yet: call it once, or .lower() it"
            )
        return self._schedules[-1]

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The schedules of all traces, oldest first."""
        return tuple(self._schedules)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function on this rank's arguments."""
        # To be asked here: inside a jit of ours the answer is always no, and kept.
        if not compat.outside_trace():
            self._communicator().check_usable()
            return self._part(*args, **kwargs)
        return self._run(self._program, args, kwargs)

    def _run(self, program: Any, args: Any, kwargs: Any) -> Any:
        """Call a program of this function; return its result without the token."""
        comm = self._communicator()
        comm.check_usable()
        threads.enter(comm, (args, kwargs))
        before = self._replicas.before(comm, (args, kwargs))
        # For the trace, if this call makes one: it sees no values.
        self._call.given = (args, kwargs)
        try:
            if self._postponed:
                self._compare_postponed()
            out = program(*args, **kwargs)
            if self._unchecked:
                # A failed check of this first run is ours to name; later runs stay
                # asynchronous.
                self._unchecked = False
                jax.block_until_ready(out)
        except compat.CALL_ERRORS as error:
            agreement.raise_failure(error)
            raise
        finally:
            self._call.given = None
        if before is not None:
            self._replicas.compare(comm, before, _name(self._fn))
        return out[0]

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Bind to an instance, so that methods can be decorated."""
        return self if instance is None else BoundDataParallel(self, instance)

    def lower(self, *args: Any, **kwargs: Any) -> Lowered:
        """Lower without running, as `jax.jit(fn).lower`; never waits for other ranks.

        What it compiles to returns the function's result, as a call does.
        """
        return Lowered(self._program.lower(*args, **kwargs), self._run)

    def trace(self, *args: Any, **kwargs: Any) -> Traced:
        """Trace without lowering, as `jax.jit(fn).trace`; never waits for other ranks.

        The jaxpr has one result more: the token that orders the collectives.
        """
        return Traced(self._program.trace(*args, **kwargs), self._run)

    def clear_cache(self) -> None:
        """Forget compiled programs, as `jax.jit(fn).clear_cache()`."""
        self._program.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]

    def __repr__(self) -> str:
        return (
            f"DataParallel({_name(self._fn)}, axis_name={self._axis_name!r}, "
            f"schedules={len(self._schedules)})"
        )

    def _communicator(self) -> Communicator:
        return self._comm or world()

    def _trace(self, args: Any, kwargs: Any, token: Any) -> tuple[Any, Any]:
        """Trace, plan and evaluate; runs when JAX traces a jitted function.

        Returns:
          The function's result, and the last token; None where none was given.
        """
        comm = self._communicator()
        paths, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs))
        leaves = [leaf for _, leaf in paths]
        dynamic = [isinstance(leaf, compat.Tracer) for leaf in leaves]
        inputs = [
            (_argument_path(path), leaf)
            for (path, leaf), traced in zip(paths, dynamic, strict=True)
            if traced
        ]

        def call(*values: Any) -> Any:
            found = iter(values)
            merged = [
                next(found) if traced else leaf
                for leaf, traced in zip(leaves, dynamic, strict=True)
            ]
            a, k = jax.tree.unflatten(treedef, merged)
            return self._fn(*a, **k)

        values = [leaf for _, leaf in inputs]
        topology.check_known(world().rank, world().size)
        self._log_change(Signature.of(paths, treedef))
        try:
            closed, shapes = self._read(call, args, values)
        except NameError as error:  # JAX's answer to an unbound axis name
            if "unbound axis" not in str(error):
                raise
            raise InvalidOptionError(
                f"{_name(self._fn)}, {compat.failing_call(error)}: "
                f"{str(error).rstrip('.')}. It is decorated with "
                f"axis_name={self._axis_name!r}; use that name in its collectives "
                "and in layers such as BatchNorm(axis_name=...)."
            ) from error
        numbers = [k for k, traced in enumerate(dynamic) if traced]
        equal = functools.partial(
            self._kept_equal, closed, (args, kwargs), numbers, shapes
        )
        with _no_garbage():
            # Inside another program nobody compares the arguments' first values.
            top = token is not None
            program = self._plan(closed, inputs, comm, equal if top else None)
            self._check_results(closed, args, shapes)
            out, token = program.run(values, token)
        if top:
            self._compare_equal(program, inputs, numbers, comm)
            wide = functools.partial(equal, arrays=True)
            self._replicas.traced(closed, inputs, wide, self._reader())
        if comm.alone:
            token = None  # a result more costs time on a GPU
        self._unchecked |= token is not None
        return jax.tree.unflatten(jax.tree.structure(shapes), out), token

    def _as_part(self, args: Any, kwargs: Any) -> Any:
        """Trace as part of another program."""
        return self._trace(args, kwargs, None)[0]

    def _read(
        self, call: Callable[..., Any], args: Any, values: Sequence[Any]
    ) -> tuple[Any, Any]:
        """Trace the function of its arrays; return a jaxpr and the results' shapes."""
        del args
        return compat.trace_with_axis(
            call, self._axis_name, self._communicator().size, values
        )

    def _declared(self, args: Any, kwargs: Any) -> Sequence[bool]:
        """Tell of each leaf whether it is declared to be the same on all ranks."""
        return [False] * len(jax.tree.leaves((args, kwargs)))

    def _check_results(self, closed: Any, args: Any, shapes: Any) -> None:
        """Refuse results that are declared equal and may not be."""

    def _reader(self) -> Reader:
        return Reader(self._axis_name, self._communicator())

    def _kept_equal(
        self,
        closed: Any,
        arguments: Any,
        numbers: Sequence[int],
        shapes: Any,
        reader: Reader,
        *,
        arrays: bool = False,
    ) -> frozenset[int]:
        """Find the arguments that are the same on all ranks, if they were once.

        Args:
          closed: the function's jaxpr.
          arguments: (args, kwargs).
          numbers: which of their leaves the jaxpr takes.
          shapes: of the results.
          reader: the function's.
          arrays: whether a first argument that is an array by itself may be one. What
            decides about collectives may not: it may well be this rank's data.
        """
        declared = self._declared(*arguments)
        known = {k for k, number in enumerate(numbers) if declared[number]}
        carried = replicas.carried(arguments, numbers, shapes, arrays=arrays)
        return kept_equal(closed, reader, known, carried)

    def _compare_equal(
        self,
        program: rewrite.Program,
        inputs: Sequence[tuple[str, Any]],
        numbers: Sequence[int],
        comm: Communicator,
    ) -> None:
        """Compare across ranks the arguments that predicates are made of, once.

        If they differ, some ranks do not come to the first call, where schedules are
        compared.
        """
        fingerprint = program.schedule.fingerprint
        if not program.equal_inputs or comm.size == 1 or fingerprint in self._compared:
            return
        if self._call.given is None:  # lowered, or traced, ahead of the first call
            shapes = [(leaf.shape, leaf.dtype) for _, leaf in inputs]
            compare = functools.partial(
                self._compare_equal, program, inputs, numbers, comm
            )
            self._postponed.append((numbers, shapes, compare))
            return
        leaves = jax.tree.leaves(self._call.given)
        mine = {
            inputs[k][0]: replication.describe(leaves[numbers[k]])
            for k in sorted(program.equal_inputs)
        }
        every = comm.all_gather_object(mine)
        if found := replication.difference(every, f"{_name(self._fn)}: argument"):
            raise ReplicationError(
                f"{found}. It decides about collectives that all ranks must call, so "
                "it must be equal on all of them; nothing was sent"
            )
        self._compared.add(fingerprint)

    def _compare_postponed(self) -> None:
        """Compare what a program needs that was traced ahead of this call."""
        leaves = jax.tree.leaves(self._call.given)
        waiting, self._postponed = self._postponed, []
        for numbers, shapes, compare in waiting:
            found = [leaves[k] for k in numbers if k < len(leaves)]
            if [(jnp.shape(x), jnp.result_type(x)) for x in found] == shapes:
                compare()
            else:
                self._postponed.append((numbers, shapes, compare))

    def _plan(
        self,
        closed: Any,
        inputs: Sequence[tuple[str, Any]],
        comm: Communicator,
        equal: Callable[[Reader], frozenset[int]] | None = None,
    ) -> rewrite.Program:
        """Plan what was traced, and keep its schedule."""
        options = rewrite.Options(
            self._axis_name,
            comm,
            self._groups,
            self._bucket_bytes,
            self._wire_dtype,
            self._allow_divergent,
        )
        program = rewrite.program(closed, options, inputs, equal)
        self._schedules.append(program.schedule)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s: %s", _name(self._fn), program.schedule.explain())
        return program

    def _log_change(self, signature: Signature) -> None:
        """Say why a function is traced again."""
        if self._seen is not None:
            change = self._seen.change(signature)
            log.info("%s is traced again: %s", _name(self._fn), change)
        self._seen = signature


class _Call(threading.local):
    """The arguments of the call that each thread is in."""

    given: Any = None


class BoundDataParallel(functools.partial[Any]):
    """A decorated method of an instance, with what a `DataParallel` has.

    The schedules are those of the method, whatever the instances they were traced for.
    """

    @property
    def _method(self) -> DataParallel:
        return cast(DataParallel, self.func)

    @property
    def schedule(self) -> Schedule:
        """As `DataParallel.schedule`."""
        return self._method.schedule

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """As `DataParallel.schedules`."""
        return self._method.schedules

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """Lower without running, as `DataParallel.lower`."""
        return self._method.lower(*self.args, *args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """Trace without lowering, as `DataParallel.trace`."""
        return self._method.trace(*self.args, *args, **kwargs)

    def clear_cache(self) -> None:
        """Forget compiled programs, those for other instances too."""
        self._method.clear_cache()

    def __repr__(self) -> str:
        # An instance may hold a whole model.
        return f"<{self._method!r} of a {type(self.args[0]).__name__}>"


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Put off garbage collection: what a pass makes lives as long as the pass.

    A collection would walk all of it, and all of JAX's objects, to free nothing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclasses.dataclass(frozen=True)
class Signature:
    """What a trace depends on, as far as a user can see it."""

    leaves: tuple[tuple[str, str], ...]
    treedef: Any

    @classmethod
    def of(cls, paths: Sequence[tuple[Any, Any]], treedef: Any) -> Signature:
        """Describe flattened arguments."""

        def show(leaf: Any) -> str:
            if not isinstance(leaf, compat.Tracer):
                return repr(leaf)
            return f"{leaf.dtype}{list(leaf.shape)}"

        return cls(
            tuple((_argument_path(path), show(leaf)) for path, leaf in paths), treedef
        )

    def change(self, new: Signature) -> str:
        """Say in one line which argument differs from the last trace's."""
        before, after = dict(self.leaves), dict(new.leaves)
        for path in [*before, *after]:
            if path not in after:
                return f"argument {path} ({before[path]}) is no more"
            if path not in before:
                return f"argument {path} ({after[path]}) is new"
            if before[path] != after[path]:
                return f"argument {path} was {before[path]} and is {after[path]}"
        if self.treedef != new.treedef:
            return f"the arguments' structure was {self.treedef} and is {new.treedef}"
        return (
            "shapes, dtypes and structure are those of the last trace; a static "
            "argument, a weak type, a sharding or JAX's configuration differs"
        )


@overload
def data_parallel(
    fn: Callable[..., Any],
    *,
    axis_name: str = ...,
    comm: Communicator | None = ...,
    groups: Groups = ...,
    bucket_bytes: int | None = ...,
    wire_dtype: str | None = ...,
    donate_argnums: int | Sequence[int] = ...,
    static_argnums: int | Sequence[int] = ...,
    allow_divergent: bool = ...,
    check_replicas: bool | int | None = ...,
) -> DataParallel: ...
@overload
def data_parallel(
    fn: None = None,
    *,
    axis_name: str = ...,
    comm: Communicator | None = ...,
    groups: Groups = ...,
    bucket_bytes: int | None = ...,
    wire_dtype: str | None = ...,
    donate_argnums: int | Sequence[int] = ...,
    static_argnums: int | Sequence[int] = ...,
    allow_divergent: bool = ...,
    check_replicas: bool | int | None = ...,
) -> Callable[[Callable[..., Any]], DataParallel]: ...


def data_parallel(
    fn: Callable[..., Any] | None = None,
    *,
    axis_name: str = "batch",
    comm: Communicator | None = None,
    groups: Groups = None,
    bucket_bytes: int | None = None,
    wire_dtype: str | None = None,
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
    allow_divergent: bool = False,
    check_replicas: bool | int | None = None,
) -> Any:
    """Jit a function of one rank's data, with its collectives on a static schedule.

    Code written for `jax.pmap` runs unchanged, one process per device, without the
    leading device axis: `lax.psum`, `pmean`, `pmax`, `pmin`, `all_gather`,
    `psum_scatter`, `all_to_all`, `ppermute` and `pbroadcast` over `axis_name` are
    gathered into buckets, in the order in which their operands become ready, and each
    bucket becomes one custom call; `axis_index` is the rank. jaxcomm's own collectives
    may be used inside too.

    Args:
      fn: the function; leave it out to decorate with arguments.
      axis_name: the name that collectives inside use.
      comm: the ranks that take part; all by default.
      groups: as in `all_reduce`, for the function's named-axis reductions. A group
        whose leaves depend on each other is divided where they do.
      bucket_bytes: as in `all_reduce`.
      wire_dtype: as in `all_reduce`, for every float32 reduction of the function over
        its axis, batch statistics too. To send gradients alone in 16 bits, reduce them
        with `all_reduce(grads, wire_dtype=...)` instead.
      donate_argnums: as in `jax.jit`.
      static_argnums: as in `jax.jit`.
      allow_divergent: accept a collective inside a `cond` or `while_loop` whose
        predicate is not provably equal on all ranks. Where it then differs, ranks wait
        for each other forever.
      check_replicas: compare across ranks, in the first call and every hundredth (or
        every n-th, for a number), the arguments that should be the same on all ranks:
        those that the function gives back equal if it is given them equal, as
        parameters are. Equal batches and equal PRNG keys raise a warning. None:
        JAXCOMM_CHECK=replicas says it for all functions.

    Returns:
      A `DataParallel`: a callable with `.schedule`, `.schedules`, `.trace` and
      `.lower`.

    Raises:
      InvalidOptionError: an option has an unusable value, or (when traced) a
        collective uses another axis name, or a `ppermute` has pairs that are no
        partial permutation.
      UnsupportedCollectiveError: when traced: a collective that is not scheduled, or
        that some ranks may not reach.
      ScheduleMismatchError: at the first call: the ranks' schedules differ; raised on
        every rank before anything is sent.
      ReplicationError: `check_replicas` found parameters that differ between ranks, or
        an argument does that decides about a collective.

    Example:
      >>> @jaxcomm.data_parallel(axis_name="batch")
      ... def step(w, x):
      ...     grads = jax.grad(lambda w: jnp.mean(w * x))(w)
      ...     return w - 0.5 * jax.lax.pmean(grads, "batch")
      >>> step(jnp.float32(2), jnp.ones(4))
      Array(1.5, dtype=float32)
      >>> step.schedule.nbytes
      4
    """
    if not isinstance(axis_name, str):
        raise InvalidOptionError(f"axis_name={axis_name!r}; give a string")
    planner.check_options(groups=groups, bucket_bytes=bucket_bytes)
    if wire_dtype is not None:
        planner.wire_name(wire_dtype)
    make = functools.partial(
        DataParallel,
        axis_name=axis_name,
        comm=comm,
        groups=groups,
        bucket_bytes=bucket_bytes,
        wire_dtype=wire_dtype,
        donate_argnums=donate_argnums,
        static_argnums=static_argnums,
        allow_divergent=allow_divergent,
        check_replicas=check_replicas,
    )
    if fn is None:
        return make
    if not callable(fn):
        raise InvalidOptionError(f"data_parallel: {fn!r} is not a function")
    return make(fn)


def _argument_path(path: Any) -> str:
    # (args, kwargs) -> "[0].params['w']" for the first argument, "['x']" by name.
    return jax.tree_util.keystr(path[1:])


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__qualname__", repr(fn))
