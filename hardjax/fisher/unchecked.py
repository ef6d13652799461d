"""Gram matrices of networks whose rows are known to be right: pure functions, nothing looked at but shapes."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from jax import Array, lax

from hardjax.choose.losses import Loss
from hardjax.fisher import by_uses, definition
from hardjax.fisher.program import Apply
from hardjax.models.apply import as_apply

Rows = Literal["contribution", "coupled", "frozen"]


def make_unchecked(
    model: Any, loss: Loss, rows: Rows, method: str, chunk: int | None, by_parameter: bool
) -> Callable[..., Any]:
    """`gram.make_gram` of a network whose rows are known to be right."""
    apply = as_apply(model)

    def fn(variables: Mapping[str, Any], images: Array, labels: Array, key: Array | None = None) -> Any:
        # Kept apart from the training step around it, so that compiling the two together leaves the step's own
        # arithmetic as it was.
        variables, images, labels = lax.optimization_barrier((dict(variables), images, labels))
        # On recent GPUs "default" means TF32, whose 10 bits would decide which eigenvalues count as zero.
        with jax.default_matmul_precision("highest"):
            if rows == "coupled" or method == "vmap":
                grams = definition.products(defined_rows(apply, loss, rows, variables, images, labels, key, chunk))
                return grams if by_parameter else sum(grams.values())
            problem = by_uses.problem(apply, loss, variables, images, labels, key, rows != "frozen")
            return by_uses.grams(problem, chunk) if by_parameter else by_uses.gram(problem, chunk)

    return fn


def defined_rows(
    apply: Apply,
    loss: Loss,
    rows: str,
    variables: Mapping[str, Any],
    images: Array,
    labels: Array,
    key: Array | None,
    chunk: int | None = None,
) -> Any:
    """Rows as they are defined: shaped like the parameters, with a leading B."""
    if rows == "coupled":
        return definition.coupled_rows(apply, loss, variables, images, labels, key, chunk)
    fn = definition.contribution_rows if rows == "contribution" else definition.frozen_rows
    return fn(apply, loss, variables, images, labels, key)
