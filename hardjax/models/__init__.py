"""The networks that the four papers train, by name, equal to their reference implementations."""

from hardjax.models.layers import BatchNorm, Network
from hardjax.models.summary import Size, size_of, table
from hardjax.models.torch_weights import from_torch
from hardjax.models.zoo import create, names, options

__all__ = [
    "BatchNorm",
    "Network",
    "Size",
    "create",
    "from_torch",
    "names",
    "options",
    "size_of",
    "table",
]
