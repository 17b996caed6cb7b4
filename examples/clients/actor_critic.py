"""An actor-critic (PPO) on cart-poles in JAX, of which every device has its own."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from jax import lax
from jax.sharding import PartitionSpec as P

import backend

ENVIRONMENTS, LENGTH, EPOCHS = 16, 32, 2  # environments in all, steps of each
DISCOUNT, DECAY, CLIP = 0.98, 0.95, 0.2


class ActorCritic(nn.Module):
    """The logits of both actions, and the value of the state."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Any) -> tuple[Any, Any]:
        kind = {"dtype": self.dtype, "param_dtype": self.dtype}
        x = nn.tanh(nn.Dense(32, **kind)(x))
        return nn.Dense(2, **kind)(x), nn.Dense(1, **kind)(x)[..., 0]


class Transition(NamedTuple):
    """What a step of the environment leaves behind."""

    seen: Any
    action: Any
    log_prob: Any
    value: Any
    reward: Any
    done: Any


def reset(key: Any, dtype: Any) -> Any:
    """Return a cart and its pole near rest: place, speed, angle, angular speed."""
    return jax.random.uniform(key, (4,), dtype, -0.05, 0.05)


def advance(state: Any, action: Any, key: Any) -> tuple[Any, Any]:
    """Push left or right for 20 ms; begin anew where the pole or the cart is out."""
    _, speed, angle, turning = state
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    # The cart weighs 1 kg; the pole 0.1 kg, and its middle is 0.5 m up.
    push = (jnp.where(action == 1, 10.0, -10.0) + 0.05 * turning**2 * sine) / 1.1
    twist = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
    pull = push - 0.05 * twist * cosine / 1.1
    moved = state + 0.02 * jnp.stack([speed, pull, turning, twist])
    done = (jnp.abs(moved[0]) > 2.4) | (jnp.abs(moved[2]) > 0.2095)
    return jnp.where(done, reset(key, state.dtype), moved), done


def play(train: TrainState, environments: Any, key: Any) -> tuple[Any, Transition]:
    """Follow the policy for LENGTH steps in this device's environments."""

    def step(environments: Any, key: Any) -> tuple[Any, Transition]:
        logits, value = train.apply_fn(train.params, environments)
        choose, fall = jax.random.split(key)
        action = jax.random.categorical(choose, logits)
        chosen = jnp.take_along_axis(nn.log_softmax(logits), action[:, None], 1)[:, 0]
        keys = jax.random.split(fall, len(environments))
        after, done = jax.vmap(advance)(environments, action, keys)
        reward = jnp.where(done, 0.0, 1.0).astype(value.dtype)
        row = Transition(environments, action, chosen, value, reward, done)
        return after, row

    return lax.scan(step, environments, jax.random.split(key, LENGTH))


def targets(rows: Transition, last: Any) -> tuple[Any, Any]:
    """Return generalised advantages, normalised over all devices, and returns."""

    def back(carry: Any, row: Transition) -> tuple[Any, Any]:
        advantage, later = carry
        goes_on = DISCOUNT * (1 - row.done)
        error = row.reward + goes_on * later - row.value
        advantage = error + goes_on * DECAY * advantage
        return (advantage, row.value), advantage

    start = (jnp.zeros_like(last), last)
    advantages = lax.scan(back, start, rows, reverse=True)[1]
    mean = lax.pmean(jnp.mean(advantages), backend.AXIS)
    variance = lax.pmean(jnp.mean((advantages - mean) ** 2), backend.AXIS)
    return (advantages - mean) / jnp.sqrt(variance + 1e-8), advantages + rows.value


def local_loss(params: Any, apply: Any, rows: Transition, found: Any) -> Any:
    """Return PPO's loss over this device's transitions."""
    advantages, returns = found
    logits, values = apply(params, rows.seen)
    logs = nn.log_softmax(logits)
    ratio = jnp.take_along_axis(logs, rows.action[..., None], -1)[..., 0]
    ratio = jnp.exp(ratio - rows.log_prob)
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    actor = -jnp.mean(jnp.minimum(ratio * advantages, clipped * advantages))
    entropy = -jnp.mean(jnp.sum(jnp.exp(logs) * logs, -1))
    return actor + 0.5 * jnp.mean((values - returns) ** 2) - 0.01 * entropy


def pmap_grad(params: Any, *rest: Any) -> tuple[Any, Any]:
    loss, grads = jax.value_and_grad(local_loss)(params, *rest)
    return lax.pmean(loss, backend.AXIS), lax.pmean(grads, backend.AXIS)


def shard_map_grad(params: Any, *rest: Any) -> tuple[Any, Any]:
    # jax.grad adds over devices where parameters are P(): the mean's gradient is whole.
    def loss_fn(params: Any) -> Any:
        return lax.pmean(local_loss(params, *rest), backend.AXIS)

    return jax.value_and_grad(loss_fn)(params)


def iterate(grad_fn: Any, train: Any, environments: Any, key: Any) -> tuple[Any, Any]:
    """Play, then learn from what was played EPOCHS times."""
    key, now = jax.random.split(key)
    environments, rows = play(train, environments, now)
    found = targets(rows, train.apply_fn(train.params, environments)[1])

    def epoch(train: TrainState, _: Any) -> tuple[TrainState, Any]:
        loss, grads = grad_fn(train.params, train.apply_fn, rows, found)
        return train.apply_gradients(grads=grads), loss

    train, losses = lax.scan(epoch, train, length=EPOCHS)
    return (train, environments, key), losses[0]


def pmap_step(state: Any, _: Any) -> tuple[Any, Any]:
    return iterate(pmap_grad, *state)


def shard_map_step(state: Any, _: Any) -> tuple[Any, Any]:
    train, environments, keys = state  # the block of keys holds one: this device's
    state, loss = iterate(shard_map_grad, train, environments, keys[0])
    return (*state[:2], state[2][None]), loss


@backend.options
@click.option("--x64", is_flag=True, help="In float64: actions hang on the last bit.")
def main(backend_name: str, devices: int, steps: int, x64: bool) -> None:
    """Train under pmap or shard_map, JAX's or jaxcomm's."""
    jax.config.update("jax_enable_x64", x64)
    run = backend.connect(backend_name, devices)
    dtype = np.dtype("float64" if x64 else "float32")
    model = ActorCritic(dtype)
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), dtype))
    tx = optax.adam(3e-3, eps=1e-5)
    train = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    keys = jax.random.split(jax.random.PRNGKey(1), ENVIRONMENTS)
    environments = run.shard(jax.vmap(lambda key: reset(key, dtype))(keys))
    # Raw keys, one a device.
    keys = run.per_device(jax.random.split(jax.random.PRNGKey(2), run.total))
    if run.shard_map:
        specs = (P(), P(backend.AXIS), P(backend.AXIS))
        mapped = run.shard_map(
            shard_map_step, in_specs=(specs, P()), out_specs=(specs, P())
        )
        step = jax.jit(mapped, donate_argnums=0)
    else:
        step = run.pmap(pmap_step, axis_name=backend.AXIS, donate_argnums=0)
    state = run.replicate(train), environments, keys
    name = "actor_critic-x64" if x64 else "actor_critic"
    nothing = itertools.repeat(())  # the environments make the data
    backend.train(run, name, step, state, nothing, steps, lambda s: s[0].params)


if __name__ == "__main__":
    main()
