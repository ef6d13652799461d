"""P4's reduced AlexNet for 32x32 images."""

import flax.linen as nn
from jax import Array

from hardjax import _validate
from hardjax._validate import Refusal
from hardjax.models.initial import SMALL_BATCH_STUDY
from hardjax.models.layers import Layers, Network, flatten
from hardjax.models.ops.pooling import max_pool


class ReducedAlexNet(Network):
    """Five convolutions and three dense layers (P4, section 3.1, which prints no count): 358,106 parameters.

    Pools have no padding (32-15-7-3): padded ones would give 472,794 parameters.

    Attributes:
        norm: "none"; "batch" or "group" after every convolution, before its ReLU (358,394 parameters).
        norm_dense: also after the first two dense layers, which then have no bias (358,906).
        dropout: after the first two dense layers.
    """

    norm: str = "none"
    norm_dense: bool = False
    paper_init = SMALL_BATCH_STUDY
    last_layer = "fc3"

    def __post_init__(self) -> None:
        _validate.boolean(norm_dense=self.norm_dense)
        if self.norm_dense and self.norm == "none":
            raise Refusal("Expected norm='batch' or 'group' with norm_dense=True, not 'none'.")
        super().__post_init__()

    def logits(self, x: Array, layers: Layers) -> Array:
        # P4 prints the layers and no padding: 2 at 5x5 and 1 at 3x3 keep the sides, pools of 3x3 at stride 2 have none.
        convolutions = [(16, 5, True), (48, 3, True), (96, 3, False), (64, 3, False), (64, 3, True)]
        for index, (features, kernel, pool) in enumerate(convolutions, 1):
            x = layers.conv(x, features, kernel, name=f"conv{index}")
            x = nn.relu(layers.normalise(x, f"bn{index}"))
            # Pooled after the ReLU, as in the original; the order makes no difference to the values.
            x = max_pool(x) if pool else x
        x = flatten(x)
        for index in (1, 2):
            x = layers.dense(x, 256, bias=not self.norm_dense, name=f"fc{index}")
            x = layers.normalise(x, f"bn_fc{index}") if self.norm_dense else x
            x = layers.drop(nn.relu(x))
        return layers.dense(x, self.num_classes, name=self.last_layer)
