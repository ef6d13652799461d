"""Densely connected networks: ImageNet's with bottlenecks (P2), and P3's without."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from hardjax import _validate
from hardjax.models.initial import FISHER_STUDY, TORCHVISION_DENSENET
from hardjax.models.layers import STEMS, Layers, Network
from hardjax.models.ops.pooling import mean_pool


class PreActivation(nn.Module):
    """Normalisation, ReLU, convolution, once or several times; the result is appended to the input, or pooled.

    Attributes:
        layers: of the network.
        convolutions: (features, kernel, number in the names) of each; "" for a name without a number.
        normalisation: its name before the number.
        pool: halve the sides of the result (a transition) instead of appending it to the input's channels.
    """

    layers: Layers
    convolutions: Sequence[tuple[int, int, str]]
    normalisation: str
    pool: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = x
        for features, kernel, number in self.convolutions:
            y = nn.relu(self.layers.normalise(y, self.normalisation + number))
            y = self.layers.conv(y, features, kernel, name=f"conv{number}")
        # Every layer copies all channels before it: quadratic in depth, and in memory the largest part of DenseNet-110.
        return mean_pool(y) if self.pool else jnp.concatenate([x, y], -1)


class DenseNet(Network):
    """ImageNet's DenseNet-BC as in torchvision and timm (Huang et al. 2017).

    DenseNet-121 has 6,964,106 parameters with 10 classes and 7,056,356 with 100 (P2).

    Attributes:
        stages: layers in each of the four blocks.
        growth: channels that a layer adds.
        stem: "imagenet" (7x7 at stride 2 and a max pool: a quarter of the side) or "cifar" (3x3, the full side).
    """

    stages: Sequence[int] = (6, 12, 24, 16)
    growth: int = 32
    stem: str = "imagenet"
    paper_init = TORCHVISION_DENSENET
    last_layer = "classifier"

    def __post_init__(self) -> None:
        _validate.one_of(STEMS, stem=self.stem)
        super().__post_init__()

    def logits(self, x: Array, layers: Layers) -> Array:
        x = layers.stem(x, 2 * self.growth, self.stem, "features.conv0", "features.norm0")
        convolutions = [(4 * self.growth, 1, "1"), (self.growth, 3, "2")]
        for stage, count in enumerate(self.stages, 1):
            for index in range(1, count + 1):
                name = f"features.denseblock{stage}.denselayer{index}"
                x = PreActivation(layers, convolutions, "norm", name=name)(x)
            if stage < len(self.stages):
                convolution = [(x.shape[-1] // 2, 1, "")]  # compression 0.5, the "C" of DenseNet-BC
                x = PreActivation(layers, convolution, "norm", pool=True, name=f"features.transition{stage}")(x)
        x = nn.relu(layers.normalise(x, "features.norm5"))
        return layers.classify(x, self.num_classes, self.last_layer)


class SmallDenseNet(Network):
    """P3's DenseNets: single-convolution layers, no bottleneck, no compression.

    DenseNet-110 (18 layers a block, growth 8/10/14, 16 initial channels) has 1,724,890 parameters with 10 classes and
    1,778,260 with 100; P3's 1.77M fits 100 classes alone. The 8-layer network (2 a block, growth 6, 8 initial
    channels) has 9,866 on one channel; P3 gives 10,000 for MNIST, to which this is the nearest.

    Attributes:
        initial: channels of the first convolution.
        growth: channels that a layer of each block adds.
        block_layers: layers in each block.
    """

    initial: int = 16
    growth: Sequence[int] = (8, 10, 14)
    block_layers: int = 18
    paper_init = FISHER_STUDY

    def logits(self, x: Array, layers: Layers) -> Array:
        x = layers.conv(x, self.initial, name="conv0")
        # Numbered through, transitions included, as the reference names its layers.
        plan = []
        for growth in self.growth:
            plan += ([(None, 1)] if plan else []) + [(growth, 3)] * self.block_layers
        for number, (features, kernel) in enumerate(plan):
            convolution = [(features or x.shape[-1], kernel, "")]
            x = PreActivation(layers, convolution, "bn", pool=features is None, name=f"layers.{number}")(x)
        return layers.classify(nn.relu(layers.normalise(x, "bn_last")), self.num_classes, self.last_layer)
