"""Per-sample gradients as they are defined, with nothing clever: what the layer rules are tested against.

`Forward` is (variables, images, train) -> logits (B, classes).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from hardjax.fisher import capture, rules

Forward = Callable[[Mapping[str, Any], Array, bool], Array]
_SAMPLES = "samples"
_SAME = 0.02  # share of the largest logit: what bfloat16 rounds apart, and far below what another network gives


def losses(logits: Array, labels: Array) -> Array:
    """Softmax cross-entropy of each sample, (B,) nats, in at least float32; NaN, derivatives included, for a label out
    of range (optax alone would leave its gradient finite and wrong)."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    known = jnp.where((labels >= 0) & (labels < logits.shape[-1]), 1.0, jnp.nan).astype(logits.dtype)
    return known * optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def frozen_rows(forward: Forward, variables: Mapping[str, Any], images: Array, labels: Array) -> Any:
    """Row i: the gradient of loss i alone, running statistics. Shaped like the parameters, with a leading B."""

    def loss(params: Any, image: Array, label: Array) -> Array:
        return losses(forward({**variables, "params": params}, image[None], False), label[None])[0]

    return jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(variables["params"], images, labels)


def contribution_rows(forward: Forward, variables: Mapping[str, Any], images: Array, labels: Array) -> Any:
    """Row i: the gradient of the summed losses in the copy of the parameters that sample i alone uses, where batch
    norms see the whole batch. Shaped like the parameters, with a leading B; NaN where the copies do not compute what
    the model does (samples coupled by more than its batch norms)."""
    rows, gap = copied_rows(forward, variables, images, labels)
    return jax.tree.map(lambda row: jnp.where(gap <= _SAME, row, jnp.nan), rows)


def copied_rows(forward: Forward, variables: Mapping[str, Any], images: Array, labels: Array) -> tuple[Any, Array]:
    """(`contribution_rows` as they come, how far the copies' logits are from the model's, relative to the largest)."""
    # B copies of every parameter: slow by nature. ResNet-20 at batch 32 and 128 takes three times as long as by layers
    # with our convolutions, and 52 times with XLA's own (2 CPU cores).
    copies = jax.tree.map(lambda p: jnp.broadcast_to(p, (len(images), *p.shape)), variables["params"])

    def summed(copies: Any) -> tuple[Array, Array]:
        def loss(params: Any, image: Array, label: Array) -> tuple[Array, Array]:
            with capture.shared_statistics(_SAMPLES):
                logits = forward({**variables, "params": params}, image[None], True)
            return losses(logits, label[None])[0], logits[0]

        values, logits = jax.vmap(loss, axis_name=_SAMPLES)(copies, images, labels)
        return values.sum(), logits

    rows, logits = jax.grad(summed, has_aux=True)(copies)
    expected = forward(variables, images, True)
    # Written so that logits which are all zero (a head that starts at zero) agree with themselves.
    gap = jnp.abs(logits - expected).max() / jnp.maximum(jnp.abs(expected).max(), jnp.finfo(jnp.float32).tiny)
    return rows, gap


def coupled_rows(
    forward: Forward, variables: Mapping[str, Any], images: Array, labels: Array, chunk: int | None = None
) -> Any:
    """Row i: d loss_i / d parameters through the batch statistics; `chunk` cotangents are back-propagated at a time.
    Shaped like the parameters, with a leading B."""

    def all_losses(params: Any) -> Array:
        return losses(forward({**variables, "params": params}, images, True), labels)

    values, pull = jax.vjp(all_losses, variables["params"])
    cotangents = jnp.eye(len(values), dtype=values.dtype)
    # A chunk at a time: a pullback mapped over all B cotangents holds B batches of every intermediate one.
    return lax.map(lambda cotangent: pull(cotangent)[0], cotangents, batch_size=min(chunk or len(values), len(values)))


def products(rows: Any) -> dict[str, Array]:
    """Parameter path -> (B, B), the products of its rows."""
    return {name: rules.outer(leaf) for name, leaf in capture.named_leaves(rows).items()}
