"""Optimisers by name from optax, with traced rates: a change of rate, decay or momentum compiles nothing."""

from typing import NamedTuple

import numpy as np
import optax
from jax import Array

from hardjax import _validate

NAMES = ("sgd", "momentum", "nesterov", "adam", "adamw")


class Hyper(NamedTuple):
    """Numbers that differ between runs of one trace; all scalars, all traced.

    Attributes:
        learning_rate: peak rate; the schedule multiplies it.
        weight_decay: L2 added to the gradient (`adamw`: decoupled, times the rate, as in PyTorch).
        momentum: read by `momentum` and `nesterov`.
        total_steps: back-propagations of the whole run; progress = step / total_steps.
        keep: samples of each batch that are trained, read under trimming alone.
    """

    learning_rate: Array
    weight_decay: Array
    momentum: Array
    total_steps: Array
    keep: Array = np.int32(0)


def make_optimizer(name: str, hyper: Hyper, learning_rate: Array) -> optax.GradientTransformation:
    """The optax transformation `name` at the present learning rate; its state depends on the name alone.

    Weight decay acts on every parameter, biases and norm scales too, as PyTorch's `weight_decay` does.

    Raises:
        ValueError: unknown name; the closest one is offered.
    """
    _validate.one_of(NAMES, optimizer=name)
    l2 = optax.add_decayed_weights(hyper.weight_decay)
    descend = optax.scale(-learning_rate)
    if name == "sgd":
        return optax.chain(l2, descend)
    if name == "adam":
        return optax.chain(l2, optax.scale_by_adam(), descend)
    if name == "adamw":
        return optax.chain(optax.scale_by_adam(), l2, descend)
    return optax.chain(l2, optax.trace(decay=hyper.momentum, nesterov=name == "nesterov"), descend)
