"""Images as arrays: what is taken, and their statistics."""

from typing import Any

import numpy as np

from hardjax._validate import Refusal

_CHUNK = 256  # images added up at a time: squares take twice their bytes, and sums of 66,000 squares fit 32 bits
_LEAST_STD = 1e-6
_ROUNDING = 1e-5  # how far float pixels may leave 0..1: a bilinear resize in float32 overshoots by 1e-6
_SCALES_APART = 200  # brightest pixels: one split divided by 255 and the other not are 255 apart


def checked(split: str, images: np.ndarray) -> np.ndarray:
    """Images (n, H, W, C) uint8, or float32 in 0..1, of those of a split as they were given.

    Raises:
        ValueError: see `Dataset.from_arrays`.
    """
    images = as_array(f"{split} images", images)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4:
        raise Refusal(f"Expected {split} images of shape (n, H, W, C) or (n, H, W), got {images.shape}.")
    if 0 in images.shape:
        raise Refusal(f"Expected at least one {split} image, got shape {images.shape}.")
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise Refusal(f"Expected {split} images of dtype uint8 or float (0..1), got {images.dtype}.")
    with np.errstate(over="ignore"):  # what float32 cannot hold is counted below
        images = images.astype(np.float32)
    bad = int((~np.isfinite(images)).sum())
    if bad:
        raise Refusal(f"Expected finite {split} images, got {bad} NaN or infinite values.")
    low, high = float(images.min()), float(images.max())
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise Refusal(
            f"Expected {split} images of floats scaled to 0..1, got values from {low:g} to {high:g}; divide by the "
            "largest possible value, or give uint8 (normalisation is a part of Augmentation)."
        )
    return images


def check_scales(train: np.ndarray, test: np.ndarray) -> None:
    """Both splits are stored alike; else a network trained on one sees noise in the other, and nothing says so."""
    if train.dtype != test.dtype:
        raise Refusal(f"Expected training and test images of one dtype, got {train.dtype} and {test.dtype}.")
    highs = float(train.max()), float(test.max())
    if 0 < min(highs) * _SCALES_APART <= max(highs):
        raise Refusal(
            f"Expected training and test images of one scale, got values up to {highs[0]:g} and {highs[1]:g}."
        )


def check_constant(split: str, images: np.ndarray) -> None:
    """Some constant images there are in real data; where they are more than half, reading or scaling went wrong."""
    found = count_constant(images)
    if 2 * found > len(images):
        raise Refusal(
            f"Expected at most half of the {split} images to be constant, got {found} of {len(images)} that are one"
            " colour all over."
        )


def pixel_statistics(images: Any, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (C,) float32 of pixels scaled to 0..1; a constant channel has deviation 1.

    Args:
        images: (m, H, W, C) uint8 or floats, on the host or the device.
        rows: (n,) which of them; None for all.
    """
    count, channels = len(images) if rows is None else len(rows), images.shape[-1]
    whole = images.dtype == np.uint8
    # Sums of whole numbers are exact: in whatever order, of a share or of copies, they are the same.
    total, squares = (np.zeros(images.shape[1:], np.int64 if whole else np.float64) for _ in range(2))
    for start in range(0, count, _CHUNK):
        part = slice(start, start + _CHUNK)
        # From the device a chunk at a time: `np.asarray` of all images would keep them on the host as well.
        pixels = np.asarray(images[part if rows is None else rows[part]])
        if whole:
            total += pixels.sum(0, dtype=np.uint32)
            wide = pixels.astype(np.uint16)
            wide *= wide
            squares += wide.sum(0, dtype=np.uint32)
        else:
            pixels = pixels.astype(np.float64)
            total, squares = total + pixels.sum(0), squares + (pixels**2).sum(0)
    number = count * images[0].size // channels
    # Python's whole numbers: n * squares of ImageNet's pixels leaves 64 bits.
    sums = [(a.item(), b.item()) for a, b in zip(*(s.sum((0, 1)) for s in (total, squares)), strict=True)]
    scale = number * (255 if whole else 1)
    mean = np.array([a / scale for a, _ in sums])
    std = np.sqrt([max(number * b - a * a, 0) / scale**2 for a, b in sums])
    return mean.astype(np.float32), np.where(std < _LEAST_STD, 1, std).astype(np.float32)


def count_constant(images: np.ndarray) -> int:
    """How many images (n, H, W, C) are the same colour all over, as pictures that failed to decode are; 0 of single
    pixels, which have nothing to vary over."""
    height, width = images.shape[1:3]
    if height * width == 1:
        return 0
    # By their middle rows first: few are constant there, and all pixels of those alone are read.
    rows = images[:, height // 2]
    suspects = np.flatnonzero((rows == rows[:, :1]).all((1, 2)))
    found = 0
    for start in range(0, len(suspects), _CHUNK):
        chunk = images[suspects[start : start + _CHUNK]]
        found += int((chunk == chunk[:, :1, :1]).all((1, 2, 3)).sum())
    return found


def as_array(what: str, given: Any) -> np.ndarray:
    """What was given as an array; `what` it is, in a refusal."""
    if np.ma.is_masked(given):
        raise Refusal(f"Expected {what} without masked values, got {np.ma.count_masked(given)} of them.")
    try:
        return np.asarray(given)
    except ValueError as error:  # lists of several lengths
        raise Refusal(f"Expected {what} as an array: {error}") from None
