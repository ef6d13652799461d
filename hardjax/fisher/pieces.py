"""A network run once, in pieces: those that are alike (the blocks of a deep network) are traced and compiled once.

For the check, which runs a network a few times on a few samples: compiled whole, ResNet-110 took a minute for it.
"""

import functools
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hardjax.fisher import written
from hardjax.fisher.program import Op, Program, Reads, Step

# What a piece may begin with.
_PRODUCTS = ("dot_general", "conv_general_dilated")


class _Piece(NamedTuple):
    fn: Callable[..., list[Array]]
    ins: tuple[Any, ...]
    outs: tuple[Any, ...]


class Pieces:
    """Runs a program as `Program.run`, with the derivative of each piece; for use outside of `jit`.

    What was compiled for one run serves the next ones, of the same program and with a step that does the same.
    """

    def __init__(self) -> None:
        self._program: Program | None = None
        self._pieces: list[_Piece] = []

    def __call__(self, program: Program, env: Mapping[Any, Any], step: Step, reads: Reads | None = None) -> Array:
        if program is not self._program:
            self._program, self._pieces = program, _cut(program, step, reads or _nothing)
        env = {**program.constants, **env}
        for piece in self._pieces:
            env.update(zip(piece.outs, piece.fn(*[env[key] for key in piece.ins]), strict=True))
        return env[program.output]


def _nothing(op: Op) -> tuple[tuple[Any, ...], Hashable]:
    del op
    return (), None


def _cut(program: Program, step: Step, reads: Reads) -> list[_Piece]:
    ops, parts = list(program.ops()), []
    for op in ops:
        if not parts or _holds_product(op.eqn):
            parts.append([])
        parts[-1].append(op)
    ends = _ends(parts, program.output, reads)
    written_parts = [_written(program, part, ends[i], reads) for i, part in enumerate(parts)]
    counts = Counter(name for name, _, _ in written_parts)
    # A piece of its own is worth its calls where it is met again.
    joined: list[list[Op]] = []
    for i, (part, (name, _, _)) in enumerate(zip(parts, written_parts, strict=True)):
        alone = counts[name] == 1
        if alone and i and counts[written_parts[i - 1][0]] == 1:
            joined[-1] += part
        else:
            joined.append(list(part))
    ends = _ends(joined, program.output, reads)
    made: dict[Hashable, Callable] = {}
    pieces = []
    for i, part in enumerate(joined):
        name, ins, outs = _written(program, part, ends[i], reads)
        if name not in made:
            made[name] = _differentiable(_function(part, ins, outs, step))
        pieces.append(_Piece(made[name], ins, outs))
    return pieces


def _ends(parts: Sequence[Sequence[Op]], output: int, reads: Reads) -> list[set[Any]]:
    """For each part the keys that are read behind it."""
    behind, found = {output}, []
    for part in reversed(parts):
        found.append(set(behind))
        for op in part:
            behind |= {*op.ins, *reads(op)[0]}
    return found[::-1]


def _written(
    program: Program, part: Sequence[Op], behind: set[Any], reads: Reads
) -> tuple[Hashable, tuple[Any, ...], tuple[Any, ...]]:
    """(what the part computes, keys of what it takes, of what it gives)."""
    names: dict[Any, int] = {}
    ins: list[Any] = []
    made: list[Any] = []
    lines = []
    for op in part:
        further, how = reads(op)
        for key in (*op.ins, *further):
            if key not in names:
                names[key] = len(names)
                ins.append(key)
        for key in op.outs:
            names[key] = len(names)
            made.append(key)
        known = tuple(program.values[key] for key in (*op.ins, *op.outs))
        single = None if op.single is None else written.equation(op.single)
        places = tuple(names[key] for key in (*op.ins, *further, *op.outs))
        lines.append((written.equation(op.eqn), places, op.operands, single, known, how))
    outs = tuple(key for key in made if key in behind)
    return (tuple(lines), tuple(names[key] for key in outs)), tuple(ins), outs


def _holds_product(eqn: Any) -> bool:
    if eqn.primitive.name in _PRODUCTS:
        return True
    inner = [item for value in eqn.params.values() for item in (value if isinstance(value, list | tuple) else [value])]
    jaxprs = [getattr(item, "jaxpr", item) for item in inner]
    return any(_holds_product(own) for jaxpr in jaxprs if hasattr(jaxpr, "eqns") for own in jaxpr.eqns)


def _function(part: Sequence[Op], ins: Sequence[Any], outs: Sequence[Any], step: Step) -> Callable[..., list[Array]]:
    def fn(*values: Array) -> list[Array]:
        env = dict(zip(ins, values, strict=True))
        for op in part:
            env.update(zip(op.outs, step(op, [env[key] for key in op.ins], env), strict=True))
        return [env[key] for key in outs]

    return fn


def _differentiable(fn: Callable[..., list[Array]]) -> Callable[..., list[Array]]:
    """The compiled function, whose derivative is compiled as well and computes it anew."""
    forward = _compiled(fn)

    def pulled(values: tuple[Array, ...], cotangents: list[Array]) -> tuple[Array, ...]:
        moves = [i for i, value in enumerate(values) if _is_inexact(value)]

        def of_moved(*moved: Array) -> list[Array]:
            given = dict(enumerate(values)) | dict(zip(moves, moved, strict=True))
            return [out for out in fn(*given.values()) if _is_inexact(out)]

        return jax.vjp(of_moved, *(values[i] for i in moves))[1](cotangents)

    backward = _compiled(pulled)

    @jax.custom_vjp
    def piece(*values: Array) -> list[Array]:
        return forward(*values)

    def pull(values: tuple[Array, ...], cotangents: list[Any]) -> tuple[Array | None, ...]:
        found = iter(backward(values, [c for c in cotangents if c.dtype != jax.dtypes.float0]))
        return tuple(next(found) if _is_inexact(value) else None for value in values)

    piece.defvjp(lambda *values: (forward(*values), values), pull)
    return piece


def _is_inexact(value: Array) -> bool:
    return jnp.issubdtype(jnp.asarray(value).dtype, jnp.inexact)


def _compiled(fn: Callable) -> Callable:
    """On CPU without optimisations, in a quarter of the time: what runs a few times on five samples."""
    return jax.jit(fn, compiler_options=_options(jax.default_backend()))


@functools.cache
def _options(backend: str) -> dict[str, Any] | None:
    if backend != "cpu":
        return None
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    more = options | {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda x: x + 1, compiler_options=more).lower(jax.ShapeDtypeStruct((), jnp.float32)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return options  # jax 0.12 has no such choice any more
    return more
