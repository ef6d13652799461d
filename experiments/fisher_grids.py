"""P3, Fisher characterisation: the supplement's 18 grids and dynamic rows, nine of each with both errors.

    hardjax table run p3-grid-mlp-mnist --scale reduced --data-dir DIR --workers 2
    hardjax table run p3-dynamic-mlp-mnist --scale reduced --data-dir DIR --workers 2

The perceptron on MNIST is run as published but for the reading of its input (batch norm, digits placed at random in
32x32: `LOG.md`), from batch 32 on. Other networks reduced: 8 layers, 10,000 images, 40 epochs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import hardjax as hj
from hardjax.study import beacon_file
from hardjax.study.experiments import Experiment, Published, Scale, Statement, errata, published

PRINTED = published(__file__, "fisher")
RUNS, FEWER = PRINTED["runs"], 3
NETWORKS = {"resnet": "ResNet", "densenet": "DenseNet", "mlp": "MLP"}
DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN", "mnist": "MNIST"}
POINTS = {"cifar10": 0.2, "cifar100": 0.5, "svhn": 0.1, "mnist": 0.1}  # smallest differences of interest
PAIRS = tuple(name.removesuffix("_test") for name in PRINTED["grids"] if name.endswith("_test"))
METRICS = ("test error", "train error", "log10 C_K", "log10 C_K at 1e-6", "log10 L_K", "steps", "seconds")

BASE = hj.TrainConfig(
    epochs=320,
    optimizer="nesterov",
    learning_rate=0.1,
    weight_decay=1e-4,
    schedule="step",
    augmentation="standard",
    measure=hj.fisher.FisherMeasure(every=50),
    test_every=8,
)
_MNIST = dataclasses.replace(
    BASE, dataset="mnist", epochs=40, test_every=4, augmentation=hj.Augmentation(frame=32, place="random")
)
_SVHN = dataclasses.replace(BASE, dataset="svhn_cropped_extra", epochs=40, test_every=1)
PAPER = {
    "resnet_cifar10": dataclasses.replace(BASE, dataset="cifar10", model="cbrcb_resnet110"),
    "densenet_cifar10": dataclasses.replace(BASE, dataset="cifar10", model="densenet110"),
    "resnet_cifar100": dataclasses.replace(BASE, dataset="cifar100", model="cbrcb_resnet110"),
    "densenet_cifar100": dataclasses.replace(BASE, dataset="cifar100", model="densenet110"),
    "resnet_svhn": dataclasses.replace(_SVHN, model="cbrcb_resnet110"),
    "densenet_svhn": dataclasses.replace(_SVHN, model="densenet110"),
    "resnet_mnist": dataclasses.replace(_MNIST, model="cbrcb_resnet8"),
    "densenet_mnist": dataclasses.replace(_MNIST, model="densenet8"),
    "mlp_mnist": dataclasses.replace(_MNIST, model="mlp", model_options={"norm": "batch"}),
}
SMOKE = dataclasses.replace(
    BASE,
    dataset="digits",
    model="mlp",
    model_options={"widths": [8]},
    epochs=2,
    augmentation="none",
    test_every=1,
    measure=hj.fisher.FisherMeasure(every=5),
)


def arm(size: int, rate: float) -> str:
    return f"s{size}-lr{rate:g}"


def cells(sizes: Any, rates: Any) -> dict[str, dict[str, Any]]:
    return {arm(m, r): {"batch_size": m, "learning_rate": r} for r in rates for m in sizes}


def plans(names: Any) -> dict[str, dict[str, Any]]:
    return {name: {"batch_plan": hj.batch_plan.BatchPlan(name)} for name in names}


def reduced(name: str) -> hj.TrainConfig:
    """8 layers, 10,000 images of the same data, 40 epochs."""
    network, _ = name.split("_")
    model = {"resnet": "cbrcb_resnet8", "densenet": "densenet8"}[network]
    return dataclasses.replace(PAPER[name], model=model, train_samples=10_000, epochs=40, test_every=4)


def departing(name: str, words: str = "") -> str:
    """In what the runs of any scale depart from the text, which augments all data as He et al. do and has no norm."""
    read = {"svhn": "digits are not flipped", "mnist": "digits are placed at random in 32x32, not cropped and flipped"}
    norm = "batch norm in the perceptron" * name.startswith("mlp")
    return "; ".join(filter(None, (words, read.get(name.split("_")[1]), norm)))


def title(name: str) -> str:
    network, data = name.split("_")
    return f"{NETWORKS[network]} on {DATA[data]}"


def label(kind: str, name: str) -> str:
    return f"p3-{kind}-{name.replace('_', '-')}"


def row_of_mnist(line: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `mnist_dynamic.py`, as the sweep would have written it."""
    trail = beacon_file.from_plain(line["trail"])
    known = [place for place, value in enumerate(line["trail"]["errors"]["test"]) if value is not None]
    top1 = {split: [100 - line["trail"]["errors"][split][place] for place in known] for split in ("test", "train")}
    epochs = [float(trail.epoch[place]) for place in known]
    return {
        "arm": line["arm"],
        "seed": line["seed"],
        "config": line["settings"],
        "status": "diverged" if trail.diverged else "done",
        "metrics": {
            "final_test_error": trail.test_error,
            "final_train_error": trail.train_error,
            "final_test_top1": 100 - trail.test_error,
            "final_full_train_top1": 100 - trail.train_error,
            "backprops": line["backprops"],
        },
        "history": {"epoch": epochs, "test_top1": top1["test"], "full_train_top1": top1["train"]},
        "trail": line["trail"],
        # A run beside other work says nothing of its time; a row without one was that.
        "seconds": None if line["train_seconds"] is None else line["train_seconds"] + line["compile_seconds"],
        "train_seconds": line["train_seconds"],
        "device": line["device"],
        "versions": line["versions"],
        "commit": None,
    }


def printed_cells(name: str) -> tuple[Published, ...]:
    found = []
    for split in ("test", "train"):
        grid = PRINTED["grids"][f"{name}_{split}"]
        if split == "train" and name == "mlp_mnist":  # the test errors once more
            continue
        for rate, means, spreads in zip(grid["learning_rates"], grid["mean"], grid["std"], strict=True):
            for size, mean, spread in zip(grid["batch_sizes"], means, spreads, strict=True):
                found.append(Published(arm(size, rate), f"{split} error", mean, spread))
    return tuple(found)


def in_best_range(name: str) -> tuple[Statement, ...]:
    """The best configuration lies in the range that the text calls best."""
    grid, found = PRINTED["grids"][f"{name}_test"], []
    for one in PRINTED["best_ranges"]:
        if title(name) == f"{one['model']} on {one['dataset']}":
            (least, most), (low, high) = one["batch_sizes"], one["learning_rates"]
            sizes, rates = grid["batch_sizes"], grid["learning_rates"]
            inside = tuple(cells([m for m in sizes if least <= m <= most], [r for r in rates if low <= r <= high]))
            outside = tuple(one for one in cells(sizes, rates) if one not in inside)
            says = f"the best configuration has a batch of {least} to {most} and a rate of {low:g} to {high:g}"
            found.append(Statement(says, inside, outside, "test error", POINTS[name.split("_")[1]], FEWER))
    return tuple(found)


def grid_scales(name: str) -> dict[str, Scale]:
    grid, network = PRINTED["grids"][f"{name}_test"], name.split("_")[0]
    sizes, rates = grid["batch_sizes"], grid["learning_rates"]
    found = {"paper": Scale(PAPER[name], cells(sizes, rates), RUNS, departs=departing(name))}
    if name == "mlp_mnist":
        large = [size for size in sizes if size >= 32]
        # Three runs of what relations 2 to 6 compare, and of the beacons.
        compared = {arm(32, rate) for rate in (0.05, 0.1, 0.2, 0.8)} | {arm(64, 0.1)}
        fewer = {one: 1 for one in cells([32, 64], rates) if one not in compared}
        departs = (
            "batch 32 to 1024, three runs from 128 on and of what is compared (batch 16 at 0.1 too), one elsewhere"
        )
        beacons = {arm(16, 0.1): cells([16], [0.1])[arm(16, 0.1)]}
        found["reduced"] = Scale(
            PAPER[name],
            cells(large, rates) | beacons,
            FEWER,
            fewer,
            departing(name, departs),
        )
    elif name.endswith("mnist"):
        found["reduced"] = Scale(PAPER[name], cells([128], [0.1]), 1, departs=departing(name, "one cell"))
    else:
        largest = 512 if network == "resnet" else 256
        departs = f"8 layers, 10,000 images, 40 epochs, batch 32, 128, {largest} by three rates"
        found["reduced"] = Scale(
            reduced(name),
            cells([32, 128, largest], [0.05, 0.1, 0.2]),
            FEWER,
            departs=departing(name, departs),
        )
    return found | {"smoke": Scale(SMOKE, cells([32, 64], [0.05, 0.1, 0.2]), 1)}


def dynamic_scales(name: str) -> dict[str, Scale]:
    known = plans(PRINTED["dynamic"][f"{name}_test"])
    if name == "mlp_mnist":
        known |= plans(["s512-to-32-MS"])
    found = {"paper": Scale(PAPER[name], known, RUNS, departs=departing(name))}
    if name == "mlp_mnist":
        found["reduced"] = Scale(PAPER[name], known, FEWER, departs=departing(name, "three runs"))
    elif not name.endswith("mnist"):
        departs = departing(name, "8 layers, 10,000 images, 40 epochs")
        found["reduced"] = Scale(reduced(name), known, FEWER, departs=departs)
    return found | {"smoke": Scale(SMOKE, plans(["s32-to-64", "s32-to-64-MS"]), 1)}


def multi_step(name: str) -> tuple[Statement, ...]:
    """-MS against the plan that it repeats."""
    points, known = POINTS[name.split("_")[1]], dynamic_scales(name)["paper"].arms
    return tuple(
        Statement(f"{plan}-MS tests better than {plan}", (f"{plan}-MS",), (plan,), "test error", points, FEWER)
        for plan in known
        if f"{plan}-MS" in known
    )


ERRATA = {
    "mlp_mnist": ("FE1", "FE7"),
    "resnet_mnist": ("FE2", "FE6"),
    "densenet_mnist": ("FE3", "FE5", "FE8"),
    "densenet_svhn": ("FE3",),
    "densenet_cifar10": ("FE4", "FE8"),
}
ALSO = {"mnist_dynamic.jsonl": row_of_mnist}
GRIDS = tuple(
    Experiment(
        name=label("grid", name),
        title=f"errors by batch size and rate, {title(name)}",
        source="P3, supplement",
        scales=grid_scales(name),
        published=printed_cells(name),
        metrics=METRICS[:5],
        statements=in_best_range(name),
        layout="grid",
        paper_runs=RUNS,
        errata=errata(PRINTED, *ERRATA.get(name, ()), "missing"),
        also_in=ALSO if name == "mlp_mnist" else {},
    )
    for name in PAIRS
)
DYNAMIC = tuple(
    Experiment(
        name=label("dynamic", name),
        title=f"errors under dynamic sampling, {title(name)}",
        source="P3, supplement",
        scales=dynamic_scales(name),
        published=tuple(
            Published(plan, f"{split} error", *value)
            for split in ("test", "train")
            if (split, name) != ("train", "mlp_mnist")
            for plan, value in PRINTED["dynamic"][f"{name}_{split}"].items()
        ),
        metrics=METRICS,
        statements=multi_step(name),
        layout="arms",
        paper_runs=RUNS,
        errata=errata(PRINTED, *(("FE1",) if name == "mlp_mnist" else ()), "FE10"),
        also_in=ALSO if name == "mlp_mnist" else {},
    )
    for name in PAIRS
)
# Readings of what the text leaves open, on four cells of the perceptron; LOG.md says what came of them.
_READINGS: dict[str, dict[str, Any]] = {
    f"{words}, norm {norm}": {"augmentation": augmentation, "model_options": {"norm": norm}}
    for norm in ("none", "batch")
    for words, augmentation in {
        "28x28": hj.Augmentation(),
        "padded crops": hj.Augmentation(pad=4),
        "padded crops and flips": hj.Augmentation(pad=4, flip=True),
        "placed in 32x32": hj.Augmentation(frame=32, place="random"),
        "placed in 32x32 and flips": hj.Augmentation(frame=32, place="random", flip=True),
    }.items()
}
_PROBED = ((128, 0.1), (1024, 0.1), (1024, 0.00625), (32, 0.2))
READING = Experiment(
    name="p3-extra-reading",
    title="readings of input and network, perceptron on MNIST",
    source="ours, of what P3 leaves open",
    scales={
        "reduced": Scale(
            dataclasses.replace(PAPER["mlp_mnist"], measure=None),
            {
                f"{arm(*cell)}, {words}": settings | {"batch_size": cell[0], "learning_rate": cell[1]}
                for cell in _PROBED
                for words, settings in _READINGS.items()
            },
            1,
            departs="one run a cell, to choose by",
        ),
        "smoke": Scale(SMOKE, cells([64], [0.05, 0.1]), 1),
    },
    published=tuple(
        dataclasses.replace(one, arm=f"{one.arm}, {words}")
        for one in printed_cells("mlp_mnist")
        for words in _READINGS
        if one.metric == "test error" and one.arm in {arm(*cell) for cell in _PROBED}
    ),
    metrics=("test error", "train error"),
)

EXPERIMENTS = (*GRIDS, *DYNAMIC, READING)
