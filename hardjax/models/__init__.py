"""Networks by name."""

from typing import Any

import flax.linen as nn

from hardjax import _validate
from hardjax.models.mlp import MLP
from hardjax.models.resnet_he import HeResNet
from hardjax.models.summary import count_parameters

_MODELS = {
    "mlp": (MLP, {}),
    "resnet8": (HeResNet, {"blocks": 1}),
    "resnet20": (HeResNet, {"blocks": 3}),
    "resnet32": (HeResNet, {"blocks": 5}),
}


def names() -> list[str]:
    """Names that `create` takes."""
    return list(_MODELS)


def create(name: str, num_classes: int = 10, **options: Any) -> nn.Module:
    """The network `name`: module(images (B, H, W, C) float32, train) -> logits (B, num_classes).

    Raises:
        ValueError: unknown name (the closest one is offered) or option.
    """
    _validate.one_of(names(), model=name)
    constructor, settings = _MODELS[name]
    options = {option: tuple(value) if isinstance(value, list) else value for option, value in options.items()}
    known = set(constructor.__dataclass_fields__) - set(settings) - {"parent", "name", "num_classes"}
    for option in options:
        _validate.one_of(sorted(known), **{f"option of {name}": option})
    return constructor(num_classes=num_classes, **settings, **options)


def table() -> list[dict[str, Any]]:
    """A row for each network: its name and its parameters on 32x32 images with 10 classes."""
    channels = {"mlp": 1}
    return [
        {"name": name, "parameters": count_parameters(create(name), (32, 32, channels.get(name, 3)))}
        for name in names()
    ]
