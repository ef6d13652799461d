"""One ordinary backward pass whose uses of parameters leave Gram matrices or rows behind instead of gradients.

A tap is the identity on what a use gives. Going backward it meets the cotangent, forms that use's share of the Gram
matrix from it and the use's own inputs, and hands the share on as the cotangent of an unused input, the sink. Automatic
differentiation adds the shares up, and no cotangent outlives its use.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from hardjax.choose.losses import Loss
from hardjax.fisher import definition, rules
from hardjax.fisher.chains import Chain, chain_of
from hardjax.fisher.definition import outer
from hardjax.fisher.program import Apply, Op, Program, Run
from hardjax.fisher.walk import trace

Rows = dict[str, Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """An equation where parameters meet the batch.

    Attributes:
        chains: to each weight-side operand, as the rule orders them.
        direct: the products of the operand's rows are those of its one parameter's rows, which has no other use.
    """

    op: Op
    rule: rules.Rule
    chains: tuple[Chain, ...]
    direct: bool

    @property
    def params(self) -> list[str]:
        return sorted({name for chain in self.chains for name in chain.params})


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A network ready to be differentiated.

    Attributes:
        env: key -> array of the program's inputs.
        labels: (B, ...), what the loss takes.
        loss: of each sample.
        uses: in the order of the forward pass, less those whose parameters the loss cannot see.
        shared: names of parameters with several uses: their rows add up before they are multiplied.
        shapes: of all parameters, by name.
        dtype: of the sums: float32, or float64 where parameters or images are.
    """

    program: Program
    env: Mapping[int, Any]
    labels: Array
    loss: Loss
    uses: tuple[Use, ...]
    shared: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: Any


_TOTAL = ""


class _Shares(NamedTuple):
    """By parameter: products of rows that are complete, and rows that others are added to."""

    products: dict[str, Array]
    rows: Rows


class _Given(NamedTuple):
    """What a use's rows are made from beside the cotangents: inputs of the equation, and of each chain."""

    ins: list[Array]
    params: dict[str, Array]
    fixed: list[list[Array]]


def problem(
    apply: Apply,
    loss: Loss,
    variables: Mapping[str, Any],
    images: Array,
    labels: Array,
    key: Array | None,
    train: bool,
) -> Problem:
    """Finds the uses by tracing the network.

    Raises:
        ValueError: a parameter meets the batch where samples are mixed or out of order.
    """
    program = trace(apply, variables, images, key, train)
    found = _found(program)
    if any(isinstance(rule, rules.Whole) for _, rule, _ in found):
        # Of a network that takes a single sample, these equations are had for one.
        with contextlib.suppress(ValueError, TypeError):
            program = trace(apply, variables, images, key, train, beside_one=True)
            found = _found(program)
    counts = Counter(name for _, _, some in found for name in {name for chain in some for name in chain.params})
    shared = frozenset(name for name, count in counts.items() if count > 1)
    uses = tuple(
        Use(op, rule, some, len(some) == 1 and some[0].moves and not shared & set(some[0].params))
        for op, rule, some in found
    )
    inexact = [value.aval.dtype for key in program.params.values() if (value := program.values[key]).aval.inexact]
    # Products of bfloat16 would decide which eigenvalues count as zero.
    dtype = jnp.result_type(jnp.float32, images, *inexact)
    shapes = {name: program.values[key].aval.shape for name, key in program.params.items()}
    return Problem(program, program.environment(variables, images, key), labels, loss, uses, shared, shapes, dtype)


def _found(program: Program) -> list[tuple[Op, rules.Rule, tuple[Chain, ...]]]:
    made_by = {key: op for op in program.ops() for key in op.outs}
    chains: dict[int, Chain] = {}
    found = []
    for op in program.ops():
        for at in op.operands:
            if op.ins[at] not in chains:
                chains[op.ins[at]] = chain_of(program, made_by, op.ins[at])
        if op.operands:
            found.append((op, rules.rule_of(program, op), tuple(chains[op.ins[at]] for at in op.operands)))
    return found


def gram(problem: Problem, chunk: int | None) -> Array:
    """(B, B): one sink that all uses share, so that their matrices are added up as they come."""

    def emit(use: Use, given: _Given, cotangents: Sequence[Array]) -> _Shares:
        found = _share(problem, use, given, cotangents, chunk)
        return found._replace(products={_TOTAL: sum(found.products.values())} if found.products else {})

    left = _backward(problem, _Shares({_TOTAL: _square(problem)}, _row_sinks(problem, problem.shared)), emit)
    return sum((outer(rows) for rows in left.rows.values()), left.products[_TOTAL])


def grams(problem: Problem, chunk: int | None) -> dict[str, Array]:
    """Parameter name -> (B, B)."""
    alone = dict.fromkeys(problem.shapes.keys() - problem.shared, _square(problem))
    sinks = _Shares(alone, _row_sinks(problem, problem.shared))
    left = _backward(problem, sinks, lambda *args: _share(problem, *args, chunk))
    return left.products | {name: outer(rows) for name, rows in left.rows.items()}


def rows(problem: Problem) -> Rows:
    """Parameter name -> (B, *shape)."""
    sinks = _Shares({}, _row_sinks(problem, problem.shapes))
    return _backward(problem, sinks, lambda *args: _Shares({}, _pulled(*args))).rows


def rows_and_grams(problem: Problem, run: Run = Program.run) -> tuple[Rows, dict[str, Array]]:
    """`rows` and `grams` of one backward pass."""
    alone = dict.fromkeys(problem.shapes.keys() - problem.shared, _square(problem))

    def emit(*args: Any) -> _Shares:
        return _Shares(_share(problem, *args, None).products, _pulled(*args))

    left = _backward(problem, _Shares(alone, _row_sinks(problem, problem.shapes)), emit, run)
    return left.rows, left.products | {name: outer(left.rows[name]) for name in problem.shared}


def _share(problem: Problem, use: Use, given: _Given, cotangents: Sequence[Array], chunk: int | None) -> _Shares:
    if use.direct:
        (name,) = use.params
        return _Shares({name: use.rule.gram(given.ins, cotangents, chunk)}, {})
    found = _pulled(use, given, cotangents)
    products = {name: outer(row) for name, row in found.items() if name not in problem.shared}
    return _Shares(products, {name: row for name, row in found.items() if name in problem.shared})


def _pulled(use: Use, given: _Given, cotangents: Sequence[Array]) -> Rows:
    found: Rows = {}
    formed = use.rule.rows(given.ins, cotangents)
    for chain, fixed, row in zip(use.chains, given.fixed, formed, strict=True):
        for name, pulled in chain.pull(given.params, fixed, row).items():
            found[name] = found[name] + pulled if name in found else pulled
    return found


def _backward(problem: Problem, sinks: _Shares, emit: Callable[..., _Shares], run: Run = Program.run) -> _Shares:
    """What each sink received."""
    by_op = {id(use.op): use for use in problem.uses}
    wanted = _Shares(dict.fromkeys(sinks.products, True), dict.fromkeys(sinks.rows, True))

    def step(op: Op, values: list[Any], env: Mapping[Any, Any]) -> list[Any]:
        found, use = op.bind(*values), by_op.get(id(op))
        return found if use is None else _tapped(problem, use, emit, found, values, env, wanted)

    def reads(op: Op) -> tuple[tuple[Any, ...], Hashable]:
        use = by_op.get(id(op))
        return ((), None) if use is None else _reads(problem, use, wanted)

    def objective(sinks: _Shares) -> Array:
        env = {(kind, name): sink for kind, some in sinks._asdict().items() for name, sink in some.items()}
        logits = run(problem.program, {**problem.env, **env}, step, reads)
        return definition.losses(problem.loss, logits, problem.labels).sum()

    return jax.grad(objective)(sinks)


def _sinks_of(problem: Problem, use: Use, wanted: _Shares) -> list[tuple[str, str]]:
    """Keys of the sinks that a use fills, in the order of its chains."""
    params = list(dict.fromkeys(name for chain in use.chains for name in chain.params))
    own = [name for name in params if name not in problem.shared]
    products = [("products", name) for name in ([_TOTAL] if own else []) + own if name in wanted.products]
    return products + [("rows", name) for name in params if name in wanted.rows]


def _looked_up(use: Use, sinks: list[tuple[str, str]]) -> tuple[dict[str, int], list[tuple[int, ...]]]:
    """Keys of the parameters, and of the fixed values of each chain, that rows are pulled back with."""
    pulls = not use.direct or any(kind == "rows" for kind, _ in sinks)
    params = {name: key for chain in use.chains if pulls for name, key in chain.params.items()}
    return params, [chain.fixed for chain in use.chains] if pulls else []


def _reads(problem: Problem, use: Use, wanted: _Shares) -> tuple[tuple[Any, ...], Hashable]:
    """Everything that `_tapped` looks up, and what it makes of it."""
    sinks = _sinks_of(problem, use, wanted)
    params, fixed = _looked_up(use, sinks)
    keys = (*params.values(), *(key for some in fixed for key in some), *sinks)
    shared = tuple(name in problem.shared for name in params)
    chains = tuple(chain.written(list(params)) for chain in use.chains)
    kinds = tuple((kind, list(params).index(name) if name in params else name == _TOTAL) for kind, name in sinks)
    return keys, (use.direct, shared, chains, kinds, str(problem.dtype))


def _tapped(
    problem: Problem,
    use: Use,
    emit: Callable[..., _Shares],
    found: list[Any],
    values: list[Any],
    env: Mapping[Any, Any],
    wanted: _Shares,
) -> list[Any]:
    """What a use gives, through its tap."""
    keys = _sinks_of(problem, use, wanted)
    sinks = _Shares(*({name: env[kind, name] for kind, name in keys if kind == own} for own in _Shares._fields))
    params, fixed = _looked_up(use, keys)
    given = _Given(
        [values[i] for i in use.rule.needs],
        {name: env[key] for name, key in params.items()},
        [[env[key] for key in some] for some in fixed],
    )
    inexact = [i for i, key in enumerate(use.op.outs) if problem.program.values[key].aval.inexact]
    tap = _tap(problem, use, emit)
    passed = tap([found[i] for i in inexact], lax.stop_gradient(given), sinks)
    found = list(found)
    for i, value in zip(inexact, passed, strict=True):
        found[i] = value
    return found


def _tap(problem: Problem, use: Use, emit: Callable[..., _Shares]) -> Callable[..., list[Array]]:
    @jax.custom_vjp
    def tap(found: list[Array], given: _Given, sinks: _Shares) -> list[Array]:
        del given, sinks
        return found

    def forward(found: list[Array], given: _Given, sinks: _Shares) -> tuple[list[Array], _Given]:
        del sinks
        return found, given

    def backward(given: _Given, cotangents: list[Array]) -> tuple:
        whole = isinstance(use.rule, rules.Whole)
        wide = given if whole else given._replace(ins=[_wide(value) for value in given.ins])
        shares = emit(use, wide, [_wide(cotangent) for cotangent in cotangents])
        # The share leaves as a cotangent: autodiff sums it over uses, also through rematerialisation.
        return cotangents, None, jax.tree.map(lambda value: value.astype(problem.dtype), shares)

    tap.defvjp(forward, backward)
    return tap


def _wide(value: Array) -> Array:
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return value
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def _square(problem: Problem) -> Array:
    return jnp.zeros((len(problem.labels),) * 2, problem.dtype)


def _row_sinks(problem: Problem, names: Any) -> Rows:
    return {name: jnp.zeros((len(problem.labels), *problem.shapes[name]), problem.dtype) for name in sorted(names)}
