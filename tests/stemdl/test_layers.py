"""The network's layers are Flax's, to rounding, with gradients of their own on CPUs."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stemdl.model import layers
from stemdl.model.network import NETWORKS, StemNet

HE = nn.initializers.he_normal()


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


class Pool(nn.Module):
    fast: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return layers.max_pool(x) if self.fast else _plain_pool(x)


def _plain_pool(x: Any) -> Any:
    return nn.max_pool(x, (2, 2), strides=(2, 2))


def plain_conv(features: int, kernel: int, **options: Any) -> nn.Module:
    return nn.Conv(features, (kernel, kernel), **options)


def plain_raised(features: int, kernel: int, init: Any, dtype: Any = None) -> Any:
    return nn.ConvTranspose(
        features,
        (kernel, kernel),
        strides=(2, 2),
        use_bias=False,
        kernel_init=init,
        dtype=dtype,
    )


def gradients(module: nn.Module, variables: Any, x: Any) -> Any:
    def loss(variables: Any, x: Any) -> Any:
        y: Any = module.apply(variables, x)
        # Every element of the result counts in its own way.
        return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape)))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(variables, x)


PAIRS: dict[str, tuple[nn.Module, nn.Module]] = {
    **{
        f"conv {k}": (
            layers.conv(5, k, use_bias=k == 3),
            plain_conv(5, k, use_bias=k == 3),
        )
        for k in (1, 2, 3, 5)
    },
    **{
        f"raised {k}": (layers.ConvTranspose(5, k, HE), plain_raised(5, k, HE))
        for k in (1, 2, 3, 5)
    },
    "pool": (Pool(True), Pool(False)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_layer_is_that_of_flax(name: str) -> None:
    fast, plain = PAIRS[name]
    rng = np.random.default_rng(0)
    # Zeros, as after a relu: poolings choose among equal values.
    x = jnp.maximum(rng.normal(size=(2, 6, 8, 4)), 0)
    variables = plain.init(jax.random.key(0), x)
    own = fast.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, own, variables)
    for a, b in zip(
        jax.tree.leaves(gradients(fast, variables, x)),
        jax.tree.leaves(gradients(plain, variables, x)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_the_network_is_that_of_flax(monkeypatch: pytest.MonkeyPatch) -> None:
    net = StemNet(growth=3, layers=(1, 2, 1))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 2, 8, 8)))

    def found() -> Any:
        variables = net.init(jax.random.key(0), x)
        paths = jax.tree_util.tree_leaves_with_path(variables)
        names = [jax.tree_util.keystr(path) for path, _ in paths]
        return names, gradients(net, variables, x)

    names, fast = found()
    monkeypatch.setattr(layers, "conv", plain_conv)
    # Flax names a layer after its class.
    monkeypatch.setattr(layers, "ConvTranspose", plain_raised)
    monkeypatch.setattr(layers, "max_pool", _plain_pool)
    plain_names, plain = found()
    assert names == plain_names
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_a_gpu_keeps_its_own_gradients() -> None:
    net = NETWORKS["toy"]
    x = jnp.ones((1, 2, 2, 8, 8))
    variables = net.init(jax.random.key(0), x)

    def step(variables: Any) -> Any:
        return jax.grad(lambda v: jnp.sum(jnp.asarray(net.apply(v, x))))(variables)

    traced = jax.jit(step).trace(variables)
    count = {
        platform: traced.lower(lowering_platforms=(platform,))
        .as_text()
        .count("stablehlo.convolution")
        for platform in ("cpu", "cuda")
    }
    # Two gradients of each convolution, where a CPU has products of matrices.
    filters = sum("kernel" in name for name in map(str, _paths(variables)))
    assert count["cuda"] - count["cpu"] == 2 * (filters - 1)  # freq2space is a product


def _paths(tree: Any) -> list[str]:
    return [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
