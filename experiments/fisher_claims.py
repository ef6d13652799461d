"""P3, Fisher characterisation: the claims F1 to F25 of its text, and its relations of sections 4.1 to 4.3.

    hardjax table show p3-relation-2

Relations are looked at for the perceptron on MNIST and for ResNet on CIFAR-10, at tolerance 0, as published, and (for
C_K) at 1e-6. Where the paper says that something does not depend on another, the dependence is what is stated here, and
"does not hold" is what the paper says.
"""

from collections.abc import Callable, Iterable
from typing import Any

from hardjax.models import zoo
from hardjax.models.summary import size_of
from hardjax.study.experiments import Experiment, Published, Statement, errata, published

PRINTED = published(__file__, "fisher")
RUNS, FEWER = PRINTED["runs"], 3
PAIRS = tuple(name.removesuffix("_test").replace("_", "-") for name in PRINTED["grids"] if name.endswith("_test"))
POINTS = {"cifar10": 0.2, "cifar100": 0.5, "svhn": 0.1, "mnist": 0.1}
LOOKED_AT = ("mlp-mnist", "resnet-cifar10")
DECADES = 0.05  # smallest difference of interest in log10 C_K and log10 L_K: 12 %
RATES = (0.05, 0.1, 0.2)
NOT_SO = " (it should not be)"  # of a dependence that the paper denies
METRICS = ("test error", "train error", "log10 C_K", "log10 C_K at 1e-6", "log10 L_K")
_ERRATA = {
    "F1": ("FE3",),
    "F3": ("FE4",),
    "F8": ("FE6",),
    "F9": ("FE5",),
    "F19": ("FE8",),
    "F21": ("FE8",),
    "F22": ("FE7",),
}
_SETS = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "SVHN": "svhn", "MNIST": "mnist"}


def grid(pair: str, arm: str) -> str:
    return f"p3-grid-{pair}: {arm}"


def plan(pair: str, arm: str) -> str:
    return f"p3-dynamic-{pair}: {arm}"


def one(
    says: str,
    arm: str,
    against: str | None,
    metric: str,
    smallest: float,
    higher: bool | None = True,
    late: bool = False,
) -> Statement:
    return Statement(says, (arm,), () if against is None else (against,), metric, smallest, FEWER, higher, late=late)


def source(found: dict[str, Any]) -> str:
    place = found["where"]
    return f"P3, {place if place[0].isalpha() else f'section {place}'}"


def relation(
    number: int,
    statements: Callable[[str], Iterable[Statement]],
    pairs: Iterable[str] = LOOKED_AT,
    layout: str = "plane",
) -> Experiment:
    (found,) = (claim for claim in PRINTED["relations"] if claim["id"] == f"R{number}")
    return Experiment(
        name=f"p3-relation-{number}",
        title=found["says"],
        source=source(found),
        reads=tuple(f"p3-{kind}-{pair}" for pair in pairs for kind in ("grid", "dynamic")),
        metrics=METRICS,
        statements=tuple(statement for pair in pairs for statement in statements(pair)),
        layout=layout,
        paper_runs=RUNS,
        errata=errata(PRINTED, *(("FE10",) if number == 12 else ())),
    )


def by_size(pair: str) -> Iterable[Statement]:
    for rate in RATES:
        small, large = grid(pair, f"s32-lr{rate:g}"), grid(pair, f"s512-lr{rate:g}")
        for metric in ("log10 C_K", "log10 C_K at 1e-6"):
            yield one(f"{pair}, rate {rate:g}: C_K is larger at 512 than at 32", large, small, metric, DECADES)
        yield one(f"{pair}, rate {rate:g}: L_K is smaller at 512 than at 32", small, large, "log10 L_K", DECADES)


def by_rate(
    pair: str, metrics: Iterable[str] = ("log10 C_K", "log10 C_K at 1e-6", "log10 L_K"), words: str = ""
) -> Iterable[Statement]:
    for size in (32, 128, 512):
        low, high = grid(pair, f"s{size}-lr0.05"), grid(pair, f"s{size}-lr0.2")
        for metric in metrics:
            name = metric.split()[1]
            yield one(f"{pair}, batch {size}: {name} is larger at 0.2 than at 0.05{words}", high, low, metric, DECADES)


def extremes(pair: str) -> Iterable[Statement]:
    points = POINTS[pair.split("-")[1]]
    middle = grid(pair, "s128-lr0.1")
    yield one(f"{pair}: the largest L_K (32, 0.2) trains worse", grid(pair, "s32-lr0.2"), middle, "train error", points)
    yield one(
        f"{pair}: large C_K, small L_K (512, 0.05) tests worse", grid(pair, "s512-lr0.05"), middle, "test error", points
    )


def deficient(pair: str) -> Iterable[Statement]:
    for size, low, high in ((32, 0.1, 0.8), (16, 0.1, 0.4), (8, 0.1, 0.4)):
        if (pair, size) == ("resnet-cifar10", 32):
            high = 0.4  # its grid ends there
        arms = grid(pair, f"s{size}-lr{high:g}"), grid(pair, f"s{size}-lr{low:g}")
        yield one(f"{pair}, batch {size}: C_K is larger at {high:g} than at {low:g}", *arms, "log10 C_K", DECADES)


def energy_by_size(pair: str) -> Iterable[Statement]:
    for rate in RATES:
        small, large = grid(pair, f"s32-lr{rate:g}"), grid(pair, f"s512-lr{rate:g}")
        yield one(
            f"{pair}, rate {rate:g}: L_K is larger at 32 than at 512 after half of the iterations of 512{NOT_SO}",
            small,
            large,
            "log10 L_K at half of the iterations of batch 512",
            DECADES,
            late=pair == "mlp-mnist" and rate == 0.1,
        )


def second_half(pair: str) -> Iterable[Statement]:
    grows = pair.endswith(("cifar10", "cifar100"))
    for size in (32, 128, 512):
        word = "grows" if grows else "falls"
        yield one(
            f"{pair}, batch {size}: C_K {word} in the second half",
            grid(pair, f"s{size}-lr0.1"),
            None,
            "log10 growth of C_K in the second half",
            0.02,
            grows,
        )


def first_half(pair: str) -> Iterable[Statement]:
    for size in (32, 128, 512):
        yield one(
            f"{pair}, batch {size}: L_K grows faster in the first half",
            grid(pair, f"s{size}-lr0.1"),
            None,
            "log10 growth of L_K, first half over second",
            DECADES,
        )


def ends(pair: str) -> Iterable[Statement]:
    rising, falling = plan(pair, "s32-to-512"), plan(pair, "s512-to-32")
    yield one(
        f"{pair}: C_K of s32-to-512 is larger than of s512-to-32{NOT_SO}",
        rising,
        falling,
        "log10 C_K",
        DECADES,
    )
    yield one(f"{pair}: L_K of s32-to-512 is larger than of s512-to-32", rising, falling, "log10 L_K", DECADES)
    for name, size, higher in ((rising, 512, False), (falling, 32, True)):
        words = "larger" if higher else "smaller"
        yield one(
            f"{pair}: C_K of {name.split(': ')[-1]} is {words} than of batch {size}{NOT_SO}",
            name,
            grid(pair, f"s{size}-lr0.1"),
            "log10 C_K",
            DECADES,
            higher,
            late=pair == "mlp-mnist",
        )


PLANS = ("s16-to-64", "s16-to-256", "s32-to-128", "s32-to-512", "s128-to-512", "s512-to-32")
REPEATED = {"mlp-mnist": PLANS, "resnet-cifar10": PLANS[1:5]}  # of the others there is no -MS
BEACONS = tuple(f"s{size}-lr0.1" for size in (16, 32, 64, 128, 256, 512))


def as_well(pair: str) -> Iterable[Statement]:
    points = POINTS[pair.split("-")[1]]
    plans = tuple(plan(pair, f"{name}{end}") for name in PLANS for end in ("", "-MS"))
    fixed = tuple(grid(pair, name) for name in BEACONS)
    says = f"{pair}: the best plan tests worse than the best size{NOT_SO}"
    yield Statement(says, plans, fixed, "test error", points, FEWER, higher=True, late=pair == "mlp-mnist")
    yield one(
        f"{pair}: s32-to-512 takes less time than batch 32",
        plan(pair, "s32-to-512"),
        grid(pair, "s32-lr0.1"),
        "seconds",
        1.0,
        None,
    )


def repeated(pair: str) -> Iterable[Statement]:
    points = POINTS[pair.split("-")[1]]
    for name in REPEATED[pair]:
        yield one(
            f"{pair}: {name}-MS tests better than {name}",
            plan(pair, f"{name}-MS"),
            plan(pair, name),
            "test error",
            points,
            None,
        )


def limited(pair: str) -> Iterable[Statement]:
    for name in REPEATED[pair]:
        yield one(
            f"{pair}: L_K of {name}-MS is smaller than of {name}",
            plan(pair, name),
            plan(pair, f"{name}-MS"),
            "log10 L_K",
            DECADES,
            late=(pair, name) == ("mlp-mnist", "s512-to-32"),
        )


RELATIONS = (
    relation(1, lambda pair: ()),
    relation(2, by_size),
    relation(3, by_rate),
    relation(4, extremes),
    relation(5, deficient),
    relation(6, lambda pair: by_rate(pair, ("log10 C_K", "log10 C_K at 1e-6"), NOT_SO), layout="iterations"),
    relation(7, energy_by_size, layout="iterations"),
    relation(8, second_half, ("mlp-mnist", "resnet-cifar10", "resnet-svhn"), "epochs"),
    relation(9, first_half, layout="epochs"),
    relation(10, ends, layout="travels"),
    relation(11, as_well, layout="travels"),
    relation(12, repeated, layout="travels"),
    relation(13, limited, layout="travels"),
)


def level(found: dict[str, Any]) -> Experiment:
    """A printed error of a configuration; F2 to F9 call it the best one of its grid."""
    network, data = found["model"].lower(), _SETS[found["dataset"]]
    kind = "dynamic" if "-to-" in found["arm"] else "grid"
    printed = PRINTED["grids"][f"{network}_{data}_test"]
    others = tuple(
        f"s{size}-lr{rate:g}"
        for size in printed["batch_sizes"]
        for rate in printed["learning_rates"]
        if f"s{size}-lr{rate:g}" != found["arm"]
    )
    best = Statement(f"{found['arm']} does best", (found["arm"],), others, "test error", POINTS[data], FEWER)
    return Experiment(
        name=f"p3-claim-{found['id'][1:]}",
        title=found["says"],
        source=source(found),
        reads=(f"p3-{kind}-{network}-{data}",),
        arms=(found["arm"], *others) if kind == "grid" else (),
        published=(Published(found["arm"], "test error", *found["test_error"]),),
        metrics=("test error",),
        statements=(best,) if int(found["id"][1:]) <= 9 else (),
        layout="grid" if kind == "grid" else "arms",
        paper_runs=RUNS,
        errata=errata(PRINTED, *_ERRATA.get(found["id"], ())),
    )


def claim(number: int, reads: tuple[str, ...], *statements: Statement, layout: str = "arms") -> Experiment:
    (found,) = (one for one in PRINTED["claims"] if one["id"] == f"F{number}")
    return Experiment(
        name=f"p3-claim-{number}",
        title=found["says"],
        source=source(found),
        reads=reads,
        metrics=METRICS[:2],
        statements=statements,
        layout=layout,
        paper_runs=RUNS,
        errata=errata(PRINTED, *_ERRATA.get(found["id"], ())),
    )


def fact(
    number: int, values: Callable[[], dict[str, float]], printed: dict[str, float], metric: str = "value"
) -> Experiment:
    """What needs no training."""
    (found,) = (one for one in PRINTED["claims"] if one["id"] == f"F{number}")
    return Experiment(
        name=f"p3-claim-{number}",
        title=found["says"],
        source=source(found),
        computed=lambda: [{"arm": arm, metric: value} for arm, value in values().items()],
        published=tuple(Published(arm, metric, value) for arm, value in printed.items()),
        metrics=(metric,),
        errata=errata(PRINTED, *_ERRATA.get(found["id"], ()), *(("FE11",) if number == 23 else ())),
    )


def parameters(name: str) -> Callable[[], dict[str, float]]:
    def count() -> dict[str, float]:
        shape = zoo.ZOO[name].image_shape
        return {
            sized(name, classes): size_of(zoo.create(name, classes), shape).parameters / 1e6
            for classes in CLASSES[name]
        }

    return count


def sized(name: str, classes: int) -> str:
    return f"{name}, {classes} classes"


MILLION = "parameters (million)"
# The paper trains the deep ones on both, and does not say whose size it prints.
CLASSES = {
    "cbrcb_resnet110": (10, 100),
    "densenet110": (10, 100),
    "cbrcb_resnet8": (10,),
    "densenet8": (10,),
    "mlp": (10,),
}
_SIZES = {18: "cbrcb_resnet110", 19: "densenet110", 20: "cbrcb_resnet8", 21: "densenet8", 22: "mlp"}
_BY_ID = {found["id"]: found for found in PRINTED["claims"]}
_SPAN = _BY_ID["F23"]["epochs"]
CLAIMS = (
    *(
        claim(
            1,
            (f"p3-dynamic-{pair}",),
            one("s32-to-512 tests better than s512-to-32", "s32-to-512", "s512-to-32", "test error", 0.2, None),
        )
        for pair in ("resnet-cifar10",)
    ),
    *(level(found) for found in PRINTED["claims"] if "test_error" in found),
    claim(
        14,
        ("p3-grid-resnet-svhn", "p3-grid-densenet-svhn"),
        *(
            one(
                f"{pair}: the error rises after epochs 22 to 25 of 40",
                grid(pair, "s32-lr0.05"),
                None,
                "late rise of the test error",
                0.1,
            )
            for pair in ("resnet-svhn", "densenet-svhn")
        ),
    ),
    claim(15, ("p3-grid-resnet-svhn", "p3-grid-densenet-svhn"), layout="errors"),
    claim(
        16,
        ("p3-grid-resnet-cifar10", "p3-grid-densenet-cifar10"),
        *(
            one(
                f"{pair}: batch {size} trains worse at 0.4 than at 0.1",
                grid(pair, f"s{size}-lr0.4"),
                grid(pair, f"s{size}-lr0.1"),
                "train error",
                1.0,
            )
            for pair in ("resnet-cifar10", "densenet-cifar10")
            for size in (8, 16)
        ),
    ),
    fact(17, lambda: {"percent of mini-batches": 100 / 50}, {"percent of mini-batches": 2}),
    *(
        fact(
            number,
            parameters(name),
            {sized(name, classes): _BY_ID[f"F{number}"]["parameters"] / 1e6 for classes in CLASSES[name]},
            MILLION,
        )
        for number, name in _SIZES.items()
    ),
    fact(
        23,
        lambda: {f"batch {size}": 320 * 50 * int(size) / 50_000 for size in _SPAN},
        {f"batch {size}": epochs for size, epochs in _SPAN.items()},
    ),
    fact(
        24,
        lambda: {f"point {place}": 100 * share for place, share in enumerate(_shares(), 1)},
        {f"point {place}": share for place, share in enumerate(_BY_ID["F24"]["percent"], 1)},
    ),
    claim(25, ("p3-grid-resnet-cifar10",), layout="epochs"),
)


def _shares() -> tuple[float, ...]:
    from hardjax.plots.plane import SHARES

    return SHARES


EXPERIMENTS = (*RELATIONS, *CLAIMS)
