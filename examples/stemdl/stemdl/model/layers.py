"""Convolutions and pooling whose gradients XLA runs fast on CPUs.

XLA:CPU computes the gradient of a convolution's filter, and of a pooling, by loops that
take many times as long as the layers themselves. Here the first is one product of
matrices for each element of the kernel, and the second chooses among four values.
Parameters, their names and what is computed are those of Flax's layers, to rounding; on
other platforms so is how it is computed. They can be differentiated in reverse only.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import Array, lax

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
_STRIDE = 2


def conv(features: int, kernel: int, **options: Any) -> nn.Conv:
    """Return `flax.linen.Conv` of stride 1 and equal sizes, with fast gradients.

    Args:
      features: of the result.
      kernel: side of the filter.
      **options: of `flax.linen.Conv`.
    """
    return nn.Conv(
        features, (kernel, kernel), conv_general_dilated=_conv_as_flax, **options
    )


class ConvTranspose(nn.Module):
    """As `flax.linen.ConvTranspose` of stride 2, with padding "SAME" and no bias."""

    features: int
    kernel: int
    kernel_init: Any
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
        return _raised(x, kernel)


@jax.custom_vjp
def max_pool(x: Array) -> Array:
    """Return the largest of each 2 x 2 pixels; (n, h, w, c) to (n, h/2, w/2, c).

    Of equal ones the first has the gradient, as in `flax.linen.max_pool`.
    """
    return nn.max_pool(x, (2, 2), strides=(2, 2))


def _max_pool_forward(x: Array) -> tuple[Array, Array]:
    return max_pool(x), x


def _max_pool_backward(x: Array, g: Array) -> tuple[Array]:
    def chosen(x: Array, g: Array) -> Array:
        n, h, w, c = g.shape
        corners = x.reshape(n, h, 2, w, 2, c)
        largest = corners.max((2, 4))
        left = jnp.ones(largest.shape, bool)  # pixels of which none was chosen yet
        parts = []
        for row in range(2):
            for column in range(2):
                here = left & (corners[:, :, row, :, column] == largest)
                left = left & ~here
                parts.append(jnp.where(here, g, 0))
        upper, lower = (jnp.stack(parts[k : k + 2], axis=3) for k in (0, 2))
        return jnp.stack([upper, lower], axis=2).reshape(x.shape)

    def plain(x: Array, g: Array) -> Array:
        pool = jax.vjp(lambda x: nn.max_pool(x, (2, 2), strides=(2, 2)), x)[1]
        return pool(g)[0]

    return (lax.platform_dependent(x, g, cpu=chosen, default=plain),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _conv_as_flax(x: Array, kernel: Array, *_: Any, **options: Any) -> Array:
    """What Flax calls, for a convolution of stride 1 with padding "SAME"."""
    return _same(x, kernel)


def _plain_same(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=_DIMENSIONS
    )


@jax.custom_vjp
def _same(x: Array, kernel: Array) -> Array:
    return _plain_same(x, kernel)


def _same_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _plain_same(x, kernel), (x, kernel)


def _same_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = kept
    (to_x,) = jax.vjp(lambda x: _plain_same(x, kernel), x)[1](g)

    def products(x: Array, g: Array) -> Array:
        side = kernel.shape[0]
        below = (side - 1) // 2
        around = (below, side - 1 - below)
        padded = jnp.pad(x, ((0, 0), around, around, (0, 0)))
        _, h, w, _ = g.shape
        return _per_element(
            side, lambda i, j: (padded[:, i : i + h, j : j + w], g)
        ).astype(kernel.dtype)

    def plain(x: Array, g: Array) -> Array:
        return jax.vjp(lambda k: _plain_same(x, k), kernel)[1](g)[0]

    return to_x, lax.platform_dependent(x, g, cpu=products, default=plain)


_same.defvjp(_same_forward, _same_backward)


def _plain_raised(x: Array, kernel: Array) -> Array:
    return lax.conv_transpose(
        x, kernel, (_STRIDE, _STRIDE), "SAME", dimension_numbers=_DIMENSIONS
    )


@jax.custom_vjp
def _raised(x: Array, kernel: Array) -> Array:
    return _plain_raised(x, kernel)


def _raised_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _plain_raised(x, kernel), (x, kernel)


def _raised_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = kept
    (to_x,) = jax.vjp(lambda x: _plain_raised(x, kernel), x)[1](g)

    def products(x: Array, g: Array) -> Array:
        # Pixel u of x meets pixel 2u + first - i of the result in element i.
        side = kernel.shape[0]
        total = side + _STRIDE - 2
        first = side - 1 if side - 1 < _STRIDE else -(-total // 2)
        _, h, w, _ = x.shape
        padded = jnp.pad(g, ((0, 0), (side, side), (side, side), (0, 0)))

        def pair(i: int, j: int) -> tuple[Array, Array]:
            row, column = side + first - i, side + first - j
            met = padded[
                :,
                row : row + _STRIDE * h - 1 : _STRIDE,
                column : column + _STRIDE * w - 1 : _STRIDE,
            ]
            return x, met

        return _per_element(side, pair).astype(kernel.dtype)

    def plain(x: Array, g: Array) -> Array:
        return jax.vjp(lambda k: _plain_raised(x, k), kernel)[1](g)[0]

    return to_x, lax.platform_dependent(x, g, cpu=products, default=plain)


_raised.defvjp(_raised_forward, _raised_backward)


def _per_element(side: int, pair: Any) -> Array:
    """Return the products of two images for each element of a square kernel."""

    def product(i: int, j: int) -> Array:
        a, b = (image.reshape(-1, image.shape[-1]) for image in pair(i, j))
        return lax.dot_general(
            a,
            b,
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.promote_types(a.dtype, jnp.float32),
        )

    return jnp.stack(
        [jnp.stack([product(i, j) for j in range(side)]) for i in range(side)]
    )
