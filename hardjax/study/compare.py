"""Several ways of choosing, trained alike and set side by side over seeds (P1, P2)."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from hardjax import _validate
from hardjax._by_name import is_own
from hardjax._validate import Refusal
from hardjax.choose import losses
from hardjax.config import Performance, TrainConfig
from hardjax.data import Dataset, load
from hardjax.engine.recipe import Functions, functions_named, functions_of
from hardjax.study import evidence, rows
from hardjax.study.arms import Arm
from hardjax.training import hosts
from hardjax.training.run import RunResult, train
from hardjax.training.setting import Setting, prepare


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns.

    Attributes:
        config: what all arms share.
        arms, results: the arms that were trained with every seed, and their runs, seeds in order.
        thresholds: nats for each seed that every run of it reached, those left out aside; NaN if all were.
        rows: the table, plain data, see `evidence.make_rows`.
        left_out: a line for each run that is left out of differences in epochs and spectra, with the reason.
        interrupted: it was asked to end before all runs were done.
        signal: name of the signal that asked, if one did.
    """

    config: TrainConfig
    arms: tuple[Arm, ...]
    results: tuple[tuple[RunResult, ...], ...]
    thresholds: tuple[float, ...]
    rows: list[dict[str, Any]]
    left_out: tuple[str, ...] = ()
    interrupted: bool = False
    signal: str | None = None


def compare(
    config: TrainConfig,
    arms: Sequence[Arm],
    seeds: int = 3,
    *,
    dataset: Dataset | None = None,
    model: Any = None,
    performance: Performance | None = None,
    output: str | os.PathLike | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
    on_result: Callable[[Arm, RunResult], None] = lambda arm, result: None,
) -> Comparison:
    """Train every arm with `seeds` seeds from `config.seed` on, all else as configured.

    Args:
        config: each arm's settings replace its own.
        arms: see `make_arms` and `make_methods`; the first one is the baseline.
        seeds: runs of each arm.
        dataset, model, performance, progress: as in `run`.
        output: folder for config.json, history.jsonl (a line a run, the moment it ends) and summary.json; None writes
            nothing.
        overwrite: let `output` hold another result already, which is removed.
        resume: go on with the comparison in `output`: runs that are done are read (without their states), the one that
            was under way goes on from its last checkpoint.
        on_result: called after every run.

    Ctrl-C or SIGTERM ends it after the run under way was cut short. Seeds that every arm was trained with are kept;
    before the first one is complete, the arms that it was complete for.

    Raises:
        ValueError: seeds below 1 or beyond the last one, no evaluation of the training split, several seeds of a
            network that starts from the same weights with each, another comparison in the folder; what `run` refuses.
        Interrupted: (a KeyboardInterrupt) before the first run was complete.
    """
    hosts.check_alone("a comparison")
    check_comparable(config, seeds, arms)
    if output is not None:
        rows.check(output, None, overwrite, resume)
    dataset = dataset if dataset is not None else load(config.dataset, config.data_dir)
    model = _made_once(config, dataset, model, seeds)
    config = dataclasses.replace(
        config,
        dataset=dataset.name,
        model=config.model if model is None else model.name,
        loss=losses.resolve(config.loss),
    )

    def ready(config: TrainConfig) -> Setting:
        return prepare(config, dataset, model, performance)

    with ExitStack() as held:
        kept = None
        if output is not None:
            # Of people's own code the name tells nothing: its program does.
            own = model is not None or losses.resolve(config.loss).targets == "any"
            plain = _meant(config, arms, seeds, dataset) | {"network": _network(ready, config, arms) if own else None}
            kept = held.enter_context(rows.opened(output, plain, tuple(arms), overwrite, resume))
        done, signal = _pairs(config, arms, seeds, ready, kept, progress, on_result)
        if not done:
            raise Interrupted(signal)
        short = len(done[0]) < len(arms) or len(done) < seeds
        found = summarise(config, tuple(arms[: len(done[0])]), tuple(zip(*done, strict=True)), interrupted=short)
        if kept is not None:
            kept.summarise(found.rows, found.thresholds, found.left_out, found.interrupted)
    return dataclasses.replace(found, signal=signal)


def _made_once(config: TrainConfig, dataset: Dataset, model: Any, seeds: int) -> Functions | None:
    """The functions of a network of one's own, None for one of the zoo: each run would take it for another network
    otherwise, and compile its programs anew."""
    found = None if model is None else functions_of(model)
    if found is None and is_own(config.model):
        found = functions_named(config.model, dataset.num_outputs, config.model_options)
    if seeds > 1 and found is not None and getattr(found.apply, "starts_alike", False):
        raise Refusal(
            f"{found.name} holds its weights, from which all {seeds} seeds would start: give"
            " hj.models.Seeded(lambda key: ...), which draws them by the seed (or gives the same ones on purpose), or"
            " seeds=1."
        )
    return found


def _pairs(
    config: TrainConfig,
    arms: Sequence[Arm],
    seeds: int,
    ready: Callable[[TrainConfig], Setting],
    kept: rows.Rows | None,
    progress: bool,
    on_result: Callable[[Arm, RunResult], None],
) -> tuple[list[list[RunResult]], str | None]:
    """(runs of each seed in the order of the arms, name of the signal that ended it early)."""
    done: list[list[RunResult]] = []
    # All arms of a seed one after another: pairs are neighbours in time, so that a machine which grows busy or warm
    # while the comparison runs weighs on both, and an end before time leaves whole pairs.
    for seed in range(config.seed, config.seed + seeds):
        runs: list[RunResult] = []
        signal = None
        for arm in arms:
            settings = dataclasses.replace(config, **arm.settings, seed=seed)
            result = None if kept is None else kept.find(arm, settings)
            if result is None:
                result = _trained(arm, ready(settings), kept, progress, on_result)
                signal = result.summary["signal"]
            if result.summary["end"] != "interrupted":
                runs.append(result)
            if signal:
                break
        # A seed that not every arm was trained with is no pair; of the very first one, what there is is shown.
        if len(runs) == len(arms) or (runs and not done):
            done.append(runs)
        if signal:
            return done, signal
    return done, None


def _trained(
    arm: Arm,
    setting: Setting,
    kept: rows.Rows | None,
    progress: bool,
    on_result: Callable[[Arm, RunResult], None],
) -> RunResult:
    place, there = (None, False) if kept is None else kept.place(setting.config)
    result = train(setting, place, resume=there, progress=progress, keep=False)
    if result.summary["end"] != "interrupted":
        if kept is not None:
            kept.add(arm, result)
        on_result(arm, result)
    return result


def _meant(config: TrainConfig, arms: Sequence[Arm], seeds: int, dataset: Dataset) -> dict[str, Any]:
    """What makes two comparisons the same one, as JSON."""
    # Two arms of one's own may share a label, and two networks a name.
    settings = {arm.label: _settings_of(config, arm) for arm in arms}
    labels = [arm.label for arm in arms]
    return config.to_dict() | {"arms": labels, "seeds": seeds, "data": dataset.checksum, "settings": settings}


def _network(ready: Callable[[TrainConfig], Setting], config: TrainConfig, arms: Sequence[Arm]) -> str:
    return ready(dataclasses.replace(config, **arms[0].settings)).network


def _settings_of(config: TrainConfig, arm: Arm) -> dict[str, Any]:
    """What an arm sets, as JSON."""
    plain = dataclasses.replace(config, **arm.settings).to_dict()
    return {name: plain[name] for name in arm.settings}


class Interrupted(KeyboardInterrupt):
    """A comparison was asked to end before its first run was complete."""

    def __init__(self, signal: str | None) -> None:
        super().__init__("interrupted before the first run was complete")
        self.signal = signal


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
    table, thresholds, left_out = evidence.make_rows(arms, results)
    return Comparison(config, arms, results, thresholds, table, left_out, interrupted)
