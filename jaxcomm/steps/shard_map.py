"""`jaxcomm.shard_map`: jax.shard_map's body and specs for one device per process."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jaxcomm import compat
from jaxcomm.errors import InvalidOptionError, UnsupportedCollectiveError
from jaxcomm.planning.planner import Groups
from jaxcomm.ranks.communicator import Communicator
from jaxcomm.startup import world
from jaxcomm.steps.data_parallel import DataParallel, data_parallel
from jaxcomm.tracing.predicates import equal_results


def shard_map(
    f: Callable[..., Any] | None = None,
    *,
    in_specs: Any,
    out_specs: Any,
    axis_name: str | None = None,
    mesh: Any = None,
    axis_names: Any = None,
    check_vma: bool = True,
    comm: Communicator | None = None,
    groups: Groups = None,
    bucket_bytes: int | None = None,
    wire_dtype: str | None = None,
    donate_argnums: int | Sequence[int] = (),
    allow_divergent: bool = False,
    check_replicas: bool | int | None = None,
) -> Any:
    """Stand in for `jax.shard_map` in a program of one process per device.

    The body and the specs are those of `jax.shard_map`. Each rank passes its own block
    of what is sharded, and the whole of what `P()` says is replicated; `local_block`
    cuts a block out of what all ranks hold. It gets the same of the results. JAX itself
    traces the body, so its checks are made, and gradients are JAX's: inside the body,
    by default, `jax.grad` sums over the ranks where a replicated argument meets what
    varies; with `check_vma=False` it does not.

    Args:
      f: the body; leave it out to decorate with arguments.
      in_specs: a `PartitionSpec` for each argument, or a tree of them that is a prefix
        of the arguments.
      out_specs: likewise for the result.
      axis_name: the axis of the ranks; that of the mesh, or else "batch".
      mesh: None, or a mesh of this one axis, whose devices do not matter.
      axis_names: None, or the one axis.
      check_vma: as in `jax.shard_map`. Without it, what `out_specs` takes for
        replicated must be so for a reason that the program shows, such as a `psum`.
      comm: the ranks that take part; all by default.
      groups: as in `data_parallel`.
      bucket_bytes: as in `data_parallel`.
      wire_dtype: as in `data_parallel`.
      donate_argnums: as in `jax.jit`.
      allow_divergent: as in `data_parallel`; what `out_specs` takes for replicated is
        not looked at either.
      check_replicas: as in `data_parallel`; what `P()` says is replicated is compared.

    Returns:
      A `DataParallel`. Called inside another program, it can be differentiated in
      reverse, with the gradients that `jax.shard_map` gives: those of replicated
      arguments are summed over the ranks.

    Raises:
      InvalidOptionError: an option cannot be used; or, when called, an argument is an
        array of several processes.
      ValueError: from JAX, when traced: the specs do not fit arguments or results.
      UnsupportedCollectiveError, ScheduleMismatchError: as `data_parallel`.

    Example:
      >>> P = jax.sharding.PartitionSpec
      >>> @jaxcomm.shard_map(in_specs=(P(), P("batch")), out_specs=P())
      ... def gradient(w, x):  # of the mean over all ranks' blocks
      ...     return jax.grad(lambda w: jax.lax.pmean(jnp.mean(w * x), "batch"))(w)
      >>> gradient(jnp.float32(2), jnp.ones(4))
      Array(1., dtype=float32)
    """
    axis = _axis(axis_name, mesh, axis_names)
    for name, specs in (("in_specs", in_specs), ("out_specs", out_specs)):
        _check_specs(name, specs, axis)
    make = functools.partial(
        ShardMap,
        specs=_Specs(in_specs, out_specs, check_vma),
        axis_name=axis,
        comm=comm,
        groups=groups,
        bucket_bytes=bucket_bytes,
        wire_dtype=wire_dtype,
        donate_argnums=donate_argnums,
        static_argnums=(),
        allow_divergent=allow_divergent,
        check_replicas=check_replicas,
    )
    # For its checks of the other options.
    data_parallel(axis_name=axis, bucket_bytes=bucket_bytes, wire_dtype=wire_dtype)
    if f is None:
        return make
    if not callable(f):
        raise InvalidOptionError(f"shard_map: {f!r} is not a function")
    return make(f)


def local_block(
    tree: Any,
    spec: Any,
    *,
    axis_name: str = "batch",
    comm: Communicator | None = None,
) -> Any:
    """Return this rank's block of arrays that every rank holds whole.

    Args:
      tree: arrays, with every sharded dimension a multiple of the number of ranks.
      spec: a `PartitionSpec`, or a tree of them that is a prefix of `tree`.
      axis_name: the axis in it that stands for the ranks.
      comm: the ranks; all by default.

    Returns:
      The tree with each array's own block; NumPy's arrays are views.

    Raises:
      InvalidOptionError: a spec has another axis, or more dimensions than its array, or
        a dimension cannot be divided; names the leaf.

    Example:
      >>> whole = jnp.arange(4 * jaxcomm.size())
      >>> jaxcomm.local_block(whole, jax.sharding.PartitionSpec("batch")).shape
      (4,)
    """
    comm = comm or world()
    _check_specs("spec", spec, axis_name)

    def cut(path: Any, leaf: Any, spec: Any) -> Any:
        name = f"local_block: leaf {jax.tree_util.keystr(path) or 'of the tree'}"
        shape = np.shape(leaf)
        if len(spec) > len(shape):
            raise InvalidOptionError(f"{name} has shape {shape}; its spec is {spec}")
        index = [slice(None)] * len(shape)
        for k, sharded in enumerate(_sharded(spec)):
            if not sharded:
                continue
            if shape[k] % comm.size:
                raise InvalidOptionError(
                    f"{name}: dimension {k} of {shape} is no multiple of {comm.size} "
                    "ranks; pad it, and give what was added weight 0"
                )
            block = shape[k] // comm.size
            index[k] = slice(comm.rank * block, (comm.rank + 1) * block)
        return leaf[tuple(index)] if any(_sharded(spec)) else leaf

    specs = _spread("spec", spec, tree)
    return jax.tree_util.tree_map_with_path(cut, tree, specs)


@dataclasses.dataclass(frozen=True)
class _Specs:
    inputs: Any
    outputs: Any
    check_vma: bool


class ShardMap(DataParallel):
    """A jitted function of one rank's blocks, traced by `jax.shard_map`."""

    def __init__(self, fn: Callable[..., Any], *, specs: _Specs, **options: Any):
        self._specs = specs
        super().__init__(fn, **options)

    def __call__(self, *args: Any) -> Any:
        """Run the body on this rank's blocks."""
        if compat.outside_trace() and not all(map(_is_own, jax.tree.leaves(args))):
            path = next(
                path
                for path, leaf in jax.tree_util.tree_leaves_with_path(args)
                if not _is_own(leaf)
            )
            raise InvalidOptionError(
                f"shard_map: argument {jax.tree_util.keystr(path)} is an array of "
                "several processes. Each rank passes its own block, and needs no mesh: "
                "jaxcomm.local_block cuts it out of a whole array"
            )
        return super().__call__(*args)

    def _read(
        self, call: Callable[..., Any], args: Any, values: Sequence[Any]
    ) -> tuple[Any, Any]:
        comm = self._communicator()
        specs = self._flat_specs(args)
        return compat.trace_shard_map(
            self._mapped(call, specs, comm),
            self._axis_name,
            comm.size,
            self._whole(values, specs, comm),
            values,
        )

    def _declared(self, args: Any, kwargs: Any) -> Sequence[bool]:
        del kwargs
        return [not any(_sharded(spec)) for spec in self._flat_specs(args)]

    def _check_results(self, closed: Any, args: Any, shapes: Any) -> None:
        if self._specs.check_vma or self._allow_divergent:  # JAX has seen to it
            return
        specs = _spread("out_specs", self._specs.outputs, shapes)
        whole = [
            not any(_sharded(spec)) for spec in jax.tree.leaves(specs, is_leaf=_is_spec)
        ]
        inputs = {k for k, equal in enumerate(self._declared(args, {})) if equal}
        equal = equal_results(closed, self._reader(), inputs)
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
        for path, declared, found in zip(paths, whole, equal, strict=True):
            if declared and found is None:
                name = jax.tree_util.keystr(path)
                raise UnsupportedCollectiveError(
                    f"shard_map(check_vma=False): out_specs takes result "
                    f"{name or 'of the function'} for equal on all ranks, and nothing "
                    "in the program makes it so. Reduce it over the axis, give it a "
                    "sharded spec, or, if it is equal for another reason, say "
                    "allow_divergent=True"
                )

    def _as_part(self, args: Any, kwargs: Any) -> Any:
        """As part of another program, with the derivative that JAX gives it."""
        kept: dict[str, Any] = {}

        @jax.custom_vjp
        def part(*args: Any) -> Any:
            return self._trace(args, {}, None)[0]

        def forward(*args: Any) -> tuple[Any, Any]:
            return self._forward(args, kept)

        def backward(residuals: Any, cotangents: Any) -> Any:
            return self._backward(residuals, cotangents, kept)

        part.defvjp(forward, backward)
        return part(*args, **kwargs)

    def _forward(self, args: Any, kept: dict[str, Any]) -> tuple[Any, Any]:
        comm = self._communicator()
        values, treedef = jax.tree.flatten(args)
        specs = self._flat_specs(args)

        def call(*values: Any) -> Any:
            return self._fn(*jax.tree.unflatten(treedef, values))

        mapped = self._mapped(call, specs, comm)
        whole = self._whole(values, specs, comm)
        closed, shapes = compat.trace_shard_map(
            lambda *values: jax.vjp(mapped, *values),
            self._axis_name,
            comm.size,
            whole,
            values,
        )
        paths = jax.tree_util.tree_leaves_with_path(args)
        inputs = [(jax.tree_util.keystr(p), leaf) for p, leaf in paths]
        flat, _ = self._plan(closed, inputs, comm).run(values)
        results, residuals = shapes
        count = len(jax.tree.leaves(results))
        kept["args"] = treedef, values
        kept["results"] = results
        kept["residuals"] = residuals
        out = jax.tree.unflatten(jax.tree.structure(results), flat[:count])
        return out, flat[count:]

    def _backward(self, residuals: Any, cotangents: Any, kept: dict[str, Any]) -> Any:
        comm = self._communicator()
        treedef, primals = kept["args"]
        whole, vjp = jax.tree.flatten(kept["residuals"])
        results, structure = jax.tree.flatten(kept["results"])
        given = jax.tree.leaves(cotangents)
        # Of integers there is no derivative; JAX stands zeros of no size in for them.
        smooth = [ct.dtype != jax.dtypes.float0 for ct in given]

        def pull(*values: Any) -> Any:
            held, tangents = values[: len(whole)], iter(values[len(whole) :])
            full = [
                next(tangents) if has else np.zeros(result.shape, jax.dtypes.float0)
                for has, result in zip(smooth, results, strict=True)
            ]
            back = jax.tree.unflatten(vjp, held)(jax.tree.unflatten(structure, full))
            return [ct for ct in back if ct.dtype != jax.dtypes.float0]

        given = [ct for ct, has in zip(given, smooth, strict=True) if has]
        shapes = [
            jax.ShapeDtypeStruct(result.shape, ct.dtype)
            for result, ct in zip(
                [r for r, has in zip(results, smooth, strict=True) if has],
                given,
                strict=True,
            )
        ]
        values = [*residuals, *given]
        inexact = [jnp.issubdtype(jnp.result_type(p), jnp.inexact) for p in primals]
        closed, _ = compat.trace_shard_map(
            pull,
            self._axis_name,
            comm.size,
            [*whole, *shapes],
            values,
            [p for p, has in zip(primals, inexact, strict=True) if has],
        )
        inputs = [("", value) for value in values]
        flat, _ = self._plan(closed, inputs, comm).run(values)
        found = iter(flat)
        back = [next(found) if has else None for has in inexact]
        return jax.tree.unflatten(treedef, back)

    def _mapped(
        self, call: Callable[..., Any], specs: list[Any], comm: Communicator
    ) -> Callable[..., Any]:
        mesh = AbstractMesh(
            (comm.size,), (self._axis_name,), axis_types=(AxisType.Auto,)
        )
        return jax.shard_map(
            call,
            mesh=mesh,
            in_specs=tuple(specs),
            out_specs=self._specs.outputs,
            check_vma=self._specs.check_vma,
        )

    def _flat_specs(self, args: Any) -> list[Any]:
        specs = self._specs.inputs
        if _is_spec(specs):
            specs = (specs,) * len(args)
        if isinstance(specs, list):
            specs = tuple(specs)
        if not isinstance(specs, tuple) or len(specs) != len(args):
            raise InvalidOptionError(
                f"shard_map: in_specs has {len(specs)} entries for {len(args)} "
                "arguments; give one each, or one for all"
            )
        spread = _spread("in_specs", specs, args)
        return jax.tree.leaves(spread, is_leaf=_is_spec)

    @staticmethod
    def _whole(
        values: Sequence[Any], specs: list[Any], comm: Communicator
    ) -> list[jax.ShapeDtypeStruct]:
        """Return the shapes of whole arrays."""
        whole = []
        for value, spec in zip(values, specs, strict=True):
            shape = list(jnp.shape(value))
            for k, sharded in enumerate(_sharded(spec)[: len(shape)]):
                if sharded:
                    shape[k] *= comm.size
            whole.append(jax.ShapeDtypeStruct(tuple(shape), jnp.result_type(value)))
        return whole


def _is_own(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def _axis(axis_name: str | None, mesh: Any, axis_names: Any) -> str:
    """Return the one axis that an option, the mesh or `axis_names` names."""
    found = [] if axis_name is None else [axis_name]
    if mesh is not None:
        large = [name for name in mesh.axis_names if mesh.shape[name] > 1]
        if len(mesh.axis_names) > 1 and len(large) > 1:
            raise InvalidOptionError(
                f"shard_map(mesh=...): it has axes {mesh.axis_names}, and the ranks "
                "are one axis; leave mesh out, or give one of a single axis"
            )
        found += large or list(mesh.axis_names[:1])
    found += list(axis_names or ())
    if len(set(found)) > 1:
        raise InvalidOptionError(
            f"shard_map: axis_name, mesh and axis_names name {sorted(set(found))}; the "
            "ranks are one axis"
        )
    name = found[0] if found else "batch"
    if not isinstance(name, str):
        raise InvalidOptionError(f"axis_name={name!r}; give a string")
    return name


def _is_spec(value: Any) -> bool:
    return isinstance(value, PartitionSpec)


def _check_specs(what: str, specs: Any, axis: str) -> None:
    for spec in jax.tree.leaves(specs, is_leaf=_is_spec):
        if not _is_spec(spec):
            raise InvalidOptionError(f"{what}: {spec!r} is no PartitionSpec")
        names = [
            name
            for part in spec
            for name in (part if isinstance(part, tuple) else (part,))
            if name is not None
        ]
        if strange := [name for name in names if name != axis]:
            raise InvalidOptionError(
                f"{what}: {spec} has axis {strange[0]!r}, and the ranks' is {axis!r}"
            )


def _sharded(spec: Any) -> list[bool]:
    """Say of each dimension whether a spec divides it among the ranks."""
    return [part is not None and part != () for part in spec]


def _spread(what: str, specs: Any, tree: Any) -> Any:
    """Give each leaf of a tree the spec of the prefix above it."""
    try:
        return jax.tree.map(
            lambda spec, part: jax.tree.map(lambda _: spec, part),
            specs,
            tree,
            is_leaf=_is_spec,
        )
    except ValueError as error:
        raise InvalidOptionError(
            f"{what} = {specs} is no prefix of the tree it is for: {error}"
        ) from error
