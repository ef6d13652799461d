"""Learning-rate schedules as factors of training progress, so that no length and no batch size is part of a trace."""

from dataclasses import dataclass

import numpy as np

from hardjax import _settings, _validate
from hardjax._axis import Axis
from hardjax._validate import Refusal

KINDS = ("constant", "step", "cosine")


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a factor of its peak over progress, the share of back-propagations done, in [0, 1).

    Attributes:
        kind: "constant", "step" (times `decay_factor` at each share in `decay_at`) or "cosine" (to 0 at the end).
        decay_at: shares of training, rising, in (0, 1); read by "step".
        decay_factor: read by "step".
        warmup: share of training with a linear rise from `warmup_start` to 1 (P4: 0.05 from 1/32).
        warmup_start: first factor of the warm-up.

    Raises:
        ValueError: unknown kind, shares outside their range or not rising.
    """

    kind: str = "constant"
    decay_at: tuple[float, ...] = (0.5, 0.75)
    decay_factor: float = 0.1
    warmup: float = 0.0
    warmup_start: float = 1 / 32

    def __post_init__(self) -> None:
        _settings.settle(self)
        _validate.one_of(KINDS, schedule=self.kind)
        rising = all(a < b for a, b in zip((0.0, *self.decay_at), (*self.decay_at, 1.0), strict=True))
        if not rising:
            raise Refusal(f"Expected decay_at={_validate.shown(self.decay_at)} to rise within (0, 1).")
        _validate.in_half_open_unit(decay_factor=self.decay_factor)  # a rate divided by ten is one times 0.1
        _validate.in_unit(warmup=self.warmup)
        _validate.in_closed_unit(warmup_start=self.warmup_start)


def factors(schedule: Schedule, progress: np.ndarray | float) -> np.ndarray:
    """What the peak rate is multiplied by at these shares of training, float64 of the same shape.

    On the host, in float64, from a division of whole numbers: rounded once, progress equals `decay_at` exactly where
    the training has reached it. In float32 a third of 294 steps would come one step late.

    Args:
        progress: shares of the training done, in [0, 1).
    """
    progress = np.asarray(progress, np.float64)
    if schedule.kind == "step":
        passed = (progress[..., None] >= np.asarray(schedule.decay_at)).sum(-1)
        main = np.float64(schedule.decay_factor) ** passed
    elif schedule.kind == "cosine":
        main = (1 + np.cos(np.pi * progress)) / 2
    else:
        main = np.ones_like(progress)
    if schedule.warmup == 0:
        return main
    # A product: the shares of training keep counting from the start during the warm-up (P4: the warm-up is part of it).
    rise = np.minimum(progress / schedule.warmup, 1)
    return main * (schedule.warmup_start + (1 - schedule.warmup_start) * rise)


AXIS = Axis(
    Schedule,
    flags={"schedule": "kind", "decay_at": "decay_at", "decay_factor": "decay_factor", "warmup": "warmup"},
)
