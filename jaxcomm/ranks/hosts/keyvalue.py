"""Python objects between ranks over jax.distributed, where there is no MPI.

The store is a TCP port of process 0 without authentication, so nothing that is read
from it is unpickled (see `_encoding`). Who can write there can still stop or mislead
the job; jax.distributed itself has the same weakness.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxcomm import compat
from jaxcomm.errors import (
    InvalidOptionError,
    JaxcommError,
    StallError,
    TransportUnavailableError,
)
from jaxcomm.ranks import deadline
from jaxcomm.ranks.fault import Fault
from jaxcomm.ranks.hosts import encoding

# The store speaks gRPC, whose messages may be limited to 4 MB. A listing of what 10,000
# ranks wrote, each in line, stays below that.
_PART_BYTES = 1 << 20
_INLINE_BYTES = 256
# A wait inside the store does not see Ctrl-C, so it is made of short ones.
_SLICE_SECONDS = 1.0

Combine = Callable[[list[bytes]], bytes]

_lock = threading.Lock()
_made: dict[str, int] = {}


class KeyValueChannel:
    """Blocking exchange of plain objects, with the interface of HostChannel.

    Every call is a round in which all ranks take part: each writes its contribution,
    rank 0 reads all of them and writes one answer, and the others read that. So a
    broadcast, too, returns only when all ranks have called it. What can be sent is what
    `encoding.encode` takes.

    Different threads may use different channels at the same time. One channel may be
    used from several threads only if its calls come in the same order on all ranks:
    never at the same time.

    A rank waits for the others at most `timeout` seconds. Reading and writing the store
    comes on top. Whoever gives up answers the round with its error, unless there is an
    answer already: all ranks return from a round, or none does and the channel is not
    used again. When the store is gone, that is an error at once, unless JAX ends the
    process first; JAX also ends it some time after another process has died.
    """

    def __init__(
        self,
        name: str,
        members: Sequence[int],
        timeout: float,
        fault: Fault | None = None,
    ):
        """Make this process's end of the channel. Every member does, equally often.

        Args:
          name: with `members`, what tells this channel from others.
          members: distinct process indices of jax.distributed, in the order that
            numbers the ranks; this process's is among them.
          timeout: seconds that a call waits for the other ranks.
          fault: shared with other channels that are of no use either when this one has
            lost the other ranks.

        Raises:
          TransportUnavailableError: jax.distributed is not initialised.
          InvalidOptionError: the members are not as above.
        """
        client = compat.distributed_client()
        if client is None:
            raise TransportUnavailableError(
                "the ranks cannot find one another: call jax.distributed.initialize() "
                "before jaxcomm.init(), or start the job under MPI"
            )
        everyone = [int(process) for process in members]
        if (
            client.process_id not in everyone
            or len(set(everyone)) != len(everyone)
            or not all(0 <= process < client.num_processes for process in everyone)
        ):
            raise InvalidOptionError(
                f"members={everyone}: give distinct process indices between 0 and "
                f"{client.num_processes - 1}, this process's "
                f"({client.process_id}) among them"
            )
        self.rank, self.size = everyone.index(client.process_id), len(everyone)
        self.client, self._timeout = client, timeout
        self.fault = fault or Fault()
        self.who = f"rank {self.rank} of {self.size}"
        # One round at a time: the lock is held for a whole round, `_number` is its own.
        self._lock, self._number = threading.Lock(), 0
        # An earlier channel of this name has left the keys of its last round.
        text = json.dumps([name, everyone])
        with _lock:
            count = _made[text] = _made.get(text, 0) + 1
        # A digest, because a name may have a "/", which would put its keys below
        # another channel's.
        digest = hashlib.sha256(f"{text} {count}".encode()).hexdigest()[:24]
        self.base = f"jaxcomm/{digest}"

    def barrier(self) -> None:
        """Wait until every rank is here.

        Not JAX's own wait_at_barrier, which lets everyone pass who names a barrier that
        has been met before, and keeps all of them.
        """
        self._round("barrier", b"", lambda every: b"", self._timeout, "enter a barrier")

    def broadcast(self, obj: Any, root: int) -> Any:
        """Return the root's object on every rank."""
        answer = self._round(
            f"broadcast from {root}",
            encoding.encode(obj) if self.rank == root else b"",
            lambda every: every[root],
            self._timeout,
            f"take part in a broadcast from rank {root}",
        )
        # The root too gets a copy, so that no rank shares it with the caller.
        return encoding.decode(answer)

    def all_gather(self, obj: Any) -> list[Any]:
        """Return every rank's object, in rank order."""
        answer = self._round(
            "all_gather",
            encoding.encode(obj),
            lambda every: encoding.encode(every),
            self._timeout,
            "gather objects",
        )
        return [encoding.decode(data) for data in encoding.decode(answer)]

    def reduce_min(self, send: np.ndarray, timeout: float, what: str) -> np.ndarray:
        """Elementwise minimum over ranks; StallError after `timeout` seconds."""

        def combine(every: list[bytes]) -> bytes:
            arrays = [np.frombuffer(data, send.dtype) for data in every]
            return functools.reduce(np.minimum, arrays).tobytes()

        kind = f"reduce_min of {send.dtype}{list(send.shape)}"
        answer = self._round(kind, send.tobytes(), combine, timeout, what)
        return np.frombuffer(answer, send.dtype).reshape(send.shape).copy()

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to hold: the store takes any number of threads."""
        return contextlib.nullcontext()

    def _round(
        self, call: str, mine: bytes, combine: Combine, timeout: float, what: str
    ) -> bytes:
        if self.size == 1:
            return combine([mine])
        with self._lock, self.fault.guard():
            self._number += 1
            turn = _Round(self, call, self._number, timeout, what)
            try:
                return turn.lead(mine, combine) if self.rank == 0 else turn.follow(mine)
            except compat.JaxRuntimeError as error:
                reason = str(error).partition("\n")[0]
                raise JaxcommError(
                    f"{self.who} could not {what}: jax.distributed's store failed "
                    f"({reason}). Process 0, where the store is, has ended, or another "
                    "program writes there: read that process's output first."
                ) from error


class _Round:
    """One round: the keys at/RANK with what the ranks bring, and out, the answer.

    A value is a label, a number of parts and, where that is 0, the content. The label
    says what the rank calls, or of what kind the error is that the answer stands for.
    """

    def __init__(
        self,
        channel: KeyValueChannel,
        call: str,
        number: int,
        timeout: float,
        what: str,
    ):
        self._client, self._size = channel.client, channel.size
        self._rank, self._who = channel.rank, channel.who
        self._here = f"{channel.base}/{number}"
        self._previous = f"{channel.base}/{number - 1}"
        self._call, self._timeout, self._what = call, timeout, what
        self._end = time.monotonic() + timeout

    def lead(self, mine: bytes, combine: Combine) -> bytes:
        self._put("at/0", self._call, b"")  # for the others, should they give up
        found: dict[int, bytes] = {}
        try:
            self._wait(lambda: self._collect(found))
            opened = {rank: self._open(f"at/{rank}", found[rank]) for rank in found}
            self._check(opened)
            answer = combine([mine, *(opened[r][1] for r in range(1, self._size))])
        except JaxcommError as error:
            # Who waits need not wait longer, and who comes late learns why.
            self._give_up(error)
            raise
        try:
            self._put("out", "", answer)
        except compat.JaxRuntimeError:
            # A key is written once: another rank has given up first.
            value = self._client.get(f"{self._here}/out", 0)
            if value is None:  # then it is the store that failed
                raise
            return self._opened(value)
        # Every rank has written its key of this round, so each has come back from the
        # round before and reads or writes nothing there any more. At any time there
        # are the keys of two rounds at most; the last one's stay, and those of a round
        # whose successor failed.
        self._client.delete(self._previous)
        return answer

    def follow(self, mine: bytes) -> bytes:
        self._put(f"at/{self._rank}", self._call, mine)
        found: list[bytes] = []

        def answered() -> bool:
            value = self._client.get(f"{self._here}/out", self._slice())
            found.extend([] if value is None else [value])
            return value is not None

        try:
            self._wait(answered)
        except StallError as error:
            if not self._give_up(error):
                raise
            found = [self._client.get(f"{self._here}/out", self._timeout) or b""]
        return self._opened(found[0])

    def _give_up(self, error: JaxcommError) -> bool:
        """Answer the round with an error; return whether there is an answer already."""
        content = f"{type(error).__name__}\n0\n{error}".encode()
        try:
            self._client.set(f"{self._here}/out", content)
        except compat.JaxRuntimeError:  # a key is written once
            return True
        return False

    def _opened(self, value: bytes) -> bytes:
        """Return the answer, or raise the error that it stands for."""
        error, answer = self._open("out", value)
        if error:
            kind = StallError if error == "StallError" else JaxcommError
            raise kind(answer.decode(errors="replace"))
        return answer

    def _wait(self, done: Callable[[], bool]) -> None:
        late = self._late
        deadline.wait(done, self._timeout, who=self._who, what=self._what, late=late)

    def _slice(self) -> float:
        return min(_SLICE_SECONDS, self._end - time.monotonic())

    def _collect(self, found: dict[int, bytes]) -> bool:
        """Wait for one rank that is missing, then take all that are there.

        Ranks come in no order, so few listings find all of them.
        """
        missing = next(r for r in range(1, self._size) if r not in found)
        if self._client.get(f"{self._here}/at/{missing}", self._slice()) is not None:
            found.update(self._arrived())
            found.pop(0, None)
        return len(found) == self._size - 1

    def _arrived(self) -> dict[int, bytes]:
        listed = self._client.list(f"{self._here}/at")
        keys = {rank: f"{self._here}/at/{rank}" for rank in range(self._size)}
        return {rank: listed[key] for rank, key in keys.items() if key in listed}

    def _late(self) -> str:
        here = {self._rank, *self._arrived()}
        late = [rank for rank in range(self._size) if rank not in here]
        if not late:
            # Rank 0 sees this if the last one came in this moment.
            return "All have come by now, but rank 0 has not answered in time."
        names = deadline.rank_names(late)
        return f"{names[0].upper()}{names[1:]} did not come."

    def _check(self, opened: dict[int, tuple[str, bytes]]) -> None:
        calls = {self._call: [0]}
        for rank in sorted(opened):
            calls.setdefault(opened[rank][0], []).append(rank)
        if len(calls) > 1:
            each = [f"{deadline.rank_names(r)}: {call}" for call, r in calls.items()]
            raise JaxcommError(
                f"the ranks do different things at the same time ({'; '.join(each)}). "
                "Every rank must call the same collectives in the same order."
            )

    def _put(self, name: str, label: str, content: bytes) -> None:
        count = 0
        if len(content) > _INLINE_BYTES:
            count = -(-len(content) // _PART_BYTES)
            for k in range(count):
                part = content[k * _PART_BYTES : (k + 1) * _PART_BYTES]
                self._client.set(f"{self._here}/parts/{name}/{k}", part)
            content = b""
        # Last, so that whoever sees this key finds the parts.
        head = f"{label}\n{count}\n".encode()
        self._client.set(f"{self._here}/{name}", head + content)

    def _open(self, name: str, value: bytes) -> tuple[str, bytes]:
        try:
            label, number, content = value.split(b"\n", 2)
            count = int(number)
        except ValueError as error:
            raise JaxcommError(
                f"the key {self._here}/{name} in jax.distributed's store is not as "
                "jaxcomm wrote it; another program writes there"
            ) from error
        parts = [content]
        for k in range(count):
            # It is there, and only its way takes time: no slices here, a large part
            # over a slow wire would never come to its end.
            key = f"{self._here}/parts/{name}/{k}"
            part = self._client.get(key, self._timeout)
            if part is None:
                raise StallError(
                    f"{self._who} could not read part {k + 1} of {count} of a message "
                    f"from jax.distributed's store within {self._timeout:g} s, to "
                    f"{self._what}. init(timeout=...) sets the time."
                )
            parts.append(part)
        return label.decode(errors="replace"), b"".join(parts)
