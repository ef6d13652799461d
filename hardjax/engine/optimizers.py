"""Optimisers by name from optax, with traced rates: a change of rate, decay or momentum compiles nothing."""

from typing import NamedTuple

import optax
from jax import Array

from hardjax import _validate

NAMES = ("sgd", "momentum", "nesterov", "adam", "adamw")


class Hyper(NamedTuple):
    """Numbers that differ between runs of one trace and stay while a run goes on; all scalars, all traced.

    Attributes:
        weight_decay: L2 added to the gradient (`adamw`: decoupled, times the rate, as in PyTorch).
        momentum: read by `momentum` and `nesterov`.
    """

    weight_decay: Array
    momentum: Array


def make_optimizer(name: str, hyper: Hyper, learning_rate: Array) -> optax.GradientTransformation:
    """The optax transformation `name` at the present learning rate; its state depends on the name alone.

    Weight decay acts on every parameter, biases and norm scales too, as PyTorch's `weight_decay` does.

    Raises:
        ValueError: unknown name; the closest one is offered.
    """
    _validate.one_of(NAMES, optimizer=name)
    l2 = optax.add_decayed_weights(hyper.weight_decay)
    # The rate is an argument of this step, not a schedule inside optax's state: a schedule would count steps in its own
    # float32 way, and a change of batch size would have to rewrite its counter.
    descend = optax.scale(-learning_rate)
    if name == "sgd":
        return optax.chain(l2, descend)
    if name == "adam":
        # P2 trains with PyTorch's Adam(weight_decay=...): L2 in the gradient, before the moments see it.
        return optax.chain(l2, optax.scale_by_adam(), descend)
    if name == "adamw":
        # Decay after the moments and before the rate, so that it is multiplied by the rate: PyTorch's AdamW.
        return optax.chain(optax.scale_by_adam(), l2, descend)
    # The rate multiplies what is accumulated and has no part in it, as in PyTorch: the first step after a decay of the
    # rate is small already.
    return optax.chain(l2, optax.trace(decay=hyper.momentum, nesterov=name == "nesterov"), descend)
