"""Reductions of ranks of several hosts that share memory on each of them."""

from __future__ import annotations

import pytest

from tests.jobs import Launch


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "hosts",
    [
        pytest.param("0,1,1,0", marks=pytest.mark.thorough),
        "1,0,2,0",
        pytest.param("0,0,0,1", marks=pytest.mark.thorough),
        pytest.param("0,1,2,3,4,0", marks=pytest.mark.thorough),
        pytest.param("0,0,1,1,2,2,3,3", marks=pytest.mark.thorough),
    ],
)
def test_bits_and_bytes_between_pretended_hosts(launch: Launch, hosts: str) -> None:
    ranks = hosts.count(",") + 1
    done = launch(
        ranks,
        ["-m", "tests.programs.tiers_ranks", hosts],
        # Slots of 128 KiB: many segments, of several lanes.
        env={"JAXCOMM_TEST_HOSTS": hosts, "JAXCOMM_STAGING_BYTES": str(1 << 20)},
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all checked") == ranks, done.stdout + done.stderr
