"""The STEMDL benchmark's job for JAX: steps of the example's training.

benchmarks.stemdl.worker OUT NETWORK REPEATS PEER. PEER is "ranks", started by `jaxcomm
run`; "many", the same for any number of ranks, none of which runs alone; "timeline",
with jaxcomm's step alone; or "devices", one process with two host devices under
`jax.pmap`. Every process writes OUT.<rank>.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcomm
from benchmarks.common import taking_turns
from benchmarks.stemdl.sizes import SIZES
from stemdl import config
from stemdl.training import optimizer, recipe
from stemdl.training.backends import AXIS, Devices, Ranks

OURS, PMAP = "jaxcomm", "jax.pmap"
TIMELINE_BLOCKS = 4

Block = Callable[[], None]


def one_device() -> jax.sharding.Mesh:
    return jax.make_mesh((1,), (AXIS,), axis_types=(AxisType.Auto,))


class Steps:
    """The example's train step on synthetic data of the right shape."""

    def __init__(self, network: str):
        size = SIZES[network]
        sets = (f"network.name={network}", "network.layout=probes")
        self.calls = size.calls
        self.config = config.load(None, sets)
        self.model = recipe.build(self.config.network, size.pixels, axis_name=AXIS)
        steps = self.config.training.steps
        self.tx = optimizer.make(self.config.optimizer, self.config.schedule, steps)
        pattern = (size.scan, size.scan, size.pixels, size.pixels)
        rng = np.random.default_rng(0)
        self.batch = (
            rng.normal(size=(size.batch, *pattern)).astype(np.float32),
            rng.normal(size=(size.batch, size.pixels, size.pixels)).astype(np.float32),
        )
        self.train_step = recipe.make_train_step(self.model, self.tx, self.config)

    def state(self) -> Any:
        """A first state of its own: the step is given it to reuse.

        Drawn by NumPy: to compile the network's own drawing takes longer than to
        compile its step, and the time of a step does not depend on it.
        """
        rng = np.random.default_rng(1)
        shapes = jax.eval_shape(self.model.init, jax.random.key(0), self.batch[0][:1])

        def drawn(leaf: Any) -> jax.Array:
            if len(leaf.shape) == 1:
                return jnp.full(leaf.shape, 0.1)
            deviation = math.sqrt(2 / math.prod(leaf.shape[:-1]))
            return jnp.asarray(rng.normal(0, deviation, leaf.shape), jnp.float32)

        params = jax.tree.map(drawn, shapes["params"])
        batch_stats = jax.tree.map(
            lambda leaf: jnp.ones(leaf.shape), shapes["batch_stats"]
        )
        return recipe.State(params, batch_stats, self.tx.init(params))

    def block(self, step: Any, state: Any, batch: Any) -> Block:
        """`calls` steps, one dispatched after the other as in a training."""

        def run() -> None:
            nonlocal state
            for _ in range(self.calls):
                state, loss = step(state, batch)
            jax.block_until_ready((state, loss))

        return run

    def plain(self) -> Block:
        """The step where nothing travels: collectives over an axis of one device."""
        mapped = self.on_one_device(self.train_step)
        step = jax.jit(mapped, donate_argnums=0)
        # Where the step leaves it, so that it is compiled once.
        whole = NamedSharding(one_device(), PartitionSpec())
        state = jax.device_put(self.state(), whole)
        return self.block(step, state, self.batch)

    def on_one_device(self, step: Any, operands: int = 2) -> Any:
        """Run a step over an axis of one device: JAX drops its collectives."""
        everywhere, split = PartitionSpec(), PartitionSpec(AXIS)
        return jax.shard_map(
            step,
            mesh=one_device(),
            in_specs=(everywhere, *[split] * (operands - 1)),
            out_specs=everywhere,
            check_vma=False,
        )


def on_ranks(steps: Steps, repeats: int, folder: Path, peer: str) -> dict[str, Any]:
    """Time jaxcomm's step beside the one without communication, or run it alone."""
    backend, comm = Ranks(), jaxcomm.init()
    if len(os.sched_getaffinity(0)) != 1:
        raise SystemExit("a rank may use several cores; jaxcomm run was to pin it")
    step = recipe.compile_step(steps.model, steps.tx, steps.config, backend)
    state = backend.replicate(steps.state())
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    ours = steps.block(step, state, steps.batch)
    if peer != "timeline":
        blocks = {OURS: ours, taking_turns.TOGETHER: steps.plain()}
        samples = taking_turns.seconds_of(
            *(blocks, comm.rank, repeats, folder, comm.barrier),
            one_alone=peer == "ranks",
        )
    else:
        samples = {}
        for _ in range(taking_turns.WARM_UP + TIMELINE_BLOCKS):
            ours()
    schedule = step.schedule
    about = {"buckets": len(schedule.buckets), "bytes": schedule.nbytes}
    return {"seconds": samples, "parameters": parameters, **about}


def on_devices(steps: Steps, repeats: int) -> dict[str, Any]:
    """Time the step under `jax.pmap`, in one process."""
    backend = Devices()
    if backend.size != taking_turns.RANKS:
        raise SystemExit(
            f"{backend.size} devices; XLA_FLAGS was to make two of the CPU"
        )
    step = recipe.compile_step(steps.model, steps.tx, steps.config, backend)
    state = backend.replicate(steps.state())
    batch = tuple(np.stack([part] * backend.size) for part in steps.batch)
    run, samples = steps.block(step, state, batch), []
    for repeat in range(taking_turns.WARM_UP + repeats):
        seconds = taking_turns.timed(run)
        if repeat >= taking_turns.WARM_UP:
            samples.append(seconds)
    return {"seconds": {PMAP: samples}}


def main(out: Path, network: str, repeats: int, peer: str) -> None:
    steps = Steps(network)
    if peer == "devices":
        found, rank = on_devices(steps, repeats), 0
    else:
        found = on_ranks(steps, repeats, out.parent, peer)
        rank = jaxcomm.rank()
    out.with_suffix(f".{rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
