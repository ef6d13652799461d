"""Whether the order of samples is for values to decide: which ones an index picks, a trace does not tell.

An index that follows from the batch size alone picks the same whenever the program is the same: that it restores what
it changes is for the check to find out. One that an input decides may keep the order today and change it tomorrow.
"""

from collections.abc import Callable, Sequence
from typing import Any

from hardjax.fisher.layouts import Aval, Layout

# (position of an input, which entry along its last axis; None: all) -> whether it follows from the batch size alone
Fixed = Callable[[int, int | None], bool]


def decided_by_values(eqn: Any, given: Sequence[Layout | None], avals: Sequence[Aval], fixed: Fixed) -> bool:
    """Of an equation's output.

    Args:
        given, avals: of the equation's inputs.
    """
    name, params = eqn.primitive.name, eqn.params
    axes = {part.axis for part in (given[0] if given else None) or ()}
    if name == "gather":
        sizes, shape = params["slice_sizes"], avals[0].shape
        picked = enumerate(params["dimension_numbers"].start_index_map)
        return any(axis in axes and sizes[axis] < shape[axis] and not fixed(1, at) for at, axis in picked)
    if name.startswith("scatter"):
        picked = enumerate(params["dimension_numbers"].scatter_dims_to_operand_dims)
        return any(axis in axes and not fixed(1, at) for at, axis in picked)
    if name == "dynamic_slice":
        sizes, shape = params["slice_sizes"], avals[0].shape
        return any(sizes[axis] < shape[axis] and not fixed(1 + axis, None) for axis in axes)
    if name == "dynamic_update_slice":
        (whole, part) = (aval.shape for aval in avals[:2])
        return any(part[axis] < whole[axis] and not fixed(2 + axis, None) for axis in axes)
    return False
