"""CIFAR ResNets of He et al. with option A shortcuts: 6n + 2 layers, 16-32-64 channels."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from hardjax.models.layers import conv, he_fan_out, norm


class HeResNet(nn.Module):
    """ResNet-8, 20, 32 for n = 1, 3, 5: 75,290, 269,722, 464,154 parameters with 10 classes and 3 channels.

    Attributes:
        blocks: n, residual blocks a stage.
        num_classes: logits.
        norm: "batch", "group" or "none" (then every convolution has a bias).
    """

    blocks: int
    num_classes: int = 10
    norm: str = "batch"

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        bias = self.norm == "none"

        def conv_norm(x: Array, features: int, stride: int = 1) -> Array:
            x = conv(features, stride=stride, use_bias=bias, kernel_init=he_fan_out)(x)
            return norm(self.norm, train)(x)

        x = nn.relu(conv_norm(images, 16))
        for features in (16, 32, 64):
            for block in range(self.blocks):
                stride = 2 if features > 16 and block == 0 else 1
                y = nn.relu(conv_norm(x, features, stride))
                y = conv_norm(y, features)
                if stride == 2:
                    x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (0, features // 2)))
                x = nn.relu(x + y)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))
