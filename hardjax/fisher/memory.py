"""How much memory and work a Gram matrix takes, layer by layer, and what to set where the memory is not enough."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from hardjax import _validate
from hardjax.fisher import capture
from hardjax.fisher.unchecked import Rows, find
from hardjax.models.modes import plain


class LayerPlan(NamedTuple):
    """How one layer's share is formed.

    Attributes:
        name: path of the layer.
        form: "rows" (rows, then their products) or "pairs" (products over pairs of positions, no rows).
        calls: times the layer is called in one forward pass.
        row_bytes: memory of the rows of all B samples.
        flops: floating-point operations.
    """

    name: str
    form: str
    calls: int
    row_bytes: int
    flops: int


def plan(
    model: Any, variables: Mapping[str, Any], images: Array, rows: Rows = "contribution", *, key: Array | None = None
) -> list[LayerPlan]:
    """How `method="layers"` will form each layer's share, in the order of the forward pass; nothing is computed.

    Raises:
        ValueError: as in `gram`.
    """
    _validate.one_of(("contribution", "frozen"), rows=rows)
    variables, labels = plain(variables), jnp.zeros(len(images), jnp.int32)
    problem = find(model, capture.forward_of(model, variables, images, key), rows, variables, images, labels)
    calls = Counter(layer.name for layer in problem.layers)
    plans = {}
    for layer in problem.layers:
        cost = layer.rule.cost(layer.input_shape, layer.output_shape)
        form = cost.form if calls[layer.name] == 1 else "rows"
        row_bytes = cost.row_size * len(images) * problem.dtype.itemsize
        plans[layer.name] = LayerPlan(layer.name, form, calls[layer.name], row_bytes, cost.flops)
    return list(plans.values())


def advice(rows: str, method: str, chunk: int | None, batch: int) -> str:
    """What to set when the memory is not enough."""
    smaller = max(1, (chunk or batch) // 4)
    if method == "vmap" and rows != "coupled":
        return 'method="vmap" holds all rows at once; take method="layers" or a smaller batch'
    if chunk == 1:
        return f"chunk=1 is the least; measure a smaller batch than {batch}"
    return f"set chunk={smaller} (Performance.gram_chunk, --gram-chunk) or measure a smaller batch"


def largest(layers: list[LayerPlan]) -> str:
    """Words for the layer whose rows take the most memory."""
    layer = max(layers, key=lambda layer: layer.row_bytes)
    return f" (largest layer {layer.name}: {layer.row_bytes / 2**20:.0f} MiB of rows)"
