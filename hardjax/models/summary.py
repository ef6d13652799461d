"""Sizes of the networks from their shapes alone, beside the published ones."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from hardjax.models.apply import init_variables
from hardjax.models.layers import BatchNorm
from hardjax.models.zoo import ZOO, create


class Size(NamedTuple):
    """What a network holds, and does for one image.

    Attributes:
        parameters: numbers in the "params" collection.
        multiply_adds: of convolutions and dense layers, biases left out.
        normalised: numbers that pass batch norm. P1's floating-point operations are twice the multiply-adds, and in its
            ResNets 8 more for each of these.
    """

    parameters: int
    multiply_adds: int
    normalised: int


def size_of(module: nn.Module, image_shape: tuple[int, int, int]) -> Size:
    """The size for images (H, W, C); traces the initialisation, computes nothing."""
    multiply_adds = normalised = 0

    def count(call: Any, args: tuple, kwargs: dict, context: Any) -> Any:
        nonlocal multiply_adds, normalised
        y = call(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(context.module, nn.Conv | nn.Dense):
            kernel = context.module.variables["params"]["kernel"].shape
            # The kernel holds the channels of one group alone, so that grouped convolutions come out right.
            multiply_adds += math.prod(y.shape[1:-1]) * math.prod(kernel)
        elif context.method_name == "__call__" and isinstance(context.module, BatchNorm | nn.BatchNorm):
            normalised += math.prod(y.shape[1:])
        return y

    # Counted while shapes are traced, from layers as they are called: a layer that is called twice counts twice.
    with nn.intercept_methods(count):
        shapes = jax.eval_shape(lambda key: init_variables(module, key, image_shape)["params"], jax.random.key(0))
    return Size(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)), multiply_adds, normalised)


def table() -> list[dict[str, Any]]:
    """A row a network at its paper's image size and classes: name, papers, parameters, multiply-adds, published."""
    rows = []
    for name, entry in ZOO.items():
        size = size_of(create(name, entry.num_classes), entry.image_shape)
        rows.append(
            {
                "name": name,
                "paper": entry.papers,
                "images": "x".join(map(str, entry.image_shape)),
                "classes": entry.num_classes,
                "parameters": size.parameters,
                "multiply_adds": size.multiply_adds,
                "published": entry.published,
            }
        )
    return rows
