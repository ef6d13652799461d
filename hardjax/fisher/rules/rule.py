"""What a rule gives, and what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import jax
from jax import Array

from hardjax.fisher.definition import outer

Form = Literal["rows", "pairs"]


def on_cpu() -> bool:
    """Whether rules take their forms for a CPU. Asked here alone, so that programs for another platform than the one
    they are traced on can be made (`scripts/gpu_programs.py`)."""
    return jax.default_backend() == "cpu"


@dataclass(frozen=True)
class Cost:
    """How a Gram matrix is formed: form, floating-point operations, and the row entries of one sample."""

    form: Form
    flops: int
    row_size: int


class Rule(Protocol):
    """One use.

    Attributes:
        needs: positions of the inputs of the equation that `rows` and `gram` take.
    """

    needs: tuple[int, ...]

    def rows(self, ins: Sequence[Array], cotangents: Sequence[Array]) -> list[Array]:
        """For each weight-side operand (B, *its shape)."""
        ...

    def gram(self, ins: Sequence[Array], cotangents: Sequence[Array], chunk: int | None) -> Array:
        """(B, B), the products of the rows of the only operand."""
        ...

    def cost(self) -> Cost:
        """What `gram` will do."""
        ...


class OfRows:
    """Products of rows that are never large: formed whole."""

    def gram(self, ins: Sequence[Array], cotangents: Sequence[Array], chunk: int | None) -> Array:
        del chunk
        (rows,) = self.rows(ins, cotangents)
        return outer(rows)
