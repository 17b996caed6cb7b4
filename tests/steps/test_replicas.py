"""What should be equal on all ranks is, or somebody says so."""

from __future__ import annotations

import pytest

from tests.jobs import Launch

COUNTERS = """
import functools
from typing import NamedTuple
import jax, jax.numpy as jnp, jaxcomm
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxcomm.errors import ReplicationError, UnsupportedCollectiveError

comm = jaxcomm.init()
x = jnp.full(3, 1.0 + comm.rank)

def sometimes(step, x):
    def mean(x):
        return lax.pmean(x, "batch") + 0 * x  # varying, as the other branch
    return lax.cond(step % 2 == 0, mean, lambda x: 0 * x, x)

def check(call):
    assert (call(jnp.int32(0)) == 1 + (comm.size - 1) / 2).all()
    assert (call(jnp.int32(1)) == 0).all()

# Declared equal.
mapped = jaxcomm.pmap(sometimes, in_axes=(None, 0))
check(lambda n: mapped(n, x[None])[0])
specs = {"in_specs": (P(), P("batch")), "out_specs": P("batch")}
for vma in (True, False):
    shard_mapped = jaxcomm.shard_map(sometimes, check_vma=vma, **specs)
    check(lambda n: shard_mapped(n, x))

# Equal by construction: given back one larger, at the same place.
class State(NamedTuple):
    w: object
    step: object

def update(state, x):
    grad = sometimes(state.step, x)
    return State(state.w - grad, state.step + 1), lax.pmean(x, "batch")

state = State(x, jnp.int32(0))
train = jaxcomm.data_parallel(update)
for _ in range(3):
    state, _ = train(state, x)
assert int(state.step) == 3

def refused(f, *args):
    try:
        jaxcomm.data_parallel(f).lower(*args)
    except UnsupportedCollectiveError as error:
        assert "may differ between ranks" in str(error)
    else:
        raise AssertionError("not refused")

refused(sometimes, jnp.int32(0), x)  # given back nowhere
refused(lambda s, x: update(State(s.w, x[0].astype(int)), x), state, x)
refused(lambda s, x: (State(s.w, s.step + x[0].astype(jnp.int32)),
                      sometimes(s.step, x)), state, x)
refused(lambda s, x: (State(s.w, s.step + lax.axis_index("batch")),
                      sometimes(s.step, x)), state, x)
# A rank's number, found by a decorated function inside.
number = jaxcomm.data_parallel(lambda: lax.axis_index("batch"))
refused(lambda x: sometimes(number(), x), x)
# Inside another program nobody compares it.
try:
    jax.jit(train)(state, x)
except UnsupportedCollectiveError as error:
    assert "called in another program" in str(error)
else:
    raise AssertionError("not refused")

# Declared, and not so: named on every rank before anything is sent. Also where one rank
# has lowered the step ahead.
ahead = jaxcomm.data_parallel(update)
if comm.rank == 1:
    ahead.lower(State(x, jnp.int32(0)), x)
for call in (
    lambda n: ahead(State(x, n), x),
    lambda n: jaxcomm.pmap(sometimes, in_axes=(None, 0))(n, x[None]),
    lambda n: jaxcomm.shard_map(sometimes, **specs)(n, x),
    lambda n: jaxcomm.data_parallel(update)(State(x, n), x),
):
    try:
        call(jnp.int32(7 + comm.rank))
    except ReplicationError as error:
        assert "argument [0]" in str(error) and "nothing was sent" in str(error), error
    else:
        raise AssertionError("ranks were not compared")
print("done")
"""


def test_counters(job: Launch) -> None:
    done = job(2, COUNTERS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2


PARAMETERS = """
import sys
import jax, jax.numpy as jnp, jaxcomm, optax
from jax import lax
from jaxcomm.errors import ReplicationError

comm = jaxcomm.init()
how = sys.argv[1]
tx = optax.adam(0.1)
seed = comm.rank if how == "no broadcast" else 0
params = {"w": jax.random.normal(jax.random.key(seed), (3,)), "b": jnp.zeros(())}
state = (params, tx.init(params))
number = 0 if how == "one batch" else comm.rank
x = jnp.arange(12.0).reshape(4, 3) + number
key = jax.random.key(0 if how == "one key" else comm.rank)

@jaxcomm.data_parallel(**({} if how == "variable" else {"check_replicas": 2}))
def step(state, batch, key):
    params, opt = state
    def loss(p):
        keep = jax.random.bernoulli(key, 0.5, batch["x"].shape)
        return jnp.mean((batch["x"] * keep) @ p["w"] + p["b"])
    grads = lax.pmean(jax.grad(loss)(params), "batch")
    updates, opt = tx.update(grads, opt)
    return (optax.apply_updates(params, updates), opt), loss(params)

try:
    for i in range(5):
        if how == "later" and i == 3 and comm.rank == 1:
            (p, opt) = state
            state = ({**p, "b": p["b"] + 1}, opt)
        state, _ = step(state, {"x": x + i}, key)
except ReplicationError as error:
    print(f"found in call {i}: {error}", flush=True)
else:
    print("fine", flush=True)
"""


@pytest.mark.parametrize(
    ("how", "said", "warned"),
    [
        ("right", "fine", ""),
        ("variable", "fine", ""),
        ("no broadcast", "found in call 0: step: argument [0][0]['w'] is not", ""),
        ("later", "found in call 4: step: argument [0][0]['b'] is not", ""),
        ("one batch", "fine", "the same batch (argument [1]['x']): each rank"),
        ("one key", "fine", "the same PRNG key (argument [2]): all draw"),
    ],
)
def test_parameters_batches_and_keys(
    job: Launch, how: str, said: str, warned: str
) -> None:
    env = {"JAXCOMM_CHECK": "replicas"} if how == "variable" else {}
    done = job(2, PARAMETERS, how, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(said) == 2, done.stdout
    assert "jaxcomm.broadcast" in done.stdout or said == "fine"
    assert warned in done.stderr
    assert ("were given the same" in done.stderr) == bool(warned), done.stderr


def test_bad_options_are_refused(job: Launch) -> None:
    done = job(
        1,
        "import jaxcomm; jaxcomm.data_parallel(lambda x: x, check_replicas=0)",
    )
    assert done.returncode == 1
    assert "check_replicas=0; give True, False, or a number" in done.stderr
    env = {"JAXCOMM_CHECK": "every,replica"}
    done = job(1, "import jaxcomm; jaxcomm.data_parallel(abs)(-1)", env=env)
    assert done.returncode == 1
    assert "JAXCOMM_CHECK: 'every,replica'; give 'once'" in done.stderr
