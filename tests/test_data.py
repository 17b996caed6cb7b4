"""Who takes which samples, and loops over uneven data that end together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomm.data import Batches
from jaxcomm.errors import InvalidOptionError
from tests.jobs import Launch, documented

seeds = st.integers(0, (1 << 64) - 1)


@settings(max_examples=200, deadline=None)
@given(
    samples=st.integers(1, 200),
    share=st.integers(1, 9),
    size=st.integers(1, 8),
    seed=seeds,
    epoch=st.integers(0, 5),
    pad=st.booleans(),
    shuffle=st.booleans(),
)
def test_an_epoch_takes_each_sample_at_most_once_in_equal_steps(
    samples: int,
    share: int,
    size: int,
    seed: int,
    epoch: int,
    pad: bool,
    shuffle: bool,
) -> None:
    batch = share * size
    if samples < batch and not pad:
        samples += batch

    def make(rank: int, size: int) -> Batches:
        return Batches(
            samples,
            batch,
            seed,
            "pad" if pad else "drop",
            shuffle=shuffle,
            rank=rank,
            size=size,
        )

    ranks, alone = [make(rank, size) for rank in range(size)], make(0, 1)
    steps = alone.steps_per_epoch
    assert {b.steps_per_epoch for b in ranks} == {steps}
    taken = []
    for step in range(epoch * steps, (epoch + 1) * steps):
        assert alone.epoch(step) == epoch
        parts = [b.at(step) for b in ranks]
        assert all(p.indices.shape == p.weights.shape == (share,) for p in parts)
        indices, weights = (np.concatenate(x) for x in zip(*parts, strict=True))
        # The same global batch for any number of ranks.
        assert np.array_equal(indices, alone.at(step).indices)
        assert np.array_equal(weights, alone.at(step).weights)
        assert indices.dtype == np.int64 and weights.dtype == np.float32
        assert set(weights) <= {0.0, 1.0} and weights.sum() > 0
        assert indices.min() >= 0 and indices.max() < samples
        taken += indices[weights == 1].tolist()
    assert len(taken) == len(set(taken)) == (samples if pad else steps * batch)
    if not shuffle:
        assert taken == sorted(taken)


def test_the_order_depends_on_seed_and_epoch_and_stays_as_it_is() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return Batches(8, 8, seed, rank=0, size=1).at(epoch).indices.tolist()

    # Written down: a job that goes on under a later NumPy must find the same order.
    assert order(0, 0) == [0, 2, 1, 5, 4, 3, 6, 7]
    assert order(7, 2) == [6, 7, 4, 0, 1, 5, 3, 2]
    different = {tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(different) == 16
    # Every place gets every sample about equally often.
    first = [Batches(8, 8, seed, rank=0, size=1).at(0).indices for seed in range(4000)]
    counts = np.stack(
        [np.bincount(column, minlength=8) for column in np.stack(first).T]
    )
    assert abs(counts - 500).max() < 120  # more than five standard deviations


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 0}, "samples=0"),
        ({"batch": 0}, "batch=0"),
        ({"batch": 5, "size": 2, "rank": 0}, "batch=5; give a multiple of the 2 ranks"),
        ({"batch": 12}, r"batch=12; exceeds the 10 samples.*remainder=\"pad\""),
        ({"remainder": "keep"}, 'remainder=\'keep\'; give "drop" or "pad"'),
        ({"size": 2, "rank": 2}, "rank=2; of 2 ranks"),
        ({"rank": 1}, "rank=1; give size= as well, or neither"),
        ({"rank": 0}, "rank=0; give size= as well, or neither"),
        ({"size": 3}, "size=3; give rank= as well, or neither"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_options_are_named(options: dict[str, int], words: str) -> None:
    given = {"samples": 10, "batch": 2, **options}
    with pytest.raises(InvalidOptionError, match=words):
        Batches(**given)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidOptionError, match="step=-1"):
        Batches(10, 2).at(-1)


LOOP = """
import jax, jax.numpy as jnp, numpy as np, jaxcomm
from jaxcomm.data import Batches

comm = jaxcomm.init()
rank, size = comm.rank, comm.size
data = np.random.default_rng(0).normal(size=(37, 3))
target = data @ np.array([1.0, -2.0, 3.0])
jax.config.update("jax_enable_x64", True)

@jax.jit
def gradient(params, batch):
    x, y = batch
    return jax.grad(lambda p: jnp.mean((x @ p - y) ** 2))(params)

def descend(params, grads):
    return params - 0.05 * grads

# Rank r has r batches, of two or three samples.
rows = [np.arange(3 * k, 3 * k + 2 + k % 2) + 9 * rank for k in range(rank)]
loader = iter([(data[r], target[r]) for r in rows])
blank = (np.zeros((2, 3)), np.zeros(2))
params = jnp.zeros(3)
every = comm.all_gather_object(rows)
expected = np.zeros(3)
for k in range(size - 1):
    taken = np.concatenate([ranks[k] for ranks in every if k < len(ranks)])
    x, y = data[taken], target[taken]
    expected = expected - 0.05 * 2 * x.T @ (x @ expected - y) / len(taken)
"""

CHECK = """
np.testing.assert_allclose(params, expected, rtol=1e-12)
jaxcomm.assert_replicated(params)

# Padded batches: the mean over an epoch's samples, weighed by what is real.
batches = Batches(37, 8, seed=3, remainder="pad")
weights, total = 0.0, np.zeros(3)
for step in range(batches.steps_per_epoch):
    rows = batches.at(step)
    count = rows.weights.sum()
    x = data[rows.indices] * rows.weights[:, None]
    own = x.sum(0) / max(count, 1)
    mean = jaxcomm.all_reduce(jnp.asarray(own), weight=count)
    everyone = float(jaxcomm.all_reduce(jnp.asarray(count), op="sum"))
    weights, total = weights + everyone, total + everyone * np.asarray(mean)
assert weights == 37
np.testing.assert_allclose(total / 37, data.mean(0), rtol=1e-6)
print("all checked", flush=True)
"""


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_the_loop_in_the_documentation_ends_together(job: Launch, ranks: int) -> None:
    done = job(ranks, LOOP + documented("Uneven data") + CHECK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all checked") == ranks, done.stdout + done.stderr
