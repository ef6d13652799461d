"""P4, small batches: the claims S1 to S23 of its text, read off the rows of its figures.

    hardjax table show p4-claim-4

`p4-claim-22` is computed, without training.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

import hardjax as hj
from hardjax.study.experiments import Experiment, Statement, errata, published

PRINTED = published(__file__, "small_batches")
SIZES = tuple(2**power for power in range(1, 12))
RATES = range(-12, 1)
METRIC, POINTS, RUNS = "median test top-1", 1.0, 3
IMAGENET = PRINTED["runs_imagenet"]  # two: too few for any verdict, by the rule
CIFAR = (1, 2, 3, 5, 6, 7, 8, 9, 10, 11)
_ERRATA = {1: ("SE2",), 2: ("SE4",), 18: ("SE3",), 19: ("SE2", "SE3")}


def arms(least: int, most: int, prefix: str = "") -> tuple[str, ...]:
    return tuple(f"{prefix}m={m} 2^{r}" for m in SIZES if least <= m <= most for r in RATES)


def best(least: int, most: int, prefix: str = "", title: str = "", runs: int = RUNS) -> Statement:
    """The best of the sizes within a range against the best of those outside."""
    inside = arms(least, most, prefix)
    outside = tuple(one for one in arms(1, 4096, prefix) if one not in inside)
    says = f"{title}{': ' if title else ''}the best batch size lies from {least} to {most}"
    return Statement(says, inside, outside, METRIC, POINTS, runs)


def norm(
    sizes: Iterable[int], least: int, most: int, prefix: str = "", title: str = "", runs: int = RUNS
) -> list[Statement]:
    """For each batch size: batch norm over so many of its samples against over fewer or more."""
    found = []
    for m in sizes:
        parts = {f"{prefix}m={m} norm over {part}": part for part in SIZES if part <= m}
        inside = tuple(label for label, part in parts.items() if least <= part <= most)
        outside = tuple(label for label, part in parts.items() if not least <= part <= most)
        says = f"{title}{': ' if title else ''}batch norm over {least} to {most} is best at m = {m}"
        if inside and outside:
            found.append(Statement(says, inside, outside, METRIC, POINTS, runs))
    return found


def over_all_rates(says: str, inside: tuple[str, ...], outside: tuple[str, ...]) -> Statement:
    """Of accuracies over the whole range of base rates, those that diverge among them: the wider the range of usable
    ones, the higher. The share that converged has no spread between seeds, and so no interval."""
    return Statement(says, inside, outside, METRIC, POINTS, IMAGENET, of_several="mean")


def claim(number: int, reads: tuple[str, ...], *statements: Statement, layout: str = "performance") -> Experiment:
    (found,) = (one for one in PRINTED["claims"] if one["id"] == f"S{number}")
    place = found["where"]
    return Experiment(
        name=f"p4-claim-{number}",
        title=found["says"],
        source=f"P4, {place if place[0].isalpha() else f'section {place}'}",
        reads=reads,
        metrics=(METRIC, "converged"),
        statements=statements,
        layout=layout,
        errata=errata(PRINTED, *_ERRATA.get(number, ())),
    )


def of(*figures: int) -> tuple[str, ...]:
    return tuple(f"p4-figure-{number}" for number in figures)


def every(least: int, most: int, *figures: int) -> list[Statement]:
    """The same range for several figures."""
    return [best(least, most, f"p4-figure-{number}: ", f"figure {number}") for number in figures]


def variance() -> list[dict[str, Any]]:
    """Variance of the weight update of one step at a constant base rate, over that at m = 1.

    Per-sample gradients of softmax regression at weights of zero on scanned digits; batches drawn with replacement.
    """
    split = hj.data.load("digits").train
    images = np.asarray(split.images, np.float64).reshape(len(split.labels), -1) / 255
    errors = np.full((len(images), 10), 0.1) - np.eye(10)[np.asarray(split.labels)]
    gradients = (errors[:, :, None] * images[:, None]).reshape(len(images), -1)
    rng = np.random.default_rng(0)
    found = {}
    for size in (1, 4, 16, 64):
        # rate * mean = base rate * sum
        sums = np.stack([gradients[rng.integers(len(gradients), size=size)].sum(0) for _ in range(4000)])
        found[size] = float(sums.var(0).sum())
    return [{"arm": f"m={size}", "value": total / found[1]} for size, total in found.items()]


CLAIMS = (
    claim(1, of(*CIFAR), *every(2, 32, *CIFAR), layout="best"),
    claim(
        2,
        ("p4-extra-resnet32-without-norm",),
        # Not by the share that converged, which without an exception has no spread and so no interval.
        Statement("the best of 2 to 8 trains, that of 16 on does not", arms(2, 8), arms(16, 2048), METRIC, 10.0, RUNS),
    ),
    claim(3, of(1), best(2, 8)),
    claim(4, of(2, 3), *every(2, 4, 2, 3)),
    claim(
        5,
        of(7),
        Statement(
            "4 is better than 64 at 2^-8 (it should not be)", ("m=4 2^-8",), ("m=64 2^-8",), METRIC, POINTS, RUNS
        ),
        layout="progress",
    ),
    claim(6, of(5), best(8, 64)),
    claim(7, of(6), best(4, 32)),
    claim(8, of(7, 8, 9), *every(4, 8, 7, 8, 9)),
    # "Usable" at the best base rate: the sizes above do worse, each at its own best rate.
    claim(9, of(7, 8), *every(2, 16, 7, 8), layout="reliable"),
    claim(10, of(9), best(2, 8), layout="reliable"),
    claim(11, of(10), best(4, 8)),
    claim(
        12,
        of(10),
        Statement("8 is better than 128 (it should not be)", arms(8, 8), arms(128, 128), METRIC, POINTS, RUNS),
    ),
    claim(13, of(11), best(4, 16)),
    claim(14, of(12), best(16, 64, runs=IMAGENET)),
    claim(
        15,
        of(12),
        over_all_rates(
            "16 and 32 are better than the others over all base rates",
            arms(16, 32),
            tuple(one for one in arms(1, 4096) if one not in arms(16, 32)),
        ),
    ),
    claim(
        16,
        ("p4-figure-13", "p4-figure-13b"),
        *norm(SIZES[2:8], 4, 8, "p4-figure-13: ", "CIFAR-10"),
        *norm(SIZES[2:8], 4, 8, "p4-figure-13b: ", "CIFAR-100"),
        layout="arms",
    ),
    claim(17, ("p4-figure-14",), *norm(SIZES[2:], 16, 64, runs=IMAGENET), layout="arms"),
    claim(18, of(1, 2, 3, 5, 6, 7, 8, 10), *every(2, 16, 1, 2, 3, 5, 6, 7, 8, 10), layout="best"),
    claim(19, of(*CIFAR), *every(2, 32, *CIFAR), layout="best"),
    # "May be useful": as good as the best of the others is enough, which "does not hold" would say.
    claim(
        20,
        of(12),
        Statement(
            "32 and 64 are worse than the best of the others (they should not be)",
            arms(32, 64),
            tuple(one for one in arms(1, 4096) if one not in arms(32, 64)),
            METRIC,
            POINTS,
            IMAGENET,
            higher=False,
        ),
    ),
    claim(21, of(17, 18), *every(2, 32, 17, 18), layout="best"),
    claim(23, of(12), Statement("8 does worse than 16", arms(8, 8), arms(16, 16), METRIC, POINTS, IMAGENET, False)),
)
VARIANCE = Experiment(
    name="p4-claim-22",
    title="at a constant base rate the variance of the weight update grows linearly with the batch size",
    source="P4, sections 2.2, 4",
    computed=variance,
    metrics=("value",),
    printed=("1, 4, 16, 64 would be exactly linear",),
)

EXPERIMENTS = (*CLAIMS, VARIANCE)
