"""Learning-rate schedules as factors of training progress, so that they need no retrace when lengths change."""

from collections.abc import Callable
from dataclasses import dataclass

import optax
from jax import Array

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
            raise Refusal(f"Expected decay_at={self.decay_at} to rise within (0, 1).")
        _validate.positive(decay_factor=self.decay_factor)
        _validate.in_unit(warmup=self.warmup)
        _validate.in_closed_unit(warmup_start=self.warmup_start)


def make_schedule(schedule: Schedule) -> Callable[[Array], Array]:
    """progress () in [0, 1) -> factor (): optax schedules whose unit of time is the whole training."""
    if schedule.kind == "step":
        main = optax.piecewise_constant_schedule(1.0, dict.fromkeys(schedule.decay_at, schedule.decay_factor))
    elif schedule.kind == "cosine":
        main = optax.cosine_decay_schedule(1.0, decay_steps=1.0)
    else:
        main = optax.constant_schedule(1.0)
    if schedule.warmup == 0:
        return main
    ramp = optax.linear_schedule(schedule.warmup_start, 1.0, transition_steps=schedule.warmup)
    # A product, not optax.join_schedules: the shares of training keep counting from the start during the warm-up.
    return lambda progress: ramp(progress) * main(progress)


AXIS = Axis(
    Schedule,
    flags={"schedule": "kind", "decay_at": "decay_at", "decay_factor": "decay_factor", "warmup": "warmup"},
)
