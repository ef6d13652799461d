"""The command line: `hardjax train | compare | data | models`. Bad input is one line and exit code 2."""

import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from hardjax import _validate


def _optional(kind: type, metavar: str) -> Any:
    """A setting that may be left out, with a legible help entry."""
    return Annotated[kind | None, tyro.conf.arg(metavar=metavar, help_behavior_hint="")]


_Folder, _Number, _Side = _optional(str, "DIR"), _optional(float, "FLOAT"), _optional(int, "PIXELS")


@dataclass(frozen=True)
class Settings:
    """What every training command shares; each maps onto the field of `TrainConfig` of that name."""

    dataset: str = "digits"  # digits | mnist | fashion_mnist | cifar10 | cifar100 | svhn_cropped | stl10 ...
    data_dir: _Folder = None  # folder of prepared TFDS data (default: TFDS's own)
    validation: float = 0.0  # share of the training split held out for choosing
    model: str = "mlp"  # a name from `hardjax models`
    model_option: tuple[str, ...] = ()  # options of the model as key=value
    epochs: int = 10  # E; exactly E * N back-propagations are made
    batch_size: int = 128  # samples a mini-batch
    optimizer: str = "momentum"  # sgd | momentum | nesterov | adam | adamw
    momentum: float = 0.9  # read by momentum and nesterov
    learning_rate: _Number = None  # peak rate (0.005 if neither rate is given)
    base_learning_rate: _Number = None  # rate per sample of the batch; give one of the two
    weight_decay: float = 0.0  # L2 on every parameter
    schedule: str = "constant"  # constant | step | cosine
    decay_at: tuple[float, ...] = (0.5, 0.75)  # shares of training at which "step" decays
    decay_factor: float = 0.1  # what "step" multiplies by
    warmup: float = 0.0  # share of training with a rising rate
    augmentation: str = "none"  # none | standard (random crops, and flips where they keep the label)
    frame: _Side = None  # place images in a black square of this side
    place: str = "center"  # where in the frame: center | random (in training)
    resize: _Side = None  # bilinear resize to this side (the hard mini-batch paper: 128)
    precision: str = "default"  # of products: default | high | highest
    test_every: str = "epoch"  # epoch (N back-propagations) | round
    evaluate_train: bool = True  # evaluate the whole training split at every test point
    seed: int = 0  # first seed
    quiet: bool = False  # no progress bar

    def config(self, **changes: Any) -> Any:
        from hardjax.config import TrainConfig
        from hardjax.schedules import Schedule

        own = {f.name for f in dataclasses.fields(TrainConfig)}
        plain = {name: getattr(self, name) for name in own & {f.name for f in dataclasses.fields(Settings)}}
        plain["schedule"] = Schedule(self.schedule, self.decay_at, self.decay_factor, self.warmup)
        plain["model_options"] = dict(_option(text) for text in self.model_option)
        return TrainConfig(**{**plain, **changes})


@dataclass(frozen=True)
class Train(Settings):
    """Train one network and write what happened to a folder."""

    selection: str = "all-batches"  # all-batches | hard-batches | random-batches | hard-samples
    delta: _Number = None  # share of the mini-batches (or samples) in a round, in (0, 1]
    fixed: bool = False  # with all-batches: one partition for the whole run
    output: str = "runs/train"  # folder for config.json, history.jsonl, summary.json, checkpoint, pictures
    overwrite: bool = False  # let the folder hold another run already

    def __call__(self) -> int:
        from hardjax import selection

        _validate.one_of(selection.STRATEGIES, selection=self.selection)
        settings: dict[str, Any] = {"name": self.selection}
        if self.selection == "all-batches":
            if self.delta is not None:
                raise ValueError(f"delta={self.delta} goes with hard-batches, random-batches or hard-samples.")
            settings["fixed"] = self.fixed
        else:
            if self.fixed:
                raise ValueError(f"--fixed goes with all-batches; {self.selection} keeps its batches anyway.")
            settings["delta"] = 0.2 if self.delta is None else self.delta
        return _train(self, self.config(selection=selection.from_dict(settings)))


@dataclass(frozen=True)
class Compare(Settings):
    """Hard mini-batch replay against ordinary training and its controls, over seeds: a table and a picture."""

    deltas: tuple[float, ...] = (1.0, 0.8, 0.5, 0.2)  # shares of the mini-batches; the baseline (1.0) always runs
    controls: tuple[str, ...] = ("random", "fixed")  # random replay of the same share | baseline on the fixed batches
    seeds: int = 3  # runs of each arm
    output: str = "runs/compare"  # folder for summary.json, runs.jsonl, comparison.png
    overwrite: bool = False  # let the folder hold another comparison already

    def __call__(self) -> int:
        return _compare(self)


@dataclass(frozen=True)
class Models:
    """List the networks with their sizes beside the published ones."""

    def __call__(self) -> int:
        return _models()


@dataclass(frozen=True)
class DataList:
    """List the data sets and what of them is on this machine."""

    data_dir: _Folder = None  # folder of prepared TFDS data

    def __call__(self) -> int:
        from hardjax.data import prepare

        _print_table("data sets", prepare.status(self.data_dir))
        return 0


@dataclass(frozen=True)
class DataPrepare:
    """Download and prepare a data set (needs the network and `pip install hardjax[prepare]`)."""

    name: tyro.conf.Positional[str]  # a name from `hardjax data list`
    data_dir: _Folder = None  # folder for prepared TFDS data

    def __call__(self) -> int:
        from hardjax.data import prepare

        prepare.prepare(self.name, self.data_dir)
        return 0


@dataclass(frozen=True)
class DataCheck:
    """Read a prepared data set and report its counts, shapes and statistics."""

    name: tyro.conf.Positional[str]  # a name from `hardjax data list`
    data_dir: _Folder = None  # folder of prepared TFDS data

    def __call__(self) -> int:
        from hardjax.data import prepare

        report = prepare.check(self.name, self.data_dir)
        _print_table(self.name, [{"what": what, "found": found} for what, found in report.items()])
        return 0


@dataclass(frozen=True)
class Data:
    """List, prepare or check data sets."""

    action: tyro.conf.OmitSubcommandPrefixes[
        Annotated[DataList, tyro.conf.subcommand("list", prefix_name=False)]
        | Annotated[DataPrepare, tyro.conf.subcommand("prepare", prefix_name=False)]
        | Annotated[DataCheck, tyro.conf.subcommand("check", prefix_name=False)]
    ]

    def __call__(self) -> int:
        return self.action()


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 0, 2 on bad input, 130 when interrupted."""
    try:
        code = _command(sys.argv[1:] if arguments is None else arguments)()
    except (ValueError, FileNotFoundError) as error:
        print(f"hardjax: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("hardjax: interrupted.", file=sys.stderr)
        code = 130
    sys.exit(code)


def _command(arguments: list[str]) -> Callable[[], int]:
    commands = (
        Annotated[Train, tyro.conf.subcommand("train", prefix_name=False)]
        | Annotated[Compare, tyro.conf.subcommand("compare", prefix_name=False)]
        | Annotated[Data, tyro.conf.subcommand("data", prefix_name=False)]
        | Annotated[Models, tyro.conf.subcommand("models", prefix_name=False)]
    )
    return tyro.cli(commands, args=arguments, prog="hardjax", description="Choosing what a network trains on.")


def _train(options: Train, config: Any) -> int:
    _use_compilation_cache()
    from hardjax import results
    from hardjax.runner import prepare, run

    results.check_folder(options.output, options.overwrite)
    dataset, config = _load(options, config)
    result = run(
        config, dataset=dataset, output=options.output, overwrite=options.overwrite, progress=not options.quiet
    )
    folder = Path(options.output)
    if options.selection in ("hard-batches", "hard-samples"):
        from hardjax.hardest import hardest_samples
        from hardjax.plots import hardest

        found = hardest_samples(prepare(config, dataset), result)
        hardest(dataset.with_validation(config.validation), *found).savefig(folder / "hardest.png", dpi=130)
    summary = result.summary
    _print_table(
        f"{config.model} on {dataset.name}",
        [{"what": name, "value": _show(value)} for name, value in summary.items() if not isinstance(value, dict)],
    )
    print(f"written to {folder}")
    return 130 if summary["interrupted"] else 0


def _compare(options: Compare) -> int:
    _use_compilation_cache()
    from hardjax import plots, results
    from hardjax.compare import compare, make_arms

    arms = make_arms(options.deltas, options.controls)
    _validate.at_least(1, seeds=options.seeds)
    config = options.config()
    results.check_folder(options.output, options.overwrite)
    dataset, config = _load(options, config)
    folder = results.claim_folder(options.output, options.overwrite)
    results.write_json(folder / "config.json", config.to_dict() | {"deltas": options.deltas, "seeds": options.seeds})

    def log(arm: Any, result: Any) -> None:
        entry = {"selection": arm.selection_name, "delta": arm.delta, "seed": result.config.seed}
        results.append_line(folder / "history.jsonl", entry | {"history": result.history, "summary": result.summary})
        print(
            f"{arm.label}, seed {result.config.seed}: test {result.summary['final_test_top1']:.2f} %", file=sys.stderr
        )

    result = compare(config, arms, options.seeds, dataset=dataset, progress=not options.quiet, on_result=log)
    results.write_json(
        folder / "summary.json", {"rows": result.rows, "threshold": result.threshold} | results.environment()
    )
    plots.comparison(result).savefig(folder / "comparison.png", dpi=120)
    _print_table(
        f"{config.model} on {config.dataset}, batch {config.batch_size}, {config.epochs} epochs, {options.seeds} seeds",
        [_paper_columns(row) for row in result.rows],
    )
    print(
        "e: epoch in which the loss of the whole training split settles at its own final level; "
        f"e (common): first epoch at {result.threshold:.3g} nats, which every run reached.\n"
        "change: 100 (e1 - e) / e as in the paper, positive is sooner than ordinary training."
    )
    print(f"written to {folder}: summary.json, history.jsonl, comparison.png")
    return 0


def _models() -> int:
    from hardjax import models

    _print_table("networks", models.table())
    return 0


def _paper_columns(row: dict[str, Any]) -> dict[str, str]:
    return {
        "selection": row["selection"],
        "delta": f"{row['delta']:g}",
        "train top-1 (%)": f"{row['train_top1']:.2f}",
        "test top-1 (%)": f"{row['test_top1']:.2f} ± {row['test_top1_ci95']:.2f}",
        "e": f"{row['convergence_epoch']:.1f}",
        "change of e (%)": f"{row['convergence_change_percent']:+.1f}",
        "e (common)": f"{row['common_threshold_epoch']:.1f}",
        "change (%)": f"{row['common_threshold_change_percent']:+.1f}",
        "ms/step": f"{1000 * row['seconds_per_step']:.3g}",
    }


def _load(options: Settings, config: Any) -> tuple[Any, Any]:
    """(dataset, configuration): sizes that frame and resize images need the data to be known."""
    from hardjax import data, models
    from hardjax.data.augment import named
    from hardjax.runner import prepare

    _validate.one_of(models.names(), model=config.model)
    dataset = data.load(config.dataset, config.data_dir, progress=True)
    augmentation = named(options.augmentation, dataset.train.images.shape[1:], dataset.flip)
    augmentation = dataclasses.replace(augmentation, frame=options.frame, place=options.place, resize=options.resize)
    config = dataclasses.replace(config, augmentation=augmentation)
    prepare(config, dataset)  # refuses what does not fit before any file is touched
    return dataset, config


def _use_compilation_cache() -> None:
    """Compiled programs outlive the process, in the user's cache folder."""
    import jax

    from hardjax.data.tfds import cache_folder

    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def _option(text: str) -> tuple[str, Any]:
    import json

    name, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"Expected model option {text!r} as key=value, such as norm=group.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _print_table(title: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in rows[0]:
        numeric = all(isinstance(row[name], int | float) or str(row[name])[:1] in "+-0123456789" for row in rows)
        table.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_show(value) for value in row.values()))
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
