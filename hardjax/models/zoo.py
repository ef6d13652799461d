"""The networks of the four papers by name, with what was published about them."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hardjax import _validate
from hardjax.models.alexnet import ReducedAlexNet
from hardjax.models.densenet import DenseNet, SmallDenseNet
from hardjax.models.initial import TORCHVISION_RESNET
from hardjax.models.inverted import EFFICIENTNET_B4, EFFICIENTNETV2_S, EfficientNet, MobileNetV3
from hardjax.models.layers import Network
from hardjax.models.mlp import MLP
from hardjax.models.resnet import CBRCBResNet, HeResNet, ResNet


class TorchvisionResNet(ResNet):
    """`ResNet` with torchvision's initial weights: no branch starts at zero."""

    paper_init = TORCHVISION_RESNET


@dataclass(frozen=True)
class Entry:
    """A network of the zoo.

    Attributes:
        constructor, settings: `constructor(**settings, **options)` makes it.
        papers: that train it.
        image_shape: (H, W, C) there.
        num_classes: there.
        published: parameters and, where given, floating-point operations (both truncated to the digits shown).
    """

    constructor: Callable[..., Network]
    settings: Mapping[str, Any] = field(default_factory=dict)
    papers: str = ""
    image_shape: tuple[int, int, int] = (32, 32, 3)
    num_classes: int = 10
    published: str = ""


# "Cropped to the image size 128" in P1 is read as a bilinear resize to 128x128: its operation counts fit that size.
_P1 = {"papers": "P1", "image_shape": (128, 128, 3)}
_MNIST = (28, 28, 1)

ZOO = {
    "mlp": Entry(MLP, {}, "P3", (32, 32, 1), published="0.77M"),
    "alexnet_reduced": Entry(ReducedAlexNet, {}, "P4"),
    "resnet8": Entry(HeResNet, {"blocks": 1}, "P4"),
    "resnet20": Entry(HeResNet, {"blocks": 3}, "P4"),
    "resnet32": Entry(HeResNet, {"blocks": 5}, "P4"),
    # P3 gives round parameter counts for MNIST that no network of its form meets; these are the nearest.
    "cbrcb_resnet8": Entry(CBRCBResNet, {"blocks": 1}, "P3", _MNIST, published="~70,000"),
    "cbrcb_resnet110": Entry(CBRCBResNet, {"blocks": 18}, "P3", published="1.73M"),
    "densenet8": Entry(
        SmallDenseNet, {"initial": 8, "growth": (6, 6, 6), "block_layers": 2}, "P3", _MNIST, published="~10,000"
    ),
    "densenet110": Entry(
        SmallDenseNet,
        {"initial": 16, "growth": (8, 10, 14), "block_layers": 18},
        "P3",
        num_classes=100,
        published="1.77M",
    ),
    "resnet18": Entry(ResNet, {"stages": (2, 2, 2, 2), "bottleneck": False}, **_P1, published="11.18M, 1.19G"),
    # P2 says only "ResNet-34" and "DenseNet-121". Its errors fit ImageNet stems on 32x32 images, which leave maps of
    # one pixel; that the weights are drawn as torchvision does is an assumption.
    "resnet34": Entry(TorchvisionResNet, {"stages": (3, 4, 6, 3), "bottleneck": False}, "P2"),
    "resnet50": Entry(
        ResNet, {"stages": (3, 4, 6, 3), "bottleneck": True}, "P1 P4", (128, 128, 3), published="23.52M, 2.69G"
    ),
    "densenet121": Entry(DenseNet, {"stages": (6, 12, 24, 16), "growth": 32}, "P2"),
    "mobilenetv3_small_100": Entry(MobileNetV3, {}, **_P1, published="1.52M, 0.03G"),
    "efficientnet_b4": Entry(
        EfficientNet, {"stem": 48, "head": 1792, "stages": EFFICIENTNET_B4}, **_P1, published="17.56M, 0.98G"
    ),
    "efficientnetv2_s": Entry(
        EfficientNet, {"stem": 24, "head": 1280, "stages": EFFICIENTNETV2_S}, **_P1, published="20.19M, 1.86G"
    ),
}


def names() -> list[str]:
    """Names that `create` takes."""
    return list(ZOO)


def options(name: str) -> list[str]:
    """Options that `create` takes for the network of that name.

    Raises:
        ValueError: unknown name; the closest one is offered.
    """
    _validate.one_of(ZOO, model=name)
    entry = ZOO[name]
    fields = (
        {field.name for field in dataclasses.fields(entry.constructor)}
        - set(entry.settings)
        - {"parent", "name", "num_classes"}
    )
    return sorted({"init_scheme": "init"}.get(field, field) for field in fields)


def create(name: str, num_classes: int = 10, **model_options: Any) -> Network:
    """The network `name`: module(images (B, H, W, C) float32, train) -> logits (B, num_classes).

    Options are plain JSON values: for all networks `norm`, `norm_batch_size`, `norm_momentum`, `dtype`, `init`,
    `dropout` (see `models.Network`); `drop_path` and `stem` where it has them; `widths` for "mlp", `norm_dense` for
    "alexnet_reduced".

    Raises:
        ValueError: unknown name or option (the closest one is offered), or a value out of range.
    """
    known = options(name)
    for option in model_options:
        _validate.one_of(known, **{f"option of {name}": option})
    # JSON has lists, and modules must be hashable: compiled programs are found again by them.
    plain = {option: tuple(value) if isinstance(value, list) else value for option, value in model_options.items()}
    if "init" in plain:  # the name of a method of Flax's modules
        plain["init_scheme"] = plain.pop("init")
    entry = ZOO[name]
    return entry.constructor(num_classes=num_classes, **entry.settings, **plain)
