"""Several Python threads in a rank, each with a communicator of its own.

XLA:CPU leaves a program to a thread of a pool, and holds it until the program ends. The
pool has a thread per core of the rank. With one, a rank may run one Python thread's
program while another rank runs another's, and each waits for the other for ever.

There a program is run by the Python thread that calls it. Two programs then still share
the threads on which XLA runs parts of a program, so a call that must wait does so on a
thread of its communicator's own. All but the world's calls: XLA's threads then wait for
the ranks of one communicator only, and those do come.

A GPU has one stream for all programs of a process: what two Python threads put on it
may lie there in one order on one rank and in the other on another, and NCCL's kernels
then wait for each other for ever. So over NCCL one thread makes all calls.
"""

# pyright: strict, reportUnknownMemberType=false
# JAX types its own functions in part.
from __future__ import annotations

import math
import os
import threading
from typing import TYPE_CHECKING, Any

import jax

from jaxcomm import compat
from jaxcomm.errors import InvalidOptionError
from jaxcomm.transports.base import Transport

if TYPE_CHECKING:
    from jaxcomm.ranks.communicator import Communicator

_lock = threading.Lock()
_known: set[int] = set()  # of the threads that have used a communicator
_first = 0  # of the one that called `init`
_pool = 1


def prepare(*, waits_in_pool: bool) -> None:
    """Let the thread that calls a program run it, where XLA's pool has but one.

    Before the first use of JAX only: its client for the CPU is made once. One thread on
    one core computes no faster than the other.

    Args:
      waits_in_pool: whether calls will wait for other ranks on threads of that pool.
    """
    global _pool, _first
    _first = threading.get_ident()
    reserved = os.environ.get("NPROC", "")  # XLA asks it before the system
    cores = len(os.sched_getaffinity(0))
    _pool = int(reserved) if reserved.isdigit() and int(reserved) > 0 else cores
    if _pool == 1 and waits_in_pool and not compat.backends_initialized():
        compat.set_async_dispatch(False)


def run_programs() -> bool:
    """Tell whether programs are run by the thread that calls them."""
    return not compat.async_dispatch()


def enter(comm: Communicator, arguments: Any = ()) -> None:
    """Before a program is called: refuse one thread more than XLA has.

    Args:
      comm: the program's communicator.
      arguments: the program's.

    Raises:
      InvalidOptionError: as many other threads use communicators; says what to do.
    """
    ident = threading.get_ident()
    if ident not in _known and comm.size > 1:
        _admit(ident, comm.backend)
    if len(_known) > 1 and run_programs():
        # A program whose arguments are not there yet would go to the pool.
        jax.block_until_ready(arguments)


def _admit(ident: int, transport: Transport) -> None:
    threading.current_thread()  # one that Python did not start is known from now on
    most = _most(transport)
    with _lock:
        _known.intersection_update(t.ident or 0 for t in threading.enumerate())
        # Where it is one, it is the same one on all ranks. Else the first may well do
        # nothing but wait for the others.
        others = len(_known - {_first})
        if ident == _first or (most > 1 and others < most):
            _known.add(ident)
            return
    remedy = transport.one_thread
    if not remedy:
        remedy = (
            f"where XLA's pool runs {most} program{'s' * (most > 1)} at a time: ranks "
            "could wait for each other in different programs for ever. Give each rank "
            f"more cores (`jaxcomm run --threads {most + 1}`), or begin the script by "
            'jax.config.update("jax_cpu_enable_async_dispatch", False), so that every '
            "thread runs its own; jaxcomm.init() does so where a rank has one core, if "
            "it is called before anything else uses JAX."
        )
    raise InvalidOptionError(
        f"{threading.current_thread().name} is one Python thread too many that uses "
        f"communicators over {transport.name!r}, {remedy}"
    )


def _most(transport: Transport) -> float:
    if transport.one_thread:
        return 1
    return _pool if transport.waits_in_pool and not run_programs() else math.inf
