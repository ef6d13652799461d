"""Per-sample gradients of one layer from its input and its output's cotangent, and their Gram matrix. Pure JAX.

Row i of a layer is what batch position i adds to the layer's gradient. Every rule offers the rows themselves and
their (B, B) products, the latter without ever holding more than `chunk` samples' worth of rows.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import jax.numpy as jnp
from jax import Array, lax

# TF32 or bfloat16 products would decide which eigenvalues count as zero.
_HIGHEST = lax.Precision.HIGHEST
# Kernel offsets are joined until a product has this many columns: narrower ones waste a matrix unit, wider ones
# copy the input once for every offset of the kernel.
_JOINED_COLUMNS = 64

Form = Literal["rows", "pairs"]


class Rule(Protocol):
    """One layer's per-sample gradient, from `a` (what multiplies the parameters) and `d` (cotangent), both (B, ...)."""

    def rows(self, a: Array, d: Array) -> dict[str, Array]:
        """Parameter name -> (B, *parameter shape)."""
        ...

    def grams(self, a: Array, d: Array, chunk: int | None) -> dict[str, Array]:
        """Parameter name -> (B, B), the products of its rows."""
        ...

    def cost(self, a_shape: Sequence[int], d_shape: Sequence[int]) -> "Cost":
        """What `grams` will do for these shapes."""
        ...


@dataclass(frozen=True)
class Cost:
    """How a layer's Gram is formed: form, floating-point operations, and the row entries of one sample."""

    form: Form
    flops: int
    row_size: int


@dataclass(frozen=True)
class Linear:
    """y = a @ kernel + bias over the last axis; axes between batch and features are positions that share the kernel."""

    use_bias: bool

    def rows(self, a: Array, d: Array) -> dict[str, Array]:
        a, d = _positions(a), _positions(d)
        rows = {"kernel": jnp.einsum("btk,btc->bkc", a, d, precision=_HIGHEST)}
        return rows | ({"bias": d.sum(1)} if self.use_bias else {})

    def grams(self, a: Array, d: Array, chunk: int | None) -> dict[str, Array]:
        a, d = _positions(a), _positions(d)
        grams = {"kernel": _kernel_gram([a[:, :, None]], d[:, :, None], chunk)}
        return grams | ({"bias": _outer(d.sum(1))} if self.use_bias else {})

    def cost(self, a_shape: Sequence[int], d_shape: Sequence[int]) -> Cost:
        return _cost(a_shape[0], math.prod(a_shape[1:-1]), 1, a_shape[-1], d_shape[-1], 1)


@dataclass(frozen=True)
class Convolution:
    """A convolution, channels last. `a` is the layer's input before the zero padding that belongs to the kernel.

    Attributes:
        kernel_size, strides, input_dilation, kernel_dilation: one number a spatial axis.
        padding: (low, high) of each spatial axis; negative values cut.
        groups: feature groups; equal to the number of input channels for a depthwise convolution.
        use_bias: whether a bias follows.
    """

    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int
    use_bias: bool

    def rows(self, a: Array, d: Array) -> dict[str, Array]:
        slices, cotangent = self._slices(a, d), _split_groups(_positions(d), self.groups)
        kernel = jnp.stack([_block(piece, cotangent) for piece in slices], 1)  # (B, offsets, g, k, c)
        kernel = jnp.moveaxis(kernel, 2, 3).reshape(len(a), *self.kernel_size, kernel.shape[3], d.shape[-1])
        return {"kernel": kernel} | ({"bias": _positions(d).sum(1)} if self.use_bias else {})

    def grams(self, a: Array, d: Array, chunk: int | None) -> dict[str, Array]:
        cotangent = _split_groups(_positions(d), self.groups)
        grams = {"kernel": _kernel_gram(self._slices(a, d), cotangent, chunk)}
        return grams | ({"bias": _outer(_positions(d).sum(1))} if self.use_bias else {})

    def cost(self, a_shape: Sequence[int], d_shape: Sequence[int]) -> Cost:
        columns, channels = a_shape[-1] // self.groups, d_shape[-1] // self.groups
        offsets = math.prod(self.kernel_size)
        return _cost(a_shape[0], math.prod(d_shape[1:-1]), offsets, columns, channels, self.groups)

    def _slices(self, a: Array, d: Array) -> list[Array]:
        """What each kernel offset sees: (B, positions, groups, channels per group). Slices are far cheaper than
        `conv_general_dilated_patches`, and XLA reads most of them in place."""
        pads = [(*pad, dilation - 1) for pad, dilation in zip(self.padding, self.input_dilation, strict=True)]
        padded = lax.pad(a, jnp.zeros((), a.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
        outputs = d.shape[1:-1]
        return [
            _split_groups(_positions(self._slice(padded, offset, outputs)), self.groups)
            for offset in _offsets(self.kernel_size)
        ]

    def _slice(self, padded: Array, offset: tuple[int, ...], outputs: tuple[int, ...]) -> Array:
        start = [o * dilation for o, dilation in zip(offset, self.kernel_dilation, strict=True)]
        limit = [s + (n - 1) * stride + 1 for s, n, stride in zip(start, outputs, self.strides, strict=True)]
        return lax.slice(padded, [0, *start, 0], [len(padded), *limit, padded.shape[-1]], [1, *self.strides, 1])


@dataclass(frozen=True)
class Scaling:
    """y = a * scale + bias of a normalisation: `a` is the normalised input.

    Attributes:
        feature_axes: axes of `a` that scale and bias span, ascending, none of them 0.
        names: which of "scale" and "bias" exist.
    """

    feature_axes: tuple[int, ...]
    names: tuple[str, ...]

    def rows(self, a: Array, d: Array) -> dict[str, Array]:
        shared = [axis for axis in range(1, d.ndim) if axis not in self.feature_axes]
        return {name: (d * a if name == "scale" else d).sum(shared) for name in self.names}

    def grams(self, a: Array, d: Array, chunk: int | None) -> dict[str, Array]:
        del chunk  # rows of one number a channel are never large
        return {name: _outer(rows.reshape(len(rows), -1)) for name, rows in self.rows(a, d).items()}

    def cost(self, a_shape: Sequence[int], d_shape: Sequence[int]) -> Cost:
        size = math.prod(d_shape[axis] for axis in self.feature_axes) * len(self.names)
        return Cost("rows", 2 * math.prod(d_shape) + 2 * d_shape[0] ** 2 * size, size)


def _kernel_gram(slices: list[Array], d: Array, chunk: int | None) -> Array:
    """Products of kernel rows; slices (B, T, g, k) for each kernel offset, d (B, T, g, c)."""
    batch, positions, groups, channels = d.shape
    cost = _cost(batch, positions, len(slices), slices[0].shape[-1], channels, groups)
    limit = cost.row_size * min(chunk or batch, batch)
    if cost.form == "pairs":
        a = slices[0] if len(slices) == 1 else jnp.concatenate(slices, -1)
        return _pairs_gram(a, d, limit)
    blocks = _row_blocks(slices, d, max(1, limit // batch))
    return sum((_outer(block) for block in blocks), jnp.zeros((batch, batch), d.dtype))


def _pairs_gram(a: Array, d: Array, limit: int) -> Array:
    """Sum over groups and pairs of positions of (a_is . a_jt) (d_is . d_jt), about `limit` products at a time."""
    batch, positions, groups, _ = d.shape

    def one_sample(sample: tuple[Array, Array]) -> Array:
        a_i, d_i = sample
        inputs = jnp.einsum("sgk,jtgk->jgst", a_i, a, precision=_HIGHEST)
        cotangents = jnp.einsum("sgc,jtgc->jgst", d_i, d, precision=_HIGHEST)
        return jnp.sum(inputs * cotangents, (1, 2, 3))

    if positions == 1 and groups == 1:
        return _outer(a[:, 0, 0]) * _outer(d[:, 0, 0])
    samples = max(1, limit // (2 * batch * groups * positions**2))
    return lax.map(one_sample, (a, d), batch_size=min(samples, batch))


def _row_blocks(slices: list[Array], d: Array, max_columns: int) -> Iterator[Array]:
    """Rows cut into (B, at most max_columns) where one kernel entry's groups allow it."""
    batch, _, groups, channels = d.shape
    columns = slices[0].shape[-1]
    width = columns * channels * groups
    joined = max(1, min(_JOINED_COLUMNS // columns, max_columns // width))
    channels_at_once = max(1, min(channels, channels * max_columns // width))
    for first in range(0, len(slices), joined):
        pieces = slices[first : first + joined]
        a = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, -1)
        for channel in range(0, channels, channels_at_once):
            yield _block(a, d[..., channel : channel + channels_at_once]).reshape(batch, -1)


def _block(a: Array, d: Array) -> Array:
    """(B, T, g, k), (B, T, g, c) -> (B, g, k, c), summed over positions."""
    if a.shape[2] == 1:
        return jnp.einsum("btk,btc->bkc", a[:, :, 0], d[:, :, 0], precision=_HIGHEST)[:, None]
    if a.shape[3] == 1 or d.shape[3] == 1:  # depthwise: a matrix product one number wide is slow
        return jnp.sum(a[..., :, None] * d[..., None, :], 1)
    return jnp.einsum("btgk,btgc->bgkc", a, d, precision=_HIGHEST)


def _outer(rows: Array) -> Array:
    return jnp.matmul(rows, rows.T, precision=_HIGHEST)


def _positions(array: Array) -> Array:
    """(B, ..., C) -> (B, T, C)."""
    return array.reshape(len(array), -1, array.shape[-1])


def _split_groups(array: Array, groups: int) -> Array:
    """(B, T, C) -> (B, T, g, C / g)."""
    return array.reshape(*array.shape[:2], groups, -1)


def _offsets(kernel_size: Sequence[int]) -> list[tuple[int, ...]]:
    offsets: list[tuple[int, ...]] = [()]
    for size in kernel_size:
        offsets = [(*head, o) for head in offsets for o in range(size)]
    return offsets


def _cost(batch: int, positions: int, offsets: int, columns: int, channels: int, groups: int) -> Cost:
    row_size = offsets * columns * channels * groups
    rows = 2 * batch * (positions + batch) * row_size
    pairs = 2 * batch**2 * positions**2 * groups * (offsets * columns + channels + 1)
    form: Form = "pairs" if pairs < rows else "rows"
    return Cost(form, min(rows, pairs), row_size)
