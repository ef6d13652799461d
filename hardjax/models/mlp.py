"""Fully connected networks (P3: 1024-500-500-10 on digits placed in 32x32)."""

from collections.abc import Sequence

import flax.linen as nn
from jax import Array

from hardjax.models.layers import norm


class MLP(nn.Module):
    """Dense layers with ReLU between; 768,010 parameters on 32x32x1 images with 10 classes.

    Attributes:
        num_classes: logits.
        widths: hidden layers.
        norm: "none", "batch" or "group" between each hidden layer and its ReLU.
    """

    num_classes: int = 10
    widths: Sequence[int] = (500, 500)
    norm: str = "none"

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        x = images.reshape(images.shape[0], -1)
        for width in self.widths:
            x = nn.relu(norm(self.norm, train)(nn.Dense(width)(x)))
        return nn.Dense(self.num_classes)(x)
