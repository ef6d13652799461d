"""How much memory and work a Gram matrix takes, layer by layer, and what to set where the memory is not enough."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from hardjax import _validate
from hardjax.choose.losses import CROSS_ENTROPY, resolve
from hardjax.fisher import by_uses
from hardjax.fisher.unchecked import Rows
from hardjax.models.apply import as_apply
from hardjax.models.modes import plain


class LayerPlan(NamedTuple):
    """How one layer's share is formed.

    Attributes:
        name: path of the layer: of its parameters, without their own names.
        form: of its largest parameter: "rows" (rows, then their products) or "pairs" (products over pairs of positions,
            no rows).
        calls: times that a parameter of it is used in one forward pass.
        row_bytes: memory of the rows of all B samples, of its largest parameter.
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
    loss = resolve(CROSS_ENTROPY)  # no loss is computed, and none has parameters
    problem = by_uses.problem(as_apply(model), loss, variables, images, labels, key, rows == "contribution")
    calls = Counter(name for use in problem.uses for name in use.params)
    plans: dict[str, LayerPlan] = {}
    for use in problem.uses:
        cost = use.rule.cost()
        row_bytes = cost.row_size * len(images) * problem.dtype.itemsize
        for name in use.params:
            layer = name.rpartition("/")[0] or name
            before = plans.get(layer, LayerPlan(layer, "rows", 0, 0, 0))
            form = (cost.form if use.direct else "rows") if row_bytes > before.row_bytes else before.form
            plans[layer] = LayerPlan(
                layer,
                form,
                max(before.calls, calls[name]),
                max(before.row_bytes, row_bytes),
                before.flops + cost.flops,
            )
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
