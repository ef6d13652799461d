"""What the families share: the frame of a network, its layers, normalisation and pooling."""

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from hardjax import _validate
from hardjax._validate import Refusal
from hardjax.models.initial import SCHEMES, Init
from hardjax.models.ops.batch_norm import batch_norm
from hardjax.models.ops.convolution import convolve
from hardjax.models.ops.pooling import TooSmall, max_pool

STEMS = ("imagenet", "cifar")
NORMS = ("batch", "group", "none")
DTYPES = ("float32", "bfloat16")
# PyTorch's, which all reference implementations leave alone (its momentum is that of the new value: 0.1).
# P4 does not print the momentum of its running statistics; at batch 2 they rest on about 20 samples with this one.
EPSILON = 1e-5
MOMENTUM = 0.9


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, as in PyTorch, with statistics of the batch or of parts of it.

    Normalises by the biased variance and keeps the unbiased one, n / (n - 1) times larger, among the running
    statistics (`flax.linen.BatchNorm` keeps the biased one). Statistics are float32 (or wider) whatever the input.

    Attributes:
        train: normalise by this batch and update the running statistics; otherwise normalise by those.
        batch_size: samples that share their statistics (P4, section 3.6): consecutive ones. The running statistics
            move once, towards the average over the parts. None: the whole batch.
        zero_scale: start the scale at 0 instead of 1.
        momentum: share of the old value that the running statistics keep at a step.
    """

    train: bool
    batch_size: int | None = None
    zero_scale: bool = False
    momentum: float = MOMENTUM

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(B, ..., C) -> the same shape and dtype.

        Raises:
            ValueError: in training, `batch_size` does not divide B, or one value has no variance.
        """
        channels = x.shape[-1:]
        scale_init = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
        scale = self.param("scale", scale_init, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if not self.train:
            factor = jax.lax.rsqrt(running_var.value + EPSILON) * scale
            return ((wide - running_mean.value) * factor + bias).astype(x.dtype)
        parts = self._parts(wide)
        axes = tuple(range(parts.ndim - x.ndim, parts.ndim - 1))
        y, mean, var = batch_norm(parts, scale, bias, axes, EPSILON)
        if not self.is_initializing():
            # Initialisation runs in evaluation mode on one image, and must leave the statistics at their start.
            count = math.prod(parts.shape[axis] for axis in axes)
            if count < 2:
                raise Refusal(
                    "Expected more than 1 value per channel for batch statistics in training; this batch (or part of"
                    " it) has 1 sample of 1 pixel."
                )
            self._move(running_mean, mean)
            self._move(running_var, var * (count / (count - 1)))
        return y.reshape(x.shape).astype(x.dtype)

    def _parts(self, x: Array) -> Array:
        """(parts, samples of a part, ..., C), also where the batch is one part: per-sample rows are read from a trace
        that looks the same at every batch size. The batch itself without parts."""
        if self.batch_size is None:
            return x
        if len(x) % self.batch_size:
            raise Refusal(
                f"Expected norm_batch_size={self.batch_size} to divide the batch of {len(x)} samples that it cuts."
            )
        return x.reshape(-1, self.batch_size, *x.shape[1:])

    def _move(self, running: nn.Variable, parts: Array) -> None:
        new = parts.mean(tuple(range(parts.ndim - 1)))
        running.value = (self.momentum * running.value + (1 - self.momentum) * new).astype(running.value.dtype)


@dataclass(frozen=True)
class Layers:
    """The layers of one network in one mode: made once in `Network`, handed to its blocks.

    Attributes:
        train: batch statistics, dropout and stochastic depth are on.
        norm, norm_batch_size, dropout: as in `Network`.
        dtype: of the computation; None takes the input's.
        init: how weights are drawn.
        norm_momentum: as `BatchNorm.momentum`.
    """

    train: bool
    norm: str
    norm_batch_size: int | None
    dropout: float
    dtype: Any
    init: Init
    norm_momentum: float = MOMENTUM

    @jax.named_scope("convolution")
    def conv(
        self,
        x: Array,
        features: int,
        kernel: int = 3,
        stride: int = 1,
        *,
        groups: int = 1,
        bias: bool | None = None,
        name: str,
    ) -> Array:
        """A square convolution, padded by kernel // 2 on every side (`SAME` pads unevenly at stride 2).

        bias: None has one if nothing normalises (norm="none").
        """
        if x.ndim != 4:
            raise Refusal(f"Expected images (B, H, W, C); these have shape {x.shape}.")
        pad = (kernel // 2, kernel // 2)  # as PyTorch pads: "SAME" would shift the strided ones by a pixel
        return nn.Conv(
            features,
            (kernel, kernel),
            (stride, stride),
            padding=(pad, pad),
            feature_group_count=groups,
            # Before a normalisation a bias is subtracted again at once: its gradient is zero, a zero row in every Gram.
            use_bias=self.norm == "none" if bias is None else bias,
            dtype=self.dtype,
            kernel_init=self.init.conv_kernel(groups),
            bias_init=self.init.bias_of(kernel**2 * x.shape[-1] // groups),
            conv_general_dilated=convolve,
            name=name,
        )(x)

    @jax.named_scope("dense")
    def dense(self, x: Array, features: int, *, bias: bool = True, name: str) -> Array:
        """A fully connected layer on (B, C)."""
        return nn.Dense(
            features,
            use_bias=bias,
            dtype=self.dtype,
            kernel_init=self.init.dense_kernel(),
            bias_init=self.init.bias_of(x.shape[-1]),
            name=name,
        )(x)

    @jax.named_scope("normalisation")
    def normalise(self, x: Array, name: str, *, last: bool = False) -> Array:
        """Batch norm, group norm (8 channels a group, fewer where 8 does not divide them) or nothing.

        last: the last one of a residual branch.
        """
        zero = last and self.init.zero_last_scale
        if self.norm == "batch":
            return BatchNorm(self.train, self.norm_batch_size, zero, self.norm_momentum, name=name)(x)
        if self.norm == "group":
            # Groups of fixed size, not of fixed number: networks of 16 and of 2048 channels are normalised alike.
            size = next(size for size in range(8, 0, -1) if x.shape[-1] % size == 0)
            scale_init = nn.initializers.zeros if zero else nn.initializers.ones
            return nn.GroupNorm(
                num_groups=None, group_size=size, epsilon=EPSILON, dtype=self.dtype, scale_init=scale_init, name=name
            )(x)
        return x

    def stem(self, x: Array, features: int, kind: str, conv: str, norm: str) -> Array:
        """The first layers: "imagenet" leaves a quarter of the side, "cifar" all of it."""
        kernel, stride = (7, 2) if kind == "imagenet" else (3, 1)
        x = nn.relu(self.normalise(self.conv(x, features, kernel, stride, name=conv), norm))
        return max_pool(x, padding=1) if kind == "imagenet" else x

    def drop(self, x: Array) -> Array:
        """Dropout."""
        return nn.Dropout(self.dropout, deterministic=not self.train)(x) if self.dropout else x

    def drop_path(self, branch: Array, rate: float) -> Array:
        """Stochastic depth: a sample's whole branch is dropped, the others' grow by 1 / (1 - rate)."""
        if not rate:
            return branch
        return nn.Dropout(rate, broadcast_dims=(1, 2, 3), deterministic=not self.train)(branch)

    def classify(self, x: Array, classes: int, name: str) -> Array:
        """(B, H, W, C) or (B, C) -> mean over the image, dropout, (B, classes)."""
        x = x.mean((1, 2)) if x.ndim == 4 else x
        return self.dense(self.drop(x), classes, name=name)


class Network(nn.Module):
    """A classifier of images: module(images (B, H, W, C), train) -> logits (B, num_classes).

    Layers have the names of the reference implementation in PyTorch ("layer1.0" / "conv1"), so that `from_torch` needs
    no table. Subclasses write `logits`.

    Attributes:
        num_classes: logits.
        norm: "batch", "group", or "none" (then convolutions have biases).
        norm_batch_size: samples that share batch statistics (P4, section 3.6); None: the whole batch.
        norm_momentum: share of the old value that the running statistics of batch norm keep at a step, in [0, 1);
            None: 0.9 (PyTorch's 0.1, which is the share of the new one). With m samples a step they rest on about
            m / (1 - norm_momentum) of them.
        dtype: "float32" (the type of parameters and images), or "bfloat16" for the computation alone: parameters,
            statistics and logits stay as they are.
        init_scheme: `create(name, init=...)`: "paper" (what the network's paper or reference implementation does),
            "he_fan_in", "he_fan_out" or "torch".
        dropout: share of the features dropped before the last layer in training.

    Raises:
        ValueError: an unknown word or a value out of range; while tracing: images too small (the smallest size that
            works is said), `norm_batch_size` that does not divide the batch.
    """

    num_classes: int = 10
    norm: str = "batch"
    norm_batch_size: int | None = None
    norm_momentum: float | None = None
    dtype: str = "float32"
    init_scheme: str = "paper"
    dropout: float = 0.0

    paper_init: ClassVar[Init]
    last_layer: ClassVar[str] = "fc"  # name of the last layer

    def __post_init__(self) -> None:
        _validate.at_least(1, num_classes=self.num_classes)
        _validate.one_of(NORMS, norm=self.norm)
        _validate.one_of(DTYPES, dtype=self.dtype)
        _validate.one_of(("paper", *SCHEMES), init=self.init_scheme)
        _validate.in_unit(dropout=self.dropout)
        if hasattr(self, "drop_path"):
            _validate.in_unit(drop_path=self.drop_path)
        if self.norm_batch_size is not None:
            _validate.at_least(1, norm_batch_size=self.norm_batch_size)
        if self.norm_momentum is not None:
            _validate.in_unit(norm_momentum=self.norm_momentum)
        for name in ("norm_batch_size", "norm_momentum"):
            if self.norm != "batch" and (given := getattr(self, name)) is not None:
                raise Refusal(f"Expected norm={self.norm!r} to be 'batch' with {name}={given}.")
        super().__post_init__()

    def __call__(self, images: Array, train: bool = False) -> Array:
        # Sizes are not checked beforehand: what does not fit says so while tracing, and only then is the smallest side
        # that does searched for.
        try:
            return self.forward(images, train)
        except TooSmall:
            height, width, channels = images.shape[1:]
            side = smallest_side(self.clone(parent=None, name=None), channels)
            raise Refusal(
                f"Images of {height}x{width} are too small for {type(self).__name__}: at least {side}x{side} is needed"
                " (the data can be placed in a frame of that size or resized)."
            ) from None

    @nn.compact
    def forward(self, images: Array, train: bool) -> Array:
        """`__call__` with the bare error for images too small."""
        # None follows the input, so that the same network computes in float64 where a measurement asks for it.
        dtype = None if self.dtype == "float32" else jnp.dtype(self.dtype)
        init = SCHEMES.get(self.init_scheme) or self.paper_init
        momentum = MOMENTUM if self.norm_momentum is None else self.norm_momentum
        layers = Layers(train, self.norm, self.norm_batch_size, self.dropout, dtype, init, momentum)
        logits = self.logits(images if dtype is None else images.astype(dtype), layers)
        # Softmax and loss in float32: bfloat16 keeps 8 bits, and small losses are differences of near numbers.
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    def logits(self, x: Array, layers: Layers) -> Array:
        """(B, H, W, C) -> (B, num_classes)."""
        raise NotImplementedError


@functools.cache
def smallest_side(module: Network, channels: int) -> int:
    """Side in pixels of the smallest square image that the network takes; traces shapes, computes nothing."""
    # Upwards by one and not by bisection: what fits is not monotonic where sides must be multiples of 4.
    for side in range(1, 1025):
        images = jax.ShapeDtypeStruct((2, side, side, channels), jnp.float32)
        try:
            jax.eval_shape(lambda images: module.init(jax.random.key(0), images, False, method="forward"), images)
        except ValueError:
            continue
        return side
    raise AssertionError(f"{type(module).__name__} takes no image up to 1024x1024.")


def flatten(x: Array) -> Array:
    """(B, H, W, C) -> (B, C * H * W), channel by channel as in PyTorch."""
    return jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)
