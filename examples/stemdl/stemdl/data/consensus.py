"""Steps that all ranks take, or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from jaxcomm import Communicator
from stemdl.data.manifest import ShardError

Result = TypeVar("Result")


def together(comm: Communicator, call: Callable[[], Result]) -> Result:
    """Return this rank's result once every rank has one.

    Raises:
      ShardError: the same on every rank, if the call failed on any of them.
    """
    result, failure = None, ""
    try:
        result = call()
    except Exception as error:  # whatever it is, the other ranks must not wait
        known = isinstance(error, ShardError)
        failure = str(error) if known else f"{type(error).__name__}: {error}"
    failures = comm.all_gather_object(failure)
    for rank, text in enumerate(failures):
        if text:
            raise ShardError(f"rank {rank}: {text}")
    return result  # type: ignore[return-value]
