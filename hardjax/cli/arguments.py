"""The command line: `hardjax train | compare | measure | data | models`. Bad input is one line and exit code 2."""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import tyro

from hardjax import _validate
from hardjax._validate import Refusal
from hardjax.cli import commands


def _optional(kind: type, metavar: str) -> Any:
    """A setting that may be left out, with a legible help entry."""
    return Annotated[kind | None, tyro.conf.arg(metavar=metavar, help_behavior_hint="")]


_Folder, _Number, _Side = _optional(str, "DIR"), _optional(float, "FLOAT"), _optional(int, "PIXELS")
_Kind = TypeVar("_Kind")
_Flat = Annotated[_Kind, tyro.conf.OmitArgPrefixes]  # a group in the help text, none in the options' names


def _option(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise Refusal(f"Expected model option {text!r} as key=value, such as norm=group.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


@dataclass(frozen=True)
class DataOptions:
    dataset: str = "digits"  # digits | mnist | fashion_mnist | cifar10 | cifar100 | svhn_cropped | stl10 ...
    data_dir: _Folder = None  # folder of prepared TFDS data (default: TFDS's own)
    validation: float = 0.0  # share of the training split held out for choosing
    augmentation: str = "none"  # none | standard (random crops, and flips where they keep the label)
    frame: _Side = None  # place images in a black square of this side
    place: str = "center"  # where in the frame: center | random (in training)
    resize: _Side = None  # bilinear resize to this side (the hard mini-batch paper: 128)


@dataclass(frozen=True)
class ModelOptions:
    model: str = "mlp"  # a name from `hardjax models`
    model_option: tuple[str, ...] = ()  # its options as key=value, such as norm=group widths=[64]


@dataclass(frozen=True)
class TrainingOptions:
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
    precision: str = "default"  # of products: default | high | highest
    test_every: str = "epoch"  # epoch (N back-propagations) | round
    evaluate_train: bool = True  # evaluate the whole training split at every test point
    seed: int = 0  # first seed


@dataclass(frozen=True)
class TrimmingOptions:
    trim_end: _Number = None  # share of each batch kept in the last epoch (0.2 as published); turns trimming on
    trim_start: float = 1.0  # share kept in the first epoch
    trim_schedule: str = "linear"  # linear | cosine, from start to end
    trim_keep: str = "hardest"  # hardest | random (the control)

    def trimming(self) -> Any:
        from hardjax.choose.trimming import Trimming

        if self.trim_end is not None:
            return Trimming(self.trim_start, self.trim_end, self.trim_schedule, self.trim_keep)
        _needs(self, TrimmingOptions(), "--trim-end, the share kept in the last epoch, in (0, 1]")
        return None


@dataclass(frozen=True)
class MeasuringOptions:
    measure_every: _optional(int, "STEPS") = None  # spectra of per-sample gradients every so many steps (published: 50)
    measure_rows: str = "contribution"  # what a sample's gradient is under batch norm: contribution | coupled | frozen
    measure_method: str = "layers"  # layers | vmap (the definition; slow)
    measure_tolerance: float = 1e-6  # an eigenvalue is non-zero above this share of the largest
    stop_when_not_finite: bool = False  # end the run once a spectrum is not finite
    gram_chunk: _optional(int, "SAMPLES") = None  # bounds the memory of a measurement

    def measure(self) -> Any:
        from hardjax.fisher.observe import FisherMeasure

        if self.measure_every is not None:
            return FisherMeasure(
                self.measure_every,
                self.measure_rows,
                self.measure_method,
                self.measure_tolerance,
                self.stop_when_not_finite,
            )
        _needs(self, MeasuringOptions(), "--measure-every, the steps between measurements")
        return None


def _needs(options: Any, default: Any, switch: str) -> None:
    """Refuse settings that nothing would read."""
    given = {name: value for name, value in vars(options).items() if value != getattr(default, name)}
    if given:
        words = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
        raise Refusal(f"{words} goes with {switch}.")


@dataclass(frozen=True)
class Settings:
    """What every training command shares; each maps onto the field of `TrainConfig` of that name."""

    data: _Flat[DataOptions] = DataOptions()
    network: _Flat[ModelOptions] = ModelOptions()
    training: _Flat[TrainingOptions] = TrainingOptions()
    trimming: _Flat[TrimmingOptions] = TrimmingOptions()
    measuring: _Flat[MeasuringOptions] = MeasuringOptions()
    output: str = "runs/latest"  # folder for what is written
    overwrite: bool = False  # let the folder hold other results already
    quiet: bool = False  # no progress bar

    def config(self, **changes: Any) -> Any:
        from hardjax.config import TrainConfig
        from hardjax.engine.rates import Schedule

        given = vars(self.data) | vars(self.network) | vars(self.training)
        plain = {f.name: given[f.name] for f in dataclasses.fields(TrainConfig) if f.name in given}
        steps = self.training
        plain["schedule"] = Schedule(steps.schedule, steps.decay_at, steps.decay_factor, steps.warmup)
        plain["model_options"] = dict(_option(text) for text in self.network.model_option)
        plain |= {"trimming": self.trimming.trimming(), "measure": self.measuring.measure()}
        return TrainConfig(**{**plain, **changes})

    def performance(self) -> Any:
        from hardjax.config import Performance

        return Performance(gram_chunk=self.measuring.gram_chunk)


@dataclass(frozen=True)
class Train(Settings):
    """Train one network and write to a folder: configuration, history, summary, checkpoint, pictures."""

    selection: str = "all-batches"  # all-batches | hard-batches | random-batches | hard-samples
    delta: _Number = None  # share of the mini-batches (or samples) in a round, in (0, 1]
    fixed: bool = False  # with all-batches: one partition for the whole run
    output: str = "runs/train"  # folder for what is written

    def __call__(self) -> int:
        from hardjax.choose import selection

        _validate.one_of(selection.STRATEGIES, selection=self.selection)
        settings: dict[str, Any] = {"name": self.selection}
        if self.selection == "all-batches":
            if self.delta is not None:
                raise Refusal(f"delta={self.delta} goes with hard-batches, random-batches or hard-samples.")
            settings["fixed"] = self.fixed
        else:
            if self.fixed:
                raise Refusal(f"--fixed goes with all-batches; {self.selection} keeps its batches anyway.")
            settings["delta"] = 0.2 if self.delta is None else self.delta
        return commands.train(self, self.config(selection=selection.from_dict(settings)))


_DELTAS, _CONTROLS = (1.0, 0.8, 0.5, 0.2), ("random", "fixed")


@dataclass(frozen=True)
class Compare(Settings):
    """Ways of choosing against ordinary training and its controls, over seeds: a table and a picture.

    By default hard mini-batch replay (--deltas, --controls); with --methods, mini-batch trimming. The folder gets
    summary.json, history.jsonl (a line a run) and comparison.png.
    """

    deltas: tuple[float, ...] = _DELTAS  # shares of the mini-batches; the baseline (1.0) always runs
    controls: tuple[str, ...] = _CONTROLS  # random replay of the same share | baseline on the fixed batches
    methods: tuple[str, ...] = ()  # instead of deltas: standard | trimmed | random-trimmed
    seeds: int = 3  # runs of each arm
    output: str = "runs/compare"  # folder for what is written

    def __call__(self) -> int:
        if self.methods and (self.deltas, self.controls) != (_DELTAS, _CONTROLS):
            raise Refusal(f"Give --methods {' '.join(self.methods)} or --deltas and --controls, not both.")
        return commands.compare(self)


@dataclass(frozen=True)
class Measure:
    """Read the spectra that runs recorded, with any tolerance, measure their final states, and draw both."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # folders of `hardjax train`
    batches: int = 8  # mini-batches of the final state's partition to measure; 0 for none (needs no data)
    rows: _optional(str, "STR") = None  # contribution | coupled | frozen (default: what the run measured)
    tolerance: float = 1e-6  # an eigenvalue is non-zero above this share of the largest
    float64: bool = False  # measure the final states in float64
    data_dir: _Folder = None  # folder of prepared TFDS data (default: that of the run)
    gram_chunk: _optional(int, "SAMPLES") = None  # bounds the memory
    output: str = "runs/measure"  # folder for measure.json and measures.png
    overwrite: bool = False  # let the folder hold another result already

    def __call__(self) -> int:
        return commands.measure(self)


@dataclass(frozen=True)
class Models:
    """List the networks with their sizes beside the published ones."""

    def __call__(self) -> int:
        return commands.models()


@dataclass(frozen=True)
class DataList:
    """List the data sets and what of them is on this machine."""

    data_dir: _Folder = None  # folder of prepared TFDS data

    def __call__(self) -> int:
        from hardjax.data import prepare

        commands.print_table("data sets", prepare.status(self.data_dir))
        return 0


@dataclass(frozen=True)
class DataPrepare:
    """Download and prepare a data set (needs the network and `pip install hardjax[prepare]`)."""

    name: tyro.conf.Positional[str]  # a name from `hardjax data list`
    data_dir: _Folder = None  # folder for prepared TFDS data

    def __call__(self) -> int:
        from hardjax.data import prepare

        print(f"{self.name} is prepared in {prepare.prepare(self.name, self.data_dir)}")
        return 0


@dataclass(frozen=True)
class DataCheck:
    """Read a prepared data set and report its counts, shapes and statistics."""

    name: tyro.conf.Positional[str]  # a name from `hardjax data list`
    data_dir: _Folder = None  # folder of prepared TFDS data

    def __call__(self) -> int:
        from hardjax.data import prepare

        report = prepare.check(self.name, self.data_dir)
        commands.print_table(self.name, [{"what": what, "found": found} for what, found in report.items()])
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
    except (ValueError, OSError, MemoryError) as error:
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
        | Annotated[Measure, tyro.conf.subcommand("measure", prefix_name=False)]
        | Annotated[Data, tyro.conf.subcommand("data", prefix_name=False)]
        | Annotated[Models, tyro.conf.subcommand("models", prefix_name=False)]
    )
    return tyro.cli(commands, args=arguments, prog="hardjax", description="Choosing what a network trains on.")
