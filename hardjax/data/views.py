"""What a network is shown of an image beyond its place: crops of any size and shape (Inception's), and colour jitter.

Pure, on the device; all that is drawn is whole numbers, which are the same wherever they are drawn.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hardjax._validate import Refusal

# Shares of the area and ratios of the sides that are drawn from; an odd number of ratios, so that 1 is among them.
_AREAS, _RATIOS = 256, 65
WIDEST = 4 / 3
_SHADES = 2**16
_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # luma of ITU-R BT.601, as Pillow and torchvision take it


@functools.lru_cache(maxsize=16)
def crop_sizes(height: int, width: int, least: float) -> np.ndarray:
    """Sizes (k, 2) int32, height and width, of the crops of an image that Inception is trained on.

    A share of the area is drawn evenly from `least` to 1, a ratio of the sides evenly, by its logarithm, from 3/4 to
    4/3, and both again where the crop is higher or wider than the image. Each row is as likely as the others: those
    draws on a grid of 256 by 65, the ones that fit. Empty where none does (an image many times as wide as it is high).

    Source: Szegedy et al., Going deeper with convolutions, section 6.
    """
    areas = height * width * (least + (1 - least) * (np.arange(_AREAS) + 0.5) / _AREAS)
    ratios = WIDEST ** (2 * (np.arange(_RATIOS) + 0.5) / _RATIOS - 1)
    heights, widths = (np.rint(np.sqrt(areas[:, None] * share)) for share in (1 / ratios, ratios))
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    return np.stack([heights[fits], widths[fits]], 1).astype(np.int32)


def check(image_shape: tuple[int, ...], area: float | None, jitter: float | None) -> None:
    """Look whether images (H, W, C) have such crops and colours.

    Raises:
        ValueError: they have not.
    """
    height, width, channels = image_shape
    if area is not None and not len(crop_sizes(height, width, area)):
        raise Refusal(f"Expected crop_area={area} to fit images of {height}x{width} with sides as 3 to 4 up to 4 to 3.")
    if jitter is not None and channels != 3:
        raise Refusal(f"Expected jitter=None with images of {channels} channels, which have no colours; got {jitter}.")


def draw_boxes(key: Array, count: int, image_shape: tuple[int, ...], least: float) -> Array:
    """(count, 4) int32: top, left, height and width of a crop of each image (H, W, C), see `crop_sizes`."""
    which, where = jax.random.split(key)
    sizes = jnp.asarray(crop_sizes(*image_shape[:2], least))
    found = sizes[jax.random.randint(which, (count,), 0, len(sizes))]
    room = jnp.array(image_shape[:2], jnp.int32) - found
    return jnp.concatenate([jax.random.randint(where, (count, 2), 0, room + 1), found], 1)


def draw_shades(key: Array, count: int) -> Array:
    """(count, 3) int32 for `jittered`."""
    return jax.random.randint(key, (count, 3), 0, _SHADES)


def cut(images: Array, boxes: Array, shape: tuple[int, int]) -> Array:
    """Crops (B, H', W', C) of images (B, H, W, C) float32, resized (bilinear, without antialiasing) to one shape.

    Beyond its edges a crop is continued by its own outermost pixels.
    """
    low_y, high_y, down = _between(boxes[:, 0], boxes[:, 2], shape[0])
    low_x, high_x, right = _between(boxes[:, 1], boxes[:, 3], shape[1])
    each = jnp.arange(len(images))[:, None, None]
    down, right = down[:, :, None, None], right[:, None, :, None]

    def row(y: Array) -> Array:
        left, other = (images[each, y[:, :, None], x[:, None, :]] for x in (low_x, high_x))
        return left * (1 - right) + other * right

    return row(low_y) * (1 - down) + row(high_y) * down


def _between(start: Array, length: Array, size: int) -> tuple[Array, Array, Array]:
    """Along one axis, of every pixel of the result: the pixels (B, size) before and behind its place, and how far it is
    from the first to the second."""
    # Half-pixel centres, in whole numbers (of 2 * size to a pixel): a crop of the result's own size stays as it is.
    last = length[:, None] - 1
    place = jnp.clip((2 * jnp.arange(size) + 1) * length[:, None] - size, 0, 2 * size * last)
    before = place // (2 * size)
    behind = jnp.minimum(before + 1, last)
    return start[:, None] + before, start[:, None] + behind, (place % (2 * size)) / (2 * size)


def jittered(images: Array, shades: Array, strength: float) -> Array:
    """Images (B, H, W, 3) float32 in 0..1 in other colours, pure.

    Brightness, contrast (about the mean grey) and saturation (about the grey of each pixel) are multiplied by factors
    from 1 - strength to 1 + strength, in this order, and clipped to 0..1 each time.

    torchvision's `ColorJitter` without hue draws the order too; here it is fixed.

    Args:
        shades: (B, 3) of `draw_shades`, for each of the three.
    """
    spread = 2 * shades.astype(jnp.float32) / (_SHADES - 1) - 1
    bright, contrast, saturated = (1 + strength * spread).T[:, :, None, None, None]
    images = jnp.clip(images * bright, 0, 1)
    mean = _grey(images).mean((1, 2), keepdims=True)
    images = jnp.clip(mean + contrast * (images - mean), 0, 1)
    grey = _grey(images)
    return jnp.clip(grey + saturated * (images - grey), 0, 1)


def _grey(images: Array) -> Array:
    """(B, H, W, 1)."""
    # No product of matrices, which a GPU would round to ten bits.
    return (images * _GREY).sum(-1, keepdims=True)
