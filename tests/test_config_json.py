"""Whatever can be configured is the same after a trip through JSON: settings drawn from the fields as declared."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

import hardjax as hj
from hardjax import _settings
from hardjax._axis import axes
from hardjax._validate import Refusal
from hardjax.choose import batch_plan, losses, trimming
from hardjax.config import COMPILE_AHEAD, ON_NAN, POPULATIONS, PRECISIONS
from hardjax.data import augment
from hardjax.engine import norm_statistics, optimizers, rates
from hardjax.fisher.gram import METHODS, ROWS

UNIT = st.floats(2**-10, 1 - 2**-10)
WORDS = st.text(st.characters(codec="utf-8"), max_size=8)

# Fields whose values are bound by more than their type. A field that is declared later is drawn by its type alone,
# until it needs a line here.
BOUND = {
    "seed": st.integers(0, 2**32 - 1),
    "train_samples": st.one_of(st.none(), st.integers(2, 2**40)),
    "population": st.one_of(st.none(), st.sampled_from(POPULATIONS)),
    "sides": st.sampled_from([None, (), (1, 1), (256, 480)]),
    "epochs": st.integers(1, 2**40),
    "batch_size": st.integers(2, 2**40),
    "data_dir": st.one_of(st.none(), st.sampled_from(["data", "~/x y", "/a/ü"])),
    "optimizer": st.sampled_from(optimizers.NAMES),
    "precision": st.sampled_from(PRECISIONS),
    "test_every": st.sampled_from(["epoch", "round", 1, 7]),
    "on_nan": st.sampled_from(ON_NAN),
    "norm_statistics": st.sampled_from(norm_statistics.NAMES),
    "save_every": st.one_of(st.none(), st.integers(1, 2**40), st.sampled_from(["90s", "1.5min", "2 h", "end"])),
    "base_learning_rate": st.none(),  # one of the two rates, below
    "decay_at": st.lists(UNIT, unique=True, max_size=4).map(sorted).map(tuple),
    "kind": st.sampled_from(rates.KINDS),
    "start": st.floats(0.5, 1.0),
    "end": st.floats(2**-10, 0.5),
    "keep": st.sampled_from(trimming.KEEPS),
    "frame": st.integers(1, 2**14),
    "resize": st.one_of(st.none(), st.integers(1, 2**14)),
    "pad": st.one_of(st.none(), st.integers(0, 2**14)),
    "loss": st.sampled_from(losses.NAMES),
    "rate_scaling": st.sampled_from(batch_plan.SCALINGS),
    "place": st.sampled_from(augment.PLACES),
    "rows": st.sampled_from(ROWS),
    "method": st.sampled_from(METHODS),
    "trim_path": st.sampled_from(trimming.PATHS),
    "compile_ahead": st.sampled_from(COMPILE_AHEAD),
}
OF_CLASS = {
    hj.trimming.Trimming: {"schedule": st.sampled_from(trimming.SCHEDULES)},
    hj.batch_plan.BatchPlan: {
        "text": st.sampled_from(["32", "s32-to-512", "0.25*8-0.75*16", "1/3*8-2/3*8@0.3;every=2"])
    },
}
NAMES = {"schedule": rates.KINDS, "augmentation": tuple(augment.PRESETS)}  # texts that stand for a whole axis


def by_type(hint) -> st.SearchStrategy:
    """Values of a type, away from the ends of what any field takes."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([by_type(part) for part in parts])
    if origin is tuple:
        return st.lists(by_type(parts[0]), max_size=3).map(tuple)
    if origin is not None and issubclass(origin, Mapping):
        return st.dictionaries(WORDS, JSON, max_size=3)
    simple = {bool: st.booleans(), int: st.integers(1, 2**40), float: UNIT, str: WORDS, types.NoneType: st.none()}
    return simple[hint]


def of_class(cls: type) -> st.SearchStrategy:
    """Settings of a dataclass, given as a caller might hand them in."""
    hints = _settings.hints(cls)
    bound = {name: by_type(hint) for name, hint in hints.items() if name not in {*BOUND, *axes(cls)}}
    bound |= {name: strategy for name, strategy in (BOUND | OF_CLASS.get(cls, {})).items() if name in hints}
    fields = {name: strategy.flatmap(dressed) for name, strategy in bound.items()}
    fields |= {name: of_axis(name, declared, hints[name]) for name, declared in axes(cls).items()}

    def make(given: dict) -> object:
        try:
            return cls(**given)
        except Refusal as refusal:
            # Fields that do not go together; whatever else is refused ought not to be.
            if not any(
                words in str(refusal)
                for words in ("Expected a frame", "a way to crop", "batch_plan", "with measure", "with micro_batch")
            ):
                raise
            reject()

    missing = dataclasses.MISSING
    needed = [f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing]
    always = {name: fields.pop(name) for name in needed}
    return st.fixed_dictionaries(always, optional=fields).map(make)


def of_axis(name: str, declared, hint) -> st.SearchStrategy:
    classes = [declared.settings] if isinstance(declared.settings, type) else list(declared.settings.values())
    choices = [of_class(cls) for cls in classes]
    choices += [st.none()] if types.NoneType in typing.get_args(hint) else []
    choices += [st.sampled_from(NAMES[name])] if str in typing.get_args(hint) else []
    return st.one_of(choices)


def dressed(value) -> st.SearchStrategy:
    """The value, as it is or as NumPy and pathlib have it."""
    forms = [value]
    if isinstance(value, bool):
        forms += [np.bool_(value), np.array(value)]
    elif isinstance(value, int):
        forms += [np.int64(value), np.array(value)]
    elif isinstance(value, float):
        forms += [np.float64(value), np.array(value)] + ([np.float32(value)] if abs(value) < 1e38 else [])
    elif isinstance(value, str):
        forms += [np.str_(value)] + ([Path(value)] if value and "\0" not in value else [])
    elif isinstance(value, tuple):
        forms += [list(value), np.array(value)]
    return st.sampled_from(forms)


LEAVES = st.one_of(
    *(st.none(), st.booleans(), st.integers(-(2**63) + 1, 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False)),
    WORDS,
)
JSON = st.recursive(
    LEAVES.flatmap(dressed),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=8,
)


def drawn(cls: type, most: int):
    """A test of settings of the class."""
    checks = settings(
        deadline=None,
        derandomize=True,
        max_examples=most,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        database=None,
    )
    return lambda test: checks(given(of_class(cls))(test))


def the_same(config: hj.TrainConfig) -> None:
    text = json.dumps(config.to_dict(), allow_nan=False)
    again = type(config).from_dict(json.loads(text))
    assert again == config and hash(again) == hash(config) and json.dumps(again.to_dict()) == text
    assert dataclasses.replace(config) == config
    for name in _settings.hints(type(config)):
        assert type(getattr(again, name)) is type(getattr(config, name)), name
    # JSON has lists alone, in any order of names.
    assert type(config).from_dict(dict(reversed(config.to_dict().items()))) == config


@drawn(hj.TrainConfig, 10)
def test_a_configuration_is_the_same_after_json(config):
    the_same(config)


@pytest.mark.ci
@drawn(hj.TrainConfig, 500)
def test_five_hundred_configurations_are_the_same_after_json(config):
    the_same(config)


@drawn(hj.Performance, 25)
def test_performance_is_the_same_after_json(performance):
    again = hj.Performance(**json.loads(json.dumps(dataclasses.asdict(performance), allow_nan=False)))
    assert again == performance and hash(again) == hash(performance)
    assert dataclasses.asdict(again) == dataclasses.asdict(performance)


@pytest.mark.ci
@pytest.mark.parametrize("name", list(axes(hj.TrainConfig)))
def test_each_axis_is_the_same_after_json(name):
    declared = axes(hj.TrainConfig)[name]

    @settings(deadline=None, derandomize=True, max_examples=100, database=None)
    @given(of_axis(name, declared, _settings.hints(hj.TrainConfig)[name]))
    def check(setting):
        the_same(hj.TrainConfig(**{name: setting}))

    check()


def test_a_rate_a_sample_is_the_same_after_json():
    for rate in (np.float32(0.1), 1e-30, 1e30):
        the_same(hj.TrainConfig(base_learning_rate=rate))
