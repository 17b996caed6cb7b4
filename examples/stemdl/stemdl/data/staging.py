"""Shards on storage of the node's own, for as long as a job has them open.

One rank of each node copies what the node's ranks read. When all have opened their
files, the names are removed at once: the kernel keeps the bytes until the last process
closes them or ends, however it ends, so that nothing is left behind even by a kill.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jaxcomm
from stemdl.data import shards
from stemdl.data.consensus import together
from stemdl.data.manifest import Shard, ShardError

PREFIX = "jaxcomm-staged-"


@contextlib.contextmanager
def staged(
    directory: Path, stage: Path, needed: Sequence[Shard], comm: jaxcomm.Communicator
) -> Iterator[Path]:
    """Copy shards to the node; all ranks enter together and open theirs inside.

    Args:
      directory: where the shards lie.
      stage: a directory on each node's own storage; made if need be.
      needed: what this rank reads.
      comm: all ranks of the job.

    Yields:
      The directory of the copies, whose checksums have been compared. It is removed on
      leaving: by then every rank must have opened its files, or all must have failed.

    Raises:
      ShardError: on every rank: there is too little room, or a copy is damaged.
    """
    me = socket.gethostname()
    ranks = comm.all_gather_object((me, [dataclasses.astuple(s) for s in needed]))
    theirs = [shard for host, found in ranks if host == me for shard in found]
    # One rank copies, what several read only once.
    mine = [Shard(*fields) for fields in sorted(set(map(tuple, theirs)))]
    mine = mine if comm.local_rank == 0 else []
    with contextlib.ExitStack() as stack:

        def make() -> str:
            if sum(host == me for host, _ in ranks) != comm.local_size:
                raise ShardError(f"several nodes are named {me!r}: cannot stage")
            if comm.local_rank:
                return ""
            room = sum(shard.bytes for shard in mine)
            return str(stack.enter_context(_folder(stage, room)))

        made = together(comm, make)
        places = comm.all_gather_object((me, made))
        place = Path(next(path for host, path in places if host == me and path))

        def fill() -> None:
            for shard in mine:
                shards.copy(directory, shard, place)

        together(comm, fill)
        yield place


@contextlib.contextmanager
def _folder(stage: Path, room: int) -> Iterator[Path]:
    """Make a folder of one's own in `stage`; removed on leaving.

    It is locked for as long: one without a lock is that of a process killed while it
    copied, and the next to stage there removes it.
    """
    stage.mkdir(parents=True, exist_ok=True)
    with _locked(stage):
        for old in stage.glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError), _locked(old, fcntl.LOCK_NB):
                shutil.rmtree(old)
        free = shutil.disk_usage(stage).free
        if free < room:
            raise ShardError(
                f"{stage}: staging needs {room} bytes, and {free} are free there; make "
                "room, or give another --stage, or none"
            )
        place = Path(tempfile.mkdtemp(prefix=PREFIX, dir=stage))
        lock = contextlib.ExitStack()
        lock.enter_context(_locked(place))
    with lock:
        try:
            yield place
        finally:
            shutil.rmtree(place)


@contextlib.contextmanager
def _locked(path: Path, how: int = 0) -> Iterator[None]:
    """Hold a directory's lock, which ends with the process."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | how)
        yield
    finally:
        os.close(handle)
