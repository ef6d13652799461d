"""Networks that the zoo does not have, as people write them in Flax, for images of 32x32 pixels."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

import hardjax as hj
from hardjax.models.ops.convolution import convolve


class Attention(nn.Module):
    """Self-attention, (B, T, C) -> (B, T, C).

    Attributes:
        heads: each of C / heads channels.
    """

    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, tokens, width = x.shape
        qkv = nn.Dense(3 * width, name="qkv")(x).reshape(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        weights = nn.softmax(jnp.einsum("bthc,bshc->bhts", q, k) / q.shape[-1] ** 0.5)
        mixed = jnp.einsum("bhts,bshc->bthc", weights, v).reshape(x.shape)
        return nn.Dense(width, name="out")(mixed)


class ViT(nn.Module):
    """A vision transformer; as it stands ViT-Tiny's shape, with a token for each 4x4 pixels.

    Attributes:
        bare: without class token and positions, the mean of the tokens being classified: what Opacus takes.
    """

    classes: int = 10
    width: int = 192
    heads: int = 3
    blocks: int = 12
    patch: int = 4
    bare: bool = False

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        del train  # no dropout
        size, width = (self.patch, self.patch), self.width
        x = nn.Conv(width, size, size, "VALID", conv_general_dilated=convolve, name="embed")(images)
        x = x.reshape(len(x), -1, width)
        if not self.bare:
            token = self.param("token", nn.initializers.normal(0.02), (1, 1, width))
            x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, width)), x], 1)
            x = x + self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], width))
        for _ in range(self.blocks):
            x = x + Attention(self.heads)(nn.LayerNorm()(x))
            wide = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(width)(wide)
        x = nn.LayerNorm()(x)
        return nn.Dense(self.classes, name="head")(x.mean(1) if self.bare else x[:, 0])


class Branch(nn.Module):
    """What a ConvNeXt block adds, (B, H, W, width)."""

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Conv(self.width, (7, 7), feature_group_count=self.width, conv_general_dilated=convolve)(x)
        wide = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
        return self.param("scale", nn.initializers.constant(1e-6), (self.width,)) * nn.Dense(self.width)(wide)


class ConvNeXt(nn.Module):
    """A ConvNeXt; as it stands ConvNeXt-Atto's shape, with a stem that halves the image.

    Attributes:
        depths, widths: of the four stages; patch: of the stem.
    """

    classes: int = 10
    depths: tuple[int, ...] = (2, 2, 6, 2)
    widths: tuple[int, ...] = (40, 80, 160, 320)
    patch: int = 2

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        del train
        x = _halved(images, self.widths[0], self.patch, "stem")
        x = nn.LayerNorm()(x)
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            if stage:
                x = _halved(nn.LayerNorm()(x), width, 2, f"down{stage}")
            for _ in range(depth):
                x = x + Branch(width)(x)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm()(x.mean((1, 2))))


def _halved(x: Array, width: int, patch: int, name: str) -> Array:
    size = (patch, patch)
    return nn.Conv(width, size, size, "VALID", conv_general_dilated=convolve, name=name)(x)


class Plain(nn.Module):
    """Four 3x3 convolutions, pooled after each two, and one linear layer: no norm, nothing to skip."""

    classes: int = 10

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        del train
        x = images
        for width in (32, 64):
            for _ in range(2):
                x = nn.relu(nn.Conv(width, (3, 3), conv_general_dilated=convolve)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(self.classes)(x.reshape(len(x), -1))


NETWORKS = {
    "vit_tiny": ViT,
    "convnext_atto": ConvNeXt,
    "plain": Plain,
    "vit_small": lambda: ViT(width=96, heads=3, blocks=3, bare=True),
}


def create(name: str, **options: Any) -> nn.Module:
    """The network of that name here or in the zoo."""
    return NETWORKS[name]() if name in NETWORKS else hj.models.create(name, **options)
