"""What equations compute, written out: equal writings mean equal programs, whatever the objects that hold them."""

import functools
import inspect
import itertools
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.extend import core

_CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
_PLAIN = (int, str, bool, float, type(None))
_COUNTER = itertools.count()


class Unknown:
    """Something that cannot be written: equal to itself alone, and written otherwise each time."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unknown) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)

    def __repr__(self) -> str:
        return f"unknown {next(_COUNTER)}"


def equation(eqn: Any, derivatives: bool = True) -> tuple:
    """Of one equation, whatever its inputs and outputs are called; hashable.

    Args:
        derivatives: of people's own, first ones, as well.
    """
    return _equation(_Held(eqn)) if derivatives else _write(eqn, False)


class _Held:
    """An equation by itself, by which what is written of it is found again."""

    def __init__(self, eqn: Any) -> None:
        self.eqn = eqn

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and self.eqn is other.eqn

    def __hash__(self) -> int:
        return id(self.eqn)


# About the equations of one check: those of networks that are gone must not be held for long.
@functools.lru_cache(maxsize=16384)
def _equation(held: _Held) -> tuple:
    return _write(held.eqn, True)


def _write(eqn: Any, derivatives: bool) -> tuple:
    name = eqn.primitive.name
    # Derivatives of people's own are functions made anew at each call: what they compute is written instead.
    params = {key: value for key, value in eqn.params.items() if name not in _CUSTOM or not callable(value)}
    if name in _CUSTOM:
        params = {key: params[key] for key in ("call_jaxpr", "fun_jaxpr", "num_consts") if key in params}
    pulled = jaxpr(_derivative(eqn), False) if derivatives and name in _CUSTOM else None
    types = tuple(_type(var) for var in (*eqn.invars, *eqn.outvars))
    return name, tuple((key, value(params[key], derivatives)) for key in sorted(params)), types, value(eqn.ctx), pulled


def jaxpr(found: Any, derivatives: bool = True) -> Hashable:
    """Of a jaxpr, open or closed, with the values of its constants."""
    if found is None:
        return None
    inner, constants = (found.jaxpr, found.consts) if hasattr(found, "jaxpr") else (found, ())
    names: dict[Any, int] = {}

    def named(var: Any) -> Any:
        return _literal(var) if isinstance(var, core.Literal) else names.setdefault(var, len(names))

    head = tuple((named(var), _type(var)) for var in (*inner.constvars, *inner.invars))
    lines = tuple(
        (equation(eqn, derivatives), tuple(map(named, eqn.invars)), tuple(map(named, eqn.outvars)))
        for eqn in inner.eqns
    )
    return head, lines, tuple(map(named, inner.outvars)), tuple(map(value, constants))


def _derivative(eqn: Any) -> Any:
    """The pullback of an equation with a derivative of its own, traced."""
    avals = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in eqn.invars]
    moves = [i for i, aval in enumerate(avals) if jnp.issubdtype(aval.dtype, jnp.inexact)]

    def pulled(values: list[Array], cotangents: list[Array]) -> list[Array]:
        def outputs(some: list[Array]) -> list[Array]:
            given = dict(enumerate(values)) | dict(zip(moves, some, strict=True))
            found = eqn.primitive.bind(*given.values(), **eqn.primitive.get_bind_params(eqn.params))
            return [out for out in found if jnp.issubdtype(out.dtype, jnp.inexact)]

        return jax.vjp(outputs, [values[i] for i in moves])[1](cotangents)[0]

    outs = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in eqn.outvars]
    outs = [out for out in outs if jnp.issubdtype(out.dtype, jnp.inexact)]
    try:
        return jax.make_jaxpr(pulled)(avals, outs)
    except (TypeError, ValueError, NotImplementedError):  # it has none
        return None


def value(found: Any, derivatives: bool = True) -> Hashable:
    if hasattr(found, "eqns") or (hasattr(found, "jaxpr") and hasattr(found, "consts")):
        return jaxpr(found, derivatives)
    if isinstance(found, Tracer):
        return Unknown(found)
    if isinstance(found, np.ndarray | np.generic | Array):
        return _array(found)
    if type(found) in (tuple, list):
        if all(type(item) in _PLAIN for item in found):
            return type(found).__name__, repr(found)  # 1 and True are equal, and written otherwise
        return type(found).__name__, tuple(value(item, derivatives) for item in found)
    if isinstance(found, dict):
        return "dict", tuple((key, value(item, derivatives)) for key, item in found.items())
    if inspect.isfunction(found):
        return _function(found, derivatives)
    if type(found).__name__ == "PRNGImpl":
        return "PRNGImpl", found.name
    text = repr(found)
    return Unknown(found) if " at 0x" in text or " object" in text else (type(found).__name__, text)


def _function(found: Any, derivatives: bool) -> Hashable:
    """A rule that an equation carries (how it is mapped, say): its code, and the values that it closes over."""
    held = tuple(cell.cell_contents for cell in found.__closure__ or ())
    closed = tuple("itself" if item is found else value(item, derivatives) for item in held)
    name = f"{found.__module__}.{found.__qualname__}"
    return name, _code(found.__code__), closed, value(found.__defaults__, derivatives)


def _code(code: Any) -> Hashable:
    constants = tuple(_code(item) if inspect.iscode(item) else repr(item) for item in code.co_consts)
    return code.co_code, code.co_names, constants


def _array(value: Any) -> Any:
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return str(value.dtype), _array(jax.random.key_data(value))
    value = np.asarray(value)
    return value.shape, str(value.dtype), value.tobytes()


def _literal(var: Any) -> tuple:
    return "literal", _type(var), value(var.val)


def _type(var: Any) -> tuple:
    aval = var.aval
    shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", aval)
    return tuple(shape), str(dtype), bool(getattr(aval, "weak_type", False))
