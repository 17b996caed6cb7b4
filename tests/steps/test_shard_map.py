"""jaxcomm.shard_map gives each rank what jax.shard_map gives each device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.jobs import ROOT, Launch, launch_ranks

pytestmark = pytest.mark.long


# Of each kind of program one; all are compared in `make test-all`.
SOME = (
    "grad of sum",
    "mean of grad, local",
    "scan",
    "pieces",
    "convolved",
    "trained",
    "outside, local",
    "outside, blocks",
)


@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        (2, SOME),
        *(pytest.param(n, (), marks=pytest.mark.thorough) for n in (1, 2, 3)),
    ],
)
def test_as_under_jax(ranks: int, names: tuple[str, ...], tmp_path: Path) -> None:
    line = [sys.executable, "-m", "tests.programs.shard_map", str(tmp_path)]
    devices = f"--xla_force_host_platform_device_count={ranks}"
    done = subprocess.run(
        [*line, "reference", *names],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {devices}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours = launch_ranks(ranks, ["-m", *line[2:], "ranks", *names], timeout=300)
    assert ours.returncode == 0, ours.stderr
    found: dict[str, np.ndarray] = {}
    for rank in range(ranks):
        found.update(np.load(tmp_path / f"{rank}.npz"))
    with np.load(tmp_path / "reference.npz") as expected:
        assert set(expected) == set(found)
        for name, value in expected.items():
            assert value.dtype == found[name].dtype, name
            # Biases before a normalisation have gradients that are rounding alone.
            np.testing.assert_allclose(
                found[name], value, rtol=2e-5, atol=2e-6, err_msg=name
            )


REFUSALS = """
import functools
import jax, jax.numpy as jnp, jaxcomm
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxcomm.errors import InvalidOptionError, JaxcommError

comm = jaxcomm.init()
x = jnp.arange(4.0) + comm.rank
S = P("batch")

def refused(text, call, kind=InvalidOptionError):
    try:
        call()
    except kind as error:
        assert text in str(error), str(error)
        return
    raise AssertionError(f"not refused: {text}")

same = lambda x: x
make = functools.partial(jaxcomm.shard_map, same)
refused("P('model',) has axis 'model', and the ranks' is 'batch'",
        lambda: make(in_specs=P("model"), out_specs=S))
refused("'batch' is no PartitionSpec", lambda: make(in_specs="batch", out_specs=S))
refused("in_specs has 1 entries for 2 arguments",
        lambda: jaxcomm.shard_map(lambda x, y: x, in_specs=(S,), out_specs=S)(x, x))
mesh = jax.sharding.AbstractMesh((2, 2), ("data", "model"))
refused("the ranks are one axis", lambda: make(mesh=mesh, in_specs=S, out_specs=S))
refused("name ['batch', 'data']", lambda: make(
    mesh=jax.sharding.AbstractMesh((2,), ("data",)), axis_name="batch", in_specs=S,
    out_specs=S))
refused("wire_dtype", lambda: make(in_specs=S, out_specs=S, wire_dtype="int3"))
# JAX's own checks, as there.
refused("out_specs", lambda: make(in_specs=S, out_specs=P())(x), ValueError)
# Without them a result that ranks may have differently is refused too.
refused("out_specs takes result of the function for equal", lambda: make(
    in_specs=S, out_specs=P(), check_vma=False)(x), JaxcommError)
jaxcomm.shard_map(lambda x: lax.pmean(x, "batch"), in_specs=S, out_specs=P(),
                  check_vma=False)(x)
taken = make(in_specs=S, out_specs=P(), check_vma=False, allow_divergent=True)(x)
assert (taken == x).all()
# A mesh of one axis names it; what else it says does not matter.
ranks = jax.sharding.AbstractMesh((7,), ("data",))
step = functools.partial(jaxcomm.shard_map, mesh=ranks, in_specs=P("data"),
                         out_specs=P())
total = step(lambda x: lax.psum(x, "data"))(x)
assert (total == comm.size * jnp.arange(4.0) + sum(range(comm.size))).all(), total
# Differentiated forwards: JAX refuses it.
refused("forward-mode", lambda: jax.jvp(make(in_specs=S, out_specs=S), (x,), (x,)),
        TypeError)
# An array of all processes.
if comm.size > 1:
    every = jax.make_mesh((comm.size,), ("batch",),
                          axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.make_array_from_process_local_data(
        jax.sharding.NamedSharding(every, S), jax.device_get(x))
    refused("argument [0] is an array of several processes",
            lambda: make(in_specs=S, out_specs=S)(spread))

block = jaxcomm.local_block({"a": jnp.arange(4 * comm.size), "n": 3},
                            {"a": S, "n": P()})
assert (block["a"] == jnp.arange(4) + 4 * comm.rank).all() and block["n"] == 3
refused("leaf ['a']: dimension 1 of (2, 3) is no multiple of",
        lambda: jaxcomm.local_block({"a": jnp.ones((2, 3))}, P(None, "batch")))
refused("leaf of the tree has shape (); its spec is",
        lambda: jaxcomm.local_block(jnp.ones(()), S))
refused("is no prefix", lambda: jaxcomm.local_block({"a": x}, {"b": S}))
print("done")
"""


def test_refusals(job: Launch) -> None:
    done = job(2, REFUSALS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2
