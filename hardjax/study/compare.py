"""Several ways of choosing, trained alike and set side by side over seeds, with their controls (P1, P2)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from hardjax import _validate
from hardjax._validate import Refusal
from hardjax.choose.selection import AllBatches, HardBatches, RandomBatches
from hardjax.choose.trimming import Trimming
from hardjax.config import Performance, TrainConfig
from hardjax.data import Dataset
from hardjax.study import convergence
from hardjax.training.loop import RunResult, run

CONTROLS = ("random", "fixed")


@dataclass(frozen=True)
class Arm:
    """One way of choosing.

    Attributes:
        name: of the strategy or method.
        delta: share of the mini-batches in a round.
        settings: fields of `TrainConfig` that it sets.
    """

    name: str
    delta: float
    settings: Mapping[str, Any]

    @property
    def label(self) -> str:
        return f"{self.name} {self.delta:g}" if self.delta < 1 else self.name


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns.

    Attributes:
        config: what all arms share.
        arms, results: the arms that were trained with every seed, and their runs, in order.
        threshold: nats that every run which did not diverge reached; NaN if all did.
        rows: the table.
        interrupted: Ctrl-C ended it before all arms were done.
    """

    config: TrainConfig
    arms: tuple[Arm, ...]
    results: tuple[tuple[RunResult, ...], ...]
    threshold: float
    rows: list[dict[str, Any]]
    interrupted: bool = False


def make_arms(deltas: Sequence[float], controls: Sequence[str] = CONTROLS) -> tuple[Arm, ...]:
    """The baseline (delta 1: ordinary training, reshuffled each epoch), then hard replay, then the controls.

    The baseline is always among them: every change is measured from it.

    Args:
        deltas: shares in (0, 1].
        controls: "random" (replay picked at random, for every delta below 1) and "fixed" (the baseline with the very
            batches that the others keep).

    Raises:
        ValueError: a share outside (0, 1], an unknown control.
    """
    for delta in deltas:
        _validate.in_half_open_unit(delta=delta)
    for control in controls:
        _validate.one_of(CONTROLS, control=control)
    shares = sorted({float(delta) for delta in deltas} - {1.0}, reverse=True)
    arms = [Arm("all-batches", 1.0, {"selection": AllBatches()})]
    arms += [Arm("hard-batches", delta, {"selection": HardBatches(delta)}) for delta in shares]
    if "random" in controls:
        arms += [Arm("random-batches", delta, {"selection": RandomBatches(delta)}) for delta in shares]
    if "fixed" in controls:
        arms.append(Arm("fixed-batches", 1.0, {"selection": AllBatches(fixed=True)}))
    return tuple(arms)


def make_methods(methods: Sequence[str], trimming: Trimming) -> tuple[Arm, ...]:
    """Ordinary training, trimmed training (P2), and the control that keeps the same share at random.

    Ordinary training is always among them.

    Args:
        methods: of "standard", "trimmed", "random-trimmed".
        trimming: its shares.

    Raises:
        ValueError: an unknown method.
    """
    settings = {
        "standard": None,
        "trimmed": dataclasses.replace(trimming, keep="hardest"),
        "random-trimmed": dataclasses.replace(trimming, keep="random"),
    }
    for method in methods:
        _validate.one_of(settings, method=method)
    return tuple(
        Arm(name, 1.0, {"trimming": value}) for name, value in settings.items() if name in {"standard", *methods}
    )


def compare(
    config: TrainConfig,
    arms: Sequence[Arm],
    seeds: int = 3,
    *,
    dataset: Dataset | None = None,
    model: Any = None,
    performance: Performance | None = None,
    progress: bool = True,
    on_result: Callable[[Arm, RunResult], None] = lambda arm, result: None,
) -> Comparison:
    """Train every arm with `seeds` seeds from `config.seed` on, all else as configured.

    Args:
        config: each arm's settings replace its own.
        arms: see `make_arms` and `make_methods`; the first one is the baseline.
        seeds: runs of each arm.
        dataset, model, performance, progress: as in `run`.
        on_result: called after every run.

    Ctrl-C ends it after the run under way was cut short; arms that were complete are kept.

    Raises:
        ValueError: seeds below 1, no evaluation of the training split; what `run` refuses.
        KeyboardInterrupt: interrupted before the first arm was complete.
    """
    check_comparable(config, seeds)
    results = []
    for arm in arms:
        runs = []
        for seed in range(config.seed, config.seed + seeds):
            settings = dataclasses.replace(config, **arm.settings, seed=seed)
            result = run(settings, dataset=dataset, model=model, performance=performance, progress=progress)
            on_result(arm, result)
            if result.summary["end"] != "interrupted":
                runs.append(result)
            if result.summary["interrupted"]:
                break
        if len(runs) == seeds:
            results.append(tuple(runs))
        if result.summary["interrupted"]:
            break
    if not results:
        raise KeyboardInterrupt
    done = tuple(arms[: len(results)])
    return summarise(config, done, tuple(results), interrupted=len(done) < len(arms))


def check_comparable(config: TrainConfig, seeds: int) -> None:
    """Raises ValueError where nothing could be compared."""
    _validate.at_least(1, seeds=seeds)
    if not config.evaluate_train:
        raise Refusal("Expected evaluate_train=True in a comparison: arms are compared by full_train_loss.")


def summarise(
    config: TrainConfig, arms: tuple[Arm, ...], results: tuple[tuple[RunResult, ...], ...], interrupted: bool = False
) -> Comparison:
    """Rows with the columns of P1's Tables 3 to 5 and P2's Table 1: means over seeds, percent, signs kept."""
    threshold = convergence.common_threshold([run.history["full_train_loss"] for runs in results for run in runs])
    rows = []
    for arm, runs in zip(arms, results, strict=True):
        test = np.array([run.summary["final_test_top1"] for run in runs])
        curves = [(run.history["epoch"], run.history["full_train_loss"]) for run in runs]
        own = np.mean([convergence.own_level_epoch(*curve) for curve in curves])
        common = np.mean([convergence.threshold_epoch(*curve, threshold) for curve in curves])
        seconds = float(np.median([run.summary["seconds_per_step"] for run in runs]))
        baseline = rows[0] if rows else {"convergence_epoch": own, "common_threshold_epoch": common}
        rows.append(
            {
                "selection": arm.name,
                "delta": arm.delta,
                "seeds": len(runs),
                "train_top1": float(np.mean([run.summary["final_full_train_top1"] for run in runs])),
                "test_top1": float(test.mean()),
                "test_top1_ci95": half_width_95(test),
                "test_error": float(100 - test.mean()),
                "convergence_epoch": float(own),
                "common_threshold_epoch": float(common),
                "convergence_change_percent": convergence.change_percent(baseline["convergence_epoch"], own),
                "common_threshold_change_percent": convergence.change_percent(
                    baseline["common_threshold_epoch"], common
                ),
                "backprops": int(runs[0].summary["backprops"]),
                "seconds_per_step": seconds,
                "time_ratio": seconds / (rows[0]["seconds_per_step"] if rows else seconds),
                "keep_first": float(runs[0].history["keep_fraction"][0]),
                "keep_last": float(runs[0].history["keep_fraction"][-1]),
                "diverged": sum(run.summary["diverged"] for run in runs),
                **{name: float(np.mean([run.history[name][-1] for run in runs])) for name in ("C_K", "L_K")},
            }
        )
    return Comparison(config, arms, results, threshold, rows, interrupted)


def half_width_95(values: np.ndarray) -> float:
    """Half width of the 95 % confidence interval of the mean (Student's t); NaN for fewer than two values."""
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
