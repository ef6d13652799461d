"""Fully connected networks (P3: 1024-500-500-10 on digits placed in 32x32)."""

from collections.abc import Sequence

import flax.linen as nn
from jax import Array

from hardjax.models.initial import FISHER_STUDY
from hardjax.models.layers import Layers, Network


class MLP(Network):
    """Dense layers with ReLU between; 768,010 parameters on 32x32x1 images with 10 classes (P3: 0.77M).

    Attributes:
        widths: hidden layers.
        norm: "none" as P3's text, "batch" or "group": between each hidden layer and its ReLU (770,010 parameters).
        dropout: after every hidden layer.
    """

    widths: Sequence[int] = (500, 500)
    norm: str = "none"
    paper_init = FISHER_STUDY

    def logits(self, x: Array, layers: Layers) -> Array:
        x = x.reshape(x.shape[0], -1)
        for index, width in enumerate(self.widths, 1):
            x = layers.normalise(layers.dense(x, width, name=f"fc{index}"), f"bn{index}")
            x = layers.drop(nn.relu(x))
        return layers.dense(x, self.num_classes, name=f"fc{len(self.widths) + 1}")
