"""One convolution for all models: the built-in one, and on CPU exact forms that stay fast inside compiled loops.

XLA on CPU rewrites only the convolutions of the entry computation into forms its fast kernels take; in the body of a
`scan` a kernel gradient runs in naive loops (about 40 times slower), and depthwise convolutions are slow everywhere.
Here the two backward convolutions are written in canonical NHWC/HWIO form on operands transposed explicitly behind an
optimisation barrier, at stride 2 one for the pixels of each remainder; kernel gradients of few channels, 1x1
convolutions and those of images smaller than the kernel are matrix products, and depthwise convolutions sums of shifted
products.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from hardjax.models.ops.depthwise import backward_padding, depthwise, sum_dtype

_NHWC = ("NHWC", "HWIO", "NHWC")
_FLAX_NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def convolve(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    """`lax.conv_general_dilated`, equal in values and first derivatives; for `nn.Conv(conv_general_dilated=convolve)`.

    Args:
        lhs: (B, H, W, C) images.
        rhs: (h, w, C / groups, D) kernel.
        dimension_numbers: anything but NHWC/HWIO/NHWC goes to the built-in convolution.

    On CPU only reverse-mode derivatives are available.
    """
    builtin = partial(
        lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    # The forms below are for what the zoo and most of people's own networks ask for; the rest stays right, if slow.
    dilated = any(d != 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    plain = lhs.ndim == 4 and not dilated and batch_group_count == 1 and preferred_element_type is None
    if not plain or lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) != _FLAX_NHWC:
        return builtin(lhs, rhs)
    strides = tuple(window_strides)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    # An empty output: the backward forms would cut windows of a negative length.
    if min(_positions(lhs, rhs, strides, pads)) < 1:
        return builtin(lhs, rhs)
    # By the platform that the program is lowered for, not the one that traces: a program for a GPU is also compiled on
    # machines without one. There the built-in form stays until a measurement speaks against it.
    on_cpu = partial(_on_cpu, strides=strides, pads=pads, groups=feature_group_count, precision=precision)
    return lax.platform_dependent(lhs, rhs, cpu=on_cpu, default=builtin)


def _on_cpu(lhs: Array, rhs: Array, strides: tuple, pads: tuple, groups: int, precision: Any) -> Array:
    if groups == 1 and rhs.shape[:2] == (1, 1) and pads == ((0, 0), (0, 0)):
        # Strides are taken first: three of four pixels at stride 2 are never looked at.
        return _pointwise(lhs[:, :: strides[0], :: strides[1]], rhs, precision)
    if groups == 1:
        return _dense(lhs, rhs, strides, pads, precision)
    if groups == lhs.shape[-1] and rhs.shape[-1] == groups:
        return depthwise(lhs, rhs, strides, pads)
    # A few wide groups: no network of the zoo has them, so that a loop is enough.
    parts = zip(jnp.split(lhs, groups, -1), jnp.split(rhs, groups, -1), strict=True)
    return jnp.concatenate([_dense(x, kernel, strides, pads, precision) for x, kernel in parts], -1)


def _pointwise(lhs: Array, rhs: Array, precision: Any) -> Array:
    """One matrix product of two dimensions, two to three times as fast as the convolution or one of four."""
    y = jnp.matmul(lhs.reshape(-1, lhs.shape[-1]), rhs[0, 0], precision=precision)
    return y.reshape(*lhs.shape[:-1], -1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _dense(lhs: Array, rhs: Array, strides: tuple, pads: tuple, precision: Any) -> Array:
    positions = _positions(lhs, rhs, strides, pads)
    # Of an image smaller than the kernel, XLA on CPU convolves in naive loops: 7 GFLOP/s on the 2x2 and 1x1 maps of
    # ResNet-34 at 32x32 pixels, as products 180. Above 16 positions the products would be many and small.
    if (lhs.shape[1] < rhs.shape[0] or lhs.shape[2] < rhs.shape[1]) and math.prod(positions) <= 16:
        return _by_position(lhs, rhs, strides, pads, positions, precision)
    return lax.conv_general_dilated(lhs, rhs, strides, pads, dimension_numbers=_NHWC, precision=precision)


def _positions(lhs: Array, rhs: Array, strides: tuple, pads: tuple) -> list[int]:
    """Height and width of the output."""
    return [(lhs.shape[i + 1] + sum(pads[i]) - rhs.shape[i]) // strides[i] + 1 for i in (0, 1)]


def _by_position(
    lhs: Array, rhs: Array, strides: tuple, pads: tuple, positions: Sequence[int], precision: Any
) -> Array:
    """One matrix product for each output position, with the part of the kernel that lies on the image."""

    def window(axis: int, index: int) -> tuple[slice, slice]:
        start = index * strides[axis] - pads[axis][0]
        low, high = max(start, 0), min(start + rhs.shape[axis], lhs.shape[axis + 1])
        return slice(low, max(low, high)), slice(low - start, max(low, high) - start)

    outputs = []
    for row in range(positions[0]):
        rows, kernel_rows = window(0, row)
        for column in range(positions[1]):
            columns, kernel_columns = window(1, column)
            pixels, part = lhs[:, rows, columns], rhs[kernel_rows, kernel_columns]
            part = part.reshape(-1, rhs.shape[-1])
            outputs.append(jnp.matmul(pixels.reshape(len(lhs), len(part)), part, precision=precision))
    return jnp.stack(outputs, 1).reshape(len(lhs), *positions, rhs.shape[-1])


def _dense_forward(lhs: Array, rhs: Array, strides: tuple, pads: tuple, precision: Any) -> tuple:
    return _dense(lhs, rhs, strides, pads, precision), (lhs, rhs)


def _dense_backward(strides: tuple, pads: tuple, precision: Any, saved: tuple, cotangent: Array) -> tuple:
    lhs, rhs = saved
    lhs_bar = _input_gradient(lhs, rhs, strides, pads, cotangent, precision)
    few = max(strides) <= 2 and _has_few_channels(lhs, rhs, pads)
    form = _few_channels if few else _images_as_channels
    return lhs_bar, form(lhs, rhs, strides, pads, cotangent, precision)


def _input_gradient(lhs: Array, rhs: Array, strides: tuple, pads: tuple, cotangent: Array, precision: Any) -> Array:
    """The cotangent against the kernel turned by 180 degrees with channels exchanged.

    Input pixels of one remainder by the strides meet every stride-th kernel entry alone, in a convolution of their own:
    a cotangent dilated by strides of 2 would be zero in three of four places. Above that there would be too many.
    """
    # Without the barrier XLA folds the transpose back into the convolution's dimension numbers, which only the entry
    # computation makes canonical again: in a scan 40 times slower. The other barrier below is there for the same.
    turned = lax.optimization_barrier(jnp.flip(rhs, (0, 1)).transpose(0, 1, 3, 2))
    count = [-(-lhs.shape[i + 1] // strides[i]) for i in (0, 1)]

    def part(axis: int, remainder: int) -> tuple[slice, tuple[int, int]]:
        """Of the turned kernel, and the cotangent's padding."""
        size, stride, low = rhs.shape[axis], strides[axis], pads[axis][0]
        first = (remainder + low) % stride
        taps, shift = len(range(first, size, stride)), (remainder + low - first) // stride
        last = size - 1 - first - stride * (taps - 1)
        room = (taps - 1 - shift, count[axis] + shift - cotangent.shape[axis + 1])
        return slice(last, size - first if taps else last, stride), room

    def pixels(row: int, column: int) -> Array:
        (rows, high), (columns, wide) = part(0, row), part(1, column)
        kernel = turned[rows, columns]
        if 0 in kernel.shape:  # stride above the kernel: no output sees these pixels
            return jnp.zeros((len(lhs), *count, lhs.shape[-1]), cotangent.dtype)
        return _dense(cotangent, kernel, (1, 1), (high, wide), precision)

    if strides == (1, 1):
        return pixels(0, 0)
    if max(strides) > 2:
        room = backward_padding(lhs.shape, rhs.shape, cotangent.shape, strides, pads)
        return lax.conv_general_dilated(
            cotangent, turned, (1, 1), room, lhs_dilation=strides, dimension_numbers=_NHWC, precision=precision
        )
    parts = [jnp.stack([pixels(row, column) for column in range(strides[1])], 3) for row in range(strides[0])]
    whole = jnp.stack(parts, 2).reshape(len(lhs), *(count[i] * strides[i] for i in (0, 1)), -1)
    return whole[:, : lhs.shape[1], : lhs.shape[2]]


def _images_as_channels(lhs: Array, rhs: Array, strides: tuple, pads: tuple, cotangent: Array, precision: Any) -> Array:
    """The kernel's gradient: the cotangent, dilated by the strides, is the kernel of a convolution over the input."""
    # (128, 32, 32, 16) in a scan: 771 ms as XLA writes it, 20 ms like this (2 cores).
    images, filters = lax.optimization_barrier((lhs.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3)))
    spread = [strides[i] * (cotangent.shape[i + 1] - 1) + 1 for i in (0, 1)]
    over = [(pads[i][0], spread[i] + rhs.shape[i] - 1 - lhs.shape[i + 1] - pads[i][0]) for i in (0, 1)]
    rhs_bar = lax.conv_general_dilated(
        images, filters, (1, 1), over, rhs_dilation=strides, dimension_numbers=_NHWC, precision=precision
    )
    return rhs_bar.transpose(1, 2, 0, 3)


def _has_few_channels(lhs: Array, rhs: Array, pads: tuple) -> bool:
    """Where `_few_channels` beats a convolution, most at 16 and 32 channels; above 128 it does not."""
    # Measured over the zoo on 2 cores: two to three times as fast for 16 to 64 channels, which took half of ResNet-20's
    # step before. The image itself (1 or 3 channels) stays with the convolution. Paddings below zero come from
    # strided backward passes alone, and shifts cannot express them.
    inside, outside = rhs.shape[2:]
    return (
        min(rhs.shape[:2]) > 1
        and min(inside, outside) >= 8
        and max(inside, outside) <= 128
        and min(*pads[0], *pads[1]) >= 0
    )


def _few_channels(lhs: Array, rhs: Array, strides: tuple, pads: tuple, cotangent: Array, precision: Any) -> Array:
    """The kernel's gradient as a matrix product (h * C, pixels) (pixels, w * D): its rows are met by shifting the
    input, its columns by shifting the cotangent. Patches would be h * w times the input.

    At stride s in s products, one for the input columns of each remainder, which every s-th kernel column meets.
    """
    (high, wide), (inside, outside) = rhs.shape[:2], rhs.shape[2:]
    rows, columns = cotangent.shape[1:3]
    dtype = sum_dtype(lhs)
    taps = [len(range(remainder, wide, strides[1])) for remainder in range(min(strides[1], wide))]

    def products(lhs: Array, cotangent: Array) -> list[Array]:
        padded = jnp.pad(lhs, ((0, 0), *pads, (0, 0)))
        found = []
        for remainder, count in enumerate(taps):
            across = slice(remainder, remainder + strides[1] * (columns + count - 2) + 1, strides[1])
            down = [slice(i, i + strides[0] * (rows - 1) + 1, strides[0]) for i in range(high)]
            shifted = jnp.concatenate([padded[:, some, across] for some in down], -1)
            room = [((0, 0), (0, 0), (j, count - 1 - j), (0, 0)) for j in range(count)]
            placed = jnp.concatenate([jnp.pad(cotangent, pad) for pad in room], -1)
            # In float32 also for bfloat16: sums over every pixel of the batch would lose half of their digits.
            a, b = shifted.reshape(-1, high * inside), placed.reshape(-1, count * outside)
            found.append(jnp.matmul(a.T, b, precision=precision, preferred_element_type=dtype))
        return found

    entries = sum(rows * (columns + count - 1) * (high * inside + count * outside) for count in taps)
    together = _samples_together(len(lhs), entries)
    if together == len(lhs):
        totals = products(lhs, cotangent)
    else:

        def add_some(index: Array, totals: list[Array]) -> list[Array]:
            some = (lax.dynamic_slice_in_dim(array, index * together, together) for array in (lhs, cotangent))
            return [total + product for total, product in zip(totals, products(*some), strict=True)]

        start = [jnp.zeros((high * inside, count * outside), dtype) for count in taps]
        totals = lax.fori_loop(0, len(lhs) // together, add_some, start)
    blocks = [total.reshape(high, inside, -1, outside) for total in totals]
    columns_of = [blocks[j % strides[1]][:, :, j // strides[1]] for j in range(wide)]
    return jnp.stack(columns_of, 1).astype(rhs.dtype)


def _samples_together(batch: int, entries: int, most: int = 1 << 21) -> int:
    """The largest divisor of the batch whose samples, of so many entries each, stay near the cache."""
    # 1 << 21 entries are 8 MiB in float32. Of a divisor alone, so that one program serves all parts.
    return next(
        count for count in range(batch, 0, -1) if batch % count == 0 and (count == 1 or count * entries <= most)
    )


_dense.defvjp(_dense_forward, _dense_backward)
