"""Several ways of choosing, trained alike and set side by side over seeds (P1, P2)."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hardjax import _validate
from hardjax._validate import Refusal
from hardjax.config import Performance, TrainConfig
from hardjax.data import Dataset
from hardjax.engine.recipe import functions_of
from hardjax.study import evidence
from hardjax.study.arms import Arm
from hardjax.training.run import RunResult, run


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns.

    Attributes:
        config: what all arms share.
        arms, results: the arms that were trained with every seed, and their runs, seeds in order.
        thresholds: nats for each seed that every run of it reached, those left out aside; NaN if all were.
        rows: the table, plain data, see `evidence.make_rows`.
        left_out: a line for each run that is left out of differences in epochs and spectra, with the reason.
        interrupted: Ctrl-C ended it before all runs were done.
    """

    config: TrainConfig
    arms: tuple[Arm, ...]
    results: tuple[tuple[RunResult, ...], ...]
    thresholds: tuple[float, ...]
    rows: list[dict[str, Any]]
    left_out: tuple[str, ...] = ()
    interrupted: bool = False


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

    Ctrl-C ends it after the run under way was cut short. Seeds that every arm was trained with are kept; before the
    first one is complete, the arms that it was complete for.

    Raises:
        ValueError: seeds below 1 or beyond the last one, no evaluation of the training split; what `run` refuses.
        KeyboardInterrupt: interrupted before the first run was complete.
    """
    check_comparable(config, seeds, arms)
    # Made once: each run would otherwise take the network for another one, and compile its programs anew.
    model = None if model is None else functions_of(model)
    done: list[list[RunResult]] = []
    interrupted = False
    # All arms of a seed one after another: pairs are neighbours in time, so that a machine which grows busy or warm
    # while the comparison runs weighs on both, and an end before time leaves whole pairs.
    for seed in range(config.seed, config.seed + seeds):
        runs: list[RunResult] = []
        for arm in arms:
            settings = dataclasses.replace(config, **arm.settings, seed=seed)
            result = run(settings, dataset=dataset, model=model, performance=performance, progress=progress)
            on_result(arm, result)
            interrupted = bool(result.summary["interrupted"])
            if result.summary["end"] != "interrupted":
                runs.append(result)
            if interrupted:
                break
        # A seed that not every arm was trained with is no pair; of the very first one, what there is is shown.
        if len(runs) == len(arms) or (runs and not done):
            done.append(runs)
        if interrupted:
            break
    if not done:
        raise KeyboardInterrupt
    short = len(done[0]) < len(arms) or len(done) < seeds
    return summarise(config, tuple(arms[: len(done[0])]), tuple(zip(*done, strict=True)), interrupted=short)


def check_comparable(config: TrainConfig, seeds: int, arms: Sequence[Arm]) -> None:
    """Raises ValueError where nothing could be compared, and for what the configuration of any run refuses."""
    _validate.at_least(1, seeds=seeds)
    if not config.evaluate_train:
        raise Refusal("Expected evaluate_train=True in a comparison: arms are compared by full_train_loss.")
    for arm in arms:  # refused now, not after hours of other arms and seeds
        dataclasses.replace(config, **arm.settings, seed=config.seed + seeds - 1)


def summarise(
    config: TrainConfig, arms: tuple[Arm, ...], results: tuple[tuple[RunResult, ...], ...], interrupted: bool = False
) -> Comparison:
    """The comparison of finished runs: `results[i][j]` is arm i with the j-th seed, the same seeds for every arm.

    Raises:
        ValueError: arms with different seeds, which cannot be paired.
    """
    seeds = [tuple(run.config.seed for run in runs) for runs in results]
    if len(set(seeds)) != 1:
        raise Refusal(f"Expected the same seeds for every arm, in the same order, got {sorted(set(seeds))}.")
    rows, thresholds, left_out = evidence.make_rows(arms, results)
    return Comparison(config, arms, results, thresholds, rows, left_out, interrupted)
