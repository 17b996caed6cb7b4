"""freq2space and a fully convolutional DenseNet: diffraction in, potential out.

The FC-DenseNet follows nlaanait/stemdl (the code behind Laanait et al.,
arXiv:1909.11150): three poolings, batch normalisation in the down transitions only,
an up path that carries new features only. `Freq2Space` stands for that repository's
later block of the same name, which learns the way from reciprocal to real space.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array


class Freq2Space(nn.Module):
    """One linear map from a diffraction pattern to a patch of real space.

    All probes share it. Input (n, scan, scan, detector, detector), output
    (n, scan * patch, scan * patch, features), each patch at its probe's position.
    """

    patch: int = 8
    features: int = 8

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, rows, columns = x.shape[:3]
        x = x.reshape(n, rows, columns, -1)
        x = nn.Dense(self.patch**2 * self.features)(x)
        # Depth to space; as a transposed convolution it is eight times slower on CPU.
        x = x.reshape(n, rows, columns, self.patch, self.patch, self.features)
        x = x.transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(n, rows * self.patch, columns * self.patch, self.features)


class DenseBlock(nn.Module):
    """Layers that each see all features before them; returns (all, new) features."""

    layers: int
    growth: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        new = []
        for _ in range(self.layers):
            y = _conv(self.growth, 3)(nn.relu(x))
            new.append(y)
            x = jnp.concatenate([x, y], axis=-1)
        return x, jnp.concatenate(new, axis=-1)


class TransitionDown(nn.Module):
    """Normalise, mix channels and halve the resolution."""

    axis_name: str | None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            scale_init=nn.initializers.constant(0.1),
            axis_name=self.axis_name,
        )(x)
        x = _conv(x.shape[-1], 1)(nn.relu(x))
        return nn.max_pool(x, (2, 2), strides=(2, 2))


class StemNet(nn.Module):
    """The whole network: 35 parameter arrays, 420,992 numbers.

    Attributes:
      growth: features that each dense layer adds.
      layers: dense layers per block: down path, bottleneck, up path.
      axis_name: mapped axis over which batch statistics are averaged (synchronised
        batch normalisation); None keeps them local.
    """

    growth: int = 8
    layers: Sequence[int] = (2, 2, 3, 4, 3, 2, 2)
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Reconstruct potentials.

        Args:
          x: (n, scan, scan, detector, detector) standardised amplitudes.
          train: use the batch's statistics and update the running ones.

        Returns:
          (n, 8 scan, 8 scan) potentials in the labels' units.
        """
        half = len(self.layers) // 2
        x = Freq2Space()(x)
        x = nn.relu(nn.Conv(self.growth, (3, 3))(x))
        skips = []
        for layers in self.layers[:half]:
            x, _ = DenseBlock(layers, self.growth)(x)
            skips.append(x)
            x = TransitionDown(self.axis_name)(x, train)
        x, new = DenseBlock(self.layers[half], self.growth)(x)
        for layers in self.layers[half + 1 :]:
            raised = nn.ConvTranspose(
                new.shape[-1], (3, 3), strides=(2, 2), use_bias=False, kernel_init=_HE
            )(new)
            x = jnp.concatenate([raised, skips.pop()], axis=-1)
            x, new = DenseBlock(layers, self.growth)(x)
        return _conv(1, 1)(x)[..., 0]


NETWORKS = {
    "tiny": StemNet(),
    # Compiles in seconds, and learns little.
    "toy": StemNet(growth=2, layers=(1, 1, 1)),
}

_HE = nn.initializers.he_normal()


def _conv(features: int, kernel: int) -> nn.Conv:
    return nn.Conv(features, (kernel, kernel), use_bias=False, kernel_init=_HE)
