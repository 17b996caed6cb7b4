"""Adapter for Flax. Linen's parameters are plain pytrees and need none of it."""

from __future__ import annotations

from typing import Any, TypeVar

from jaxcomm.collectives import reductions
from jaxcomm.ranks.communicator import Communicator

Module = TypeVar("Module")


def broadcast(
    module: Module, *, root: int = 0, comm: Communicator | None = None
) -> Module:
    """Give an nnx module on every rank the root's state, in place.

    Parameters, batch statistics and random streams all become the root's. To let
    ranks draw different dropout masks, reseed their streams afterwards, for instance
    with `nnx.reseed(module, dropout=jaxcomm.rank())`.

    Args:
      module: a `flax.nnx.Module` (an `nnx.Optimizer` too), of equal structure, shapes
        and dtypes on all ranks.
      root: the rank whose state is sent.
      comm: the ranks that take part; all by default.

    Returns:
      The same module.

    Raises:
      InvalidTreeError, InvalidOptionError, ScheduleMismatchError: as
        `jaxcomm.broadcast`; the module is unchanged then.

    Example:
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(jaxcomm.rank()))
      >>> model = jaxcomm.flax.broadcast(model)
      >>> jaxcomm.assert_replicated(nnx.state(model, nnx.Param))
    """
    from flax import nnx

    state: Any = nnx.state(module)
    nnx.update(module, reductions.broadcast(state, root=root, comm=comm))
    return module
