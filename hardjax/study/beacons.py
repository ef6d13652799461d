"""Beacons (P3, section 4.3): finished runs of one batch size, where they went in the C_K-L_K plane, and their errors.

Arrays in, arrays out: `study.measure.read_trail` finds them in a run's folder, `study.beacon_file` keeps them,
`plots.plane` draws them.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hardjax._validate import Refusal, shown

TOLERANCES = (0.0, 1e-6)  # the published reading of "non-zero", and one that keeps the noise of float32 out
READINGS = {"measurement": "", "epoch": " by epoch"}  # who counts alike -> ending of the names in the record
ERRORS = ("test", "train")
FIELDS = ("c", *(f"{name}{ending}" for ending in READINGS.values() for name in ("C_K", "L_K")))
NEAREST = 5  # errors that a point of the plane is the mean of, and configurations of the second region (P3, 4.1)

# What beacons of one plane may differ in, and what changes nothing of where a run goes.
_FREE = ("batch_size", "learning_rate", "base_learning_rate", "seed", "data_dir", "test_every", "evaluate_train")
_PLAN = ("batch_plan", "rate_scaling")


@dataclass(frozen=True)
class Trail:
    """Where a finished run went, at P points of its training.

    Attributes:
        run: its folder.
        batches: batch size, or the text of its batch plan.
        learning_rate: peak rate of a batch's mean loss, in the first stage.
        seed: of the run.
        diverged: its last loss was not finite. The errors are then those of what such a network predicts.
        test_error, train_error: at the end, percent; the second is NaN where it was not evaluated.
        epoch: (P,) epochs done.
        measures: tolerance -> field -> (P,). C_K and L_K in both readings are those of the last measurement before; "c"
            is the mean over the measurements since the point before, NaN without one.
        errors: "test", "train", "validation" -> (P,), percent; NaN where the run was not tested then.
    """

    run: str
    batches: int | str
    learning_rate: float
    seed: int
    diverged: bool
    test_error: float
    train_error: float
    epoch: np.ndarray
    measures: Mapping[float, Mapping[str, np.ndarray]]
    errors: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Configuration:
    """A batch size (or plan) and learning rate, averaged over its seeds, at one tolerance and in one reading.

    Attributes:
        batches, learning_rate, epoch: as in `Trail`.
        seeds: runs that it is the mean of.
        diverged: how many of them did.
        error: "test", "train" -> mean at the end, percent.
        c, condition, energy: (P,) geometric means over the seeds of c, C_K, L_K: the middle on logarithmic axes.
        errors: as in `Trail`, means.
    """

    batches: int | str
    learning_rate: float
    seeds: int
    diverged: int
    error: Mapping[str, float]
    epoch: np.ndarray
    c: np.ndarray
    condition: np.ndarray
    energy: np.ndarray
    errors: Mapping[str, np.ndarray]

    def is_placed(self, error: str) -> bool:
        """Whether the plane of this error has it: its place at the end and its error are finite."""
        return bool(np.isfinite(positions([self])).all() and np.isfinite(self.error[error]))


def configurations(trails: Sequence[Trail], tolerance: float, reading: str) -> list[Configuration]:
    """By batch size and learning rate, with their seeds averaged.

    Args:
        tolerance: one of `TOLERANCES`.
        reading: one of `READINGS`.
    """

    def key(trail: Trail) -> tuple:
        return isinstance(trail.batches, str), trail.batches, trail.learning_rate

    def made(runs: list[Trail]) -> Configuration:
        fields = [run.measures[tolerance] for run in runs]
        ending = READINGS[reading]
        c, condition, energy = (
            _mean_of_logarithms([one[name] for one in fields]) for name in ("c", f"C_K{ending}", f"L_K{ending}")
        )
        return Configuration(
            batches=runs[0].batches,
            learning_rate=runs[0].learning_rate,
            seeds=len(runs),
            diverged=sum(run.diverged for run in runs),
            error={
                "test": float(np.mean([run.test_error for run in runs])),
                "train": float(np.mean([run.train_error for run in runs])),
            },
            epoch=runs[0].epoch,
            c=c,
            condition=condition,
            energy=energy,
            errors={name: np.mean([run.errors[name] for run in runs], axis=0) for name in runs[0].errors},
        )

    return [made(list(runs)) for _, runs in itertools.groupby(sorted(trails, key=key), key)]


def positions(found: Sequence[Configuration], point: int = -1) -> np.ndarray:
    """(n, 2) log10 C_K, log10 L_K at one of the P points; NaN where there is no such logarithm."""
    values = np.array([(one.condition[point], one.energy[point]) for one in found], np.float64).reshape(-1, 2)
    return np.log10(np.where(values > 0, values, np.nan))


def spread(places: np.ndarray) -> np.ndarray:
    """(2,) what distances along C_K and L_K are divided by: the range of (n, 2) positions, 1 where they have none."""
    # The range, as in P3's published code: it is the plane's own unit, however many decades either measure spans.
    width = places.max(0) - places.min(0)
    return np.where(width > 0, width, 1.0)


def surface(places: np.ndarray, errors: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(g,) the error at wanted places: the mean of the five nearest ones (P3, section 4.1).

    The text says the mean, which this is; the published code weighs the five by their nearness and leaves out a
    configuration that did not converge.

    Args:
        places, wanted: (n, 2) and (g, 2), log10 C_K and log10 L_K, finite; distances are those of the plane in units of
            `spread(places)`.
        errors: (n,) percent, finite.

    Raises:
        ValueError: fewer than five places.
    """
    check_enough(places)
    unit = spread(places)
    apart = (((wanted[:, None] - places) / unit) ** 2).sum(-1)
    return errors[np.argsort(apart, axis=1, kind="stable")[:, :NEAREST]].mean(1)


def check_distinct(trails: Sequence[Trail]) -> None:
    """No configuration and seed counts twice in a mean.

    Raises:
        ValueError: two of them are the same.
    """
    met: dict[tuple, str] = {}
    for trail in trails:
        key = trail.batches, trail.learning_rate, trail.seed
        if key in met:
            raise Refusal(f"{trail.run!r} and {met[key]!r} are one configuration with one seed; name either.")
        met[key] = trail.run


def check_enough(placed: Sequence[Any] | np.ndarray) -> None:
    """As many beacons as a point of the plane is the mean of.

    Raises:
        ValueError: there are fewer.
    """
    if len(placed) < NEAREST:
        raise Refusal(f"Expected at least {NEAREST} configurations with finite measures and errors, got {len(placed)}.")


def lowest(values: np.ndarray) -> np.ndarray:
    """Mask of the level set of the minimum of a surface: P3's first optimum region."""
    # Means of the same five errors summed in another order are the same level.
    return np.isclose(values, values.min(), rtol=1e-12, atol=0.0)


def best(errors: np.ndarray) -> np.ndarray:
    """Indices of the five lowest errors, the lowest first: P3's second optimum region is that of the test errors."""
    return np.argsort(errors, kind="stable")[:NEAREST]


def shared(settings: Mapping[str, Any], plans: bool = False) -> dict[str, Any]:
    """What all runs of a plane have in common: a configuration without batch size, rate, seed, and where data lies.

    Args:
        settings: `TrainConfig.to_dict`.
        plans: leave the batch plan out as well.
    """
    left = _FREE + _PLAN if plans else _FREE
    found = {name: value for name, value in settings.items() if name not in left}
    # How often a spectrum is taken may suit the batch size; whose gradients it is of may not differ.
    measure = settings.get("measure")
    return found | {"measure": {"rows": measure["rows"]} if measure else None}


def check_shared(runs: Mapping[str, Mapping[str, Any]], plans: bool = False) -> None:
    """Nothing but batch size, rate and seed tells runs of one plane apart.

    Args:
        runs: name -> settings, or what `shared` left of them.
        plans: nor does the batch plan.

    Raises:
        ValueError: two differ in something else, which is named.
    """
    (first, wanted), *rest = ((name, shared(settings, plans)) for name, settings in runs.items())
    for name, found in rest:
        for setting in wanted.keys() | found.keys():
            here, there = found.get(setting), wanted.get(setting)
            if here != there:
                raise Refusal(
                    "Expected runs of one plane, which differ in batch size, learning rate and seed alone:"
                    f" {name!r} has {setting}={shown(here)}, {first!r} {shown(there)}."
                )


def _mean_of_logarithms(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Geometric mean over the finite ones above 0; NaN without any."""
    rows = np.array(columns, np.float64)
    known = np.isfinite(rows) & (rows > 0)
    total, count = np.log(np.where(known, rows, 1.0)).sum(0), known.sum(0)
    return np.where(count > 0, np.exp(total / np.maximum(count, 1)), np.nan)
