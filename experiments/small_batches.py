"""P4, small batches: figures 1 to 18.

    hardjax table run p4-figure-2 --scale reduced --data-dir DIR --workers 2
    hardjax table plot p4-figure-2

The paper prints neither its runs on CIFAR nor the batch sizes and rates of its grids: ours are powers of two from 2 to
1,024 at base rates 2^-12 to 2^0, five runs. Reduced: 10,000 images, 20 epochs, four sizes by four rates, three runs.
ImageNet is configurations alone: nobody has run them.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import hardjax as hj
from hardjax.study.experiments import Experiment, Scale, Statement, errata, published

PRINTED = published(__file__, "small_batches")
SIZES = tuple(2**power for power in range(1, 11))
RATES = tuple(range(-12, 1))  # logarithms to base 2
SMALL_SIZES, SMALL_RATES = (4, 16, 64, 256), (-10, -8, -6, -4)
RUNS, FEWER, RUNS_IMAGENET = 5, 3, PRINTED["runs_imagenet"]
POINTS = 1.0  # smallest difference of interest, in test accuracy
METRIC = "median test top-1"

BASE = hj.TrainConfig(
    dataset="cifar10", epochs=82, optimizer="sgd", weight_decay=1e-4, schedule="step", evaluate_train=False
)
IMAGENET = dataclasses.replace(
    BASE,
    dataset="imagenet2012",
    model="resnet50",
    model_options={"init": "he_fan_in"},  # not the zeros behind shortcuts of the network's own scheme, which are later
    epochs=90,
    schedule=hj.Schedule("step", decay_at=(30 / 90, 60 / 90, 80 / 90)),
    augmentation="standard",
)
SMOKE = dataclasses.replace(
    BASE, dataset="digits", model="mlp", model_options={"widths": [8]}, epochs=2, weight_decay=0.0, schedule="constant"
)
# Figure -> network, its options, and what else it sets.
GRIDS: dict[int, dict[str, Any]] = {
    1: {"model": "alexnet_reduced", "weight_decay": 5e-4},
    2: {"model": "resnet8", "model_options": {"norm": "none"}},
    3: {"model": "resnet20", "model_options": {"norm": "none"}},
    5: {"model": "alexnet_reduced", "model_options": {"norm": "batch", "norm_dense": True}, "weight_decay": 5e-4},
    6: {"model": "alexnet_reduced", "model_options": {"norm": "batch"}, "weight_decay": 5e-4},
    7: {"model": "resnet32"},
    8: {"model": "resnet32", "augmentation": "standard"},
    9: {"model": "resnet32", "augmentation": "standard", "dataset": "cifar100", "epochs": 164},
    10: {"model": "resnet32", "augmentation": "standard", "schedule": hj.Schedule("step", warmup=0.05)},
    11: {
        "model": "resnet32",
        "augmentation": "standard",
        "dataset": "cifar100",
        "epochs": 164,
        "schedule": hj.Schedule("step", warmup=0.05),
    },
    17: {"model": "resnet32", "augmentation": "standard", "epochs": 41},
    18: {"model": "resnet32", "augmentation": "standard", "epochs": 164},
}
TITLES = {
    1: "reduced AlexNet without batch norm",
    2: "ResNet-8 without batch norm",
    3: "ResNet-20 without batch norm",
    5: "reduced AlexNet with batch norm everywhere",
    6: "reduced AlexNet with batch norm after convolutions",
    7: "ResNet-32",
    8: "ResNet-32, augmented",
    9: "ResNet-32 on CIFAR-100, augmented",
    10: "ResNet-32, augmented, warm-up",
    11: "ResNet-32 on CIFAR-100, augmented, warm-up",
    17: "ResNet-32, augmented, half as many epochs",
    18: "ResNet-32, augmented, twice as many epochs",
}
# What the text calls best.
BEST = {
    1: (2, 8),
    2: (2, 4),
    3: (2, 4),
    5: (8, 64),
    6: (4, 32),
    7: (4, 8),
    8: (4, 8),
    9: (4, 8),
    10: (4, 8),
    11: (4, 16),
    17: (2, 32),
    18: (2, 32),
}


def arm(size: int, rate: int) -> str:
    return f"m={size} 2^{rate}"


def arms(sizes: Iterable[int], rates: Iterable[int]) -> dict[str, dict[str, Any]]:
    return {arm(m, r): {"batch_size": m, "base_learning_rate": 2.0**r} for m in sizes for r in rates}


def between(least: int, most: int, prefix: str = "", sizes: Iterable[int] = SIZES) -> tuple[str, ...]:
    """Arms of the sizes in a range, at every rate."""
    return tuple(f"{prefix}{arm(m, r)}" for m in sizes if least <= m <= most for r in RATES)


def best(says: str, least: int, most: int, prefix: str = "", runs: int = FEWER) -> Statement:
    """The best size lies in a range: the best arm of those within against the best of those outside."""
    inside = between(least, most, prefix)
    outside = tuple(one for one in between(1, 4096, prefix) if one not in inside)
    return Statement(says, inside, outside, METRIC, POINTS, runs)


def reduced(base: hj.TrainConfig) -> hj.TrainConfig:
    # A quarter of the epochs: figures that differ in their length alone go on doing so.
    return dataclasses.replace(base, train_samples=10_000, epochs=round(base.epochs * 20 / 82))


SMOKE_SCALE = Scale(SMOKE, arms((32, 128), (-8, -6)), 1)
FIGURES = tuple(
    Experiment(
        name=f"p4-figure-{number}",
        title=f"test accuracy by base rate and batch size, {TITLES[number]}",
        source=f"P4, figure {number}",
        scales={
            "paper": Scale(
                dataclasses.replace(BASE, **settings),
                arms(SIZES, RATES),
                RUNS,
                departs="not printed: batch sizes 2 to 1024 and base rates 2^-12 to 1 in powers of two, five runs",
            ),
            "reduced": Scale(
                reduced(dataclasses.replace(BASE, **settings)),
                arms(SMALL_SIZES, SMALL_RATES),
                FEWER,
                departs="10,000 images, 20 epochs where the paper has 82, batch 4 to 256, base rates 2^-10 to 2^-4",
            ),
            "smoke": SMOKE_SCALE,
        },
        metrics=(METRIC, "converged"),
        statements=(best(f"the best batch size lies from {BEST[number][0]} to {BEST[number][1]}", *BEST[number]),),
        layout="performance",
        errata=errata(PRINTED, "SE5"),
    )
    for number, settings in GRIDS.items()
)


def parts(sizes: Iterable[int], of: Iterable[int], rate: int) -> dict[str, dict[str, Any]]:
    """Batch norm over parts of the batch, at one base rate."""
    return {
        f"m={m} norm over {part}": {
            "batch_size": m,
            "base_learning_rate": 2.0**rate,
            "model_options": {"norm_batch_size": part},
        }
        for m in sizes
        for part in of
        if part <= m
    }


def best_parts(sizes: Iterable[int], least: int, most: int, runs: int) -> list[Statement]:
    """For each batch size: batch norm over so many of its samples against over fewer or more of them."""
    found = []
    for m in sizes:
        labels = {f"m={m} norm over {part}": part for part in SIZES if part <= m}
        inside = tuple(label for label, part in labels.items() if least <= part <= most)
        outside = tuple(label for label, part in labels.items() if not least <= part <= most)
        if inside and outside:
            says = f"batch norm over {least} to {most} is best at m = {m}"
            found.append(Statement(says, inside, outside, METRIC, POINTS, runs))
    return found


_NORM_SIZES = (8, 16, 32, 64, 128, 256)
_FIGURE_13 = dataclasses.replace(BASE, model="resnet32", augmentation="standard")


def sub_batches(name: str, title: str, base: hj.TrainConfig) -> Experiment:
    return Experiment(
        name=name,
        title=title,
        source="P4, figure 13",
        scales={
            "paper": Scale(
                base,
                parts(_NORM_SIZES, (2, 4, 8, 16, 32, 64, 128), -9),
                RUNS,
                departs="base rate 2^-9 at every batch size, not the best of figure 8 or 9",
            ),
            "reduced": Scale(
                dataclasses.replace(reduced(base), model="resnet8", train_samples=5_000),
                parts((64, 256), (4, 16, 64), -8),
                FEWER,
                departs="ResNet-8, 5,000 images, 20 epochs, base rate 2^-8",
            ),
            "smoke": Scale(
                dataclasses.replace(SMOKE, model_options={"widths": [8], "norm": "batch"}), parts((32,), (8, 32), -8), 1
            ),
        },
        metrics=(METRIC,),
        statements=(
            *best_parts(_NORM_SIZES, 4, 8, FEWER),
            Statement(
                "batch norm over 4 is better than over the whole batch",
                ("m=64 norm over 4",),
                ("m=64 norm over 64",),
                METRIC,
                POINTS,
                FEWER,
            ),
        ),
        printed=("base rates: the best of figures 8 and 9 at the same batch size; values are in the figures alone",),
        layout="arms",
    )


FIGURE_13 = (
    sub_batches("p4-figure-13", "batch norm over parts of the batch, CIFAR-10", _FIGURE_13),
    sub_batches(
        "p4-figure-13b",
        "batch norm over parts of the batch, CIFAR-100",
        dataclasses.replace(_FIGURE_13, dataset="cifar100", epochs=164),
    ),
)
_IMAGENET = "a configuration alone, never run; colours are not jittered"
FIGURE_12 = Experiment(
    name="p4-figure-12",
    title="test accuracy by base rate and batch size, ResNet-50 on ImageNet",
    source="P4, figure 12",
    scales={"paper": Scale(IMAGENET, arms((8, 16, 32, 64, 128, 256), RATES), RUNS_IMAGENET, departs=_IMAGENET)},
    metrics=(METRIC,),
    statements=(best("the best batch size lies from 16 to 64", 16, 64, runs=RUNS_IMAGENET),),
    paper_runs=RUNS_IMAGENET,
    layout="performance",
    errata=errata(PRINTED, "SE2"),
)
FIGURE_14 = Experiment(
    name="p4-figure-14",
    title="batch norm over parts of the batch, ResNet-50 on ImageNet",
    source="P4, figure 14",
    scales={
        "paper": Scale(
            IMAGENET,
            {
                label: settings
                for sizes, rate in (((16, 32, 64, 128, 256, 512, 1024), -10), ((2048,), -9))
                for label, settings in parts(sizes, (4, 8, 16, 32, 64, 128, 256), rate).items()
            },
            RUNS_IMAGENET,
            departs=f"{_IMAGENET}; base rates up to 128 as above it, not the best of figure 12",
        )
    },
    metrics=(METRIC,),
    statements=tuple(best_parts((*SIZES[3:], 2048), 16, 64, RUNS_IMAGENET)),
    paper_runs=RUNS_IMAGENET,
    errata=errata(PRINTED, "SE1"),
)
# What no figure shows: ResNet-32 without batch norm, sizes up to 2048.
WITHOUT_NORM = Experiment(
    name="p4-extra-resnet32-without-norm",
    title="test accuracy by base rate and batch size, ResNet-32 without batch norm",
    source="P4, section 3.2, in no figure",
    scales={
        "paper": Scale(
            dataclasses.replace(BASE, model="resnet32", model_options={"norm": "none"}),
            arms((*SIZES, 2048), RATES),
            RUNS,
        ),
        "smoke": SMOKE_SCALE,
    },
    metrics=(METRIC, "converged"),
    layout="performance",
    errata=errata(PRINTED, "SE4"),
)
FIGURE_4 = Experiment(
    name="p4-figure-4",
    title="test accuracy by epoch at a base rate of 2^-8, ResNet-32",
    source="P4, figure 4",
    reads=("p4-figure-7",),
    arms=tuple(arm(m, -8) for m in SIZES),
    metrics=(METRIC,),
    statements=(
        Statement("4 is better than 64 (it should not be)", (arm(4, -8),), (arm(64, -8),), METRIC, POINTS, FEWER),
        Statement("64 is better than 256", (arm(64, -8),), (arm(256, -8),), METRIC, POINTS, FEWER),
    ),
    layout="progress",
)
_CIFAR_10 = tuple(f"p4-figure-{number}" for number in (1, 2, 3, 5, 6, 7, 8, 10))
FIGURE_15 = Experiment(
    name="p4-figure-15",
    title="best test accuracy by batch size, CIFAR-10",
    source="P4, figure 15",
    reads=_CIFAR_10,
    metrics=(METRIC,),
    statements=tuple(best(f"{name}: the best batch size lies below 32", 2, 16, f"{name}: ") for name in _CIFAR_10),
    layout="best",
    errata=errata(PRINTED, "SE3"),
)
FIGURE_16 = Experiment(
    name="p4-figure-16",
    title="base rates of reliable convergence by batch size",
    source="P4, figure 16",
    reads=(*_CIFAR_10, "p4-figure-9", "p4-figure-11"),
    metrics=(METRIC, "converged"),
    # Not the share that converged, which without an exception has no spread between seeds, and so no interval.
    statements=tuple(
        Statement(
            f"{name}: 2 to 16 are better than 64 to 1024 over all base rates",
            *(
                tuple(
                    f"{name}: {label}" for m in SIZES if (m <= 16 if small else m >= 64) for label in arms([m], RATES)
                )
                for small in (True, False)
            ),
            METRIC,
            POINTS,
            FEWER,
            of_several="mean",
        )
        for name in (*_CIFAR_10, "p4-figure-9", "p4-figure-11")
    ),
    printed=("the range of rates shrinks as the batch grows; no criterion is printed, ours is in docs/sweep.md",),
    layout="reliable",
)

EXPERIMENTS = (*FIGURES, FIGURE_4, FIGURE_12, *FIGURE_13, FIGURE_14, FIGURE_15, FIGURE_16, WITHOUT_NORM)
