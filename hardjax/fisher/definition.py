"""Per-sample gradients as they are defined, with nothing clever: what the rules are tested against.

`apply` is (variables, images, train, key) -> (logits (B, classes), new statistics).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from hardjax.choose.losses import Loss
from hardjax.fisher import layouts
from hardjax.fisher.names import named_leaves
from hardjax.fisher.program import Apply, Op, Program, Run
from hardjax.fisher.walk import trace


def losses(loss: Loss, logits: Array, labels: Array) -> Array:
    """(B,) loss of each sample in at least float32; NaN, derivatives included, for a class out of range (optax alone
    would leave its gradient finite and wrong)."""
    found = loss(logits, labels)
    if loss.targets != "classes":
        return found
    known = ((labels >= 0) & (labels < logits.shape[-1])).reshape(len(labels), -1).all(-1)
    return jnp.where(known, 1.0, jnp.nan).astype(found.dtype) * found


def frozen_rows(
    apply: Apply, loss: Loss, variables: Mapping[str, Any], images: Array, labels: Array, key: Array | None = None
) -> Any:
    """Row i: the gradient of loss i alone, running statistics. Shaped like the parameters, with a leading B."""

    def of_one(params: Any, image: Array, label: Array) -> Array:
        return losses(loss, apply({**variables, "params": params}, image[None], False, key)[0], label[None])[0]

    return jax.vmap(jax.grad(of_one), in_axes=(None, 0, 0))(variables["params"], images, labels)


def contribution_rows(
    apply: Apply,
    loss: Loss,
    variables: Mapping[str, Any],
    images: Array,
    labels: Array,
    key: Array | None = None,
    run: Run = Program.run,
) -> Any:
    """Row i: the gradient of the summed losses in the copy of the parameters that sample i alone uses, while what is
    reduced over the batch (batch statistics) is common to all. Shaped like the parameters, with a leading B.

    Every equation that takes copies is computed with each of them, and sample i's entries are those of copy i: B times
    the network, slow by nature.

    Raises:
        ValueError: a parameter meets the batch where samples are mixed or out of order.
    """
    program = trace(apply, variables, images, key, True)
    batch, sizes = len(images), program.sizes
    params, tree = jax.tree.flatten(variables["params"])
    env, ids = program.environment(variables, images, key), list(program.params.values())
    kinds = [program.values[at].kind == "weight" for at in ids]

    def copied(at: int) -> bool:
        return program.values[at].kind == "weight"

    def step(op: Op, values: list[Any], env: Mapping[int, Any]) -> list[Any]:
        if not any(map(copied, op.ins)):
            return op.bind(*values)
        found = jax.vmap(op.bind, [0 if copied(at) else None for at in op.ins])(*values)
        outs = []
        for at, value in zip(op.outs, found, strict=True):
            layout, shape = program.values[at].layout, program.values[at].aval.shape
            if copied(at):
                outs.append(value)
            elif layouts.complete(layout, sizes):
                own = jnp.broadcast_to(layouts.sample_of(shape, layout), shape)
                outs.append(jnp.take_along_axis(value, own[None], 0)[0])
            else:  # what is not differentiated is the same for every copy
                outs.append(value[0])
        return outs

    def summed(copies: list[Array]) -> Array:
        logits = run(program, env | dict(zip(ids, copies, strict=True)), step)
        return losses(loss, logits, labels).sum()

    copies = [
        jnp.broadcast_to(leaf, (batch, *leaf.shape)) if weight else leaf
        for leaf, weight in zip(params, kinds, strict=True)
    ]
    return jax.tree.unflatten(tree, jax.grad(summed)(copies))


def coupled_rows(
    apply: Apply,
    loss: Loss,
    variables: Mapping[str, Any],
    images: Array,
    labels: Array,
    key: Array | None = None,
    chunk: int | None = None,
) -> Any:
    """Row i: d loss_i / d parameters through the batch statistics; `chunk` cotangents are back-propagated at a time.
    Shaped like the parameters, with a leading B."""

    def all_losses(params: Any) -> Array:
        return losses(loss, apply({**variables, "params": params}, images, True, key)[0], labels)

    values, pull = jax.vjp(all_losses, variables["params"])
    cotangents = jnp.eye(len(values), dtype=values.dtype)
    if chunk is None or chunk >= len(values):
        return jax.vmap(lambda cotangent: pull(cotangent)[0])(cotangents)
    # A chunk at a time: a pullback mapped over all B cotangents holds B batches of every intermediate one.
    return lax.map(lambda cotangent: pull(cotangent)[0], cotangents, batch_size=chunk)


def gradient(
    apply: Apply, loss: Loss, variables: Mapping[str, Any], images: Array, labels: Array, key: Array | None = None
) -> Any:
    """Of the summed losses, through the batch statistics. Shaped like the parameters."""

    def summed(params: Any) -> Array:
        return losses(loss, apply({**variables, "params": params}, images, True, key)[0], labels).sum()

    return jax.grad(summed)(variables["params"])


def products(rows: Any) -> dict[str, Array]:
    """Parameter path -> (B, B), the products of its rows."""
    return {name: outer(leaf) for name, leaf in named_leaves(rows).items()}


def outer(rows: Array) -> Array:
    """(B, ...) -> (B, B) inner products, in at least float32."""
    flat = rows.reshape(len(rows), -1)
    flat = flat.astype(jnp.promote_types(flat.dtype, jnp.float32))
    # TF32 or bfloat16 products would decide which eigenvalues count as zero.
    return jnp.matmul(flat, flat.T, precision=lax.Precision.HIGHEST)
