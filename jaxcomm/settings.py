"""What `init` and the environment say. Internal to `communicator` and `startup`."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from jaxcomm.errors import InvalidOptionError
from jaxcomm.planning import costs as costmodel
from jaxcomm.planning.costs import CostModel

STAGING_VARIABLE = "JAXCOMM_STAGING_BYTES"
SHARED_MEMORY_VARIABLE = "JAXCOMM_SHARED_MEMORY"
OWN_THREAD_VARIABLE = "JAXCOMM_OWN_THREAD"
CHECK_VARIABLE = "JAXCOMM_CHECK"
DISTRIBUTED_VARIABLE = "JAXCOMM_DISTRIBUTED"
# For tests: the host of every rank of the job, as numbers with commas.
TEST_HOSTS_VARIABLE = "JAXCOMM_TEST_HOSTS"
CHECKS = ("once", "every", "replicas")
REPLICAS_EVERY = 100  # calls
DISTRIBUTED = ("on", "off")
DEFAULT_TIMEOUT = 600.0
STAGING_BYTES = 8 << 20
_MIN_STAGING = 4096


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `init` was given and found; the same on every rank, subgroups included."""

    timeout: float = DEFAULT_TIMEOUT
    staging_bytes: int = STAGING_BYTES
    costs: CostModel = costmodel.DEFAULT
    shared_memory: bool = True


def staging_bytes(given: int | None) -> int:
    """Return the size of the staging buffer: as given, or as the environment says."""
    text = str(STAGING_BYTES if given is None else given)
    name = "init(staging_bytes=...)"
    if given is None and STAGING_VARIABLE in os.environ:
        text, name = os.environ[STAGING_VARIABLE], STAGING_VARIABLE
    if not text.isdigit() or int(text) < _MIN_STAGING:
        raise InvalidOptionError(
            f"{name}: {text!r}; give a number of bytes, at least {_MIN_STAGING}"
        )
    return int(text) // 16 * 16  # whole elements of every dtype


def check_every() -> bool:
    """Return whether the environment asks to compare every call across ranks."""
    return "every" in _checks()


def check_replicas(given: bool | int | None) -> int:
    """Return after how many calls arguments are compared again; 0 for never.

    Args:
      given: by a decorator; None for what the environment says.
    """
    if given is None:
        return REPLICAS_EVERY if "replicas" in _checks() else 0
    if isinstance(given, bool):
        return REPLICAS_EVERY if given else 0
    if not isinstance(given, int) or given < 1:
        raise InvalidOptionError(
            f"check_replicas={given!r}; give True, False, or a number of calls from 1"
        )
    return given


def _checks() -> list[str]:
    checks = os.environ.get(CHECK_VARIABLE, "once").split(",")
    if not set(checks) <= set(CHECKS):
        raise InvalidOptionError(
            f"{CHECK_VARIABLE}: {','.join(checks)!r}; give 'once' to compare every "
            "schedule across ranks when it first runs, 'every' for every call, to "
            "debug, and 'replicas' to compare what should be equal on all ranks, "
            "parameters above all; several with commas"
        )
    return checks


def distributed(given: bool | None) -> str:
    """Return one of `DISTRIBUTED`: as given, or as the environment says; else "on"."""
    if isinstance(given, bool):
        return "on" if given else "off"
    found: Any = given
    where = "init(distributed=...)"
    if given is None:
        found, where = os.environ.get(DISTRIBUTED_VARIABLE, "on"), DISTRIBUTED_VARIABLE
    if found not in DISTRIBUTED:
        raise InvalidOptionError(
            f"{where}: {found!r}; give True ('on'), so that JAX knows which process of "
            "how many each rank is, or False ('off') to leave JAX as it is"
        )
    return found


def seconds(name: str, given: float | None, default: float) -> float:
    """Return a limit in seconds: as given, by the environment, or the default."""
    variable = f"JAXCOMM_{name.upper()}"
    value: Any = os.environ.get(variable, default) if given is None else given
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = -1.0
    if not found >= 0:
        where = variable if given is None else f"init({name}=...)"
        raise InvalidOptionError(
            f"{where}: {value!r}; give a time in seconds, or 0 for never"
        )
    return found
