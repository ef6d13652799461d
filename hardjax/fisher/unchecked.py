"""Gram matrices of networks whose rows are known to be right: pure functions, nothing looked at but shapes."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from jax import Array, lax

from hardjax.fisher import by_layers, capture, definition
from hardjax.models.apply import is_ours

Rows = Literal["contribution", "coupled", "frozen"]


def make_unchecked(model: Any, rows: Rows, method: str, chunk: int | None, by_parameter: bool) -> Callable[..., Any]:
    """`gram.make_gram` of a network whose rows are known to be right."""

    def fn(variables: Mapping[str, Any], images: Array, labels: Array, key: Array | None = None) -> Any:
        # Kept apart from the training step around it, so that compiling the two together leaves the step's own
        # arithmetic as it was.
        variables, images, labels = lax.optimization_barrier((dict(variables), images, labels))
        # On recent GPUs "default" means TF32, whose 10 bits would decide which eigenvalues count as zero.
        with jax.default_matmul_precision("highest"):
            forward = capture.forward_of(model, variables, images, key)
            if rows == "coupled" or method == "vmap":
                grams = definition.products(defined_rows(forward, rows, variables, images, labels, chunk))
                return grams if by_parameter else sum(grams.values())
            problem = find(model, forward, rows, variables, images, labels)
            return by_layers.grams(problem, chunk) if by_parameter else by_layers.gram(problem, chunk)

    return fn


def find(
    model: Any, forward: definition.Forward, rows: str, variables: Mapping[str, Any], images: Array, labels: Array
) -> by_layers.Problem:
    """The layers of the network, for rows by `method="layers"`."""
    train = rows == "contribution"
    return by_layers.problem(forward, variables, images, labels, train, all_used=is_ours(model))


def defined_rows(
    forward: definition.Forward,
    rows: str,
    variables: Mapping[str, Any],
    images: Array,
    labels: Array,
    chunk: int | None,
) -> Any:
    """Rows as they are defined: shaped like the parameters, with a leading B."""
    if rows == "coupled":
        return definition.coupled_rows(forward, variables, images, labels, chunk)
    fn = definition.contribution_rows if rows == "contribution" else definition.frozen_rows
    return fn(forward, variables, images, labels)
