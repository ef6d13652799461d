"""Compiled Gram programs, kept from call to call: by name for the zoo, by their own text for networks of one's own."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hardjax.fisher.unchecked import make_unchecked
from hardjax.models.apply import is_ours


def compiled(model: Any, settings: tuple, args: tuple) -> Callable[..., Any]:
    """An executable of `make_unchecked(model, *settings)` for these arguments.

    People's own modules and losses are traced anew: neither equality nor identity of a module tells whether its code,
    or what its code refers to, is still the same.
    """
    loss = settings[0]
    if is_ours(model) and loss.targets != "any":
        module = getattr(model, "module", model)
        fields = [(field.name, getattr(module, field.name)) for field in dataclasses.fields(module)]
        written = repr([(name, value) for name, value in fields if name != "parent"])
        return _of_zoo(_Zoo(type(module), written), _Unequalled(module), settings)
    args = jax.tree.map(jnp.asarray, args)
    lowered = jax.jit(make_unchecked(model, *settings)).lower(*args)
    where = tuple(leaf.sharding for leaf in jax.tree.leaves(args))
    executable = _executable(lowered.as_text(), _Unequalled(lowered), (lowered.in_tree, lowered.out_tree, where))
    return lambda *args: executable(*jax.tree.map(jnp.asarray, args))


class _Zoo(NamedTuple):
    """A network of the zoo by class and written-out fields: as modules, 1 and True among the fields would be equal."""

    kind: type
    fields: str


class _Unequalled(NamedTuple):
    """Carries a module past a cache that must not look at it."""

    module: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unequalled)

    def __hash__(self) -> int:
        return 0


@functools.lru_cache(maxsize=32)
def _of_zoo(name: _Zoo, module: _Unequalled, settings: tuple) -> Callable[..., Any]:
    return jax.jit(make_unchecked(module.module, *settings))


@functools.lru_cache(maxsize=32)
def _executable(text: str, lowered: _Unequalled, rest: tuple) -> Callable[..., Any]:
    """Keyed by the program itself, its constants included, and by what the program's text leaves out."""
    del text, rest
    return lowered.module.compile()
