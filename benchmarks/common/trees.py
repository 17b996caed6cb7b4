"""The gradient trees that are reduced."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcomm.simulate import networks

Shapes = dict[str, jax.ShapeDtypeStruct]


def resnet50() -> Shapes:
    """Parameters of ResNet-50 (He et al., arXiv:1512.03385): 161 leaves, 25.6 M f32."""
    return _float32(networks.resnet50())


def small_leaves(count: int, elements: int) -> Shapes:
    """Return so many float32 vectors of so many elements."""
    one = jax.ShapeDtypeStruct((elements,), jnp.float32)
    return {f"leaf{index:04}": one for index in range(count)}


def stemdl() -> Shapes:
    """STEMDL's production network: 33 leaves, 232.8 M float32, 0.93 GB."""
    return _float32(networks.stemdl())


def gpt2() -> Shapes:
    """GPT-2 small (Radford et al., 2019): 148 leaves, 124.4 M float32."""
    return _float32(networks.gpt2())


def one_leaf() -> Shapes:
    """Return one leaf of 400 MB."""
    return {"embedding": jax.ShapeDtypeStruct((100_000, 1000), jnp.float32)}


def mixed() -> Shapes:
    """ResNet-50 with bfloat16 convolutions and float32 normalisation."""
    return {
        name: jax.ShapeDtypeStruct(
            leaf.shape, jnp.bfloat16 if leaf.ndim > 1 else jnp.float32
        )
        for name, leaf in resnet50().items()
    }


def _float32(layers: list[networks.Layer]) -> Shapes:
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in networks.shapes(layers).items()
    }
