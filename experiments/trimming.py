"""P2, mini-batch trimming: table 1 and the claims made of it.

    hardjax table run p2-table-1 --scale reduced --data-dir DIR --workers 2

Reduced: ResNet-8 with and without batch norm, 5,000 images of CIFAR-10, 40 epochs, rate halved after each third, tested
every fourth epoch; the control keeps as many at random. Without batch norm the dropped samples cost no backward pass:
there time counts too.
"""

import dataclasses
from typing import Any

import hardjax as hj
from hardjax.study.experiments import Experiment, Published, Scale, Statement, errata, published

PRINTED = published(__file__, "trimming")
NETWORKS = {"ResNet-34": "resnet34", "DenseNet-121": "densenet121"}
DATA = {"SVHN": "svhn_cropped", "CIFAR-10": "cifar10", "CIFAR-100": "cifar100"}
POINTS = 0.5  # smallest difference of interest, in test error; the published ones are 0.09 to 0.77
METHODS: dict[str, dict[str, Any]] = {
    "standard": {},
    "trimmed": {"trimming": hj.trimming.Trimming()},
    "random-trimmed": {"trimming": hj.trimming.Trimming(keep="random")},
}
PAPER = hj.TrainConfig(
    epochs=150,
    batch_size=128,
    optimizer="adam",
    learning_rate=0.001,
    weight_decay=1e-4,
    schedule=hj.Schedule("step", decay_at=(1 / 3, 2 / 3), decay_factor=0.5),
)
REDUCED = dataclasses.replace(PAPER, dataset="cifar10", train_samples=5_000, model="resnet8", epochs=40, test_every=4)
SMOKE = dataclasses.replace(PAPER, model="mlp", model_options={"widths": [8]}, epochs=2, batch_size=64)
RUNS, FEWER = 10, 5  # as in the paper, and reduced
METRICS = ("train error", "test error", "ms a step")


def arms(titles: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {f"{title} {method}": own | more for title, own in titles.items() for method, more in METHODS.items()}


def statements(title: str, runs: int, prefix: str = "") -> tuple[Statement, ...]:
    name = f"{prefix}{title}"
    return tuple(
        Statement(
            f"{title}: trimming tests better", (f"{name} trimmed",), (f"{name} {other}",), "test error", POINTS, runs
        )
        for other in ("standard", "random-trimmed")
    )


def faster(title: str) -> Statement:
    says = f"{title}: a trimmed step is faster"
    return Statement(says, (f"{title} trimmed",), (f"{title} standard",), "ms a step", 1.0, FEWER)


TITLES = [f"{network} on {data}" for data in DATA for network in NETWORKS]
WITH, WITHOUT, SMALL = "ResNet-8", "ResNet-8 without norm", "Perceptron"
ROWS = {(row["dataset"], row["network"]): row for row in PRINTED["table_1"]}


def scales(dataset: str) -> dict[str, Scale]:
    networks = {WITH: {}, WITHOUT: {"model_options": {"norm": "none"}}}
    departs = f"ResNet-8, 5,000 images of {dataset}, 40 epochs, also without batch norm"
    return {
        "reduced": Scale(dataclasses.replace(REDUCED, dataset=dataset), arms(networks), FEWER, departs=departs),
        "smoke": Scale(SMOKE, arms({SMALL: {}}), 1),
    }


TABLE = Experiment(
    name="p2-table-1",
    title="test error with and without trimming",
    source="P2, table 1",
    scales=scales("cifar10")
    | {
        "paper": Scale(
            PAPER,
            arms({f"{n} on {d}": {"model": NETWORKS[n], "dataset": DATA[d]} for d in DATA for n in NETWORKS}),
            RUNS,
            departs="stems of ImageNet, no augmentation, SVHN without its extra images: not printed",
        )
    },
    published=tuple(
        Published(f"{network} on {data} {method}", "test error", row[method])
        for (data, network), row in ROWS.items()
        for method in ("standard", "trimmed")
    ),
    metrics=METRICS,
    statements=(
        *(s for title in TITLES for s in statements(title, RUNS)),
        *(s for title in (WITH, WITHOUT, SMALL) for s in statements(title, FEWER)),
        faster(WITHOUT),
        faster(WITH),
    ),
    paper_runs=PRINTED["runs"],
    errata=errata(PRINTED, "TE1", "TE3", "TE4"),
)
FASHION = Experiment(
    name="p2-extra-fashion",
    title="test error with and without trimming, Fashion-MNIST",
    source="ours, in the manner of P2's table 1",
    scales=scales("fashion_mnist"),
    metrics=METRICS,
    statements=(
        *(s for title in (WITH, WITHOUT, SMALL) for s in statements(title, FEWER)),
        faster(WITHOUT),
        faster(WITH),
    ),
)
# Half a minute a run: as many of them as the paper has.
MLP = "MLP on Fashion-MNIST"
CHEAP = Experiment(
    name="p2-extra-perceptron",
    title="test error with and without trimming, perceptron on Fashion-MNIST",
    source="ours, in the manner of P2's table 1",
    scales={
        "reduced": Scale(
            dataclasses.replace(REDUCED, dataset="fashion_mnist", model="mlp", train_samples=10_000),
            arms({MLP: {}}),
            RUNS,
            departs="a perceptron, 10,000 images of Fashion-MNIST, 40 epochs",
        ),
        "smoke": Scale(SMOKE, arms({SMALL: {}}), 1),
    },
    metrics=METRICS,
    statements=(
        *statements(MLP, RUNS),
        *statements(SMALL, FEWER),
        dataclasses.replace(faster(MLP), smallest=0.1, runs=RUNS),
    ),
)
CLAIMS = (
    Experiment(
        name="p2-claim-1",
        title=PRINTED["claims"][0]["says"],
        source="P2, section 3",
        reads=("p2-table-1",),
        metrics=METRICS,
        statements=(
            *(s for title in TITLES for s in statements(title, RUNS)[:1]),
            *(s for title in (WITH, WITHOUT, SMALL) for s in statements(title, FEWER)[:1]),
        ),
        paper_runs=PRINTED["runs"],
        errata=errata(PRINTED, "TE1"),
    ),
    Experiment(
        name="p2-claim-2",
        title=PRINTED["claims"][1]["says"],
        source="P2, section 3",
        reads=("p2-table-1",),
        arms=tuple(f"DenseNet-121 on CIFAR-10 {method}" for method in METHODS),
        metrics=METRICS,
        statements=tuple(
            dataclasses.replace(s, says=s.says.replace("better", "worse"), higher=True)
            for s in statements("DenseNet-121 on CIFAR-10", RUNS)[:1]
        ),
        paper_runs=PRINTED["runs"],
        errata=errata(PRINTED, "TE1"),
    ),
    Experiment(
        name="p2-claim-3",
        title=PRINTED["claims"][2]["says"],
        source="P2, section 2",
        computed=lambda: [
            {"arm": f"epoch {epoch + 1} of 150, percent kept", "value": 100 * hj.trimming.Trimming().share(epoch, 150)}
            for epoch in (0, 149)
        ],
        published=(Published("epoch 150 of 150, percent kept", "value", 20),),
        metrics=("value",),
    ),
)

EXPERIMENTS = (TABLE, FASHION, CHEAP, *CLAIMS)
