"""Made-up data of tasks other than classification, and small networks for them."""

import flax.linen as nn
import numpy as np

import hardjax as hj

SIDE = 8


def segmentation(samples: int = 96) -> hj.data.Dataset:
    """Noise with a bright rectangle: which pixels are of the rectangle."""
    rng = np.random.default_rng(0)
    images, masks = rng.integers(0, 150, (samples, SIDE, SIDE, 1)), np.zeros((samples, SIDE, SIDE), int)
    for i, (top, left, height, width) in enumerate(rng.integers((0, 0, 2, 2), (5, 5, 5, 5), (samples, 4))):
        masks[i, top : top + height, left : left + width] = 1
    images = np.clip(images + 90 * masks[..., None], 0, 255).astype(np.uint8)
    half = samples // 4 * 3
    return hj.data.Dataset.from_arrays(images[:half], masks[:half], images[half:], masks[half:], name="rectangles")


def regression(samples: int = 96) -> hj.data.Dataset:
    """A bright spot: where it is, (row, column) in units of the image."""
    rng = np.random.default_rng(1)
    where = rng.random((samples, 2))
    grid = np.stack(np.meshgrid(*[(np.arange(SIDE) + 0.5) / SIDE] * 2, indexing="ij"), -1)
    spots = np.exp(-20 * np.square(grid[None] - where[:, None, None]).sum(-1))
    images = (255 * np.clip(spots + 0.05 * rng.standard_normal(spots.shape), 0, 1)).astype(np.uint8)
    half = samples // 4 * 3
    return hj.data.Dataset.from_arrays(images[:half], where[:half], images[half:], where[half:], name="spots")


class Pixels(nn.Module):
    """Logits of two classes for each pixel."""

    norm: bool = True

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Conv(4, (3, 3))(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Conv(2, (3, 3))(nn.relu(x))


class Values(nn.Module):
    """Two numbers a sample."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.tanh(nn.Dense(16)(x.reshape(len(x), -1)))
        return nn.Dense(2)(x)
