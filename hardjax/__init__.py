"""hardjax: choosing what a network trains on, as pure, compiled JAX functions."""

import importlib
from typing import TYPE_CHECKING, Any

from hardjax._version import __version__

if TYPE_CHECKING:  # what `_HOMES` says, for type checkers and editors
    from hardjax import data, fisher, models, testing
    from hardjax.choose import batch_plan, losses, selection, trimming
    from hardjax.config import Performance, TrainConfig
    from hardjax.data.augment import Augmentation
    from hardjax.engine.rates import Schedule
    from hardjax.study.cells import grid
    from hardjax.study.population import run_population
    from hardjax.study.sweep import sweep
    from hardjax.training import files as results
    from hardjax.training.run import RunResult, run

# Imported together when one of them is first asked for: jax, flax and optax take most of a second, which
# `hardjax --help` does not need. A module without a name behind it is handed out itself.
_HOMES = {
    "Augmentation": ("hardjax.data.augment", "Augmentation"),
    "Performance": ("hardjax.config", "Performance"),
    "RunResult": ("hardjax.training.run", "RunResult"),
    "Schedule": ("hardjax.engine.rates", "Schedule"),
    "TrainConfig": ("hardjax.config", "TrainConfig"),
    "batch_plan": ("hardjax.choose.batch_plan", None),
    "data": ("hardjax.data", None),
    "fisher": ("hardjax.fisher", None),
    "grid": ("hardjax.study.cells", "grid"),
    "losses": ("hardjax.choose.losses", None),
    "models": ("hardjax.models", None),
    "results": ("hardjax.training.files", None),
    "run": ("hardjax.training.run", "run"),
    "run_population": ("hardjax.study.population", "run_population"),
    "selection": ("hardjax.choose.selection", None),
    "sweep": ("hardjax.study.sweep", "sweep"),
    "testing": ("hardjax.testing", None),
    "trimming": ("hardjax.choose.trimming", None),
}

__all__ = [
    "Augmentation",
    "Performance",
    "RunResult",
    "Schedule",
    "TrainConfig",
    "__version__",
    "batch_plan",
    "data",
    "fisher",
    "grid",
    "losses",
    "models",
    "results",
    "run",
    "run_population",
    "selection",
    "sweep",
    "testing",
    "trimming",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for public, (module, attribute) in _HOMES.items():
        found = importlib.import_module(module)
        globals()[public] = found if attribute is None else getattr(found, attribute)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
