"""jaxcomm.flax: the states of Flax's modules."""

from __future__ import annotations

from tests.jobs import Launch

FLAX = """
import jax, jaxcomm, numpy as np
from flax import nnx
comm = jaxcomm.init()
model = nnx.Sequential(
    nnx.Linear(3, 4, rngs=nnx.Rngs(comm.rank)),
    nnx.BatchNorm(4, rngs=nnx.Rngs(comm.rank)),
    nnx.Dropout(0.5, rngs=nnx.Rngs(comm.rank)),
)
want = comm.broadcast_object(jax.tree.map(np.asarray, nnx.state(model, nnx.Param)), 1)
assert jaxcomm.flax.broadcast(model, root=1) is model
got = nnx.state(model, nnx.Param)
jax.tree.map(np.testing.assert_array_equal, got, want)
jaxcomm.assert_replicated(got)
"""


def test_nnx_module_gets_the_roots_state(job: Launch) -> None:
    done = job(2, FLAX)
    assert done.returncode == 0, done.stderr
