"""The timeline: what a job records."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

Job = Callable[..., "subprocess.CompletedProcess[str]"]

STEPS = """
import jax, jax.numpy as jnp, jaxcomm
from jax import lax

@jaxcomm.data_parallel(groups=lambda path: path)
def step(params, x):
    loss = lambda p: jnp.sum(jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]))
    return lax.pmean(jax.grad(loss)(params), "batch")

params = {"a": jnp.ones((300, 300)), "b": jnp.ones((300, 300))}
for _ in range(3):
    params = step(params, jnp.ones((4, 300)))
jaxcomm.all_reduce(jnp.ones(7))
print(len(step.schedule.buckets), "buckets")
"""


def test_one_rank_records_nothing(job: Job, tmp_path: Path) -> None:
    file = tmp_path / "timeline.json"
    done = job(1, STEPS, env={"JAXCOMM_TIMELINE": str(file)})
    assert done.returncode == 0, done.stderr
    assert not file.exists()  # nothing travels


def test_every_bucket_of_every_rank_is_recorded(job: Job, tmp_path: Path) -> None:
    ranks, file = 2, tmp_path / "timeline.json"
    done = job(ranks, STEPS, env={"JAXCOMM_TIMELINE": str(file)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 buckets") == ranks
    events = json.loads(file.read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert {"rank 0", "rank 1", "ready", "collective"} <= names
    for rank in range(ranks):
        mine = [e for e in events if e["ph"] == "X" and e["pid"] == rank]
        travels = [e for e in mine if e["tid"] == 1]
        assert len(travels) == 3 * 2 + 1
        assert all(e["dur"] > 0 for e in mine)
        ends = [e["ts"] + e["dur"] for e in travels]
        starts = [e["ts"] for e in travels[1:]]
        # One at a time, in one order.
        assert all(end <= start for end, start in zip(ends, starts, strict=False))
        order = [e["args"]["bucket"] for e in travels]
        assert order == [0, 1, 0, 1, 0, 1, 0]
        assert travels[0]["args"]["bytes"] == 300 * 300 * 4
        assert "['b']" in travels[0]["name"]
