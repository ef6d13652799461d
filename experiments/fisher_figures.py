"""P3, Fisher characterisation: table 1 and figures 1 to 14, read off the rows of its grids and dynamic runs.

hardjax table plot p3-figure-7
"""

from collections.abc import Iterable

from hardjax.study.experiments import Experiment, Published, Statement, errata, published

PRINTED = published(__file__, "fisher")
RUNS, FEWER = PRINTED["runs"], 3
PAIRS = tuple(name.removesuffix("_test").replace("_", "-") for name in PRINTED["grids"] if name.endswith("_test"))
BEACONS = tuple(f"s{size}-lr0.1" for size in (16, 32, 64, 128, 256, 512))
PLANS = tuple(
    f"{plan}{end}"
    for plan in (
        "s16-to-64",
        "s16-to-256",
        "s32-to-128",
        "s32-to-512",
        "s64-to-256",
        "s128-to-512",
        "s512-to-32",
        "s256-to-16",
    )
    for end in ("", "-MS")
)
POINTS = {"cifar10": 0.2, "cifar100": 0.5, "svhn": 0.1, "mnist": 0.1}
METRICS = ("test error", "train error", "log10 C_K", "log10 L_K", "steps", "seconds")
RESNET, DENSENET = "resnet-cifar10", "densenet-cifar10"


def both(pairs: Iterable[str]) -> tuple[str, ...]:
    """The grid and the dynamic runs of networks on data."""
    return tuple(f"p3-{kind}-{pair}" for pair in pairs for kind in ("grid", "dynamic"))


def beacons_and_plans(pairs: Iterable[str]) -> tuple[str, ...]:
    found = []
    for pair in pairs:
        found += [f"p3-grid-{pair}: {one}" for one in BEACONS]
        found += [f"p3-dynamic-{pair}: {one}" for one in PLANS]
    return tuple(found)


def best_of_beacons(pair: str) -> tuple[Published, ...]:
    """The best fixed size and the best plan of the supplement: table 1 itself is not in the stored text."""
    name = pair.replace("-", "_")
    grid, dynamic = PRINTED["grids"][f"{name}_test"], PRINTED["dynamic"][f"{name}_test"]
    place = grid["learning_rates"].index(0.1)
    fixed = {
        f"s{size}-lr0.1": (grid["mean"][place][i], grid["std"][place][i]) for i, size in enumerate(grid["batch_sizes"])
    }
    fixed = {arm: value for arm, value in fixed.items() if arm in BEACONS}
    size, plan = (min(of, key=lambda arm: of[arm][0]) for of in (fixed, dynamic))
    return (
        Published(f"p3-grid-{pair}: {size}", "test error", *fixed[size]),
        Published(f"p3-dynamic-{pair}: {plan}", "test error", *dynamic[plan]),
    )


def as_well(pair: str) -> tuple[Statement, ...]:
    """The best plan against the best fixed size, in error and in time."""
    plans = tuple(f"p3-dynamic-{pair}: {one}" for one in PLANS)
    fixed = tuple(f"p3-grid-{pair}: {one}" for one in BEACONS)
    points = POINTS[pair.split("-")[1]]
    known = PRINTED["dynamic"][f"{pair.replace('-', '_')}_test"]
    first, last = ("s32", "512") if "s32-to-512" in known else ("s16", "256")  # of the longest plan that grows
    return (
        Statement(f"{pair}: the best plan tests better than the best size", plans, fixed, "test error", points, FEWER),
        Statement(
            f"{pair}: {first}-to-{last} is faster than {first}",
            (f"p3-dynamic-{pair}: {first}-to-{last}",),
            (f"p3-grid-{pair}: {first}-lr0.1",),
            "seconds",
            1.0,
            FEWER,
        ),
    )


def figure(
    number: int,
    title: str,
    reads: tuple[str, ...],
    layout: str,
    arms: tuple[str, ...] = (),
    statements: tuple[Statement, ...] = (),
) -> Experiment:
    return Experiment(
        name=f"p3-figure-{number}",
        title=title,
        source=f"P3, figure {number}",
        reads=reads,
        arms=arms,
        metrics=METRICS,
        statements=statements,
        layout=layout,
        paper_runs=RUNS,
        errata=errata(PRINTED, "missing"),
    )


TABLE_1 = Experiment(
    name="p3-table-1",
    title="best fixed size and best plan: error, steps, seconds",
    source="P3, table 1 (not in the stored text: its numbers here are the supplement's)",
    reads=both(PAIRS),
    arms=beacons_and_plans(PAIRS),
    published=tuple(one for pair in PAIRS for one in best_of_beacons(pair)),
    metrics=("test error", "steps", "seconds"),
    statements=tuple(one for pair in PAIRS for one in as_well(pair)),
    paper_runs=RUNS,
    errata=errata(PRINTED, "missing"),
)
_CURVES = (*BEACONS, "s8-lr0.1")
_ERRORS = tuple(
    f"p3-{kind}-{RESNET}: {arm}"
    for kind, arms in (("grid", BEACONS), ("dynamic", ("s32-to-512", "s32-to-512-MS", "s512-to-32", "s32-to-128")))
    for arm in arms
)
_EVERY = tuple(f"p3-grid-{pair}" for pair in PAIRS if not pair.startswith("mlp"))
FIGURES = (
    figure(1, "errors, C_K-L_K plane and first epochs, ResNet on CIFAR-10", (f"p3-grid-{RESNET}",), "characterised"),
    figure(2, "c, C_K and L_K over training, ResNet on CIFAR-10", (f"p3-grid-{RESNET}",), "epochs of each", _CURVES),
    figure(3, "errors in the C_K-L_K plane, every network and data set", _EVERY, "planes of both errors"),
    figure(4, "C_K and L_K over iterations, CIFAR-10", (f"p3-grid-{RESNET}", f"p3-grid-{DENSENET}"), "iterations"),
    figure(5, "where dynamic sampling goes in the plane", both(PAIRS), "travels"),
    figure(
        6, "training and test error by epoch, plans and beacons, ResNet on CIFAR-10", both([RESNET]), "errors", _ERRORS
    ),
    figure(7, "perceptron on MNIST: plane, plans, C_K and L_K", both(["mlp-mnist"]), "perceptron"),
    figure(8, "the plane on logarithmic and on linear axes, ResNet on CIFAR-10", (f"p3-grid-{RESNET}",), "linear"),
    figure(
        9,
        "C_K and L_K of the first spectra by iteration, and of all by cumulative rate, ResNet on CIFAR-10",
        (f"p3-grid-{RESNET}",),
        "first iterations and rates",
        _CURVES,
    ),
    figure(
        10,
        "C_K and L_K by iteration and by cumulative rate, ResNet on CIFAR-10",
        (f"p3-grid-{RESNET}",),
        "iterations and rates",
        _CURVES,
    ),
    figure(11, "C_K and L_K by cumulative rate, CIFAR-10", (f"p3-grid-{RESNET}", f"p3-grid-{DENSENET}"), "cumulative"),
    figure(12, "errors by iteration, ResNet on CIFAR-10", both([RESNET]), "errors by iteration", _ERRORS),
    figure(13, "errors by cumulative rate, ResNet on CIFAR-10", both([RESNET]), "errors by rate", _ERRORS),
    figure(14, "C_K and L_K of the perceptron by cumulative rate", ("p3-grid-mlp-mnist",), "cumulative"),
)

EXPERIMENTS = (TABLE_1, *FIGURES)
