"""P1, hard mini-batch training: what an iteration costs (table 1), sizes of the networks (table 2), and claims on both.

hardjax table run p1-table-1 --scale reduced --data-dir DIR
hardjax table run p1-table-2
"""

import dataclasses
from typing import Any

import hardjax as hj
from hardjax.models import zoo
from hardjax.models.summary import size_of
from hardjax.study.experiments import Experiment, Published, Scale, Statement, published

PRINTED = published(__file__, "hard_batches")
RUNS = 3
NETWORKS = {
    "MobileNetV3-S": "mobilenetv3_small_100",
    "EfficientNet-B4": "efficientnet_b4",
    "ResNet-18": "resnet18",
    "EfficientNetV2-S": "efficientnetv2_s",
    "ResNet-50": "resnet50",
}
ARMS: dict[str, dict[str, Any]] = {"ordinary": {}} | {
    f"{delta:g}": {"selection": hj.selection.HardBatches(delta)} for delta in (0.8, 0.5, 0.2)
}
PAPER = hj.TrainConfig(
    dataset="cifar10",
    model="resnet18",
    epochs=10,
    batch_size=512,
    learning_rate=0.005,
    augmentation=hj.Augmentation(resize=128),
    test_every=10,
    evaluate_train=False,
)
REDUCED = dataclasses.replace(
    PAPER, model="resnet8", train_samples=10_000, batch_size=128, augmentation="none", epochs=10, learning_rate=0.02
)
SMOKE = hj.TrainConfig(model="mlp", model_options={"widths": [8]}, epochs=2, batch_size=64, learning_rate=0.02)


def sizes(*names: str) -> list[dict[str, Any]]:
    """Parameters and operations (twice the multiply-adds, and eight for each number that passes batch norm)."""
    found = []
    for title in names:
        entry = zoo.ZOO[NETWORKS[title]]
        size = size_of(zoo.create(NETWORKS[title], entry.num_classes), entry.image_shape)
        extra = 8 * size.normalised if title.startswith("ResNet") else 0
        line = {
            "parameters (million)": size.parameters / 1e6,
            "operations (giga)": (2 * size.multiply_adds + extra) / 1e9,
        }
        found.append({"arm": title} | line)
    return found


EXPERIMENTS = (
    Experiment(
        name="p1-table-1",
        title="time of an iteration by delta, ResNet-18 on CIFAR-10",
        source="P1, table 1 (one NVIDIA A100)",
        scales={
            "paper": Scale(
                PAPER,
                ARMS,
                RUNS,
                departs="10 epochs and three runs are ours; tests are not timed, which the printed times may include",
            ),
            "reduced": Scale(
                REDUCED, ARMS, RUNS, departs="ResNet-8, 10,000 images at their own size, batch 128, rate 0.02"
            ),
            "smoke": Scale(SMOKE, {"ordinary": {}, "0.5": ARMS["0.5"]}, 1),
        },
        published=tuple(
            Published(
                "ordinary" if row["delta"] == 1 else f"{row['delta']:g}",
                "ms a step",
                1e3 * row["seconds_per_iteration"],
            )
            for row in PRINTED["table_1"]
        ),
        metrics=("ms a step", "steps"),
        statements=tuple(
            Statement(f"an iteration at delta {arm} takes longer", (arm,), ("ordinary",), "ms a step", 1.0, RUNS, True)
            for arm in ("0.8", "0.5", "0.2")
        ),
    ),
    Experiment(
        name="p1-table-2",
        title="parameters and operations of the networks, images of 128x128",
        source="P1, table 2",
        computed=lambda: sizes(*NETWORKS),
        published=tuple(
            one
            for row in PRINTED["table_2"]
            for one in (
                Published(row["network"], "parameters (million)", row["parameters_million"]),
                Published(row["network"], "operations (giga)", row["operations_giga"]),
            )
        ),
        metrics=("parameters (million)", "operations (giga)"),
        printed=("digits are cut there, not rounded: 1.528 million is printed 1.52",),
    ),
    *(
        Experiment(
            name=f"p1-claim-{number}",
            title=says,
            source="P1, section 4.4",
            computed=lambda network=network: sizes(network),
            published=(Published(network, "parameters (million)", million),),
            metrics=("parameters (million)",),
        )
        for number, network, says, million in (
            (8, "MobileNetV3-S", "the smallest network has 1.52 million parameters", 1.52),
            (9, "ResNet-50", "the largest network has 23.52 million parameters", 23.52),
        )
    ),
    Experiment(
        name="p1-claim-10",
        title="delta is the share of mini-batches that a round trains",
        source="P1, section 1",
        computed=lambda: [
            {"arm": f"delta {delta:g} of 98 batches", "value": hj.selection.HardBatches(delta).round_steps(98)}
            for delta in (1.0, 0.8, 0.5, 0.2)
        ],
        metrics=("value",),
    ),
)
