"""Networks for tests: those of the zoo, small versions of its large families, and one that compiles fast."""

import flax.linen as nn

from hardjax import models
from hardjax.models.densenet import DenseNet
from hardjax.models.initial import SMALL_BATCH_STUDY
from hardjax.models.inverted import EfficientNet
from hardjax.models.layers import Network
from hardjax.models.resnet import ResNet
from hardjax.models.zoo import ZOO

# Their gradients take long to compile.
LARGE = {"resnet18", "resnet34", "resnet50", "densenet121", "mobilenetv3_small_100", "efficientnet_b4"}
LARGE |= {"efficientnetv2_s", "cbrcb_resnet110", "densenet110", "resnet32", "resnet20"}

_STAGES = (("depthwise", 3, 1, 1, 16, True, 1), ("edge", 3, 2, 2, 16, False, 2), ("inverted", 5, 1, 2, 24, True, 1))
SMALL_VERSIONS = {
    "resnet": lambda **options: ResNet(10, stages=(1, 1), bottleneck=True, stem="cifar", **options),
    "densenet": lambda **options: DenseNet(10, stages=(1, 2), growth=16, **options),
    "inverted": lambda **options: EfficientNet(10, stem=16, head=64, stages=_STAGES, **options),
}


class Tiny(Network):
    """One convolution, its normalisation, and a dense layer."""

    paper_init = SMALL_BATCH_STUDY

    def logits(self, x, layers):
        x = nn.relu(layers.normalise(layers.conv(x, 4, 3, 2, name="conv0"), "bn0"))
        return layers.classify(x, self.num_classes, self.last_layer)


def maker(name):
    """(**options) -> the network of that name, of the zoo or a small version."""
    return SMALL_VERSIONS.get(name) or (lambda **options: models.create(name, **options))


def channels(name):
    return ZOO[name].image_shape[2] if name in ZOO else 3
