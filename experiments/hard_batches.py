"""P1, hard mini-batch training: tables 3 to 6, figures 1 and 3 to 5, and the claims made of them.

    hardjax table run p1-table-3 --scale reduced --data-dir DIR --workers 2

Reduced: ResNet-8, 5,000 images of 32x32 as they are, batch 64 (79 batches), 40 epochs, tested every second one, all
controls and ordinary training with a decayed rate. `p1-table-5` stands for the paper's few batches: ten of 256 images
of CIFAR-10. Not printed in the paper, and ours: 100 epochs, ten runs.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import hardjax as hj
from hardjax.study.experiments import Experiment, Published, Scale, Statement, errata, published

PRINTED = published(__file__, "hard_batches")
DELTAS = (0.8, 0.5, 0.2)
NETWORKS = {
    "ResNet-18": "resnet18",
    "ResNet-50": "resnet50",
    "EfficientNet-B4": "efficientnet_b4",
    "EfficientNetV2-S": "efficientnetv2_s",
    "MobileNetV3-S": "mobilenetv3_small_100",
}
SMALL = {"ResNet-8": "resnet8"}
DEEP = {"ResNet-20": "resnet20"}
CHEAP = {"MLP": "mlp"}
TABLES = {3: ("CIFAR-10", "cifar10"), 4: ("CIFAR-100", "cifar100"), 5: ("STL-10", "stl10")}
# Epochs may be missed, and seeds that all agree have p = 2 / 2^n in the sign test: Holm's first of two takes seven of
# them, of fifteen (five networks by three deltas) ten.
RUNS, FEWER = 10, 7
POINTS, EPOCHS, SECONDS = 0.5, 1.0, 1.0  # smallest differences of interest: test accuracy, epochs of 40, training time
TESTED = 2  # ours are tested so many epochs apart, and sooner by less than that says nothing
METRICS = ("train top-1", "test top-1", "epochs to converge", "ms a step")

PAPER = hj.TrainConfig(
    model="resnet18",
    epochs=100,
    batch_size=512,
    learning_rate=0.005,
    augmentation=hj.Augmentation(resize=128),
)
# Tests of all 15,000 images take as long as an epoch of training: every second epoch.
MANY = hj.TrainConfig(
    model="resnet8", train_samples=5_000, epochs=40, batch_size=64, learning_rate=0.02, test_every=TESTED
)
FEW = dataclasses.replace(MANY, train_samples=2_560, epochs=60, batch_size=256, learning_rate=0.1)
# Half a minute a run: with as many seeds, and as many batches, as one likes.
MLP_MANY = dataclasses.replace(
    MANY, model="mlp", dataset="fashion_mnist", train_samples=10_000, batch_size=128, test_every="epoch"
)
MLP_FEW = dataclasses.replace(MLP_MANY, train_samples=5_000, epochs=100, batch_size=512, learning_rate=0.1)
SMOKE = hj.TrainConfig(model="mlp", model_options={"widths": [8]}, epochs=2, batch_size=64, learning_rate=0.02)


def arms(networks: dict[str, str], deltas: Iterable[float]) -> dict[str, dict[str, Any]]:
    """Ordinary training, hard replay, and the controls of both."""
    found: dict[str, dict[str, Any]] = {}
    for title, model in networks.items():
        own = {} if model == "mlp" else {"model": model}
        found[f"{title} ordinary"] = own
        found |= {f"{title} {d:g}": own | {"selection": hj.selection.HardBatches(d)} for d in deltas}
        found |= {f"{title} random {d:g}": own | {"selection": hj.selection.RandomBatches(d)} for d in deltas}
        found[f"{title} fixed"] = own | {"selection": hj.selection.AllBatches(fixed=True)}
        found[f"{title} decayed"] = own | {"schedule": hj.Schedule("step")}
    return found


def runs_of(title: str) -> int:
    """Of a network of the paper, or of ours in its place."""
    return RUNS if title in (*NETWORKS, *CHEAP) else FEWER


def epochs_of(title: str) -> float:
    """The smallest difference of interest in epochs."""
    return TESTED if title in (*SMALL, *DEEP) else EPOCHS


def claims(networks: Iterable[str], deltas: Iterable[float], prefix: str = "") -> tuple[Statement, ...]:
    """What the paper claims of replay, against ordinary training and against each control: a family each."""
    found = []
    for title in networks:
        name = f"{prefix}{title}"
        for delta in deltas:
            others = ("ordinary", f"random {delta:g}", "fixed")
            arm = (f"{name} {delta:g}",)
            for says, metric, smallest, against in (
                ("is sooner", "epochs to a common level", epochs_of(title), others),
                ("tests better", "test top-1", POINTS, (*others, "decayed")),
            ):
                found += [
                    Statement(
                        f"{title} {delta:g} {says}",
                        arm,
                        (f"{name} {other}",),
                        metric,
                        smallest,
                        runs_of(title),
                        family=f"{metric} against {other.split()[0]}",
                    )
                    for other in against
                ]
    return tuple(found)


def printed(table: int) -> tuple[Published, ...]:
    found = []
    for row in PRINTED["tables_3_to_5"]:
        if row["table"] == table:
            arm = f"{row['network']} {'ordinary' if row['delta'] == 1 else format(row['delta'], 'g')}"
            found += [Published(arm, f"{of} top-1", *row[f"{of}_top1"]) for of in ("train", "test")]
            found.append(Published(arm, "epochs to converge", row["epoch"]))
    return tuple(found)


def changes(table: int) -> str:
    """The column of the table that no number of ours stands beside, since not all of it follows from its epochs."""
    rows = [row for row in PRINTED["tables_3_to_5"] if row["table"] == table and row.get("change_percent") is not None]
    return "change of the epoch: " + ", ".join(
        f"{row['network']} {row['delta']:g} {row['change_percent']:g} %" for row in rows
    )


def scales(dataset: str, base: hj.TrainConfig, departs: str) -> dict[str, Scale]:
    return {
        "paper": Scale(dataclasses.replace(PAPER, dataset=dataset), arms(NETWORKS, DELTAS), RUNS, departs=_PAPER),
        "reduced": Scale(base, arms(SMALL, (0.5, 0.2)), FEWER, departs=departs),
        "smoke": Scale(SMOKE, arms({"Perceptron": "mlp"}, (0.5,)), 1),
    }


_PAPER = "100 epochs and ten runs, which are not printed; images resized to 128x128, printed as cropped"
_MANY = "{}, 5,000 images of {} at their own size, batch 64 (79 batches), {} epochs, tested every second, rate 0.02"
_FEW = (
    "ResNet-8, 2,560 images of CIFAR-10 at their own size, batch 256 (10 batches), 60 epochs, tested every second,"
    " rate 0.1"
)
REDUCED = {
    3: (dataclasses.replace(MANY, dataset="cifar10"), _MANY.format("ResNet-8", "CIFAR-10", 40)),
    4: (dataclasses.replace(MANY, dataset="cifar100"), _MANY.format("ResNet-8", "CIFAR-100", 40)),
    5: (dataclasses.replace(FEW, dataset="cifar10"), _FEW),
}
TABLES_3_TO_5 = tuple(
    Experiment(
        name=f"p1-table-{table}",
        title=f"accuracy and epoch of convergence by delta, {title}",
        source=f"P1, table {table}",
        scales=scales(dataset, *REDUCED[table]),
        published=printed(table),
        metrics=METRICS,
        statements=(*claims(NETWORKS, DELTAS), *claims(SMALL, (0.5, 0.2)), *claims(["Perceptron"], (0.5,))),
        layout="curves",
        printed=(changes(table),),
        errata=errata(PRINTED, *(("HE1",) if table == 4 else ()), "HE2", "HE3", "HE4", "HE12", "HE13"),
    )
    for table, (title, dataset) in TABLES.items()
)


def extra(
    name: str,
    title: str,
    base: hj.TrainConfig,
    networks: dict[str, str],
    departs: str,
    deltas: tuple[float, ...] = (0.5, 0.2),
    more: tuple[Statement, ...] = (),
) -> Experiment:
    """A comparison of ours that the paper has not."""
    return Experiment(
        name=f"p1-extra-{name}",
        title=title,
        source="ours, in the manner of P1's tables 3 to 5",
        scales={
            "reduced": Scale(base, arms(networks, deltas), max(map(runs_of, networks)), departs=departs),
            "smoke": Scale(SMOKE, arms({"Perceptron": "mlp"}, (0.5,)), 1),
        },
        metrics=METRICS,
        statements=(*claims(networks, deltas), *claims(["Perceptron"], (0.5,)), *more),
        layout="curves",
    )


def soonest(delta: float) -> Statement:
    """Claim 16 on the perceptron: few batches, 0.5; many, 0.2."""
    others = tuple(f"MLP {other:g}" for other in DELTAS if other != delta)
    says = f"MLP is soonest at delta {delta:g}"
    return Statement(says, (f"MLP {delta:g}",), others, "epochs to converge", EPOCHS, RUNS, family="which delta")


FASHION = extra(
    "fashion",
    "accuracy and epoch of convergence by delta, Fashion-MNIST",
    dataclasses.replace(MANY, dataset="fashion_mnist"),
    SMALL,
    _MANY.format("ResNet-8", "Fashion-MNIST", 40),
)
CHEAP_MANY = extra(
    "perceptron",
    "accuracy and epoch of convergence by delta, perceptron on Fashion-MNIST, many batches",
    MLP_MANY,
    CHEAP,
    "a perceptron, 10,000 images of Fashion-MNIST, batch 128 (79 batches), 40 epochs, rate 0.02",
    DELTAS,
    (soonest(0.2),),
)
CHEAP_FEW = extra(
    "perceptron-few",
    "accuracy and epoch of convergence by delta, perceptron on Fashion-MNIST, few batches",
    MLP_FEW,
    CHEAP,
    "a perceptron, 5,000 images of Fashion-MNIST, batch 512 (10 batches), 100 epochs, rate 0.1",
    DELTAS,
    (soonest(0.5),),
)
_DEEPER = extra(
    "resnet20",
    "one pair of arms on a deeper network, CIFAR-10",
    dataclasses.replace(MANY, dataset="cifar10", epochs=20),
    DEEP,
    _MANY.format("ResNet-20", "CIFAR-10", 20),
)
_PAIR = tuple(f"ResNet-20 {arm}" for arm in ("ordinary", "0.5", "random 0.5"))
_ALL = _DEEPER.scales["reduced"]
DEEPER = dataclasses.replace(
    _DEEPER,
    scales=_DEEPER.scales | {"reduced": dataclasses.replace(_ALL, arms={arm: _ALL.arms[arm] for arm in _PAIR})},
    statements=(
        *(one for one in claims(["ResNet-20"], (0.5,)) if {*one.arms, *one.against} <= {*_PAIR}),
        *claims(["Perceptron"], (0.5,)),
    ),
)


def trained_on(table: int, title: str) -> str:
    """A network and its data, for people: ours has other data in the place of STL-10."""
    others = {"Perceptron": "digits"} | (dict.fromkeys(SMALL, "ten batches of CIFAR-10") if table == 5 else {})
    return f"{title} on {others.get(title, TABLES[table][0])}"


BEST = {
    (table, title): Statement(
        f"the best delta tests better, {trained_on(table, title)}",
        tuple(f"p1-table-{table}: {title} {delta:g}" for delta in DELTAS),
        (f"p1-table-{table}: {title} ordinary",),
        "test top-1",
        POINTS,
        runs_of(title),
    )
    for table in TABLES
    for title in (*NETWORKS, *SMALL, "Perceptron")
}
TABLE_6 = Experiment(
    name="p1-table-6",
    title="gain in test accuracy of the best delta",
    source="P1, table 6",
    reads=tuple(one.name for one in TABLES_3_TO_5),
    metrics=("test top-1",),
    statements=tuple(BEST.values()),
    printed=tuple(
        f"{row['network']} on {row['dataset']}: {row['percent']} % of the new accuracy, by the tables"
        f" {row['points']:+g} points at delta {row['delta']:g}"
        for row in PRINTED["table_6"]
    ),
    errata=errata(PRINTED, "HE1", "HE5", "HE6"),
)


def with_ours(networks: Iterable[str], delta: float) -> tuple[str, ...]:
    """Networks of the paper, and those that stand for them at the smaller scales, which have fewer deltas."""
    return (*networks, *(SMALL if delta in (0.5, 0.2) else ()), *(("Perceptron",) if delta == 0.5 else ()))


def figure(number: int, table: int, network: str, title: str, *names: str) -> Experiment:
    titles = (network, *SMALL, "Perceptron")
    arms = tuple(f"{one} {arm}" for one in titles for arm in ("ordinary", *(f"{d:g}" for d in DELTAS)))
    said = [one for delta in DELTAS for one in claims(with_ours([network], delta), (delta,))]
    return Experiment(
        name=f"p1-figure-{number}",
        title=f"{title}, {network} on {TABLES[table][0]}",
        source=f"P1, figure {number}",
        reads=(f"p1-table-{table}",),
        arms=arms,
        metrics=METRICS,
        # Of the controls it shows nothing.
        statements=tuple(one for one in said if {*one.arms, *one.against} <= {*arms}),
        layout="curves",
        errata=errata(PRINTED, *names),
    )


FIGURES = (
    figure(1, 3, "ResNet-18", "convergence", "HE7"),
    figure(3, 3, "ResNet-18", "generalisation by delta", "HE11"),
    figure(4, 5, "EfficientNet-B4", "generalisation by delta", "HE11"),
    figure(5, 4, "ResNet-18", "generalisation by delta", "HE1", "HE11"),
)


def claim(number: int, table: int, statements: Iterable[Statement], *names: str) -> Experiment:
    (found,) = (one for one in PRINTED["claims"] if one["id"] == f"H{number}")
    tables = (table,) if table else tuple(TABLES)
    return Experiment(
        name=f"p1-claim-{number}",
        title=found["says"],
        source=f"P1, section {found['where']}",
        reads=tuple(f"p1-table-{one}" for one in tables),
        metrics=METRICS,
        statements=tuple(dataclasses.replace(one, family="") for one in statements),
        layout="curves",
        errata=errata(PRINTED, *names),
    )


def sooner(networks: Iterable[str], delta: float, against: str = "ordinary") -> list[Statement]:
    return [
        s
        for s in claims(with_ours(networks, delta), (delta,))
        if s.metric != "test top-1" and s.against[0].endswith(against)
    ]


def timed(one: Statement) -> Statement:
    return dataclasses.replace(one, metric="seconds to a common level", smallest=SECONDS)


def better(networks: Iterable[str], delta: float, against: str = "") -> list[Statement]:
    every = claims(with_ours(networks, delta), (delta,))
    return [s for s in every if s.metric == "test top-1" and s.against[0].endswith(against)]


def worse(one: Statement) -> Statement:
    return dataclasses.replace(one, says=one.says.replace("better", "worse"), higher=False)


def order(
    says: str,
    arms: Iterable[str],
    against: Iterable[str],
    metric: str,
    smallest: float,
    runs: int,
    higher: bool | None = None,
) -> Statement:
    return Statement(says, tuple(arms), tuple(against), metric, smallest, runs, higher)


def _extreme(network: str, arm: str, higher: bool) -> list[Statement]:
    """Is a network above, or below, each of the others? Below the best of them would not be the lowest."""
    return [
        order(
            f"{network} is {'above' if higher else 'below'} {other} at delta {'1.0' if arm == 'ordinary' else arm}",
            [f"{network} {arm}"],
            [f"{other} {arm}"],
            "test top-1",
            POINTS,
            RUNS,
            higher,
        )
        for other in NETWORKS
        if other != network
    ]


def _fastest(table: int, delta: float) -> list[Statement]:
    """Is one delta sooner than the others?"""
    found = []
    for title in (*NETWORKS, *SMALL):
        name = f"p1-table-{table}: {title}"
        others = [f"{name} {other:g}" for other in DELTAS if other != delta]
        says = f"{trained_on(table, title)} is soonest at delta {delta:g}"
        found.append(order(says, [f"{name} {delta:g}"], others, "epochs to converge", epochs_of(title), runs_of(title)))
    return found


def on_average(networks: Iterable[str]) -> Statement:
    """Over networks, data and deltas alike: the paper's mean is over those that tested better, chosen by looking."""
    titles = [f"p1-table-{table}: {title}" for table in TABLES for title in networks]
    return Statement(
        "replay tests better on average over networks, data and deltas",
        tuple(f"{title} {delta:g}" for title in titles for delta in DELTAS),
        tuple(f"{title} ordinary" for title in titles),
        "test top-1",
        POINTS,
        max(map(runs_of, networks)),
        of_several="mean",
    )


CLAIMS = (
    claim(1, 5, sooner(["EfficientNet-B4"], 0.5), "HE3"),
    claim(2, 4, better(["ResNet-18"], 0.2), "HE1"),
    claim(3, 3, sooner(["ResNet-18"], 0.2), "HE7"),
    claim(4, 3, [timed(s) for s in sooner(["ResNet-18"], 0.2)], "HE2"),
    claim(5, 3, [worse(s) for s in better(["ResNet-18"], 0.2, "ordinary")]),  # of the controls nothing is said
    claim(6, 0, BEST.values(), "HE1", "HE6"),
    claim(7, 0, [on_average(titles) for titles in (tuple(NETWORKS), tuple(SMALL), ("Perceptron",))], "HE1", "HE6"),
    claim(
        11, 3, [s for arm in ("ordinary", "0.8", "0.5", "0.2") for s in _extreme("EfficientNet-B4", arm, False)], "HE8"
    ),
    claim(12, 3, [s for arm in ("ordinary", "0.8") for s in _extreme("ResNet-18", arm, True)]),
    claim(13, 3, better(["EfficientNet-B4"], 0.2)),
    claim(14, 4, [s for delta in (0.5, 0.2) for s in better(NETWORKS, delta)], "HE1", "HE9"),
    claim(15, 4, sooner(NETWORKS, 0.2)),
    claim(16, 0, [s for table, delta in ((3, 0.2), (4, 0.2), (5, 0.5)) for s in _fastest(table, delta)], "HE10"),
)

EXPERIMENTS = (*TABLES_3_TO_5, FASHION, CHEAP_MANY, CHEAP_FEW, DEEPER, TABLE_6, *FIGURES, *CLAIMS)
