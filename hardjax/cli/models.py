"""`hardjax models`."""

from dataclasses import dataclass

from hardjax.cli import output
from hardjax.cli.parsing import parse


@dataclass(frozen=True)
class Models:
    """List the networks with their sizes beside the published ones."""


def run(arguments: list[str]) -> int:
    """List them; returns the exit code."""
    parse(Models, "models", arguments)
    import hardjax.models as models

    rows = [
        row | {"parameters": f"{row['parameters']:,}", "multiply_adds": f"{row['multiply_adds'] / 1e6:,.1f}M"}
        for row in models.table()
    ]
    output.table("networks", [{key.replace("_", "-"): value for key, value in row.items()} for row in rows])
    print(
        "published: parameters, floating-point operations (truncated; about twice the multiply-adds).\n"
        "options (--model-option NAME=VALUE, or hj.models.create): norm, norm_batch_size, norm_momentum, dtype, init, "
        "dropout; drop_path, stem, widths, norm_dense where a network has them."
    )
    return 0
