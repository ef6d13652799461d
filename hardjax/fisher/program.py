"""A network as the list of equations that compute its logits, and where its parameters meet the batch.

Traced, a network is a function of parameters, statistics, images and a key, whatever it was written in. Every value of
it is

- a constant (or a statistic, or a key);
- weight-side: it depends on parameters and has not met the batch (a kernel that is cast, standardised, tied, sliced);
- batched: it holds something for each sample;
- shared: reduced over the batch (batch statistics).

An equation where a weight-side value meets a batched one, or is spread over the batch, is a *use*. What sample i adds
to the gradient of a weight-side value is read there, from the other operands and the cotangent of the output.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend import core

from hardjax._validate import Refusal
from hardjax.fisher.layouts import Aval, Layout, Sizes

# (variables, images, train, key) -> (logits, new statistics)
Apply = Callable[..., tuple[Array, Any]]
# (equation, what it takes, key -> value) -> what it gives
Step = Callable[["Op", list[Any], Mapping[Any, Any]], list[Any]]
# equation -> (keys of the further values that its step looks up, whatever else decides what the step does)
Reads = Callable[["Op"], tuple[tuple[Any, ...], Hashable]]
# (program, key -> value, step, reads) -> the logits
Run = Callable[..., Array]


class Uncovered(Refusal):
    """What `method="layers"` cannot do; the line lacks the advice, which depends on what else can."""


class Value(NamedTuple):
    """What is known of one value.

    Attributes:
        kind: "const", "weight", "batched" or "shared".
        layout: where the batch is in it; None: nowhere. A weight-side or shared value may belong to sub-batches.
    """

    aval: Aval
    kind: str
    layout: Layout | None


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """One equation. `ins` and `outs` are keys of values; constants of the program are values like any other.

    Attributes:
        operands: positions of the weight-side inputs, if it is a use.
        single: the same equation for a batch of one, where the program was traced beside that.
    """

    eqn: Any
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    operands: tuple[int, ...] = ()
    single: Any = None

    def bind(self, *values: Any) -> list[Any]:
        return bind(self.eqn, *values)


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """Operations that the backward pass computes again (`jax.checkpoint`)."""

    nodes: tuple["Op | Region", ...]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    settings: Mapping[str, Any]


Node = Op | Region


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The logits of a network as a function of a flat list of arrays.

    Attributes:
        values: of every key.
        constants: key -> array.
        inputs: keys of the leaves of (parameters, rest of the variables, images, key).
        params: name -> key.
        output: key of the logits.
    """

    sizes: Sizes
    nodes: tuple[Node, ...]
    values: list[Value]
    constants: Mapping[int, Any]
    inputs: tuple[int, ...]
    params: Mapping[str, int]
    output: int

    def ops(self) -> Iterator[Op]:
        return _ops(self.nodes)

    def run(self, env: Mapping[Any, Any], step: Step, reads: Reads | None = None) -> Array:
        """The logits, where `step` computes what an equation gives from what it takes.

        Args:
            env: of the inputs, and of what else `step` looks up, which `reads` tells of.
        """
        del reads  # it matters where a program is run in pieces
        env = {**self.constants, **env}
        _run(self.nodes, env, step)
        return env[self.output]

    def environment(self, variables: Mapping[str, Any], images: Any, key: Any) -> dict[int, Any]:
        return dict(zip(self.inputs, jax.tree.leaves(arguments(variables, images, key)), strict=True))


def bind(eqn: Any, *values: Any) -> list[Any]:
    """What an equation gives."""
    with eqn.ctx.manager:
        found = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(found) if eqn.primitive.multiple_results else [found]


def arguments(variables: Mapping[str, Any], images: Any, key: Any) -> tuple:
    rest = {name: value for name, value in variables.items() if name != "params"}
    return variables["params"], rest, images, key


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr, open or closed, and its constants."""
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "jaxpr") else (jaxpr, ())


def alive_equations(jaxpr: Any, wanted: Sequence[bool]) -> list[Any]:
    """The equations that the wanted outputs need."""
    needed = {var for var, want in zip(jaxpr.outvars, wanted, strict=True)
              if want and not isinstance(var, core.Literal)}  # fmt: skip
    found = []
    for eqn in reversed(jaxpr.eqns):
        if any(var in needed for var in eqn.outvars):
            found.append(eqn)
            needed |= {var for var in eqn.invars if not isinstance(var, core.Literal)}
    return found[::-1]


def inside(eqn: Any) -> list[Any]:
    """The traces that an equation carries (branches, bodies of loops)."""
    values = [value if isinstance(value, list | tuple) else [value] for value in eqn.params.values()]
    return [opened(item)[0] for some in values for item in some if hasattr(item, "eqns") or hasattr(item, "jaxpr")]


def _ops(nodes: Sequence[Node]) -> Iterator[Op]:
    for node in nodes:
        if isinstance(node, Region):
            yield from _ops(node.nodes)
        else:
            yield node


def _run(nodes: Sequence[Node], env: dict[int, Any], step: Step) -> None:
    for node in nodes:
        values = [env[key] for key in node.ins]
        found = step(node, values, env) if isinstance(node, Op) else _checkpointed(node, env, step)(*values)
        env.update(zip(node.outs, found, strict=True))


def _checkpointed(region: Region, env: Mapping[int, Any], step: Step) -> Callable[..., list[Any]]:
    def fn(*values: Any) -> list[Any]:
        inside = {**env, **dict(zip(region.ins, values, strict=True))}
        _run(region.nodes, inside, step)
        return [inside[key] for key in region.outs]

    return jax.checkpoint(fn, **region.settings)


def shape_of(value: Value) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.aval.shape, jnp.dtype(value.aval.dtype))
