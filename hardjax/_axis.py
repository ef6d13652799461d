"""One independent part of a setting, declared once beside its dataclass and iterated by config, cli and tables.

To add one: write its frozen dataclass, declare an `Axis` under it, and give `TrainConfig` a field `axis(THAT)`.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hardjax import _settings, _validate
from hardjax._validate import Refusal

_MISSING = dataclasses.MISSING
# Metadata of a field that JSON names only where it is not the default.
UNWRITTEN = types.MappingProxyType({"written": False})
NAME = "name"  # the field that chooses among several classes or presets


class Option(NamedTuple):
    """A flag of the command line: its name (underscores), type, default and one line of help."""

    flag: str
    type: Any
    default: Any
    help: str


def _no_columns(setting: Any, history: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Axis:
    """How an axis is read, written, asked for and shown.

    Attributes:
        settings: its dataclass, or name -> dataclass where strategies are chosen by name.
        flags: command-line flag (underscores for hyphens) -> field; the field "name" chooses a strategy or a preset.
        switch: the flag that turns the axis on; without one it is always on.
        defaults: field -> what the command line takes for a field without a default of its own.
        presets: name -> fields that it stands for.
        least_batch_size: below it there is nothing for this axis to do.
        columns: (setting, history) -> what tables show of a run where the axis is on; numbers, or text.
    """

    settings: type | Mapping[str, type]
    flags: Mapping[str, str]
    switch: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    least_batch_size: int = 1
    columns: Callable[[Any, Mapping[str, Any]], dict[str, Any]] = _no_columns

    def read(self, given: Any, what: str) -> Any:
        """The setting of a JSON value; what is no object is left for the type check of the configuration.

        Raises:
            ValueError: unknown name or setting (the closest one is offered), or a value refused.
        """
        if not isinstance(given, Mapping):
            return given
        if isinstance(self.settings, type):
            return _settings.read(self.settings, given, what)
        rest = dict(given)
        name = rest.pop(NAME, None)
        _validate.one_of(self.settings, **{what: name})
        return _settings.read(self.settings[name], rest, f"{what} {name!r}")

    def write(self, setting: Any) -> Any:
        """JSON of a setting; a strategy of one's own goes by its class name."""
        content = None
        if dataclasses.is_dataclass(setting) and not isinstance(setting, type):
            content = dataclasses.asdict(setting)
            for one in dataclasses.fields(setting):
                if one.metadata == UNWRITTEN and content[one.name] == one.default:
                    del content[one.name]
        if isinstance(self.settings, type):
            return setting if content is None else content
        names = {cls: name for name, cls in self.settings.items()}
        return {NAME: names.get(type(setting), type(setting).__name__), **(content or {})}

    def options(self, about: str) -> list[Option]:
        """Its flags; `about` is the help of the one that chooses a name."""
        return [self._option(flag, name, about) for flag, name in self.flags.items()]

    def from_flags(self, given: Mapping[str, Any]) -> Any:
        """The setting that the flags ask for; None where the switch is off.

        Raises:
            ValueError: flags that nothing would read, an unknown name, or a value refused.
        """
        changed = {flag: given[flag] for flag, _, default, _ in self.options("") if given[flag] != default}
        # A setting that nothing would read is a mistake of the caller's: --trim-keep alone would train untrimmed.
        if self.switch is not None and given[self.switch] is None:
            if changed:
                raise Refusal(f"{_flag_words(changed)} goes with {dash(self.switch)}, {self._help(self.switch)}.")
            return None
        values = {name: given[flag] for flag, name in self.flags.items() if name != NAME}
        if isinstance(self.settings, type):
            preset = self.presets[self._name(given)] if self.presets else {}
            return self.settings(**values, **preset)
        return self._strategy(self._name(given), values, changed)

    def _strategy(self, name: str, values: dict[str, Any], changed: dict[str, Any]) -> Any:
        assert not isinstance(self.settings, type)
        taken = {kind: _fields(cls) for kind, cls in self.settings.items()}
        for flag, value in changed.items():
            if self.flags[flag] not in (NAME, *taken[name]):
                takers = [kind for kind in taken if self.flags[flag] in taken[kind]]
                raise Refusal(f"{_flag_words({flag: value})} goes with {', '.join(takers)}, not with {name}.")
        kept = {name: value for name, value in values.items() if value is not None}
        wanted = {**self.defaults, **kept}
        return self.settings[name](**{field: wanted[field] for field in taken[name] if field in wanted})

    def _name(self, given: Mapping[str, Any]) -> str:
        (flag,) = (flag for flag, name in self.flags.items() if name == NAME)
        _validate.one_of(self._names(), **{flag: given[flag]})
        return given[flag]

    def _names(self) -> list[str]:
        return list(self.presets if isinstance(self.settings, type) else self.settings)

    def _option(self, flag: str, name: str, about: str) -> Option:
        if name == NAME:
            return Option(flag, str, self._names()[0], about or " | ".join(self._names()))
        cls = self._owner(name)
        (found,) = (field for field in dataclasses.fields(cls) if field.name == name)
        kind, default = _settings.hints(cls)[name], found.default
        # A strategy's field without a default has none on the command line either: None there is "not given".
        if flag == self.switch or default is _MISSING:
            kind, default = kind | None, None
        return Option(flag, kind, default, self._help(flag))

    def _help(self, flag: str) -> str:
        return _settings.field_help(self._owner(self.flags[flag])).get(self.flags[flag], "")

    def _owner(self, name: str) -> type:
        kinds = [self.settings] if isinstance(self.settings, type) else self.settings.values()
        return next(cls for cls in kinds if name in _fields(cls))


def axis(declared: Axis, default: Any = None, default_factory: Any = _MISSING) -> Any:
    """A field of `TrainConfig` that is an axis."""
    # On the field itself, so that a subclass of the configuration has the axes of its parent and its own.
    metadata = types.MappingProxyType({"axis": declared})
    if default_factory is not _MISSING:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def axes(cls: type) -> dict[str, Axis]:
    """Field -> axis of a configuration's class, in order."""
    return {f.name: f.metadata["axis"] for f in dataclasses.fields(cls) if "axis" in f.metadata}


def dash(flag: str) -> str:
    """`trim_end` as it is typed."""
    return f"--{flag.replace('_', '-')}"


def _fields(cls: type) -> list[str]:
    return [found.name for found in dataclasses.fields(cls)]


def _flag_words(given: Mapping[str, Any]) -> str:
    return ", ".join(dash(flag) if value is True else f"{dash(flag)} {value}" for flag, value in given.items())
