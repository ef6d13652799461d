"""hardjax: choosing what a network trains on, as pure, compiled JAX functions."""

from hardjax import data, fisher, models, testing
from hardjax._version import __version__
from hardjax.choose import selection, trimming
from hardjax.config import Performance, TrainConfig
from hardjax.data.augment import Augmentation
from hardjax.engine.rates import Schedule
from hardjax.training import files as results
from hardjax.training.loop import RunResult, run

__all__ = [
    "Augmentation",
    "Performance",
    "RunResult",
    "Schedule",
    "TrainConfig",
    "__version__",
    "data",
    "fisher",
    "models",
    "results",
    "run",
    "selection",
    "testing",
    "trimming",
]
