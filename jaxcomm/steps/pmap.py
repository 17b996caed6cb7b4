"""`jaxcomm.pmap`: jax.pmap's signature for one device per process.

The module is not named `pmap`, which would hide the function in the package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm import compat
from jaxcomm.errors import InvalidOptionError
from jaxcomm.ranks.communicator import Communicator
from jaxcomm.startup import world
from jaxcomm.steps.data_parallel import DataParallel, data_parallel

# Of an axis that no collective can name.
_NO_NAME = "jaxcomm.pmap without axis_name"


def pmap(
    fn: Callable[..., Any] | None = None,
    axis_name: Any = "batch",
    *,
    in_axes: Any = 0,
    out_axes: Any = 0,
    donate_argnums: int | Sequence[int] = (),
    static_broadcasted_argnums: int | Sequence[int] = (),
    axis_size: int | None = None,
    devices: Sequence[Any] | None = None,
    backend: str | None = None,
    global_arg_shapes: Any = None,
    **options: Any,
) -> Any:
    """Stand in for `jax.pmap` in a program of one process per device.

    The mapped axis has length 1, the number of devices of this process. It is taken
    away, the function runs as under `data_parallel`, and it is put back.

    Args:
      fn: the function; leave it out to decorate with arguments.
      axis_name: the name that collectives inside use; with None there are none.
      in_axes: for each argument 0 (or another axis), or None for one that has no mapped
        axis; an int, or a tuple with an entry per argument, each also a tree of them
        that the argument has as its prefix. Keyword arguments are mapped over axis 0.
      out_axes: likewise for the result. Under None, this rank's value is returned.
      donate_argnums: as in `jax.jit`.
      static_broadcasted_argnums: arguments that are part of the program.
      axis_size: None, 1 (this process's devices) or the number of ranks.
      devices: None, or this process's one device: which that is is decided where the
        process is launched.
      backend: None, or the platform of JAX's running backend.
      global_arg_shapes: ignored, as JAX does.
      **options: as in `data_parallel`: comm, groups, bucket_bytes, wire_dtype,
        allow_divergent.

    Returns:
      A `DataParallel`.

    Raises:
      InvalidOptionError: an option cannot be used; or, when called, a mapped axis is
        not of length 1.
      UnsupportedCollectiveError, ScheduleMismatchError: as `data_parallel`.

    Example:
      >>> @functools.partial(jaxcomm.pmap, axis_name="batch", in_axes=(None, 0))
      ... def step(w, x):
      ...     return jax.lax.pmean(w * x, "batch")
      >>> step(jnp.float32(2), jnp.ones((1, 3)))  # this process's one device
      Array([[2., 2., 2.]], dtype=float32)
    """
    del global_arg_shapes
    if devices is not None and list(devices) != jax.local_devices()[:1]:
        raise InvalidOptionError(
            f"pmap(devices={list(devices)}): each process drives one device, here "
            f"{jax.local_devices()[:1]}; choose it where the process is launched "
            "(jaxcomm run, CUDA_VISIBLE_DEVICES), and leave devices out"
        )
    if backend is not None and backend not in compat.backend_names():
        raise InvalidOptionError(
            f"pmap(backend={backend!r}): JAX runs on "
            f"{' or '.join(map(repr, compat.backend_names()))}; leave backend out, or "
            f"set JAX_PLATFORMS={backend} before JAX is used"
        )
    static = static_broadcasted_argnums
    static = (static,) if isinstance(static, int) else tuple(static)

    def make(function: Callable[..., Any]) -> DataParallel:
        @functools.wraps(function)
        def one(*args: Any, **kwargs: Any) -> Any:
            _check_size(axis_size, options.get("comm"))
            args = _unmapped(args, in_axes, static)
            kwargs = _squeeze(0, kwargs, "keyword argument")
            return _expand(out_axes, function(*args, **kwargs))

        return Pmap(
            one,
            in_axes=in_axes,
            axis_name=_NO_NAME if axis_name is None else axis_name,
            donate_argnums=donate_argnums,
            static_argnums=static,
            **options,
        )

    name = _NO_NAME if axis_name is None else axis_name
    data_parallel(axis_name=name, **options)  # for its checks of options
    return make if fn is None else make(fn)


class Pmap(DataParallel):
    """A jitted function of arrays with a mapped axis of length 1."""

    def __init__(self, fn: Callable[..., Any], *, in_axes: Any, **options: Any):
        self._in_axes = in_axes
        super().__init__(fn, **options)

    def _declared(self, args: Any, kwargs: Any) -> Sequence[bool]:
        axes = self._in_axes
        if not isinstance(axes, tuple | list):
            axes = (axes,) * len(args)

        def spread(axis: Any, part: Any) -> Any:
            return jax.tree.map(lambda _: axis is None, part)

        # Static arguments are not mapped, and may be no trees.
        found: list[bool] = []
        for axis, arg in zip(axes, args, strict=True):
            count = len(jax.tree.leaves(arg))
            if isinstance(axis, int):
                found += [False] * count
            else:
                found += jax.tree.leaves(_over_prefix(spread, axis, arg, "in_axes"))
        return found + [False] * len(jax.tree.leaves(kwargs))


def _check_size(axis_size: int | None, comm: Communicator | None) -> None:
    ranks = (comm or world()).size
    if axis_size not in (None, 1, ranks):
        raise InvalidOptionError(
            f"pmap(axis_size={axis_size}): each process maps over the one device it "
            f"has, and the axis over all ranks has length {ranks}. Leave it out"
        )


def _is_none(value: Any) -> bool:
    return value is None


def _unmapped(
    args: tuple[Any, ...], in_axes: Any, static: tuple[int, ...]
) -> tuple[Any, ...]:
    axes = in_axes if isinstance(in_axes, tuple | list) else (in_axes,) * len(args)
    if len(axes) != len(args):
        raise InvalidOptionError(
            f"pmap: in_axes has {len(axes)} entries for {len(args)} arguments; give "
            "one each, or one for all"
        )
    still = {number % len(args) for number in static} if args else set()
    return tuple(
        arg if k in still else _squeeze(axis, arg, f"argument {k}")
        for k, (axis, arg) in enumerate(zip(axes, args, strict=True))
    )


def _squeeze(axes: Any, tree: Any, what: str) -> Any:
    def squeeze(axis: int | None, part: Any) -> Any:
        if axis is None:
            return part

        def one(path: Any, leaf: Any) -> Any:
            where = f"{what}{jax.tree_util.keystr(path)}"
            shape = jnp.shape(leaf)
            if not -len(shape) <= axis < len(shape) or shape[axis] != 1:
                raise InvalidOptionError(
                    f"pmap: {where} has shape {shape}, and axis {axis} should be of "
                    "length 1: a process passes its own device's slice. Keep the axis, "
                    "x[rank:rank + 1], or map it over None"
                )
            return jnp.squeeze(leaf, axis)

        return jax.tree_util.tree_map_with_path(one, part)

    return _over_prefix(squeeze, axes, tree, f"in_axes of {what}")


def _expand(axes: Any, tree: Any) -> Any:
    def expand(axis: int | None, part: Any) -> Any:
        if axis is None:
            return part
        return jax.tree.map(lambda leaf: jnp.expand_dims(leaf, axis), part)

    return _over_prefix(expand, axes, tree, "out_axes")


def _over_prefix(
    function: Callable[[int | None, Any], Any], axes: Any, tree: Any, what: str
) -> Any:
    """Apply a function to the parts of a tree that stand under a prefix's leaves."""
    for axis in jax.tree.leaves(axes, is_leaf=_is_none):
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
            raise InvalidOptionError(f"pmap: {what}: {axis!r} is no axis; give an int")
    try:
        return jax.tree.map(function, axes, tree, is_leaf=_is_none)
    except ValueError as error:
        raise InvalidOptionError(
            f"pmap: {what} = {axes} is no prefix of the tree it is for: {error}"
        ) from error
