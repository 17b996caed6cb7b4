"""A residual network from a diffraction pattern to its space group.

He et al., Deep Residual Learning for Image Recognition, CVPR 2016 (arXiv:1512.03385).
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stemdl.classification.space_groups import OUTPUTS

Array = jax.Array


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


class ResNet(nn.Module):
    """ResNet-18, or one of its family, with a stem for one channel.

    The published stem shrinks 224 pixels by four before the first block; a detector of
    some forty pixels is too small for that, so this one has 3 x 3 and stride `stem`.

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
        """Classify patterns.

        Args:
          x: (n, detector, detector) log-scaled, standardised patterns.
          train: use the batch's statistics, and renew the running ones.

        Returns:
          (n, outputs) logits.
        """
        x = _conv(self.width, 3, self.stem)(x[..., None])
        x = nn.relu(_norm(train, self.axis_name)(x))
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                width = self.width << stage
                x = ResidualBlock(width, stride, self.axis_name)(x, train)
        return nn.Dense(self.outputs)(jnp.mean(x, (1, 2)))


NETWORKS = {
    "small": ResNet(),
    "resnet18": ResNet(width=64),
    # Compiles in seconds, and learns little.
    "toy": ResNet(blocks=(1,), width=2),
}


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
