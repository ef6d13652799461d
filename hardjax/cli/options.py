"""Options that training commands share: plain ones by hand, those of every axis from its declaration."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import tyro

from hardjax import _settings, _validate
from hardjax._axis import Option, axes, dash
from hardjax._validate import Refusal
from hardjax.choose import losses
from hardjax.cli.parsing import Folder, Number, optional, told
from hardjax.config import Performance, TrainConfig

_Kind = TypeVar("_Kind")
Flat = Annotated[_Kind, tyro.conf.OmitArgPrefixes]  # a group in the help text, none in the options' names


# Option -> the option whose values read it; elsewhere it would be passed over in silence.
_READ_BY = {
    "momentum": ("optimizer", ("momentum", "nesterov")),
    "decay_at": ("schedule", ("step",)),
    "decay_factor": ("schedule", ("step",)),
}


@dataclass(frozen=True)
class DataOptions:
    dataset: str = "digits"  # digits | mnist | fashion_mnist | cifar10 | cifar100 | svhn_cropped | stl10 ...
    data_dir: Folder = None  # folder of prepared TFDS data (default: TFDS's own)
    train_samples: Annotated[int | None, optional("COUNT", "of the training split, by class; default: all")] = None
    validation: float = 0.0  # share of the training split (of these samples) held out for choosing


@dataclass(frozen=True)
class ModelOptions:
    # a name from `hardjax models`; package.module:Name or ./file.py:Name for one of your own, whose code is then run
    model: str = "mlp"
    model_option: tuple[str, ...] = ()  # its options as key=value, such as norm=group widths=[64]
    norm_momentum: Annotated[Number, told("share of the old value in batch norm's running statistics (0.9)")] = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The options as key=value, the one with a flag of its own among them."""
        own = () if self.norm_momentum is None else (f"norm_momentum={self.norm_momentum!r}",)
        return (*self.model_option, *own)


@dataclass(frozen=True)
class TrainingOptions:
    # a loss of optax; package.module:name or ./file.py:name for one of your own, whose code is then run
    loss: str = losses.CROSS_ENTROPY
    epochs: int = 10  # E; exactly E * N back-propagations are made
    batch_size: Annotated[int | None, optional("INT", "samples a mini-batch (128 if no batch plan is given)")] = None
    rate_scaling: str = "none"  # peak rate of a stage of --batch-plan by its size: none | linear | sqrt
    optimizer: str = "momentum"  # sgd | momentum | nesterov | adam | adamw
    momentum: float = 0.9  # read by momentum and nesterov
    learning_rate: Number = None  # peak rate (0.005 if neither rate is given)
    base_learning_rate: Number = None  # rate per sample of the batch; give one of the two
    weight_decay: float = 0.0  # L2 on every parameter
    precision: str = "default"  # of products: default | high | highest
    test_every: str = "epoch"  # epoch (N back-propagations) | round | a number of epochs
    evaluate_train: bool = True  # evaluate the whole training split at every test point
    norm_statistics: str = "running"  # of batch norm in testing: running | re-estimated (on the training split)
    on_nan: str = "record"  # of a step whose loss or gradient is not finite: record | stop | skip-step
    seed: int = 0  # first seed


@dataclass(frozen=True)
class Settings:
    """What every training command shares; `with_axes` adds the options of the axes."""

    data: Flat[DataOptions] = DataOptions()
    network: Flat[ModelOptions] = ModelOptions()
    training: Flat[TrainingOptions] = TrainingOptions()
    gram_chunk: Annotated[int | None, optional("SAMPLES", "bounds the memory of a measurement")] = None
    output: Annotated[str, told("folder for what is written")] = "runs/latest"
    save_every: Annotated[
        str | None, optional("WHEN", "test points (5), a time (90s, 10min, 2h) or end; default: at most once a minute")
    ] = None
    checkpoint_gigabytes: Annotated[
        float | None, optional("GB", "disk that checkpoints may take; default: no limit")
    ] = None
    devices: Annotated[
        int | None, optional("COUNT", "that share each batch; default: the most that are visible and divide it")
    ] = None
    shard_data: Annotated[bool, told("each device holds a part of the images, not all of them")] = False
    micro_batch: Annotated[
        int | None, optional("SAMPLES", "of a batch that are differentiated at a time; default: all of them")
    ] = None
    stream: Annotated[
        bool,
        told("read images while it trains; without it that is done where the device does not hold them"),
        tyro.conf.FlagCreatePairsOff,
    ] = False
    compile_ahead: Annotated[
        str, told("programs of a batch plan's later stages: background (while it trains) | first (before) | off")
    ] = "background"
    resume: Annotated[bool, told("go on with what the folder holds, as if it had never been interrupted")] = False
    overwrite: Annotated[bool, told("let the folder hold other results of hardjax already")] = False
    quiet: Annotated[bool, told("no progress")] = False

    def config(self) -> TrainConfig:
        """The configuration asked for.

        Raises:
            ValueError: what `TrainConfig` and its axes refuse, and options that nothing would read.
        """
        given = vars(self.data) | vars(self.network) | vars(self.training)
        settings = {f.name: given[f.name] for f in dataclasses.fields(TrainConfig) if f.name in given}
        settings["model_options"] = model_options(self.network.texts)
        for name, declared in axes(TrainConfig).items():
            if hasattr(self, name):
                settings[name] = declared.from_flags(vars(getattr(self, name)))
        if self.gram_chunk is not None and settings["measure"] is None:
            raise Refusal(f"--gram-chunk {self.gram_chunk} goes with --measure-every.")
        # Told apart here alone: a `TrainConfig` holds the default as a number, which `dataclasses.replace` and JSON
        # hand on beside a plan like one that was given.
        if settings["batch_size"] is None:
            del settings["batch_size"]
        elif settings["batch_plan"] is not None:
            raise Refusal(f"Give --batch-size {self.training.batch_size} or --batch-plan, not both.")
        config = TrainConfig(**settings)
        self._check_read()
        return config

    def _check_read(self) -> None:
        """Raises ValueError for an option that is given and that nothing reads."""
        groups = [getattr(self, f.name) for f in dataclasses.fields(self)]
        flat = {
            name: value for group in groups if dataclasses.is_dataclass(group) for name, value in vars(group).items()
        }
        defaults = {f.name: f.default for g in groups if dataclasses.is_dataclass(g) for f in dataclasses.fields(g)}
        for name, (switch, readers) in _READ_BY.items():
            if flat.get(name) != defaults.get(name) and flat[switch] not in readers:
                takers = " or ".join(readers)
                raise Refusal(f"{dash(name)} goes with {dash(switch)} {takers}, not with {flat[switch]}.")

    def performance(self) -> Performance:
        names = {f.name for f in dataclasses.fields(Performance)} & {f.name for f in dataclasses.fields(self)}
        given = {name: getattr(self, name) for name in names}
        return Performance(**given | {"stream": True if self.stream else None})


def with_axes(command: type[_Kind], leave_out: tuple[str, ...] = ()) -> type[_Kind]:
    """The options of a command and, a group each, those of the axes of `TrainConfig`."""
    about = _settings.field_help(TrainConfig)
    groups = []
    for name, declared in axes(TrainConfig).items():
        if name not in leave_out:
            group = _group(name, declared.options(about.get(name, "")))
            groups.append((name, Flat[group], dataclasses.field(default=group())))
    made = dataclasses.make_dataclass(command.__name__, groups, bases=(command,), frozen=True)
    made.__doc__ = command.__doc__
    return made


def _group(name: str, options: list[Option]) -> type:
    fields = []
    for flag, kind, default, text in options:
        text = text.replace("`", "")
        if default is None:
            metavar = {float | None: "FLOAT", int | None: "INT"}.get(kind, "STR")
            hint: Any = tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint="")
        else:
            hint = tyro.conf.arg(help=text)
        fields.append((flag, Annotated[kind, hint], dataclasses.field(default=default)))
    return dataclasses.make_dataclass(f"{name.title()}Options", fields, frozen=True)


def model_options(texts: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise Refusal(f"Expected model option {_validate.shown(text)} as key=value, such as norm=group.")
        if name in found:
            raise Refusal(f"Expected model option {name!r} once, got it twice.")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
        except (ValueError, RecursionError):
            raise Refusal(f"Expected model option {_validate.shown(text)} with fewer digits or lists.") from None
    return found
