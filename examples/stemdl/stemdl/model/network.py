"""freq2space and a fully convolutional DenseNet: diffraction in, potential out.

The FC-DenseNet is that of nlaanait/stemdl at the time of the run on Summit (the code
behind Laanait et al., arXiv:1909.11150), leaf for leaf: three poolings; no batch
normalisation but in the down transitions; a down path that keeps all features, an up
path that carries new ones only; no bias but the first convolution's. `Freq2Space` is
made after that repository's later block of that name, which learns the way from
reciprocal to real space; the published layout has the detector's grid for an image and
the probes for its channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from stemdl.model import layers

LAYOUTS = ("freq2space", "probes")

_HE = nn.initializers.he_normal()


class Freq2Space(nn.Module):
    """One linear map from a diffraction pattern to a patch of real space.

    All probes share it. Input (n, scan, scan, detector, detector), output
    (n, scan * patch, scan * patch, features), each patch at its probe's position.
    """

    patch: int = 8
    features: int = 8
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, rows, columns = x.shape[:3]
        x = x.reshape(n, rows, columns, -1)
        x = nn.Dense(self.patch**2 * self.features, dtype=self.dtype)(x)
        # Depth to space; as a transposed convolution it is eight times slower on CPU.
        x = x.reshape(n, rows, columns, self.patch, self.patch, self.features)
        x = x.transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(n, rows * self.patch, columns * self.patch, self.features)


class DenseBlock(nn.Module):
    """Layers that each see all features before them; returns (all, new) features."""

    layers: int
    growth: int
    kernel: int = 3
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        new = []
        for _ in range(self.layers):
            y = _conv(self.growth, self.kernel, self.dtype)(nn.relu(x))
            new.append(y)
            x = jnp.concatenate([x, y], axis=-1)
        return x, jnp.concatenate(new, axis=-1)


class TransitionDown(nn.Module):
    """Normalise, mix channels and halve the resolution."""

    axis_name: str | None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        # Statistics are summed in float32, whatever the dtype of the features.
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            scale_init=nn.initializers.constant(0.1),
            axis_name=self.axis_name,
            dtype=self.dtype,
        )(x)
        x = _conv(x.shape[-1], 1, self.dtype)(nn.relu(x))
        return layers.max_pool(x)


class StemNet(nn.Module):
    """The whole network; by default 35 parameter arrays, 420,992 numbers.

    Attributes:
      growth: features that each dense layer adds.
      kernel: side of the first and of the dense layers' convolutions.
      up_kernel: side of the transposed convolutions of the up path.
      layers: dense layers per block: down path, bottleneck, up path.
      layout: "freq2space", or "probes" for the published one.
      pixels: side of the output; None: 8 per probe, or the detector's if published.
      axis_name: mapped axis over which batch statistics are averaged (synchronised
        batch normalisation); None keeps them local.
      dtype: of all computations but batch statistics; parameters are float32. None:
        that of inputs and parameters.
      checkpoint: compute the dense blocks again in the backward pass instead of
        keeping their activations (`jax.checkpoint`). Batch statistics lie outside, so
        that nothing is communicated twice.
    """

    growth: int = 8
    kernel: int = 3
    up_kernel: int = 3
    layers: Sequence[int] = (2, 2, 3, 4, 3, 2, 2)
    layout: str = "freq2space"
    pixels: int | None = None
    axis_name: str | None = None
    dtype: Any = None
    checkpoint: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Reconstruct potentials.

        Args:
          x: (n, scan, scan, detector, detector) standardised amplitudes.
          train: use the batch's statistics and update the running ones.

        Returns:
          (n, pixels, pixels) potentials in the labels' units; float32 if `dtype` is
          given.

        Raises:
          ValueError: `pixels` does not divide over the poolings or probes, or `layout`
            is unknown.
        """
        half = len(self.layers) // 2
        x = self._image(x)
        x = nn.relu(layers.conv(self.growth, self.kernel, dtype=self.dtype)(x))
        skips = []
        for k, depth in enumerate(self.layers[:half]):
            x, _ = self._block(k, depth)(x)
            skips.append(x)
            x = TransitionDown(self.axis_name, self.dtype)(x, train)
        x, new = self._block(half, self.layers[half])(x)
        for k, depth in enumerate(self.layers[half + 1 :], half + 1):
            raised = layers.ConvTranspose(
                new.shape[-1], self.up_kernel, _HE, dtype=self.dtype
            )(new)
            x = jnp.concatenate([raised, skips.pop()], axis=-1)
            x, new = self._block(k, depth)(x)
        y = _conv(1, 1, self.dtype)(x)[..., 0]
        return y if self.dtype is None else y.astype(jnp.float32)

    def _image(self, x: Array) -> Array:
        """What the convolutions see: (n, pixels, pixels, channels)."""
        n, scan, columns, *detector = x.shape
        freq2space = self.layout == "freq2space"
        pixels = self.pixels or (8 * scan if freq2space else detector[0])
        divisor = math.lcm(2 ** (len(self.layers) // 2), scan if freq2space else 1)
        if pixels % divisor:
            raise ValueError(
                f"pixels={pixels} with layout {self.layout!r} and a scan of {scan}; "
                f"give a multiple of {divisor}"
            )
        if freq2space:
            return Freq2Space(pixels // scan, dtype=self.dtype)(x)
        if self.layout != "probes":
            raise ValueError(f"layout={self.layout!r}; use one of {', '.join(LAYOUTS)}")
        x = x.reshape(n, scan * columns, *detector).transpose(0, 2, 3, 1)
        if detector[0] == pixels:
            return x
        # Interpolated rather than padded: an odd detector on an even grid would lie
        # half a pixel off, and the symmetries of `augment` would not hold.
        return jax.image.resize(x, (n, pixels, pixels, x.shape[-1]), "linear")

    def _block(self, index: int, layers: int) -> nn.Module:
        cls = nn.remat(DenseBlock) if self.checkpoint else DenseBlock
        # Named, because a class that is made by remat has another default name.
        name = f"DenseBlock_{index}"
        return cls(layers, self.growth, self.kernel, self.dtype, name=name)


NETWORKS = {
    "tiny": StemNet(),
    "small": StemNet(growth=16),
    "medium": StemNet(growth=64, kernel=5),
    # As on Summit, or the largest of its family: which one ran is not published.
    "summit": StemNet(growth=256, kernel=5, up_kernel=1, layout="probes"),
    # Compiles in seconds, and learns little.
    "toy": StemNet(growth=2, layers=(1, 1, 1)),
}

_SCOPE = re.compile(r"^(?:\[\d+\]\.params|\['params'\])?\['(\w+_\d+)'\]")


def scope_of(path: str) -> str | None:
    """The scope of a parameter: the network's top-level module that it belongs to.

    STEMDL reduces gradients in these groups (`reduce_gradients` of its optimizers.py)
    and applies LARC to them. As `groups=` of jaxcomm it makes a bucket of each.

    Args:
      path: as `jax.tree_util.keystr` or a jaxcomm schedule names the leaf.

    Returns:
      Such as "DenseBlock_3"; None if it is not a parameter or gradient.
    """
    found = _SCOPE.match(path)
    return found.group(1) if found else None


def scopes(params: Any) -> dict[str, list[str]]:
    """Group the leaves of a tree of parameters or gradients.

    Args:
      params: the tree, of arrays or of shapes.

    Returns:
      The paths of each scope's leaves, in the tree's order.

    Raises:
      ValueError: a leaf belongs to no scope.
    """
    grouped: dict[str, list[str]] = {}
    for key, _ in jax.tree_util.tree_leaves_with_path(params):
        path = jax.tree_util.keystr(key)
        scope = scope_of(path)
        if scope is None:
            raise ValueError(f"{path} is not a parameter of the network")
        grouped.setdefault(scope, []).append(path)
    return grouped


def _conv(features: int, kernel: int, dtype: Any) -> nn.Conv:
    return layers.conv(features, kernel, use_bias=False, kernel_init=_HE, dtype=dtype)
