"""One process of a test of KeyValueChannel: `PORT RANK RANKS CASE`.

Prints a line of JSON for each check: its name, and what went wrong or "".
"""

from __future__ import annotations

import collections
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm import compat
from jaxcomm.errors import (
    BrokenCommunicatorError,
    InvalidOptionError,
    InvalidTreeError,
    JaxcommError,
    StallError,
    TransportUnavailableError,
)
from jaxcomm.planning import costs
from jaxcomm.ranks import deadline
from jaxcomm.ranks.fault import Fault
from jaxcomm.ranks.hosts.keyvalue import KeyValueChannel

# The test imports the names of the checks.
PORT, *NUMBERS, CASE = sys.argv[1:] if __name__ == "__main__" else ["", "0", "0", ""]
RANK, RANKS = map(int, NUMBERS)
WAIT = 20.0
SHORT = 1.0

OBJECTS: list[Any] = [
    None,
    True,
    3,
    -(1 << 80),
    0.1,
    math.inf,
    "",
    'Grüße "\n\ud800',
    b"",
    bytes(range(256)),
    [],
    (),
    {},
    [1, (2, [3.0, (b"4",)]), {"five": (None, b"")}],
    ["list", 1],
    {"a": ("float32[3]", "0123"), 7: b"x", (1, 2): [()], b"y": 1, None: None},
    costs.DEFAULT,
    (costs.BETWEEN_HOSTS, 1 << 23, True, ""),
    [(1 << 62, 2, 3, 0, 10**18, 10**18 + 1)] * 3,
]

ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
    np.array(2 + 3j),
    np.zeros((0, 4), np.int8),
    np.array(["ab", "c"]),
    np.array([1.5, -2], jnp.bfloat16),
    np.float32(0.1),
    np.int64(-5),
]


def everyone(name: str, timeout: float = WAIT) -> KeyValueChannel:
    return KeyValueChannel(name, range(RANKS), timeout)


def same(a: Any, b: Any) -> bool:
    """Tell whether objects are equal, their types too."""
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    return a == b


def raised(call: Callable[[], Any], kind: type[BaseException]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def barrier() -> None:
    channel = everyone("barrier")
    for late in range(RANKS):
        if late == RANK:
            time.sleep(0.1)
        before = time.time()
        channel.barrier()
        entered = channel.all_gather(before)
        left = channel.all_gather(time.time())
        assert max(entered) <= min(left)


def broadcast() -> None:
    channel = everyone("broadcast")
    for k, obj in enumerate(OBJECTS):
        root = k % RANKS
        got = channel.broadcast(obj if root == RANK else object(), root)
        assert same(got, obj), (got, obj)
    assert math.isnan(channel.broadcast(math.nan, 0))


def arrays() -> None:
    channel = everyone("arrays")
    for k, sent in enumerate(ARRAYS):
        got = channel.broadcast(sent, k % RANKS)
        assert type(got) is type(sent) and got.dtype == sent.dtype, got
        assert got.shape == sent.shape
        np.testing.assert_array_equal(got, sent)
        if isinstance(got, np.ndarray):
            assert got.flags.writeable


def all_gather() -> None:
    channel = everyone("all_gather")
    for obj in OBJECTS:
        got = channel.all_gather((RANK, obj))
        assert same(got, [(rank, obj) for rank in range(RANKS)])


def large() -> None:
    channel = everyone("large")

    def payload(rank: int) -> bytes:
        return np.random.default_rng(rank).bytes((5 << 20) + rank)

    assert channel.broadcast(payload(RANK), RANKS - 1) == payload(RANKS - 1)
    some = payload(RANK)[: (3 << 20) // 2]
    for rank, got in enumerate(channel.all_gather(some)):
        assert got == payload(rank)[: (3 << 20) // 2]
    for nbytes in (200, 255, 256, 257, (1 << 20) - 30, 1 << 20, (1 << 20) + 30):
        assert channel.broadcast(b"z" * nbytes, 1) == b"z" * nbytes


def reduce_min() -> None:
    channel = everyone("reduce_min")
    every = np.random.default_rng(0).integers(0, 256, (RANKS, 64)).astype(np.uint8)
    for _ in range(3):
        got = channel.reduce_min(every[RANK].copy(), WAIT, "check something")
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, every.min(0))


def subsets() -> None:
    orders = [[RANKS - 1, 0], list(range(RANKS))[::-1], [0]]
    orders += [[1, 2], [2, 0, 3]] if RANKS > 3 else []
    channels = [KeyValueChannel("s", o, WAIT) for o in orders if RANK in o]
    mine = [o for o in orders if RANK in o]
    for channel, order in zip(channels, mine, strict=True):
        assert (channel.rank, channel.size) == (order.index(RANK), len(order))
        assert channel.all_gather(RANK) == order
        assert channel.broadcast(RANK, len(order) - 1) == order[-1]
        low = channel.reduce_min(np.array([RANK, 9 - RANK], np.uint8), WAIT, "x")
        assert low.tolist() == [min(order), 9 - max(order)]
        with channel.turn():
            channel.barrier()


def halves() -> None:
    """The same name on disjoint ranks, at the same time."""
    half = [r for r in range(RANKS) if r % 2 == RANK % 2]
    channel = KeyValueChannel("half", half, WAIT)
    for k in range(5):
        assert channel.all_gather((RANK, k)) == [(r, k) for r in half]


def again() -> None:
    """A second channel of the same name does not see what the first one left."""
    for k in range(3):
        channel = everyone("again")
        for _ in range(k + 1):
            assert channel.all_gather((k, RANK)) == [(k, r) for r in range(RANKS)]
    # Nor is a name with a slash inside another.
    one, other = everyone("again"), everyone("again/1")
    for k in range(3):
        assert other.broadcast(k, 0) == k
        assert one.broadcast(-k, 1) == -k


def threads() -> None:
    channels = [everyone(f"thread {k}") for k in range(4)]
    failed: list[BaseException] = []

    def use(k: int) -> None:
        try:
            for i in range(20):
                expected = [(k, i, r) for r in range(RANKS)]
                assert channels[k].all_gather((k, i, RANK)) == expected
        except BaseException as error:
            failed.append(error)

    # Started in another order on every rank.
    order = [(k + RANK) % 4 for k in range(4)]
    every = [threading.Thread(target=use, args=(k,)) for k in order]
    for thread in every:
        thread.start()
    for thread in every:
        thread.join()
    assert not failed, failed


def no_growth() -> None:
    """Keys of three rounds at most, of 200, large ones among them."""
    channel = everyone("growth")
    client = compat.distributed_client()
    assert client is not None
    most = 0
    for k in range(200):
        if k % 50 == 0:
            channel.broadcast(bytes(3 << 20), k % RANKS)
        elif k % 3 == 0:
            channel.barrier()
        else:
            assert channel.broadcast(k, k % RANKS) == k
        if k % 20 == 19:
            most = max(most, len(client.list(channel.base)))
    # Per round: one key for each rank and the answer. A slow rank still deletes those
    # of the round before last while a fast one writes the next round's.
    assert RANKS < most <= 3 * (RANKS + 1), most


def cannot_be_encoded() -> None:
    channel = everyone("encode")
    Pair = collections.namedtuple("Pair", "a b")
    for bad, name in [
        (object(), "builtins.object"),
        (Pair(1, 2), "Pair"),
        ({1}, "builtins.set"),
        (np.array([None]), "numpy.ndarray"),
        (costs, "builtins.module"),
    ]:
        text = raised(lambda b=bad: channel.all_gather([1, {"k": b}]), InvalidTreeError)
        assert text.startswith("obj[1]['k'] is a ") and name in text, text
        assert "not pickled" in text and "numpy.asarray" in text
    # Nothing was sent: the channel goes on.
    assert channel.all_gather(RANK) == list(range(RANKS))


def damaged() -> None:
    """What another program puts into the store is an error, never an object."""
    channel = everyone("damaged")
    client = compat.distributed_client()
    assert client is not None
    channel.barrier()
    for number, value in enumerate([b"", b"\n0\n\x80\x04.", b"\n0\n" + bytes(9)], 2):
        if RANK == 1:
            client.set(f"{channel.base}/{number}/out", value)
        time.sleep(0.2)
        if RANK == 1:
            text = raised(lambda: channel.broadcast(1, 0), JaxcommError)
            assert "another program writes" in text, text
        else:
            # Rank 0 finds its place taken; others see it as rank 1 does.
            text = raised(lambda: channel.broadcast(1, 0), JaxcommError)
            assert "another program writes" in text, text


def different_calls() -> None:
    channel = everyone("different")
    call = channel.barrier if RANK == 1 else lambda: channel.broadcast(1, 0)
    text = raised(call, JaxcommError)
    assert "rank 1: barrier" in text and "broadcast from 0" in text, text


def members() -> None:
    for bad in [[], [RANK, RANK], [RANK, RANKS], [-1, RANK], [RANK ^ 1]]:
        text = raised(lambda b=bad: KeyValueChannel("m", b, 1), InvalidOptionError)
        assert "distinct process indices" in text


def rank_never_comes() -> None:
    low = np.zeros(64, np.uint8)
    calls: list[tuple[str, int, Callable[[KeyValueChannel], Any]]] = [
        ("a", RANKS - 1, lambda c: c.barrier()),
        ("b", 1, lambda c: c.broadcast(1, 0)),
        ("c", 1, lambda c: c.reduce_min(low, SHORT, "check a schedule")),
    ]
    for name, absent, call in calls:
        channel = everyone(f"never {name}", SHORT if name != "c" else WAIT)
        everyone("before never").barrier()
        if absent == RANK:
            continue
        text = raised(lambda c=channel, f=call: f(c), StallError)
        assert f"waited {SHORT:g} s for the other ranks to" in text, text
        assert f"Rank {absent} did not come" in text, text
        assert "init(timeout=...)" in text
        assert name != "c" or "check a schedule" in text


def rank_comes_late() -> None:
    """It hears at once that all was in vain."""
    everyone("before late").barrier()
    channel = everyone("late", SHORT)
    if RANK == RANKS - 1:
        time.sleep(2 * SHORT)
        text = raised(channel.barrier, StallError)
        assert f"Rank {RANK} did not come" in text
    else:
        raised(channel.barrier, StallError)


def nothing_follows() -> None:
    """A channel that was given up refuses at once, and so does one that shares it."""
    everyone("before nothing").barrier()
    fault = Fault()
    members = list(range(RANKS))
    channel = KeyValueChannel("nothing", members, SHORT, fault)
    other = KeyValueChannel("nothing else", members, WAIT, fault)
    if RANK == 1:
        time.sleep(2 * SHORT)
    raised(channel.barrier, StallError)
    for call in (channel.barrier, lambda: other.all_gather(1)):
        start = time.monotonic()
        text = raised(call, BrokenCommunicatorError)
        assert "first: StallError: rank " in text and "waited" in text, text
        assert time.monotonic() - start < SHORT


def first_rank_comes_late() -> None:
    """It does not take for an agreement what the others have given up."""
    everyone("before first late").barrier()
    channel = everyone("first late", SHORT)
    if RANK == 0:
        time.sleep(2 * SHORT)
        text = raised(lambda: channel.broadcast(bytes(10_000), 0), StallError)
    else:
        text = raised(lambda: channel.broadcast(None, 0), StallError)
    assert f"waited {SHORT:g} s" in text and "Rank 0 did not come" in text, text


def an_answer_in_the_last_moment() -> None:
    """Who would give up takes the answer that is there by then."""
    everyone("before last").barrier()
    channel = everyone("last", WAIT)
    patient = deadline.wait

    def too_short(done: Any, timeout: float, **what: Any) -> None:
        if RANK == 1:
            time.sleep(SHORT)  # the answer comes meanwhile
            raise StallError("rank 1 was not patient")
        patient(done, timeout, **what)

    with mock.patch.object(deadline, "wait", too_short):
        assert channel.all_gather(RANK) == list(range(RANKS))
    assert channel.all_gather(RANK) == list(range(RANKS))


def first_rank_never_comes() -> None:
    """Then there is nobody to tell the others: each finds out by itself."""
    everyone("before first").barrier()
    channel = everyone("first", SHORT)
    if RANK > 0:
        text = raised(lambda: channel.all_gather(1), StallError)
        assert "Rank 0 did not come" in text, text


CASES: dict[str, list[Callable[[], None]]] = {
    "all": [
        barrier,
        broadcast,
        arrays,
        all_gather,
        large,
        reduce_min,
        subsets,
        halves,
        again,
        threads,
        no_growth,
        cannot_be_encoded,
        different_calls,
        damaged,
        members,
    ],
    "stall": [
        rank_never_comes,
        rank_comes_late,
        nothing_follows,
        first_rank_comes_late,
        an_answer_in_the_last_moment,
        first_rank_never_comes,
    ],
}


def main() -> None:
    raised(lambda: KeyValueChannel("x", [0], 1), TransportUnavailableError)
    jax.distributed.initialize(
        coordinator_address=f"127.0.0.1:{PORT}",
        num_processes=RANKS,
        process_id=RANK,
    )
    for check in CASES[CASE]:
        try:
            check()
            wrong = ""
        except BaseException:
            wrong = traceback.format_exc()
        print(json.dumps([check.__name__, wrong]), flush=True)
        if wrong:
            # Leave at once: at its end JAX would wait for all ranks.
            os._exit(1)


if __name__ == "__main__":
    main()
