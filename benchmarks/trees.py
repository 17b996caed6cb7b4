"""The gradient trees that are reduced."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Shapes = dict[str, jax.ShapeDtypeStruct]

_STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))
_EXPANSION = 4


def resnet50() -> Shapes:
    """Parameters of ResNet-50 (He et al., arXiv:1512.03385): 161 leaves, 25.6 M f32."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv_norm(name: str, side: int, inputs: int, outputs: int) -> None:
        shapes[f"{name}/conv"] = (side, side, inputs, outputs)
        shapes[f"{name}/scale"] = shapes[f"{name}/bias"] = (outputs,)

    conv_norm("stem", 7, 3, 64)
    inputs = 64
    for stage, (blocks, width) in enumerate(_STAGES):
        for block in range(blocks):
            name = f"stage{stage}/block{block}"
            outputs = _EXPANSION * width
            conv_norm(f"{name}/reduce", 1, inputs, width)
            conv_norm(f"{name}/middle", 3, width, width)
            conv_norm(f"{name}/expand", 1, width, outputs)
            if block == 0:
                conv_norm(f"{name}/project", 1, inputs, outputs)
            inputs = outputs
    shapes["head/kernel"], shapes["head/bias"] = (inputs, 1000), (1000,)
    return {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}


def small_leaves(count: int, elements: int) -> Shapes:
    """Return so many float32 vectors of so many elements."""
    one = jax.ShapeDtypeStruct((elements,), jnp.float32)
    return {f"leaf{index:04}": one for index in range(count)}
