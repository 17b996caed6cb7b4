"""Collective communication for JAX on a static schedule.

Public names are imported on first use, so that the command line and `import jaxcomm`
start without waiting for JAX.

Examples in docstrings come after `import jax, jaxcomm`, `import jax.numpy as jnp`,
`import numpy as np` and imports of what they use of the standard library. All ranks run
them, and see the same.
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
    from jaxcomm.collectives.arrays import all_gather as all_gather
    from jaxcomm.collectives.arrays import all_to_all as all_to_all
    from jaxcomm.collectives.arrays import barrier as barrier
    from jaxcomm.collectives.arrays import reduce_scatter as reduce_scatter
    from jaxcomm.collectives.reductions import all_reduce as all_reduce
    from jaxcomm.collectives.reductions import broadcast as broadcast
    from jaxcomm.collectives.reductions import cache_clear as cache_clear
    from jaxcomm.collectives.reductions import plan as plan
    from jaxcomm.collectives.replication import assert_replicated as assert_replicated
    from jaxcomm.planning.planner import cache_info as cache_info
    from jaxcomm.planning.schedule import Schedule as Schedule
    from jaxcomm.ranks.communicator import Communicator as Communicator
    from jaxcomm.startup import init as init
    from jaxcomm.startup import local_rank as local_rank
    from jaxcomm.startup import local_size as local_size
    from jaxcomm.startup import rank as rank
    from jaxcomm.startup import size as size
    from jaxcomm.startup import world as world
    from jaxcomm.steps.data_parallel import data_parallel as data_parallel
    from jaxcomm.steps.pmap import pmap as pmap
    from jaxcomm.steps.shard_map import local_block as local_block
    from jaxcomm.steps.shard_map import shard_map as shard_map

_MODULES = ("checkpoint", "data", "errors", "flax", "optax")
_NAMES = {
    "all_gather": "collectives.arrays",
    "all_reduce": "collectives.reductions",
    "all_to_all": "collectives.arrays",
    "assert_replicated": "collectives.replication",
    "barrier": "collectives.arrays",
    "broadcast": "collectives.reductions",
    "cache_clear": "collectives.reductions",
    "cache_info": "planning.planner",
    "Communicator": "ranks.communicator",
    "data_parallel": "steps.data_parallel",
    "init": "startup",
    "local_block": "steps.shard_map",
    "local_rank": "startup",
    "local_size": "startup",
    "plan": "collectives.reductions",
    "pmap": "steps.pmap",
    "rank": "startup",
    "reduce_scatter": "collectives.arrays",
    "Schedule": "planning.schedule",
    "shard_map": "steps.shard_map",
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
