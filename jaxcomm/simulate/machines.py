"""Machines as data: every number with its unit, plausible range and source.

A machine is a TOML file: those in `jaxcomm/simulate/machines/` go by name, any other by
its path. `Machine` is what the model reads; `Machine.at` moves parameters inside their
ranges, which is how uncertainty and sensitivity are computed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxcomm.errors import InvalidOptionError

FOLDER = Path(__file__).parent / "machines"

# name: (unit, what it is). A machine's file gives all of them.
PARAMETERS = {
    "network_latency": ("s", "one hop of a gradient all-reduce between nodes"),
    "node_latency": ("s", "one hop of a gradient all-reduce inside a node"),
    "call_latency": ("s", "a collective call before its first byte"),
    "network_bandwidth": ("B/s", "what a node sends, all its ports together"),
    "network_share": ("1", "share of that bandwidth an all-reduce gets at scale"),
    "node_bandwidth": ("B/s", "what a rank sends to its neighbour inside a node"),
    "copy_bandwidth": ("B/s", "bytes packed or unpacked per second"),
    "control_latency": ("s", "one hop of a small host message between nodes"),
    "control_node_latency": ("s", "one hop of a small host message inside a node"),
    "control_bandwidth": ("B/s", "bytes that rank 0 receives from other hosts"),
    "root_message": ("s", "rank 0's time for one of many messages sent to it"),
    "request_seconds": ("s", "rank 0's time to read and count one request"),
    "response_bandwidth": ("B/s", "a rank's speed of copying cached responses"),
    "wake_seconds": ("s", "how late a sleeping background thread wakes"),
    "rank_spread": ("1", "standard deviation of speed between devices"),
    "step_spread": ("1", "standard deviation of a device's time between steps"),
    "leaf_spread": ("1", "standard deviation of when one gradient is ready"),
    "order_spread": ("1", "how far real ready times stray from the planned ones"),
    "xla_overlap": ("1", "share of XLA's all-reduces that run beside computation"),
    "float16_flops": ("1/s", "peak of a rank, 16-bit operands"),
    "float32_flops": ("1/s", "peak of a rank, 32-bit operands"),
    "watts": ("W", "power per rank, its share of the system's"),
}
# These shift time and energy, not how designs compare, or belong to no range.
_POSITIVE = frozenset(PARAMETERS) - {
    "rank_spread",
    "step_spread",
    "leaf_spread",
    "order_spread",
    "xla_overlap",
}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One number of a machine.

    Attributes:
      value: the nominal value, in the unit of `PARAMETERS`.
      low: the plausible range's lower end.
      high: its upper end.
      source: a reference, "measured here: ...", or "assumed: ...".
    """

    value: float
    low: float
    high: float
    source: str

    def at(self, share: float) -> float:
        """Value at a share of the range: 0 is low, 1 high; geometric if positive."""
        if self.low > 0:
            return self.low * (self.high / self.low) ** share
        return self.low + (self.high - self.low) * share


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the model knows of a machine.

    Attributes:
      name: as on the command line.
      title: for people.
      ranks_per_node: ranks, that is devices, of a node.
      max_ranks: ranks of the whole machine; larger predictions are extrapolations.
      algorithms: the all-reduce algorithms its library has.
      blocking: whether collectives run on the thread that negotiates (Horovod over MPI
        on CPUs), so that negotiation waits for them.
      parameters: by name; all of `PARAMETERS`.
    """

    name: str
    title: str
    ranks_per_node: int
    max_ranks: int
    algorithms: tuple[str, ...]
    blocking: bool
    parameters: Mapping[str, Parameter]

    def __getitem__(self, name: str) -> float:
        return self.parameters[name].value

    def nodes(self, ranks: int) -> int:
        """Nodes that so many ranks fill."""
        return -(-ranks // self.ranks_per_node)

    def at(self, values: Mapping[str, float]) -> Machine:
        """Return the machine with other values of some parameters."""
        changed = {
            name: dataclasses.replace(self.parameters[name], value=value)
            for name, value in values.items()
        }
        return dataclasses.replace(self, parameters={**self.parameters, **changed})

    def uncertain(self) -> list[str]:
        """Names of the parameters that have a range."""
        return [name for name, p in self.parameters.items() if p.low < p.high]


def names() -> list[str]:
    """Machines that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(machine: str) -> Machine:
    """Read a machine by name, or from a file.

    Args:
      machine: one of `names()`, or the path of a TOML file of the same form.

    Raises:
      InvalidOptionError: there is no such machine, or its file lacks something.
    """
    path = FOLDER / f"{machine}.toml" if machine in names() else Path(machine)
    return _read(path, path.stem)


@functools.lru_cache(maxsize=32)
def _read(path: Path, name: str) -> Machine:
    try:
        tree = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidOptionError(
            f"--machine {name}: {error}; use one of {', '.join(names())}, or the path "
            f"of a TOML file like those in {FOLDER}"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidOptionError(f"--machine {path}: {error}") from error
    try:
        return _machine(name, tree)
    except (KeyError, TypeError, ValueError) as error:
        what = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise InvalidOptionError(
            f"--machine {path}: {what}; see {FOLDER / 'summit.toml'} for the form"
        ) from error


def _machine(name: str, tree: dict[str, Any]) -> Machine:
    algorithms = tuple(map(str, tree["algorithms"]))
    known = {"ring", "tree", "halving-doubling", "hierarchical"}
    if not algorithms or not set(algorithms) <= known:
        raise ValueError(f"algorithms {algorithms}: use some of {sorted(known)}")
    given = tree["parameters"]
    if extra := sorted(set(given) - set(PARAMETERS)):
        raise ValueError(f"unknown parameter {extra[0]!r}")
    machine = Machine(
        name,
        str(tree["title"]),
        int(tree["ranks_per_node"]),
        int(tree["max_ranks"]),
        algorithms,
        bool(tree["blocking"]),
        {key: _parameter(key, given[key]) for key in PARAMETERS},
    )
    if machine.ranks_per_node < 1 or machine.max_ranks < 1:
        raise ValueError("ranks_per_node and max_ranks must be 1 or more")
    return machine


def _parameter(name: str, entry: dict[str, Any]) -> Parameter:
    value, source = float(entry["value"]), str(entry["source"])
    low, high = (float(x) for x in entry.get("range", (value, value)))
    if not (math.isfinite(low) and math.isfinite(high) and low <= value <= high):
        raise ValueError(f"{name}: range {low:g} to {high:g} does not hold {value:g}")
    if low < 0 or (low == 0 and name in _POSITIVE):
        raise ValueError(f"{name}: {low:g} is too small")
    if not source:
        raise ValueError(f"{name}: give a source")
    return Parameter(value, low, high, source)
