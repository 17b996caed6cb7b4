"""The networks whose gradients are exchanged: shapes of leaves and work per layer.

Layers are listed in the order of the forward pass. A leaf's gradient is complete when
the backward pass, which walks the list from its end, is through the layer that names
it.
"""

from __future__ import annotations

import dataclasses
import math

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
      scope: the block it belongs to, a group of its own in `cache+groups`.
      leaves: shape of every parameter, by name.
      flops: floating-point operations of the forward pass of one sample, an addition
        and a multiplication counted as two.
    """

    scope: str
    leaves: dict[str, Shape]
    flops: float


def shapes(layers: list[Layer]) -> dict[str, Shape]:
    """Shapes of all leaves by name, in the order of the forward pass."""
    return {name: shape for layer in layers for name, shape in layer.leaves.items()}


def _work(shape: Shape, positions: int) -> float:
    """Operations of a kernel that is applied at so many positions."""
    return 2.0 * math.prod(shape) * positions


def resnet50() -> list[Layer]:
    """ResNet-50 (He et al., arXiv:1512.03385) on 224 x 224 pixels: 161 leaves, 25.6 M.

    The stride of 2 lies in the 3 x 3 convolutions, as in most implementations.
    """
    layers: list[Layer] = []

    def conv_norm(
        scope: str, name: str, side: int, inputs: int, outputs: int, width: int
    ) -> None:
        shape = (side, side, inputs, outputs)
        leaves = {
            f"{name}/conv": shape,
            f"{name}/scale": (outputs,),
            f"{name}/bias": (outputs,),
        }
        layers.append(Layer(scope, leaves, _work(shape, width * width)))

    conv_norm("stem", "stem", 7, 3, 64, 112)
    inputs, before = 64, 56
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        side = 56 >> stage
        for block in range(blocks):
            name = f"stage{stage}/block{block}"
            conv_norm(name, f"{name}/reduce", 1, inputs, width, before)
            conv_norm(name, f"{name}/middle", 3, width, width, side)
            conv_norm(name, f"{name}/expand", 1, width, 4 * width, side)
            if block == 0:
                conv_norm(name, f"{name}/project", 1, inputs, 4 * width, side)
            inputs, before = 4 * width, side
    head = {"head/kernel": (inputs, 1000), "head/bias": (1000,)}
    return [*layers, Layer("head", head, _work((inputs, 1000), 1))]


def stemdl() -> list[Layer]:
    """STEMDL's production network on 1024 x 512 x 512: 33 leaves, 232.8 M.

    FC-DenseNet with growth 256 and 5 x 5 kernels, 3 pools and [2, 2, 3, 4, 3, 2, 2]
    layers per block, as `generate_fcdensenet_json` of the STEMDL repository makes it:
    transitions down keep all channels, transitions up take new features only. Which
    network the published run used is not known; this is the largest of its family.
    """
    growth, side, inputs = 256, 5, 1024
    down, bottleneck, up = (2, 2, 3), 4, (3, 2, 2)
    layers: list[Layer] = []

    def add(scope: str, leaves: dict[str, Shape], pools: int) -> None:
        positions = (512 >> pools) ** 2
        work = sum(_work(s, positions) for s in leaves.values() if len(s) > 1)
        layers.append(Layer(scope, leaves, work))

    def block(name: str, count: int, channels: int, pools: int) -> int:
        for k in range(count):
            add(name, {f"{name}/conv{k}": (side, side, channels, growth)}, pools)
            channels += growth
        return channels

    kernel = (side, side, inputs, growth)
    add("CONV_INIT", {"CONV_INIT/kernel": kernel, "CONV_INIT/bias": (growth,)}, 0)
    channels, skips = growth, []
    for k, count in enumerate(down):
        channels = block(f"DOWN{k}", count, channels, k)
        skips.append(channels)
        leaves: dict[str, Shape] = {
            f"TD{k}/scale": (channels,),
            f"TD{k}/bias": (channels,),
            f"TD{k}/conv": (1, 1, channels, channels),
        }
        add(f"TD{k}", leaves, k)
    block("BOTTLENECK", bottleneck, channels, 3)
    new = bottleneck * growth
    for k, count in enumerate(up):
        add(f"TU{k}", {f"TU{k}/deconv": (1, 1, new, new)}, 3 - k)
        channels = block(f"UP{k}", count, skips[-1 - k] + new, 2 - k)
        new = count * growth
    add("CONV_FIN", {"CONV_FIN/kernel": (1, 1, channels, 1)}, 0)
    return layers


def gpt2() -> list[Layer]:
    """GPT-2 small (Radford et al., 2019), 1,024 tokens a sample: 148 leaves, 124.4 M.

    The embedding also makes the logits, at the end of the forward pass; its gradient
    is complete only at the end of the backward pass. Attention's own products, a few
    percent, are left out.
    """
    width, blocks, vocabulary, tokens = 768, 12, 50257, 1024
    embedding = (vocabulary, width)
    layers = [Layer("wte", {"wte": embedding, "wpe": (tokens, width)}, 0.0)]
    for k in range(blocks):
        scope = f"h{k:02}"
        norm = {f"{scope}/ln1/scale": (width,), f"{scope}/ln1/bias": (width,)}
        layers.append(Layer(scope, dict(norm), 0.0))
        for name, inputs, outputs in (
            ("attn/qkv", width, 3 * width),
            ("attn/proj", width, width),
            ("mlp/fc", width, 4 * width),
            ("mlp/proj", 4 * width, width),
        ):
            if name == "mlp/fc":
                norm = {f"{scope}/ln2/scale": (width,), f"{scope}/ln2/bias": (width,)}
                layers.append(Layer(scope, dict(norm), 0.0))
            leaves: dict[str, Shape] = {
                f"{scope}/{name}/kernel": (inputs, outputs),
                f"{scope}/{name}/bias": (outputs,),
            }
            layers.append(Layer(scope, leaves, _work((inputs, outputs), tokens)))
    final: dict[str, Shape] = {"ln_f/scale": (width,), "ln_f/bias": (width,)}
    logits = Layer("ln_f", {}, _work(embedding, tokens))
    return [*layers, Layer("ln_f", final, 0.0), logits]
