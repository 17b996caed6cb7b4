"""What Open MPI says of a job's end does not hide what the job said."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from jaxcomm.launch.notices import NOTICES, RULE, Filter
from tests.jobs import Launch

NOTICE = b"\n".join([RULE, NOTICES[0] + b" 1 in communicator", b"  Proc: x", b"", RULE])
END = b"\n".join([RULE, NOTICES[1] + b" 1", RULE, b"\0"])
# What programs print: rules of their own, bars without an end of line, other NULs.
OWN = st.sampled_from(
    [b"loss 1\n", b"\n", b"-", b"-- x\n", RULE + b"\nmine\n", b"\r 50%", b"\0a\n"]
)


def filtered(data: bytes, sizes: list[int]) -> bytes:
    notices, out, at = Filter(), b"", 0
    for size in [*sizes, len(data)]:
        out += notices.feed(data[at : at + size])
        at += size
    return out + notices.end()


@given(st.lists(OWN), st.lists(OWN), st.lists(st.integers(1, 90), max_size=40))
@example([RULE], [], [])
def test_only_notices_are_left_out(
    before: list[bytes], after: list[bytes], sizes: list[int]
) -> None:
    first, then = b"".join([*before, b"\n"]), b"".join(after)
    assert filtered(first + then, sizes) == first + then
    last = then if not then or then.endswith(b"\n") else then + b"\n"
    told = first + NOTICE + b"\n" + last + END
    assert filtered(told, sizes) == first + last.lstrip(b"\0")


def test_a_bar_is_shown_at_once() -> None:
    notices = Filter()
    assert notices.feed(b"\r 10%") == b"\r 10%"
    assert notices.feed(b"\r 20%") == b"\r 20%"


FAILS = """
import jaxcomm
comm = jaxcomm.init()
if comm.rank == 1:
    raise ValueError("the disk is on fire")
comm.barrier()
"""


def test_the_report_comes_last(job: Launch) -> None:
    done = job(2, FAILS)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ValueError: the disk is on fire")
    assert "MPI_ABORT" not in done.stderr and "\0" not in done.stderr
    told = job(2, FAILS, options=["--verbose"])
    assert told.returncode == 1 and "MPI_ABORT was invoked" in told.stderr
