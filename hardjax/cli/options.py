"""Options that training commands share: plain ones by hand, those of every axis from its declaration."""

import contextlib
import dataclasses
import io
import json
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from hardjax import _settings, _validate
from hardjax._axis import Option, axes, dash
from hardjax._validate import Refusal
from hardjax.config import Performance, TrainConfig

_Kind = TypeVar("_Kind")
Flat = Annotated[_Kind, tyro.conf.OmitArgPrefixes]  # a group in the help text, none in the options' names


def optional(metavar: str, text: str | None = None) -> Any:
    """Of a setting that may be left out: a legible help entry."""
    return tyro.conf.arg(metavar=metavar, help=text, help_behavior_hint="")


def told(text: str) -> Any:
    """Of a setting, its help: tyro finds no comments behind the fields of classes that `with_axes` makes."""
    return tyro.conf.arg(help=text)


# Option -> the option whose values read it; elsewhere it would be passed over in silence.
_READ_BY = {
    "momentum": ("optimizer", ("momentum", "nesterov")),
    "decay_at": ("schedule", ("step",)),
    "decay_factor": ("schedule", ("step",)),
}

Folder = Annotated[str | None, optional("DIR")]
Number = Annotated[float | None, optional("FLOAT")]


@dataclass(frozen=True)
class DataOptions:
    dataset: str = "digits"  # digits | mnist | fashion_mnist | cifar10 | cifar100 | svhn_cropped | stl10 ...
    data_dir: Folder = None  # folder of prepared TFDS data (default: TFDS's own)
    validation: float = 0.0  # share of the training split held out for choosing


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
    learning_rate: Number = None  # peak rate (0.005 if neither rate is given)
    base_learning_rate: Number = None  # rate per sample of the batch; give one of the two
    weight_decay: float = 0.0  # L2 on every parameter
    precision: str = "default"  # of products: default | high | highest
    test_every: str = "epoch"  # epoch (N back-propagations) | round
    evaluate_train: bool = True  # evaluate the whole training split at every test point
    seed: int = 0  # first seed


@dataclass(frozen=True)
class Settings:
    """What every training command shares; `with_axes` adds the options of the axes."""

    data: Flat[DataOptions] = DataOptions()
    network: Flat[ModelOptions] = ModelOptions()
    training: Flat[TrainingOptions] = TrainingOptions()
    gram_chunk: Annotated[int | None, optional("SAMPLES", "bounds the memory of a measurement")] = None
    output: Annotated[str, told("folder for what is written")] = "runs/latest"
    overwrite: Annotated[bool, told("let the folder hold other results of hardjax already")] = False
    quiet: Annotated[bool, told("no progress")] = False

    def config(self) -> TrainConfig:
        """The configuration asked for.

        Raises:
            ValueError: what `TrainConfig` and its axes refuse, and options that nothing would read.
        """
        given = vars(self.data) | vars(self.network) | vars(self.training)
        settings = {f.name: given[f.name] for f in dataclasses.fields(TrainConfig) if f.name in given}
        settings["model_options"] = _model_options(self.network.model_option)
        for name, declared in axes(TrainConfig).items():
            if hasattr(self, name):
                settings[name] = declared.from_flags(vars(getattr(self, name)))
        if self.gram_chunk is not None and settings["measure"] is None:
            raise Refusal(f"--gram-chunk {self.gram_chunk} goes with --measure-every.")
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
        return Performance(gram_chunk=self.gram_chunk)


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


def parse(command: type[_Kind], name: str, arguments: Sequence[str]) -> _Kind:
    """The command's options; --help prints them and exits with 0.

    Raises:
        ValueError: an unknown option (the closest one is offered), a word too many, a value that cannot be read.
    """
    switches = [flag for flag, hint in _flags(command) if hint is bool]
    for word in arguments:
        # tyro takes `--quiet=no` for --quiet, and "no" for the next word.
        flag, given, _ = word.replace("_", "-").partition("=")
        if given and flag.replace("--no-", "--") in switches:
            raise Refusal(f"Expected {word!r} without a value: {_both(flag.replace('--no-', '--'))}.")
        # Scripts for the completion of a shell, under the name of a program that there is not.
        if flag.startswith("--tyro-"):
            raise Refusal(f"Unknown option {flag!r}. {_lists(name)}.")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found, strange = tyro.cli(
                command, args=list(arguments), prog=f"hardjax {name}", registry=_READERS, return_unknown_args=True
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        told = _in_one_line(said.getvalue())
        if arguments and (actions := re.fullmatch(r"Expected one of \{(.*)\}\.", told)):
            _validate.one_of(actions[1].split(", "), **{f"action of {name}": arguments[0]})
        raise Refusal(told) from None
    if strange:
        raise Refusal(_too_much(command, name, list(arguments), strange[0]))
    for option, value in _unread(found):
        raise Refusal(f"Expected {dash(option)} {_validate.shown(value.text)} to be {value.wanted}.")
    return found


@dataclass(frozen=True)
class _Unread:
    """A value that is no number: carried through tyro, which would say of a list only that it cannot be parsed."""

    text: str
    wanted: str


_READERS = ConstructorRegistry()


@_READERS.primitive_rule
def _number_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    if info.type is int:
        return _reader(int, "INT", "a whole number")
    return _reader(float, "FLOAT", "a number") if info.type is float else None


def _reader(kind: Callable[[str], Any], metavar: str, wanted: str) -> PrimitiveConstructorSpec:
    def read(words: list[str]) -> Any:
        (text,) = words
        try:
            # Python reads the digits of every script.
            return kind(text) if text.isascii() else _Unread(text, wanted)
        except ValueError:
            return _Unread(text, wanted)

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, int | float) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


def _unread(options: Any) -> Iterator[tuple[str, _Unread]]:
    """(name, value) of what could not be read."""
    for name, value in vars(options).items():
        if isinstance(value, _Unread):
            yield name, value
        elif isinstance(value, tuple):
            yield from ((name, entry) for entry in value if isinstance(entry, _Unread))
        elif dataclasses.is_dataclass(value):
            yield from _unread(value)


def _flags(hint: Any) -> list[tuple[str, Any]]:
    """("--name", type) of every option of a command, groups and actions included."""
    if not dataclasses.is_dataclass(hint):
        return [flag for part in typing.get_args(hint) for flag in _flags(part)]
    found = typing.get_type_hints(hint)
    return [flag for name, inner in found.items() for flag in _flags(inner) or [(dash(name), inner)]]


def _too_much(command: type, name: str, arguments: list[str], word: str) -> str:
    """A line on a word that belongs to no option."""
    flags = _flags(command)
    if word.startswith("-"):
        option = word.partition("=")[0]
        names = [flag for flag, _ in flags] if option.startswith("--") else []
        if option in names:
            return f"Unexpected {option} in this place; `hardjax {name} --help` says where it goes."
        return f"Unknown option {_validate.shown(option)}{_validate.closest(option, names)} {_lists(name)}."
    before = arguments[max(0, arguments.index(word) - 1)].replace("_", "-").replace("--no-", "--")
    if (before, bool) in flags:
        return f"Expected {before} without a value, got {word!r}: {_both(before)}."
    return f"Unexpected {_validate.shown(word)}; `hardjax {name} --help` says what may be given."


def _lists(name: str) -> str:
    return f"`hardjax {name} --help` lists them"


def _both(switch: str) -> str:
    return f"give {switch} or {switch.replace('--', '--no-', 1)}"


def _in_one_line(box: str) -> str:
    """What tyro says in a box: its title, a rule, what is wrong, a rule, where help is."""
    lines = [line.strip(" \u2500\u2502\u256d\u256e\u256f\u2570-|") for line in box.splitlines()]
    told = [line for line in lines[1:] if line and not re.match("For full helptext|hardjax .*--help$", line)]
    return " ".join(told or lines)


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


def _model_options(texts: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise Refusal(f"Expected model option {_validate.shown(text)} as key=value, such as norm=group.")
        if name in found:
            raise Refusal(f"Expected model option {name!r} once, got it twice.")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):  # no JSON, or of more digits or lists than Python reads: text
            found[name] = value
    return found
