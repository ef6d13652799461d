"""P4's questions where a few cores can answer them, beside its own figures.

    hardjax table run p4-extra-perceptron --data-dir DIR --workers 2
    hardjax table plot p4-extra-perceptron

A grid of batch sizes and base rates for a perceptron, and for the reduced AlexNet on fewer images; warm-up and group
norm on ResNet-8, with augmentation. Plain SGD and the base rate as the axis, as in the paper.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import hardjax as hj
from hardjax.study.experiments import Experiment, Scale, Statement

RUNS, POINTS, METRIC = 3, 1.0, "median test top-1"
SIZES, RATES = (4, 8, 16, 32, 64, 128), (-12, -10, -8, -6, -4, -2)  # rates: logarithms to base 2

BASE = hj.TrainConfig(
    dataset="cifar10",
    train_samples=10_000,
    epochs=20,
    optimizer="sgd",
    weight_decay=1e-4,
    schedule="step",
    evaluate_train=False,
)
MNIST = dataclasses.replace(BASE, dataset="mnist", model="mlp")
ALEXNET = dataclasses.replace(BASE, model="alexnet_reduced", weight_decay=5e-4, train_samples=4_000, epochs=10)
RESNET = dataclasses.replace(BASE, model="resnet8", augmentation="standard", train_samples=5_000)
SMOKE = dataclasses.replace(
    BASE,
    dataset="digits",
    train_samples=None,
    model="mlp",
    model_options={"widths": [8]},
    epochs=2,
    weight_decay=0.0,
    schedule="constant",
)


def arm(size: int, rate: int, how: str = "") -> str:
    return f"m={size} 2^{rate}{how}"


def arms(sizes: Sequence[int], rates: Sequence[int], **ways: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every size at every base rate; in each of several ways, where there are any (name -> settings)."""
    return {
        arm(m, r, f", {way.replace('_', ' ')}" if way else ""): {"batch_size": m, "base_learning_rate": 2.0**r, **also}
        for m in sizes
        for r in rates
        for way, also in (ways or {"": {}}).items()
    }


def grid(name: str, title: str, base: hj.TrainConfig, departs: str, points: float) -> Experiment:
    inside, outside = (tuple(arms([m for m in SIZES if (m <= 32) == small], RATES)) for small in (True, False))
    lower, higher = (tuple(arms(SIZES[:3], RATES)), tuple(arms(SIZES[3:], RATES)))
    return Experiment(
        name=name,
        title=title,
        source="ours, beside P4",
        scales={
            "reduced": Scale(base, arms(SIZES, RATES), RUNS, departs=departs),
            "smoke": Scale(SMOKE, arms((32, 128), (-8, -6)), 1),
        },
        metrics=(METRIC, "converged"),
        statements=(
            Statement("the best batch size is 32 or less", inside, outside, METRIC, points, RUNS),
            Statement("4 to 16 are better than 32 to 128, each at its best rate", lower, higher, METRIC, points, RUNS),
            # The range of usable rates: what diverges counts with what it predicts.
            Statement(
                "4 to 16 are better than 32 to 128 over all base rates",
                lower,
                higher,
                METRIC,
                points,
                RUNS,
                of_several="mean",
                late=True,
            ),
        ),
        layout="performance",
    )


def pairs(
    name: str,
    title: str,
    epochs: int,
    sizes: Sequence[int],
    rates: Sequence[int],
    better: str,
    **ways: Mapping[str, Any],
) -> Experiment:
    """Two ways at the same sizes and rates; `better` is the one that is claimed to be so."""
    (other,) = [way for way in ways if way != better]
    known = arms(sizes, rates, **ways)
    small = {f"{m} {way}": one for m, (way, one) in zip((32, 128), ways.items(), strict=True)}
    return Experiment(
        name=name,
        title=title,
        source="ours, beside P4",
        scales={
            "reduced": Scale(
                dataclasses.replace(RESNET, epochs=epochs),
                known,
                RUNS,
                departs=f"ResNet-8, 5,000 images, {epochs} epochs",
            ),
            "smoke": Scale(
                dataclasses.replace(SMOKE, model_options={"widths": [8], "norm": "batch"}),
                {label: {"batch_size": 32, "base_learning_rate": 2.0**-8, **one} for label, one in small.items()},
                1,
            ),
        },
        metrics=(METRIC, "converged"),
        statements=tuple(
            Statement(
                f"batch {m} at 2^{r}: {better.replace('_', ' ')} tests better than {other.replace('_', ' ')}",
                tuple(arms([m], [r], **{better: {}})),
                tuple(arms([m], [r], **{other: {}})),
                METRIC,
                POINTS,
                RUNS,
            )
            for m in sizes
            for r in rates
        ),
        layout="arms",
    )


EXPERIMENTS = (
    grid(
        "p4-extra-perceptron",
        "test accuracy by base rate and batch size, perceptron on MNIST",
        MNIST,
        "10,000 images, 20 epochs",
        0.2,
    ),
    grid(
        "p4-extra-alexnet",
        "test accuracy by base rate and batch size, reduced AlexNet on 4,000 images",
        ALEXNET,
        "4,000 images of CIFAR-10, 10 epochs",
        POINTS,
    ),
    pairs(
        "p4-extra-warmup",
        "with and without warm-up, ResNet-8 on CIFAR-10",
        20,
        (64, 256),
        (-8, -6),
        "warm-up",
        **{"warm-up": {"schedule": hj.Schedule("step", warmup=0.05)}, "at_once": {}},
    ),
    pairs(
        "p4-extra-group-norm",
        "group norm beside batch norm at small batches, ResNet-8 on CIFAR-10",
        10,
        (2, 4, 8),
        (-8,),
        "group_norm",
        group_norm={"model_options": {"norm": "group"}},
        batch_norm={"model_options": {"norm": "batch"}},
    ),
)
