"""Whether a network computes the same at two batch sizes: the same equations, whose numbers follow the size or stay.

Followed is written out in `_follows`: n itself and its multiples, one more or less, and of factors their inverse. What
else depends on the size (a threshold, a half that is rounded, an array made outside of the trace) makes two programs.
"""

import math
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from hardjax.fisher import written
from hardjax.fisher.traced import listed

_NUMBER = re.compile(r"(-?\d+)")


def alike(here: Any, there: Any, size: int, batch: int) -> bool:
    """Of two traces of the logits, the first for `size` samples, the second for `batch`."""
    if here is there:
        return True
    one, other = listed(here), listed(there)
    if (one.inputs, one.output, one.constants.keys()) != (other.inputs, other.output, other.constants.keys()):
        return False
    if [(op.ins, op.outs) for op in one.ops()] != [(op.ins, op.outs) for op in other.ops()]:
        return False
    constants = [[written.value(value) for value in program.constants.values()] for program in (one, other)]
    # Without derivatives of their own: convolutions of this package pull back in forms that depend on the batch size.
    equations = [[written.equation(op.eqn, False) for op in program.ops()] for program in (one, other)]
    return all(
        _alike(a, b, size, batch) for of_one, of_other in (constants, equations)
        for a, b in zip(of_one, of_other, strict=True)
    )  # fmt: skip


def _alike(a: Any, b: Any, size: int, batch: int) -> bool:
    """Of what `written` wrote."""
    if type(a) is not type(b):
        return False
    if isinstance(a, written.Unknown):
        return type(a.held) is type(b.held)  # it is never remembered
    if a == b:
        return True
    if type(a) is int:
        return _follows(a, b, size, batch)
    if isinstance(a, str):
        return _alike_in_text(a, b, size, batch)
    if not isinstance(a, tuple) or len(a) != len(b):
        return False
    if len(a) == 3 and isinstance(a[2], bytes):
        return _alike_arrays(a, b, size, batch)
    return all(_alike(one, other, size, batch) for one, other in zip(a, b, strict=True))


def _alike_in_text(a: str, b: str, size: int, batch: int) -> bool:
    parts, others = _NUMBER.split(a), _NUMBER.split(b)
    if parts[::2] != others[::2]:
        return False
    return all(_follows(int(m), int(n), size, batch) for m, n in zip(parts[1::2], others[1::2], strict=True))


def _alike_arrays(a: tuple, b: tuple, size: int, batch: int) -> bool:
    """Of single numbers: an array that changes is made outside of the trace, and nobody knows how."""
    (shape, dtype, one), (again, kind, other) = a, b
    if shape != again or dtype != kind or math.prod(shape) != 1 or dtype == "bool":
        return False
    m, n = (np.frombuffer(value, jnp.dtype(dtype)).item() for value in (one, other))
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        return type(m) is int and _follows(m, n, size, batch)
    rounding = 4 * float(jnp.finfo(dtype).eps)
    if not (math.isfinite(m) and math.isfinite(n)):
        return False
    if any(math.isclose(m * there, n * here, rel_tol=rounding) for here, there in _factors(size, batch)):
        return True
    whole = m == round(m) and n == round(n)
    return whole and _follows(round(m), round(n), size, batch)


def _factors(size: int, batch: int) -> list[tuple[float, float]]:
    """What a factor may be a multiple of, at both sizes: n, 1 / n, and those of a variance without bias."""
    found = [(size, batch), (1 / size, 1 / batch)]
    if size > 1 < batch:
        found += [(1 / (size - 1), 1 / (batch - 1)), (size / (size - 1), batch / (batch - 1))]
    return found


def _follows(m: int, n: int, size: int, batch: int) -> bool:
    """Whether whole numbers are equal, in proportion to the sizes, or a multiple of them and one more or less."""
    if m == n or m * batch == n * size:
        return True
    times, rest = divmod(n - m, batch - size) if batch != size else (0, 1)
    return rest == 0 and abs(m - times * size) <= 1
