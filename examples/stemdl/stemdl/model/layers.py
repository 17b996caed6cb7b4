"""Convolutions and pooling whose gradients XLA runs fast on CPUs.

XLA:CPU computes the gradient of a convolution's filter as a convolution with a window
of the image's size, for which both operands are transposed, that of a transposed
convolution by plain loops, and that of a pooling by a scatter. Here the cotangent is
laid out once, shifted by every element of the kernel: its product with the input is the
filter's gradient, and its product with the filter that of the input. A pooling's
gradient is a choice among four pixels. Parameters, their names and what is computed are
those of Flax's layers, to rounding; on other platforms so is how it is computed. They
can be differentiated in reverse only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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


def _max_pool_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    pooled = max_pool(x)
    return pooled, (x, pooled)


def _max_pool_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array]:
    def chosen(x: Array, pooled: Array, g: Array) -> Array:
        n, h, w, c = g.shape
        corners = x.reshape(n, h, 2, w, 2, c)
        largest = [
            corners[:, :, row, :, column] == pooled
            for row in range(2)
            for column in range(2)
        ]
        choice = jnp.where(
            largest[0], 0, jnp.where(largest[1], 1, jnp.where(largest[2], 2, 3))
        ).astype(jnp.int8)
        place = jnp.arange(4, dtype=jnp.int8).reshape(1, 1, 2, 1, 2, 1)
        here = choice[:, :, None, :, None] == place
        return jnp.where(here, g[:, :, None, :, None], 0).reshape(x.shape)

    def plain(x: Array, pooled: Array, g: Array) -> Array:
        pool = jax.vjp(lambda x: nn.max_pool(x, (2, 2), strides=(2, 2)), x)[1]
        return pool(g)[0]

    return (lax.platform_dependent(*kept, g, cpu=chosen, default=plain),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)

Convolution = Callable[[Array, Array], Array]
Shifts = Callable[[Array, int], Array]


def _fast(plain: Convolution, shifts: Shifts) -> Convolution:
    """Return a convolution with the gradients of `plain`.

    Args:
      plain: the convolution of (n, h, w, in) with a square kernel (k, k, in, out).
      shifts: called with the cotangent and k; returns, (n, h, w, k * k * out), the
        cotangents of what each pixel of the input went into by each kernel element.
    """
    convolution = jax.custom_vjp(plain)

    def forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        return plain(x, kernel), (x, kernel)

    def products(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
        side, _, width, features = kernel.shape
        wide = jnp.promote_types(x.dtype, jnp.float32)
        shifted = shifts(g, side).reshape(-1, side * side * features)
        pixels = x.reshape(-1, width)
        product = functools.partial(lax.dot_general, preferred_element_type=wide)
        filters = kernel.transpose(0, 1, 3, 2).reshape(-1, width)
        to_x = product(shifted, filters, (((1,), (0,)), ((), ())))
        to_kernel = product(pixels, shifted, (((0,), (0,)), ((), ())))
        to_kernel = to_kernel.reshape(width, side, side, features)
        return (
            to_x.reshape(x.shape).astype(x.dtype),
            to_kernel.transpose(1, 2, 0, 3).astype(kernel.dtype),
        )

    def as_plain(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
        return jax.vjp(plain, x, kernel)[1](g)

    def backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
        return lax.platform_dependent(*kept, g, cpu=products, default=as_plain)

    convolution.defvjp(forward, backward)
    return convolution


def _plain_same(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=_DIMENSIONS
    )


def _plain_raised(x: Array, kernel: Array) -> Array:
    return lax.conv_transpose(
        x, kernel, (_STRIDE, _STRIDE), "SAME", dimension_numbers=_DIMENSIONS
    )


def _shifts_of_same(g: Array, side: int) -> Array:
    below = (side - 1) // 2
    _, h, w, _ = g.shape
    around = (side - 1 - below, below)
    padded = jnp.pad(g, ((0, 0), around, around, (0, 0)))
    last = side - 1
    return _laid_out(
        padded,
        [slice(last - i, last - i + h) for i in range(side)],
        [slice(last - j, last - j + w) for j in range(side)],
    )


def _shifts_of_raised(g: Array, side: int) -> Array:
    # Pixel u of the input meets pixel 2u + first - i of the result in element i.
    total = side + _STRIDE - 2
    first = side - 1 if side - 1 < _STRIDE else -(-total // 2)
    _, h, w, _ = g.shape
    padded = jnp.pad(g, ((0, 0), (side, side), (side, side), (0, 0)))
    starts = [side + first - i for i in range(side)]
    return _laid_out(
        padded,
        [slice(row, row + h - 1, _STRIDE) for row in starts],
        [slice(column, column + w - 1, _STRIDE) for column in starts],
    )


def _laid_out(padded: Array, rows: list[slice], columns: list[slice]) -> Array:
    """Join an image's shifts by all rows and columns along its features.

    In two stages, each made once: XLA would compute what goes before for every shift.
    """
    padded = lax.optimization_barrier(padded)
    wide = jnp.concatenate([padded[:, :, column] for column in columns], axis=-1)
    wide = lax.optimization_barrier(wide)
    return jnp.concatenate([wide[:, row] for row in rows], axis=-1)


_same = _fast(_plain_same, _shifts_of_same)
_raised = _fast(_plain_raised, _shifts_of_raised)


def _conv_as_flax(x: Array, kernel: Array, *_: Any, **options: Any) -> Array:
    """What Flax calls, for a convolution of stride 1 with padding "SAME"."""
    return _same(x, kernel)
