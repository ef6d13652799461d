"""hardjax: choosing what a network trains on, as pure, compiled JAX functions."""

from hardjax import data, fisher, models, results, selection, trimming
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
    "fisher",
    "models",
    "results",
    "run",
    "selection",
    "trimming",
]
