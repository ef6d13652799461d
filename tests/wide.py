"""Networks of the zoo in float64, where the order of a sum is 1e-16 and a wrong sum is not.

Losses are float32 in every run (`make_step`), and so is what is read of them alone.
"""

import jax
import jax.numpy as jnp

import hardjax as hj


def wide(name, options, classes=3):
    """A network of the zoo with parameters and statistics in float64, as a pair of functions."""
    network = hj.models.create(name, classes, **options)

    def init(key, images):
        found = hj.models.init_variables(network, key, images.shape[1:])
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), found)

    def apply(variables, images, train, key):
        return hj.models.make_apply(network)(variables, images, train, key)

    return init, apply
