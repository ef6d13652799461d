"""Residual networks of three papers: ImageNet's (P1, P2, P4), He's for CIFAR (P4), conv-bn-relu-conv-bn (P3)."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from hardjax import _validate
from hardjax._validate import Refusal
from hardjax.models.initial import FISHER_STUDY, SMALL_BATCH_STUDY, TIMM_RESNET
from hardjax.models.layers import STEMS, Layers, Network
from hardjax.models.ops.pooling import mean_pool


class Residual(nn.Module):
    """Convolutions with a normalisation after each and ReLU between, added to a shortcut.

    Attributes:
        layers: of the network.
        convolutions: (features, kernel, stride) of each.
        shortcut: where the shape changes: "project" (1x1 convolution and normalisation), "subsample" (every second
            pixel, zero channels appended: option A of He et al.) or "pool" (2x2 means, zero channels appended).
        relu: after the sum.
        drop_path: rate of stochastic depth.
    """

    layers: Layers
    convolutions: Sequence[tuple[int, int, int]]
    shortcut: str
    relu: bool = True
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers, y = self.layers, x
        for index, (features, kernel, stride) in enumerate(self.convolutions, 1):
            last = index == len(self.convolutions)
            y = layers.conv(y, features, kernel, stride, name=f"conv{index}")
            y = layers.normalise(y, f"bn{index}", last=last)
            y = y if last else nn.relu(y)
        y = self._shortcut(x, y.shape[-1]) + layers.drop_path(y, self.drop_path)
        return nn.relu(y) if self.relu else y

    def _shortcut(self, x: Array, features: int) -> Array:
        # A bottleneck's stride stands in its second convolution (timm, torchvision), not in the first as printed.
        stride = max(stride for _, _, stride in self.convolutions)
        if stride == 1 and features == x.shape[-1]:
            return x
        if self.shortcut == "project":
            x = self.layers.conv(x, features, 1, stride, name="downsample.0")
            return self.layers.normalise(x, "downsample.1")
        # P3's published code takes means, which keep something of every pixel, where He et al. take every second one.
        if stride == 2:
            x = mean_pool(x) if self.shortcut == "pool" else x[:, ::2, ::2]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))


class ResNet(Network):
    """ImageNet's ResNets as in timm and torchvision (He et al. 2016, stride in the 3x3 convolution).

    ResNet-18, 34, 50 have 11,181,642, 21,289,802, 23,528,522 parameters with 10 classes (P1: 11.18M, 23.52M). P4 draws
    its ResNet-50 as He et al. do: init="he_fan_in".

    Attributes:
        stages: blocks in each of the four stages (64, 128, 256, 512 channels).
        bottleneck: 1x1-3x3-1x1 blocks with four times the channels, instead of two 3x3 convolutions.
        stem: "imagenet" (7x7 at stride 2 and a max pool: a quarter of the side) or "cifar" (3x3, the full side).
        drop_path: rate of stochastic depth of the last block, growing linearly from 0 at the first.
    """

    stages: Sequence[int] = (2, 2, 2, 2)
    bottleneck: bool = False
    stem: str = "imagenet"
    drop_path: float = 0.0
    paper_init = TIMM_RESNET

    def __post_init__(self) -> None:
        _validate.one_of(STEMS, stem=self.stem)
        super().__post_init__()

    def logits(self, x: Array, layers: Layers) -> Array:
        x = layers.stem(x, 64, self.stem, "conv1", "bn1")
        rates = iter(np.linspace(0, self.drop_path, sum(self.stages)).tolist())
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                convolutions = self._convolutions(64 * 2**stage, stride)
                name = f"layer{stage + 1}.{block}"
                x = Residual(layers, convolutions, "project", drop_path=next(rates), name=name)(x)
        return layers.classify(x, self.num_classes, self.last_layer)

    def _convolutions(self, features: int, stride: int) -> list[tuple[int, int, int]]:
        if self.bottleneck:
            return [(features, 1, 1), (features, 3, stride), (4 * features, 1, 1)]
        return [(features, 3, stride), (features, 3, 1)]


class HeResNet(Network):
    """CIFAR ResNets of He et al. with option A shortcuts: 6n + 2 layers, 16-32-64 channels (P4, section 3.1).

    ResNet-8, 20, 32 for n = 1, 3, 5: 75,290, 269,722, 464,154 parameters with 10 classes and 3 channels.

    Attributes:
        blocks: n, residual blocks a stage.
        drop_path: rate of stochastic depth of the last block, growing linearly from 0 at the first.
    """

    blocks: int = 3
    drop_path: float = 0.0
    paper_init = SMALL_BATCH_STUDY

    def logits(self, x: Array, layers: Layers) -> Array:
        x = nn.relu(layers.normalise(layers.conv(x, 16, name="conv0"), "bn0"))
        x = _three_stages(self, x, layers, "subsample", relu=True)
        return layers.classify(x, self.num_classes, self.last_layer)


class CBRCBResNet(Network):
    """P3's ResNets of conv-bn-relu-conv-bn units: no ReLU after the sum, 2x2 mean pools as strided shortcuts.

    ResNet-110 (n = 18) has 1,728,090 parameters with 10 classes (P3: 1.73M). The 8-layer network (n = 1) has 75,130
    on one channel; P3 gives about 70,000 for MNIST, which no 16-32-64 network of this form meets.

    Attributes:
        blocks: n, units a stage.
        drop_path: rate of stochastic depth of the last unit, growing linearly from 0 at the first.

    Raises:
        ValueError: while tracing, sides that are no multiples of 4 (pooled shortcuts would not fit).
    """

    blocks: int = 18
    drop_path: float = 0.0
    paper_init = FISHER_STUDY

    def logits(self, x: Array, layers: Layers) -> Array:
        # Pooled shortcuts round an odd side down, strided convolutions round it up: the sum would have two shapes.
        if any(side % 4 for side in x.shape[1:3]):
            size = "x".join(map(str, x.shape[1:3]))
            raise Refusal(f"Expected images of {size} to have sides that are multiples of 4 for {type(self).__name__}.")
        x = layers.normalise(layers.conv(x, 16, name="conv0"), "bn0")
        # No ReLU after the sums, only one before the last pool: P3's published code.
        x = _three_stages(self, x, layers, "pool", relu=False)
        return layers.classify(nn.relu(layers.normalise(x, "bn_last")), self.num_classes, self.last_layer)


def _three_stages(network: HeResNet | CBRCBResNet, x: Array, layers: Layers, shortcut: str, relu: bool) -> Array:
    """n blocks each of 16, 32 and 64 channels, at full, half and quarter side."""
    rates = np.linspace(0, network.drop_path, 3 * network.blocks).tolist()  # of Python's, which widen no dtype
    for block, rate in enumerate(rates):
        features = 16 * 2 ** (block // network.blocks)
        stride = 2 if block and block % network.blocks == 0 else 1
        convolutions = [(features, 3, stride), (features, 3, 1)]
        x = Residual(layers, convolutions, shortcut, relu, rate, name=f"blocks.{block}")(x)
    return x
