"""The ways in which buckets move between ranks: see `base.Transport`."""

from __future__ import annotations

import importlib

from jaxcomm.transports.base import Transport

# Where each is: imported when it is used, because what it needs may not be installed.
_CLASSES = {
    "local": ("jaxcomm.transports.local", "Local"),
    "mpi": ("jaxcomm.transports.mpi", "Mpi"),
    "mpi4jax": ("jaxcomm.transports.mpi4jax", "Mpi4jax"),
    "nccl": ("jaxcomm.transports.nccl", "Nccl"),
}


def names() -> tuple[str, ...]:
    """Return the transports' names."""
    return tuple(_CLASSES)


def find(name: str) -> type[Transport]:
    """Return a transport's class by its name."""
    module, attribute = _CLASSES[name]
    return getattr(importlib.import_module(module), attribute)


def automatic(backend: str) -> str:
    """Return the transport that several ranks use on one of JAX's backends.

    Args:
      backend: as `jax.default_backend()` says.
    """
    for name in _CLASSES:
        if backend in find(name).automatic_for:
            return name
    return "mpi"
