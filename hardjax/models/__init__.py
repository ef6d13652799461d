"""The networks that the four papers train, by name, equal to their reference implementations; and one's own."""

from hardjax.models.apply import Logits, Seeded, init_variables, make_apply, restore
from hardjax.models.layers import BatchNorm, Network
from hardjax.models.summary import Size, size_of, table
from hardjax.models.torch_weights import from_torch
from hardjax.models.zoo import create, names, options

__all__ = [
    "BatchNorm",
    "Logits",
    "Network",
    "Seeded",
    "Size",
    "create",
    "from_torch",
    "init_variables",
    "make_apply",
    "names",
    "options",
    "restore",
    "size_of",
    "table",
]
