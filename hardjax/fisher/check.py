"""Whether rows of per-sample gradients are those of this very network: compared with their definition before use.

Rows are read from the traced function, by rules for the equations where parameters meet the batch. So that no rule, and
nothing that was found out about the trace, has to be believed, people's own networks are compared once with

- the gradient of each sample's own loss, where samples are independent (no trace is read for that);
- else the gradient in a copy of the parameters for each sample, which no rule takes part in, the gradient of the batch
  that rows add up to, and the rows of the same samples in another order, which no trace is read for either.

A wrong number can pass in silence only where a second, independent mistake hides the first. Made-up samples are few,
and parameters are moved by noise: a head that starts at zero hides all that lies behind it. What was compared is
remembered by the program that was traced, not by the module: equal modules may compute different things (a helper that
was redefined, 1 and True). It is the program of the batch at hand: few samples stand for many where both compute the
same (`alike`), else more of them are compared. Orders of the samples that inputs decide are refused in the trace, and
statistics that decide something else (which branch is taken, say) are part of what is remembered.

Four things it cannot see:

- Inside a trace, training included, such statistics have no values. A network whose branches they choose, and change
  the order of its samples in, is right for the branches that were compared alone.
- Decisions by images or parameters (a branch taken where an image is large) are those of the made-up ones.
- A derivative of somebody's own (`custom_vjp`) that is another one for large batches, where what it is of stays.
- A number that is the same, or a multiple of the size, at both sizes and means something else at each.
"""

import collections
import hashlib
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from hardjax._validate import Refusal
from hardjax.fisher import by_uses, comparison, decisions, definition, written
from hardjax.fisher.comparison import Comparison, Subject
from hardjax.fisher.names import named_leaves, some
from hardjax.fisher.program import Uncovered
from hardjax.fisher.traced import Traced
from hardjax.fisher.walk import trace
from hardjax.models.apply import as_apply, is_ours

_CHECKED: collections.OrderedDict[str, None] = collections.OrderedDict()
# A digest each: a notebook that redefines its network all day forgets the oldest ones.
_REMEMBERED = 512


class Identity(NamedTuple):
    """What a comparison is remembered by.

    Attributes:
        program: a digest.
        kind: of the arithmetic, "float32" or "half".
        size: samples that are compared.
        deciding: names of statistics that decide what the program does.
    """

    program: str
    kind: str
    size: int
    deciding: tuple[str, ...]

    def with_values(self, variables: Any) -> str:
        """With a digest of the values of what decides."""
        if not self.deciding:
            return self.program
        leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
        values = repr([written.value(np.asarray(leaves[name])) for name in self.deciding])
        return f"{self.program} {hashlib.sha256(values.encode()).hexdigest()}"


def needed(subject: Subject) -> bool:
    """Networks of the zoo are tested, with the losses of optax; coupled rows, and frozen ones by "vmap", are the
    definition itself."""
    tested = is_ours(subject.model) and subject.loss.targets != "any"
    return not (tested or subject.rows == "coupled" or (subject.rows == "frozen" and subject.method == "vmap"))


def ensure(subject: Subject, *, traced: bool) -> None:
    """Checks the rows of this network once; inside a trace, where nothing can be computed, they must have been.

    Raises:
        ValueError: they are wrong, or the method does not take the network, or (traced) nobody has checked.
    """
    if not needed(subject):
        return
    # How it is called is found out once, and it is traced once for each shape.
    subject = subject._replace(model=Traced(as_apply(subject.model)))
    try:
        name = identity(subject)
    except Uncovered as error:
        raise Refusal(f"{_advice(subject, traced)}: {error}") from None
    # Inside a trace statistics have no values.
    known = name.program if traced else name.with_values(subject.variables)
    if known in _CHECKED:
        _CHECKED.move_to_end(known)
        return
    if traced:
        raise Refusal(
            f"Call hardjax.fisher.coverage(model, variables, images, labels, rows={subject.rows!r},"
            f" method={subject.method!r}) before compiling: the rows of {subject.model.name} have not been compared"
            " with its gradient."
        )
    _compared(subject, name, None)


def run(subject: Subject, tolerance: float | None) -> dict[str, float]:
    """The comparison itself, whether or not it was made before: errors by parameter.

    Raises:
        ValueError: as `ensure`.
    """
    subject = subject._replace(model=Traced(as_apply(subject.model)))
    try:
        name = identity(subject)
    except Uncovered as error:
        raise Refusal(f"{_advice(subject)}: {error}") from None
    return _compared(subject, name, tolerance)


def _compared(subject: Subject, identity: Identity, tolerance: float | None) -> dict[str, float]:
    """Errors by parameter, below the tolerance; the program is remembered as right."""
    found = comparison.compare(subject, identity.kind, identity.size, identity.deciding)
    tolerance = found.tolerance if tolerance is None else tolerance
    wrong = sorted((name for name, e in found.errors.items() if not e <= tolerance), key=lambda n: -found.errors[n])
    if wrong:
        raise Refusal(
            f"{_advice(subject)}: rows are not those of the gradient of {subject.model.name}, by"
            f" {found.errors[wrong[0]]:.1e} of it (tolerance {tolerance:g}) at {some(wrong)}."
        )
    _CHECKED.update(dict.fromkeys((identity.program, identity.with_values(subject.variables))))
    while len(_CHECKED) > _REMEMBERED:
        _CHECKED.popitem(last=False)
    return found.errors


def identity(subject: Subject) -> Identity:
    """Of the program of the losses, its derivatives included, and of where its parameters meet the batch, for a batch
    of the check's size, whatever the values: rows and gradient follow from these.

    Raises:
        ValueError: the method does not take the network.
    """
    apply, loss, train = subject.model, subject.loss, subject.rows != "frozen"
    key = jax.eval_shape(lambda: jax.random.key(0))
    # In 32 bits whatever the caller's settings: one check holds for both.
    with comparison.settings():
        size = comparison.size_of(subject)
        variables, images, labels = comparison.shapes_of(subject, size)
        network = apply.jaxpr(variables, images, key, train)
        losses = jax.make_jaxpr(partial(definition.losses, loss))(network.out_avals[0], labels)
        if subject.method == "layers":
            program = by_uses.problem(apply, loss, variables, images, labels, key, train).program
        else:
            program = trace(apply, variables, images, key, train)
        uses = [(op.operands, op.single and written.equation(op.single)) for op in program.ops()]
        text = repr((written.jaxpr(network), written.jaxpr(losses), program.values, uses))
    # From the program itself: modules compute in half precision by fields of their own, whatever their parameters are
    # stored in.
    half = "half" if "float16" in text else "float32"
    names = ",".join(sorted(named_leaves(variables)))
    # The names, since the program knows its arguments by place; the back end, since networks take other paths on CPU.
    settings = f"{subject.rows} {subject.method} {jax.default_backend()} {names}"
    digest = hashlib.sha256(f"{settings} {half} {text}".encode()).hexdigest()
    return Identity(digest, half, size, decisions.deciding(program, variables))


def _advice(subject: Subject, traced: bool = False) -> str:
    """What takes the network, tried where it can be."""
    other = "vmap" if subject.method == "layers" else "layers"
    if traced:
        return f'hardjax.fisher.coverage tells whether method="{other}" takes {subject.model.name}'
    try:
        subject = subject._replace(method=other)
        found = Comparison({}, 0.0)
        if needed(subject):
            name = identity(subject)
            found = comparison.compare(subject, name.kind, name.size, name.deciding)
        works = all(error <= found.tolerance for error in found.errors.values())
    except Refusal:
        works = False
    if works:
        return f'method="{other}" takes this network'
    if subject.rows == "contribution":
        return 'rows="coupled" takes any network'
    return "This network cannot be measured"
