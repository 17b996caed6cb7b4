"""What a batch system has given to this job, by the variables that it sets."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Allocation:
    """The hosts of a batch job.

    Attributes:
      scheduler: "Slurm", "PBS" or "LSF".
      hosts: their names, in the scheduler's order.
      slots: for each of them, how many ranks it is to have.
      cores: of each rank; None where the scheduler does not say.
      counted: whether the user asked for so many ranks. Else Slurm has filled in one
        a host.
    """

    scheduler: str
    hosts: tuple[str, ...]
    slots: tuple[int, ...]
    cores: int | None = None
    counted: bool = True

    @property
    def ranks(self) -> int:
        """The number of ranks on all hosts."""
        return sum(self.slots)

    def host_list(self) -> str:
        """Return the hosts as every mpiexec takes them: "n1:2,n2:1"."""
        pairs = zip(self.hosts, self.slots, strict=True)
        return ",".join(f"{host}:{count}" for host, count in pairs)


def find(environ: Mapping[str, str] = os.environ) -> Allocation | None:
    """Return what Slurm, PBS or LSF has given; None outside of their jobs.

    Raises:
      ValueError: a variable cannot be understood.
      OSError: a list of hosts cannot be read.
    """
    if "SLURM_JOB_ID" in environ and "SLURM_JOB_NODELIST" in environ:
        return _slurm(environ)
    if "PBS_NODEFILE" in environ:
        return _by_slot("PBS", Path(environ["PBS_NODEFILE"]).read_text().split())
    if pairs := environ.get("LSB_MCPU_HOSTS", "").split():
        if len(pairs) % 2:
            raise ValueError(f"LSB_MCPU_HOSTS={environ['LSB_MCPU_HOSTS']!r}")
        return Allocation("LSF", tuple(pairs[::2]), tuple(map(int, pairs[1::2])))
    if hosts := environ.get("LSB_HOSTS", "").split():
        return _by_slot("LSF", hosts)
    return None


def _by_slot(scheduler: str, names: Sequence[str]) -> Allocation:
    """Return an allocation told by one name a slot."""
    if not names:
        raise ValueError(f"{scheduler} names no host")
    counts = collections.Counter(names)  # in order of first occurrence
    return Allocation(scheduler, tuple(counts), tuple(counts.values()))


def _slurm(environ: Mapping[str, str]) -> Allocation:
    hosts = _host_names(environ["SLURM_JOB_NODELIST"])
    slots = _counts(environ.get("SLURM_TASKS_PER_NODE", f"1(x{len(hosts)})"))
    if len(slots) != len(hosts):
        raise ValueError(
            f"SLURM_JOB_NODELIST={environ['SLURM_JOB_NODELIST']!r} names {len(hosts)} "
            f"hosts, and SLURM_TASKS_PER_NODE={environ['SLURM_TASKS_PER_NODE']!r} "
            f"{len(slots)}"
        )
    cores = None
    if "SLURM_CPUS_PER_TASK" in environ:
        cores = int(environ["SLURM_CPUS_PER_TASK"])
    elif "SLURM_JOB_CPUS_PER_NODE" in environ:
        given = _counts(environ["SLURM_JOB_CPUS_PER_NODE"])
        cores = max(1, min(n // k for n, k in zip(given, slots, strict=False)))
    return Allocation("Slurm", hosts, slots, cores, "SLURM_NTASKS" in environ)


def _host_names(text: str) -> tuple[str, ...]:
    """Expand Slurm's short form: "n[08-10,12],login" is n08, n09, n10, n12, login."""
    found: list[str] = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        pieces = re.split(r"\[(.*?)\]", item)
        choices = [_numbers(p) if k % 2 else [p] for k, p in enumerate(pieces)]
        found += map("".join, itertools.product(*choices))
    return tuple(found)


def _numbers(text: str) -> list[str]:
    found: list[str] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers = range(int(first), int(last or first) + 1)
        found += [str(number).zfill(len(first)) for number in numbers]
    return found


def _counts(text: str) -> tuple[int, ...]:
    """Expand Slurm's short form: "2(x3),1" is 2, 2, 2, 1."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"{text!r} is no list of counts, such as 2(x3),1")
        found += [int(match[1])] * int(match[2] or 1)
    return tuple(found)
