"""EfficientNets and MobileNetV3 as in timm (not its `tf_` variants): inverted residuals, padded symmetrically (P1)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import flax.linen as nn
from jax import Array

from hardjax.models.initial import TIMM_EFFICIENTNET
from hardjax.models.layers import Layers, Network


@dataclass(frozen=True)
class Block:
    """One block of a network.

    Attributes:
        kind: "depthwise" (depthwise convolution, then 1x1), "inverted" (1x1, depthwise, 1x1), "edge" (full convolution,
            then 1x1) or "conv" (one convolution).
        kernel, stride: of its spatial convolution.
        features: channels out.
        expanded: channels inside.
        squeezed: channels of squeeze-and-excitation; 0 for none.
        hard_swish: its activation instead of the network's.
    """

    kind: str
    kernel: int
    stride: int
    features: int
    expanded: int = 0
    squeezed: int = 0
    hard_swish: bool = False

    def convolutions(self, channels: int) -> list[tuple[str, int, int, int, int]]:
        """(name, features, kernel, stride, groups) of each."""
        spatial, inside = (self.kernel, self.stride), self.expanded
        return {
            "depthwise": [("conv_dw", channels, *spatial, channels), ("conv_pw", self.features, 1, 1, 1)],
            "inverted": [
                ("conv_pw", inside, 1, 1, 1),
                ("conv_dw", inside, *spatial, inside),
                ("conv_pwl", self.features, 1, 1, 1),
            ],
            "edge": [("conv_exp", inside, *spatial, 1), ("conv_pwl", self.features, 1, 1, 1)],
            "conv": [("conv", self.features, *spatial, 1)],
        }[self.kind]


class InvertedResidual(nn.Module):
    """A `Block`: normalisation after each convolution, activation after all but the last of several.

    Attributes:
        layers: of the network.
        block: what it consists of.
        activation: of the block; `squeeze_activation` and `gate` are those inside squeeze-and-excitation.
        drop_path: rate of stochastic depth.
    """

    layers: Layers
    block: Block
    activation: Callable[[Array], Array]
    squeeze_activation: Callable[[Array], Array]
    gate: Callable[[Array], Array]
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers, block, y = self.layers, self.block, x
        convolutions = block.convolutions(x.shape[-1])
        for index, (name, features, kernel, stride, groups) in enumerate(convolutions, 1):
            projects = index == len(convolutions) > 1
            if projects and block.squeezed:
                y = self._excite(y)
            y = layers.conv(y, features, kernel, stride, groups=groups, name=name)
            y = layers.normalise(y, f"bn{index}")
            y = y if projects else self.activation(y)
        return x + layers.drop_path(y, self.drop_path) if x.shape == y.shape else y

    def _excite(self, x: Array) -> Array:
        """Squeeze-and-excitation: each channel times a gate computed from all channels' means."""
        means = x.mean((1, 2), keepdims=True)
        inside = self.layers.conv(means, self.block.squeezed, 1, bias=True, name="se.conv_reduce")
        gate = self.layers.conv(self.squeeze_activation(inside), x.shape[-1], 1, bias=True, name="se.conv_expand")
        return x * self.gate(gate)


class EfficientNet(Network):
    """EfficientNet and EfficientNetV2 as in timm (Tan & Le 2019, 2021).

    EfficientNet-B4 has 17,566,546 parameters with 10 classes, V2-S 20,190,298 (P1: 17.56M, 20.19M).

    Attributes:
        stem, head: channels of the first and last convolution.
        stages: (kind, kernel, stride, expansion, features, squeeze-and-excitation?, blocks) of each.
        drop_path: rate of stochastic depth; block i of n has i / n of it.
    """

    stem: int = 0
    head: int = 0
    stages: Sequence[tuple] = ()
    drop_path: float = 0.0
    paper_init = TIMM_EFFICIENTNET
    last_layer = "classifier"

    def logits(self, x: Array, layers: Layers) -> Array:
        x = nn.silu(layers.normalise(layers.conv(x, self.stem, 3, 2, name="conv_stem"), "bn1"))
        total, done = sum(repeats for *_, repeats in self.stages), 0
        for stage, (kind, kernel, stride, expansion, features, excited, repeats) in enumerate(self.stages):
            for index in range(repeats):
                channels = x.shape[-1]
                # A quarter of the channels that enter the block, not of those inside it.
                squeezed = channels // 4 if excited else 0
                block = Block(kind, kernel, stride if index == 0 else 1, features, channels * expansion, squeezed)
                rate, name = self.drop_path * done / total, f"blocks.{stage}.{index}"
                x = InvertedResidual(layers, block, nn.silu, nn.silu, nn.sigmoid, rate, name=name)(x)
                done += 1
        x = nn.silu(layers.normalise(layers.conv(x, self.head, 1, name="conv_head"), "bn2"))
        return layers.classify(x, self.num_classes, self.last_layer)


class MobileNetV3(Network):
    """MobileNetV3-Small as in timm (Howard et al. 2019): 1,528,106 parameters with 10 classes (P1: 1.52M).

    Attributes:
        drop_path: rate of stochastic depth; block i of n has i / n of it.
    """

    drop_path: float = 0.0
    paper_init = TIMM_EFFICIENTNET
    last_layer = "classifier"

    def logits(self, x: Array, layers: Layers) -> Array:
        x = nn.hard_swish(layers.normalise(layers.conv(x, 16, 3, 2, name="conv_stem"), "bn1"))
        total, done = sum(map(len, _MOBILENET_SMALL)), 0
        for stage, blocks in enumerate(_MOBILENET_SMALL):
            for index, block in enumerate(blocks):
                activation = nn.hard_swish if block.hard_swish else nn.relu
                rate, name = self.drop_path * done / total, f"blocks.{stage}.{index}"
                x = InvertedResidual(layers, block, activation, nn.relu, nn.hard_sigmoid, rate, name=name)(x)
                done += 1
        # Pooled before the last convolution, which has a bias and no normalisation: V3's "efficient last stage".
        x = x.mean((1, 2), keepdims=True)
        x = nn.hard_swish(layers.conv(x, 1024, 1, bias=True, name="conv_head"))
        return layers.classify(x, self.num_classes, self.last_layer)


# Widths 1.4 and depths 1.8 of B0, rounded to multiples of 8 and upwards, as published code does; P1's 17.56M fits them.
EFFICIENTNET_B4 = (
    ("depthwise", 3, 1, 1, 24, True, 2),
    ("inverted", 3, 2, 6, 32, True, 4),
    ("inverted", 5, 2, 6, 56, True, 4),
    ("inverted", 3, 2, 6, 112, True, 6),
    ("inverted", 5, 1, 6, 160, True, 6),
    ("inverted", 5, 2, 6, 272, True, 8),
    ("inverted", 3, 1, 6, 448, True, 2),
)

EFFICIENTNETV2_S = (
    ("conv", 3, 1, 1, 24, False, 2),
    ("edge", 3, 2, 4, 48, False, 4),
    ("edge", 3, 2, 4, 64, False, 4),
    ("inverted", 3, 2, 4, 128, True, 6),
    ("inverted", 3, 1, 6, 160, True, 9),
    ("inverted", 3, 2, 6, 256, True, 15),
)

# Written out: the expanded and squeezed channels follow no single factor (72, 88, 96 of 16, 24, 24).
_MOBILENET_SMALL = (
    [Block("depthwise", 3, 2, 16, squeezed=8)],
    [Block("inverted", 3, 2, 24, 72), Block("inverted", 3, 1, 24, 88)],
    [
        Block("inverted", 5, 2, 40, 96, 24, True),
        Block("inverted", 5, 1, 40, 240, 64, True),
        Block("inverted", 5, 1, 40, 240, 64, True),
    ],
    [Block("inverted", 5, 1, 48, 120, 32, True), Block("inverted", 5, 1, 48, 144, 40, True)],
    [
        Block("inverted", 5, 2, 96, 288, 72, True),
        Block("inverted", 5, 1, 96, 576, 144, True),
        Block("inverted", 5, 1, 96, 576, 144, True),
    ],
    [Block("conv", 1, 1, 576, hard_swish=True)],
)
