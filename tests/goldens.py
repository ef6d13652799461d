"""Reference outputs of the architectures: PyTorch's logits under weights filled by a formula (shared/goldens)."""

import functools
import json
import zlib

import numpy as np
from shared import shared

# What the reference calls the networks, where that is not their name here: (name, options, image channels and side).
HERE = {
    "resnet20_he": ("resnet20", {}),
    "resnet8_he": ("resnet8", {}),
    "resnet32_he": ("resnet32", {}),
    "resnet20_he_nonorm": ("resnet20", {"norm": "none"}),
    "alexnet_reduced_bnconv": ("alexnet_reduced", {"norm": "batch"}),
    "alexnet_reduced_bnall": ("alexnet_reduced", {"norm": "batch", "norm_dense": True}),
    "densenet8_1ch": ("densenet8", {}),
    "cbrcb_resnet8_1ch": ("cbrcb_resnet8", {}),
    "mlp_bn": ("mlp", {"norm": "batch"}),
}


@functools.cache
def read(file: str) -> dict:
    return json.loads(shared(f"goldens/{file}.json").read_text())


def filled(name: str, shape: tuple, gain: float = 1.0) -> np.ndarray:
    """The tensor of that torch name, rounded to float32."""
    flat = np.arange(int(np.prod(shape)), dtype=np.float64) * 12.9898
    v = np.sin(flat + float(zlib.crc32(name.encode()) % 1000)) * 43758.5453
    t = (2.0 * (v - np.floor(v)) - 1.0).reshape(shape)
    if name == "input":
        value = t
    elif name.endswith("num_batches_tracked"):
        value = np.zeros(shape)
    elif name.endswith("running_mean"):
        value = 0.1 * t
    elif name.endswith("running_var"):
        value = 1.0 + 0.2 * t
    elif len(shape) >= 2:
        value = gain * np.sqrt(3.0 / np.prod(shape[1:])) * t
    else:
        value = 1.0 + 0.1 * t if name.endswith("weight") else 0.1 * t
    return value.astype(np.float32)


def images(batch: int, channels: int, side: int) -> np.ndarray:
    """(B, H, W, C) float32."""
    return filled("input", (batch, channels, side, side)).transpose(0, 2, 3, 1)


def state_dict(layers: dict) -> dict[str, np.ndarray]:
    """The filled tensors of one network, from its entry in layers.json."""
    tensors = ((tensor["name"], tuple(tensor["shape"])) for tensor in layers["state_dict"])
    return {name: filled(name, shape, layers["gain"]) for name, shape in tensors}
