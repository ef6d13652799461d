"""From words to a command's dataclass; what cannot be read is one line. Needs no jax, so that it answers at once."""

import contextlib
import dataclasses
import io
import math
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from hardjax import _validate
from hardjax._axis import dash
from hardjax._validate import Refusal

_Kind = TypeVar("_Kind")


def optional(metavar: str, text: str | None = None) -> Any:
    """Of a setting that may be left out: a legible help entry."""
    return tyro.conf.arg(metavar=metavar, help=text, help_behavior_hint="")


def told(text: str) -> Any:
    """Of a setting, its help: tyro finds no comments behind the fields of classes that `with_axes` makes."""
    return tyro.conf.arg(help=text)


Folder = Annotated[str | None, optional("DIR")]
Number = Annotated[float | None, optional("FLOAT")]
Runs = Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN ...", help_behavior_hint="")]


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
            raise Refusal(f"Expected {_validate.shown(word)} without a value: {_both(flag.replace('--no-', '--'))}.")
        # Scripts for the completion of a shell, under the name of a program that there is not.
        if flag.startswith("--tyro-"):
            raise Refusal(f"Unknown option {_validate.shown(flag)}. {_lists(name)}.")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found, strange = tyro.cli(
                command, args=list(arguments), prog=f"hardjax {name}", registry=_READERS, return_unknown_args=True
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        line = _in_one_line(said.getvalue())
        if arguments and (actions := re.fullmatch(r"Expected one of \{(.*)\}\.", line)):
            _validate.one_of(actions[1].split(", "), **{f"action of {name}": arguments[0]})
        raise Refusal(line) from None
    if strange:
        raise Refusal(_too_much(command, name, list(arguments), strange[0]))
    for option, value in _unread(found):
        raise Refusal(f"Expected {dash(option)} {_validate.shown(value.text)} to be {value.wanted}.")
    return found


def typed(arguments: Sequence[str]) -> set[str]:
    """The options among the words, as "--name": a default that was typed is no less asked for."""
    flags = {word.partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--")}
    return flags | {flag.replace("--no-", "--", 1) for flag in flags}


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
    return _reader(_number, "FLOAT", "a number") if info.type is float else None


def _number(text: str) -> float:
    """0.004, 4e-3 or 2^-8: rates are powers of two in tables and pictures."""
    base, power, exponent = text.partition("^")
    if not power:
        return float(text)
    try:
        return math.pow(float(base), float(exponent))
    except OverflowError:
        raise ValueError(text) from None


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
        return f"Expected {before} without a value, got {_validate.shown(word)}: {_both(before)}."
    return f"Unexpected {_validate.shown(word)}; `hardjax {name} --help` says what may be given."


def _lists(name: str) -> str:
    return f"`hardjax {name} --help` lists them"


def _both(switch: str) -> str:
    return f"give {switch} or {switch.replace('--', '--no-', 1)}"


def _in_one_line(box: str) -> str:
    """What tyro says in a box: its title, a rule, what is wrong, a rule, where help is."""
    lines = [line.strip(" \u2500\u2502\u256d\u256e\u256f\u2570-|") for line in box.splitlines()]
    wrong = [line for line in lines[1:] if line and not re.match("For full helptext|hardjax .*--help$", line)]
    return " ".join(wrong or lines)
