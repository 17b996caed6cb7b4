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


def stemdl() -> Shapes:
    """STEMDL's production network: 33 leaves, 232.8 M float32, 0.93 GB.

    FC-DenseNet with growth 256 and 5 x 5 kernels, 3 pools and [2, 2, 3, 4, 3, 2, 2]
    layers per block, as `generate_fcdensenet_json` of the STEMDL repository makes it:
    transitions down keep all channels, transitions up take new features only.
    """
    growth, side, inputs = 256, 5, 1024
    down, bottleneck, up = (2, 2, 3), 4, (3, 2, 2)
    shapes: dict[str, tuple[int, ...]] = {
        "CONV_INIT/kernel": (side, side, inputs, growth),
        "CONV_INIT/bias": (growth,),
    }

    def block(name: str, layers: int, channels: int) -> int:
        for layer in range(layers):
            shapes[f"{name}/conv{layer}"] = (side, side, channels, growth)
            channels += growth
        return channels

    channels, skips = growth, []
    for k, layers in enumerate(down):
        channels = block(f"DOWN{k}", layers, channels)
        skips.append(channels)
        shapes[f"TD{k}/scale"] = shapes[f"TD{k}/bias"] = (channels,)
        shapes[f"TD{k}/conv"] = (1, 1, channels, channels)
    block("BOTTLENECK", bottleneck, channels)
    new = bottleneck * growth
    for k, layers in enumerate(up):
        shapes[f"TU{k}/deconv"] = (1, 1, new, new)
        channels = block(f"UP{k}", layers, skips[-1 - k] + new)
        new = layers * growth
    shapes["CONV_FIN/kernel"] = (1, 1, channels, 1)
    return {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}


def gpt2() -> Shapes:
    """GPT-2 small (Radford et al., 2019): 148 leaves, 124.4 M float32."""
    width, layers, vocabulary, context = 768, 12, 50257, 1024
    shapes: dict[str, tuple[int, ...]] = {
        "wte": (vocabulary, width),
        "wpe": (context, width),
    }
    for k in range(layers):
        for name, outputs, inputs in (
            ("attn/qkv", 3 * width, width),
            ("attn/proj", width, width),
            ("mlp/fc", 4 * width, width),
            ("mlp/proj", width, 4 * width),
        ):
            shapes[f"h{k:02}/{name}/kernel"] = (inputs, outputs)
            shapes[f"h{k:02}/{name}/bias"] = (outputs,)
        for name in ("ln1", "ln2"):
            shapes[f"h{k:02}/{name}/scale"] = (width,)
            shapes[f"h{k:02}/{name}/bias"] = (width,)
    shapes["ln_f/scale"] = shapes["ln_f/bias"] = (width,)
    return {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}


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
