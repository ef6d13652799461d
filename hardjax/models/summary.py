"""Sizes of the networks from their shapes alone, beside the published ones."""

import math
from typing import Any

import jax

from hardjax.models.apply import init_variables


def count_parameters(module: Any, image_shape: tuple[int, int, int]) -> int:
    """Numbers in the "params" collection for images (H, W, C); traces the initialisation, computes nothing."""
    shapes = jax.eval_shape(lambda key: init_variables(module, key, image_shape)["params"], jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
