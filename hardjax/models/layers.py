"""Blocks that the families share."""

from functools import partial

import flax.linen as nn

from hardjax import _validate
from hardjax.models.convolution import convolve

NORMS = ("batch", "group", "none")

he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
he_fan_in = nn.initializers.variance_scaling(2.0, "fan_in", "normal")

Conv = partial(nn.Conv, conv_general_dilated=convolve)


def conv(features: int, kernel: int = 3, stride: int = 1, **options) -> nn.Conv:
    """A square convolution padded by kernel // 2 on every side, as in PyTorch; `SAME` pads unevenly at stride 2."""
    pad = (kernel // 2, kernel // 2)
    return Conv(features, (kernel, kernel), (stride, stride), padding=(pad, pad), **options)


def norm(kind: str, train: bool):
    """The normalisation of that name: batch (momentum 0.9, epsilon 1e-5), group (8 channels a group) or none."""
    _validate.one_of(NORMS, norm=kind)
    if kind == "batch":
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)
    if kind == "group":
        return nn.GroupNorm(num_groups=None, group_size=8, epsilon=1e-5)
    return lambda images: images
