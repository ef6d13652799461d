"""Per-sample gradients of one layer from its input and its output's cotangent, and their Gram matrix. Pure JAX.

Row i of a layer is what batch position i adds to the layer's gradient. Every rule offers the rows themselves and
their (B, B) products, the latter without ever holding more than `chunk` samples' worth of rows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

# TF32 or bfloat16 products would decide which eigenvalues count as zero.
_HIGHEST = lax.Precision.HIGHEST
# 6.3 million entries are 24 MiB in float32.
# Patches that are cut and used in one go: the fastest of several sizes on a CPU, or enough to fill an accelerator.
_PATCH_ENTRIES = {"cpu": 3 << 21}

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
        kernel = _form_rows(_as_it_is, a[:, :, None], d[:, :, None]).reshape(len(a), d.shape[-1], a.shape[-1])
        return {"kernel": kernel.transpose(0, 2, 1)} | ({"bias": d.sum(1)} if self.use_bias else {})

    def grams(self, a: Array, d: Array, chunk: int | None) -> dict[str, Array]:
        a, d = _positions(a), _positions(d)
        cost = self.cost(a.shape, d.shape)
        limit = cost.row_size * min(chunk or len(a), len(a))
        if cost.form == "pairs":
            kernel = _pairs_gram(a[:, :, None], d[:, :, None], limit)
        else:
            kernel = jnp.zeros((len(a), len(a)), a.dtype)
            width = max(1, limit // (len(a) * a.shape[-1]))
            # Cut by output channel: pieces of a row are disjoint, and so their products add up.
            for channel in range(0, d.shape[-1], width):
                some = d[:, :, None, channel : channel + width]
                kernel += outer(_form_rows(_as_it_is, a[:, :, None], some))
        return {"kernel": kernel} | ({"bias": outer(d.sum(1))} if self.use_bias else {})

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
        offsets = _offsets(self.kernel_size)
        blocks = _form_rows(lambda a: self._patches(a, d.shape, offsets), a, self._grouped(d))
        kernel = blocks.reshape(len(a), self.groups, d.shape[-1] // self.groups, len(offsets), -1)
        kernel = kernel.transpose(0, 3, 4, 1, 2).reshape(len(a), *self.kernel_size, -1, d.shape[-1])
        return {"kernel": kernel} | ({"bias": _positions(d).sum(1)} if self.use_bias else {})

    def grams(self, a: Array, d: Array, chunk: int | None) -> dict[str, Array]:
        offsets, cost = _offsets(self.kernel_size), self.cost(a.shape, d.shape)
        cotangent = self._grouped(d)
        limit = cost.row_size * min(chunk or len(a), len(a))
        if cost.form == "pairs":
            kernel = _pairs_gram(self._patches(a, d.shape, offsets), cotangent, limit)
        else:
            kernel = jnp.zeros((len(a), len(a)), a.dtype)
            for some_offsets, channels in self._pieces(cost.row_size, limit // len(a), d.shape[-1]):
                patches = partial(self._patches, outputs=d.shape, offsets=some_offsets)
                kernel += outer(_form_rows(patches, a, cotangent[..., channels]))
        return {"kernel": kernel} | ({"bias": outer(_positions(d).sum(1))} if self.use_bias else {})

    def cost(self, a_shape: Sequence[int], d_shape: Sequence[int]) -> Cost:
        columns, channels = a_shape[-1] // self.groups, d_shape[-1] // self.groups
        offsets = math.prod(self.kernel_size)
        return _cost(a_shape[0], math.prod(d_shape[1:-1]), offsets, columns, channels, self.groups)

    def _pieces(self, size: int, limit: int, channels: int) -> Iterator[tuple[list, slice]]:
        """Cuts a row of `size` entries by kernel offset, then by output channel, into about `limit` entries."""
        offsets, channels = _offsets(self.kernel_size), channels // self.groups
        together = max(1, min(len(offsets), len(offsets) * limit // size))
        width = max(1, min(channels, channels * limit * len(offsets) // (size * together)))
        for first in range(0, len(offsets), together):
            for channel in range(0, channels, width):
                yield offsets[first : first + together], slice(channel, channel + width)

    def _pad(self, a: Array) -> Array:
        pads = [(*pad, dilation - 1) for pad, dilation in zip(self.padding, self.input_dilation, strict=True)]
        return lax.pad(a, jnp.zeros((), a.dtype), [(0, 0, 0), *pads, (0, 0, 0)])

    def _patches(self, a: Array, outputs: Sequence[int], offsets: list[tuple[int, ...]]) -> Array:
        """What the kernel sees at each position: (B, positions, groups, offsets * channels per group).

        Slices: `conv_general_dilated_patches` is ten times slower in compiled loops on CPU.
        """
        padded = self._pad(a)
        slices = [self._slice(padded, offset, outputs[1:-1]) for offset in offsets]
        slices = [self._grouped(piece) for piece in slices]
        return slices[0] if len(slices) == 1 else jnp.concatenate(slices, -1)

    def _grouped(self, array: Array) -> Array:
        """(B, ..., C) -> (B, positions, groups, channels per group)."""
        array = _positions(array)
        return array.reshape(*array.shape[:2], self.groups, -1)

    def _slice(self, padded: Array, offset: tuple[int, ...], outputs: Sequence[int]) -> Array:
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
        return {name: outer(rows) for name, rows in self.rows(a, d).items()}

    def cost(self, a_shape: Sequence[int], d_shape: Sequence[int]) -> Cost:
        size = math.prod(d_shape[axis] for axis in self.feature_axes) * len(self.names)
        return Cost("rows", 2 * math.prod(d_shape) + 2 * d_shape[0] ** 2 * size, size)


def _form_rows(patches: Callable[[Array], Array], a: Array, d: Array) -> Array:
    """(B, g * c * k) rows from `patches(a)` (B, T, g, k) and d (B, T, g, c), as many samples at a time as
    `_PATCH_ENTRIES` allows.

    The barrier keeps XLA from cutting the patches of all layers at once, during the forward pass.
    """
    a, d = lax.optimization_barrier((a, d))
    batch, shape = len(a), jax.eval_shape(patches, a).shape
    most = max(1, _PATCH_ENTRIES.get(jax.default_backend(), 1 << 25) // math.prod(shape[1:]))
    # A divisor of the batch: a remainder would be a second shape, and a second program.
    together = next(count for count in range(min(most, batch), 0, -1) if batch % count == 0)
    if together == batch:
        return _block(patches(a), d).reshape(batch, -1)
    # Every entry is overwritten. Zeros would be constants, which XLA lays out for all layers before the first is done.
    start = jnp.broadcast_to(d.ravel()[0], (batch, shape[2] * shape[3] * d.shape[3]))

    def some_samples(index: Array, rows: Array) -> Array:
        some_a, some_d = (lax.dynamic_slice_in_dim(array, index * together, together) for array in (a, d))
        block = _block(patches(some_a), some_d).reshape(together, -1)
        return lax.dynamic_update_slice_in_dim(rows, block, index * together, 0)

    return lax.fori_loop(0, batch // together, some_samples, start)


def _pairs_gram(a: Array, d: Array, limit: int) -> Array:
    """Sum over groups and pairs of positions of (a_is . a_jt) (d_is . d_jt), about `limit` products at a time."""
    batch, positions, groups, _ = d.shape

    def one_sample(sample: tuple[Array, Array]) -> Array:
        a_i, d_i = sample
        inputs = jnp.einsum("sgk,jtgk->jgst", a_i, a, precision=_HIGHEST)
        cotangents = jnp.einsum("sgc,jtgc->jgst", d_i, d, precision=_HIGHEST)
        return jnp.sum(inputs * cotangents, (1, 2, 3))

    # The usual last layer: two matrix products of the batch, no loop.
    if positions == 1 and groups == 1:
        return outer(a[:, 0, 0]) * outer(d[:, 0, 0])
    # Two products of T x T for every pair of samples and group are alive at once.
    samples = max(1, limit // (2 * batch * groups * positions**2))
    return lax.map(one_sample, (a, d), batch_size=min(samples, batch))


def _block(a: Array, d: Array) -> Array:
    """(B, T, g, k), (B, T, g, c) -> (B, g, c, k), summed over positions."""
    if a.shape[2] == 1:
        turned = d[:, :, 0].transpose(0, 2, 1)
        if jax.default_backend() == "cpu":  # whose products of explicit transposes are faster
            turned = lax.optimization_barrier(turned)
        return jnp.einsum("bct,btk->bck", turned, a[:, :, 0], precision=_HIGHEST)[:, None]
    if a.shape[3] == 1 or d.shape[3] == 1:  # depthwise: a matrix product one number wide is slow
        return jnp.sum(d[..., :, None] * a[..., None, :], 1)
    return jnp.einsum("btgk,btgc->bgck", a, d, precision=_HIGHEST)


def outer(rows: Array) -> Array:
    """(B, ...) -> (B, B) inner products, in at least float32."""
    flat = rows.reshape(len(rows), -1)
    flat = flat.astype(jnp.promote_types(flat.dtype, jnp.float32))
    return jnp.matmul(flat, flat.T, precision=_HIGHEST)


def _positions(array: Array) -> Array:
    """(B, ..., C) -> (B, T, C)."""
    return array.reshape(len(array), -1, array.shape[-1])


def _as_it_is(a: Array) -> Array:
    return a


def _offsets(kernel_size: Sequence[int]) -> list[tuple[int, ...]]:
    offsets: list[tuple[int, ...]] = [()]
    for size in kernel_size:
        offsets = [(*head, o) for head in offsets for o in range(size)]
    return offsets


def _cost(batch: int, positions: int, offsets: int, columns: int, channels: int, groups: int) -> Cost:
    row_size = offsets * columns * channels * groups
    rows = 2 * batch * (positions + batch) * row_size
    pairs = 2 * batch**2 * positions**2 * groups * (offsets * columns + channels + 1)
    # T^2 pairs of positions beat rows where a kernel is large and positions are few: last layers, 1x1 maps.
    form: Form = "pairs" if pairs < rows else "rows"
    return Cost(form, min(rows, pairs), row_size)
