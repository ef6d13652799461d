"""hardjax: choosing what a network trains on, as pure, compiled JAX functions."""

from hardjax import data, models, results, selection
from hardjax._version import __version__
from hardjax.config import Performance, TrainConfig
from hardjax.data.augment import Augmentation
from hardjax.runner import RunResult, run
from hardjax.schedules import Schedule

__all__ = [
    "Augmentation",
    "Performance",
    "RunResult",
    "Schedule",
    "TrainConfig",
    "__version__",
    "data",
    "models",
    "results",
    "run",
    "selection",
]
