"""Networks run in pieces, as the check runs them: equal to the whole; alike pieces made once, others told apart."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hardjax.fisher import walk, written
from hardjax.fisher.traced import Traced


def _scaled(factor):
    """The identity, whose derivative is not."""

    @jax.custom_vjp
    def scaled(x):
        return x * 1.0

    scaled.defvjp(lambda x: (scaled(x), None), lambda _, cotangent: (factor * cotangent,))
    return scaled


def _network(factors, shifts):
    def apply(variables, images, train, key):
        x = images
        for kernel, factor, shift in zip(variables["params"], factors, shifts, strict=True):
            x = x + jax.nn.relu(_scaled(factor)(x @ kernel) + np.array([shift, 0, 1], np.float32))
        return x, {}

    return apply


def _made(factors, shifts=(0, 0, 0, 0)):
    kernels = list(jax.random.normal(jax.random.key(0), (4, 3, 3)))
    images = jax.random.normal(jax.random.key(1), (5, 3))
    return _network(factors, shifts), {"params": kernels}, images


def _distinct(traced):
    ((_, run),) = traced._programs.values()
    return len(run._pieces), len({id(piece.fn) for piece in run._pieces})


@pytest.mark.parametrize("factors, count", [((2.0, 2.0, 2.0, 2.0), 1), ((2.0, 3.0, 2.0, 3.0), 2)])
def test_pieces_give_the_logits_and_the_gradient_of_the_whole(factors, count):
    apply, variables, images = _made(factors)
    traced = Traced(apply)

    def summed(network):
        return lambda variables: jnp.square(network(variables, images, True, None)[0]).sum()

    chex.assert_trees_all_close(traced(variables, images, True)[0], apply(variables, images, True, None)[0], rtol=1e-6)
    found, expected = (jax.grad(summed(network))(variables) for network in (traced, apply))
    chex.assert_trees_all_close(found, expected, rtol=1e-5)
    # The last piece is read by nothing but the output, and alike all the same.
    assert _distinct(traced) == (4, count)


def test_constants_are_handed_to_pieces():
    apply, variables, images = _made((2.0,) * 4, (0, 1, 2, 3))
    traced = Traced(apply)
    chex.assert_trees_all_close(traced(variables, images, True)[0], apply(variables, images, True, None)[0], rtol=1e-6)


def _writing(factors, shifts=(0, 0, 0, 0)):
    apply, variables, images = _made(factors, shifts)
    return repr(written.jaxpr(walk.make_jaxpr(apply, variables, images, None, True)))


def test_a_writing_tells_derivatives_and_constants_apart_and_nothing_else():
    same = _writing((2.0,) * 4)
    assert same == _writing((2.0,) * 4)
    assert same != _writing((2.0, 2.0, 2.0, 3.0))
    assert same != _writing((2.0,) * 4, (0, 0, 0, 1e-9))


def test_what_cannot_be_written_is_equal_to_itself_alone():
    one, other = object(), object()
    assert written.Unknown(one) == written.Unknown(one) != written.Unknown(other)
    assert repr(written.Unknown(one)) != repr(written.Unknown(one))
