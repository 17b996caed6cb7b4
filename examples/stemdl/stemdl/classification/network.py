"""Residual networks from diffraction patterns to a space group.

He et al., Deep Residual Learning for Image Recognition, CVPR 2016 (arXiv:1512.03385).
`ResNet` is that network, as MLCommons' STEMDL uses it: it sees one pattern at a time.
`SpectralNet` sees the three projections of a sample together, and neither how a pattern
is turned nor whether it is mirrored.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from stemdl.classification.space_groups import OUTPUTS

Array = jax.Array

ANGLES = 64
"""Samples around each ring of `rings`: two pixels apart at the detector's edge."""

ORDERS = 13
"""Angular frequencies, from 0: those of two- to sixfold axes, and overtones."""


class ResidualBlock(nn.Module):
    """The basic block: two convolutions and a way around them.

    Attributes:
      width: channels out.
      stride: of the first convolution; 2 halves the sides.
      axis_name: over whose devices batch statistics are averaged; None: over none.
    """

    width: int
    stride: int
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        norm = functools.partial(_norm, train=train, axis_name=self.axis_name)
        y = _conv(self.width, 3, self.stride)(x)
        y = nn.relu(norm()(y))
        y = _conv(self.width, 3)(y)
        # At 0 a block begins as the identity, which makes large rates safe
        # (Goyal et al., arXiv:1706.02677, 5.1).
        y = norm(scale_init=nn.initializers.zeros)(y)
        if x.shape != y.shape:
            x = norm()(_conv(self.width, 1, self.stride)(x))
        return nn.relu(x + y)


class SpectralNet(nn.Module):
    """Angular spectra of all projections, then dense residual blocks.

    Patterns are resampled to rings around the unscattered beam. Turning a pattern
    multiplies the angular frequency m of each ring by one phase exp(i m angle), and
    mirroring conjugates it: the modulus of any real combination of rings stays what it
    is. Such combinations are learned, for each frequency and projection, beside the
    rings' own moduli. They tell how far disks are from the beam, which axes of symmetry
    a pattern has, and how disks on different rings stand to each other.

    Attributes:
      mixtures: learned combinations of rings.
      width: units of the dense blocks.
      blocks: their number.
      outputs: classes.
      axis_name: over whose devices batch statistics are averaged; None: over none.
    """

    mixtures: int = 32
    width: int = 512
    blocks: int = 2
    outputs: int = OUTPUTS
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Classify samples.

        Args:
          x: (n, projections, detector, detector) log-scaled, standardised patterns.
          train: use the batch's statistics, and renew the running ones.

        Returns:
          (n, outputs) logits.
        """
        norm = functools.partial(_norm, train, self.axis_name)
        shape = (x.shape[1], ORDERS, x.shape[-1] // 2 + 1, self.mixtures)
        mix = self.param("mix", nn.initializers.normal(shape[2] ** -0.5), shape)
        # In the parameters' precision, as layers of Flax do.
        parts = fourier(rings(x.astype(mix.dtype)))
        mixed = jnp.einsum("cnprm,pmrk->cnpkm", parts, mix)
        moduli = [
            0.5 * jnp.log(jnp.square(part).sum(0) + 1e-4) for part in (parts, mixed)
        ]
        x = jnp.concatenate([m.reshape(len(x), -1) for m in moduli], -1)
        x = norm(use_scale=False, use_bias=False)(x)
        x = nn.relu(norm()(nn.Dense(self.width, use_bias=False)(x)))
        for _ in range(self.blocks):
            y = nn.relu(norm()(nn.Dense(self.width, use_bias=False)(x)))
            y = nn.Dense(self.width, use_bias=False)(y)
            x = nn.relu(x + norm(scale_init=nn.initializers.zeros)(y))
        return nn.Dense(self.outputs)(x)


class ResNet(nn.Module):
    """ResNet-18, or one of its family, with a stem for one channel.

    The published stem shrinks 224 pixels by four before the first block; a detector of
    some forty pixels is too small for that, so this one has 3 x 3 and stride `stem`.
    Logits are averaged over a sample's projections, as in ORNL's code.

    Attributes:
      blocks: residual blocks of each stage; ResNet-18 has (2, 2, 2, 2).
      width: channels of the first stage, doubled in each further one; 64 in ResNet-18.
      stem: stride of the first convolution.
      outputs: classes.
      axis_name: over whose devices batch statistics are averaged; None: over none.
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 16
    stem: int = 2
    outputs: int = OUTPUTS
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Classify samples; arguments and result are those of `SpectralNet`."""
        samples, projections = x.shape[:2]
        x = x.reshape(-1, *x.shape[2:])
        x = _conv(self.width, 3, self.stem)(x[..., None])
        x = nn.relu(_norm(train, self.axis_name)(x))
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                width = self.width << stage
                x = ResidualBlock(width, stride, self.axis_name)(x, train)
        x = nn.Dense(self.outputs)(jnp.mean(x, (1, 2)))
        return x.reshape(samples, projections, -1).mean(1)


NETWORKS: dict[str, SpectralNet | ResNet] = {
    "spectral": SpectralNet(),
    "resnet18": ResNet(width=64),
    "resnet18-narrow": ResNet(),
    # Compiles in seconds, and learns little.
    "toy": SpectralNet(mixtures=2, width=8, blocks=1),
}


def fourier(around: Any) -> Any:
    """Real and imaginary parts of the angular frequencies 0 to ORDERS - 1.

    As a product with a constant matrix: so few frequencies need no FFT.

    Args:
      around: (..., ANGLES) samples of rings, of NumPy or JAX.

    Returns:
      (2, ..., ORDERS), divided by the number of samples.
    """
    phase = 2 * np.pi / ANGLES * np.outer(np.arange(ANGLES), np.arange(ORDERS))
    waves = np.stack([np.cos(phase), -np.sin(phase)]) / ANGLES
    waves = waves.astype(around.dtype)
    real, imaginary = around @ waves[0], around @ waves[1]
    xp = np if isinstance(around, np.ndarray) else jnp
    return xp.stack([real, imaginary])


def rings(patterns: Any) -> Any:
    """Resample patterns on rings around the middle, between pixels bilinearly.

    Args:
      patterns: (..., side, side), of NumPy or JAX; odd sides.

    Returns:
      (..., side // 2 + 1, ANGLES): ring r has a radius of r pixels.
    """
    side = patterns.shape[-1]
    indices, weights = _bilinear(side)
    flat = patterns.reshape(*patterns.shape[:-2], side * side)
    weights = weights.astype(patterns.dtype)
    return sum(flat[..., indices[k]] * weights[k] for k in range(4))


@functools.cache
def _bilinear(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices and weights of the four pixels around each point: (4, radii, n)."""
    middle = side // 2
    angle = 2 * np.pi * np.arange(ANGLES) / ANGLES
    radius = np.arange(middle + 1)[:, None]
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)]) + middle
    low = np.clip(np.floor(points + 1e-9).astype(int), 0, side - 2)
    part = points - low
    indices, weights = [], []
    for down in (0, 1):
        for right in (0, 1):
            indices.append((low[0] + down) * side + low[1] + right)
            rows = part[0] if down else 1 - part[0]
            columns = part[1] if right else 1 - part[1]
            weights.append(rows * columns)
    return np.array(indices), np.array(weights)


def _conv(features: int, kernel: int, stride: int = 1) -> nn.Conv:
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        use_bias=False,
        kernel_init=nn.initializers.he_normal(),
    )


def _norm(train: bool, axis_name: str | None, **more: Any) -> nn.BatchNorm:
    return nn.BatchNorm(not train, momentum=0.9, axis_name=axis_name, **more)
