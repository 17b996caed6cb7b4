"""Section of worker.py: are the calls captured in CUDA graphs, and still right?

Three witnesses. XLA's dump of the thunks says what it put into a command buffer, the
profiler what was launched, and the numbers are compared at new addresses in each step,
since a graph has to be updated then.
"""

from __future__ import annotations

import collections
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxcomm
from jaxcomm.ranks.communicator import Communicator

STEPS, LEAVES, EXCERPT = 6, 8, 3000
CALL = "jaxcomm_"
BUFFER = "kCommandBuffer|command_buffer"


def graph(comm: Communicator, dump: Path) -> dict[str, Any]:
    """Run a step of several calls; compare with NumPy; look for its graph."""

    @jaxcomm.data_parallel(groups=4)
    def step(tree: Any) -> Any:
        tree = jax.tree.map(lambda x: jnp.sin(x) + 1, tree)
        return jax.tree.map(lambda x: 2 * x, lax.pmean(tree, "batch"))

    def inputs(rank: int, k: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([rank, k])
        return {
            f"leaf{j}": rng.normal(size=1000 + j).astype("float32")
            for j in range(LEAVES)
        }

    kept, wrong = [], []  # what is kept keeps its address
    for k in range(STEPS):
        kept.append(step(inputs(comm.rank, k)))
        every = [inputs(rank, k) for rank in range(comm.size)]
        for name, got in kept[-1].items():
            want = 2 * np.mean([np.sin(tree[name]) + 1 for tree in every], axis=0)
            if not np.allclose(got, want, atol=1e-5):
                wrong.append(f"step {k}, {name}")
    same = inputs(comm.rank, 0)
    dumped = thunks(dump)
    launched = launches(lambda: jax.block_until_ready(step(same)))
    return {
        "ok": not wrong,
        "wrong": wrong,
        "graphs launched": any("GraphLaunch" in name for name in launched),
        "command buffers dumped": any(
            "command buffers" in name for name in dumped["counts"]
        ),
        "thunks": dumped,
        "launches": launched,
        "buckets": len(step.schedule.buckets),
        # What a graph replays is not counted.
        "counters": comm.counters(),
    }


def thunks(dump: Path) -> dict[str, Any]:
    """Count command buffers and our calls in the dumps of modules that have any.

    Dumps of HLO name our calls; those of thunks say only what kind each is.
    """
    texts = {
        path.name: path.read_text(errors="replace")
        for path in sorted(dump.rglob("*"))
        if path.is_file()
    }
    # module_0007.jit_step.what.txt
    modules = {name.split(".")[0] for name, text in texts.items() if CALL in text}
    counts: collections.Counter[str] = collections.Counter()
    excerpt = ""
    for name, text in texts.items():
        if name.split(".")[0] not in modules:
            continue
        kind = re.sub(r"^module_\d+\.|\.txt$", "", name)[-60:]
        for what, pattern in (("calls", CALL), ("command buffers", BUFFER)):
            if found := len(re.findall(pattern, text)):
                counts[f"{kind}: {what}"] += found
        if "thunk" in name and re.search(BUFFER, text):
            excerpt = text[:EXCERPT]
    return {"counts": dict(counts), "excerpt": excerpt}


def events(run: Any, plane_name: str = "") -> collections.Counter[str]:
    """Count by name what the profiler saw in three calls, on planes of a name."""
    names: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(3):
                run()
        for file in Path(folder).glob("**/*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                if plane_name in plane.name:
                    for line in plane.lines:
                        names.update(event.name for event in line.events)
    return names


def launches(run: Any) -> dict[str, Any]:
    """Count what the profiler saw of graphs and of NCCL in three steps."""
    try:
        names = events(run)
    except Exception as error:  # the profiler may be absent or forbidden
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    # Names of Python's frames begin with "$".
    pattern = re.compile(r"^[^$].*(graph|nccl|command)", re.IGNORECASE)
    return {name[:80]: n for name, n in names.items() if pattern.search(name)}
