"""Collective communication for JAX on a static schedule.

Public names are imported on first use, so that the command line and `import jaxcomm`
start without waiting for JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxcomm import checkpoint as checkpoint
    from jaxcomm import data as data
    from jaxcomm import errors as errors
    from jaxcomm import flax as flax
    from jaxcomm import optax as optax
    from jaxcomm._pmap import pmap as pmap
    from jaxcomm.arrays import all_gather as all_gather
    from jaxcomm.arrays import all_to_all as all_to_all
    from jaxcomm.arrays import barrier as barrier
    from jaxcomm.arrays import reduce_scatter as reduce_scatter
    from jaxcomm.collectives import all_reduce as all_reduce
    from jaxcomm.collectives import broadcast as broadcast
    from jaxcomm.collectives import cache_clear as cache_clear
    from jaxcomm.collectives import plan as plan
    from jaxcomm.communicator import Communicator as Communicator
    from jaxcomm.decorators import data_parallel as data_parallel
    from jaxcomm.planner import cache_info as cache_info
    from jaxcomm.replication import assert_replicated as assert_replicated
    from jaxcomm.schedule import Schedule as Schedule
    from jaxcomm.startup import init as init
    from jaxcomm.startup import local_rank as local_rank
    from jaxcomm.startup import local_size as local_size
    from jaxcomm.startup import rank as rank
    from jaxcomm.startup import size as size
    from jaxcomm.startup import world as world

_MODULES = ("checkpoint", "data", "errors", "flax", "optax")
_NAMES = {
    "all_gather": "arrays",
    "all_reduce": "collectives",
    "all_to_all": "arrays",
    "assert_replicated": "replication",
    "barrier": "arrays",
    "broadcast": "collectives",
    "cache_clear": "collectives",
    "cache_info": "planner",
    "Communicator": "communicator",
    "data_parallel": "decorators",
    "init": "startup",
    "local_rank": "startup",
    "local_size": "startup",
    "plan": "collectives",
    "pmap": "_pmap",
    "rank": "startup",
    "reduce_scatter": "arrays",
    "Schedule": "schedule",
    "size": "startup",
    "world": "startup",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"jaxcomm.{name}")
    if name in _NAMES:
        value = getattr(importlib.import_module(f"jaxcomm.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'jaxcomm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_MODULES, *_NAMES])
