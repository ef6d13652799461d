"""Checks for people's own pieces: what a run takes for granted of a strategy, each as a named assertion.

`assert_selection_is_sound(MyStrategy(0.3))` in a test suite says which promise is broken before a run of hours does;
`assert_resumes_everywhere(config, dataset)` cuts a short run everywhere and goes on;
`assert_member_equals_solo(configs, dataset)` trains a population and each of its members alone.
"""

import copy
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hardjax import _validate
from hardjax.choose import selection as selections
from hardjax.choose.selection import Selection
from hardjax.config import Performance, TrainConfig
from hardjax.data import Dataset
from hardjax.engine.recipe import functions_of
from hardjax.training import checkpoint, resume
from hardjax.training.loop import Loop
from hardjax.training.population import prepare_population
from hardjax.training.population_loop import Member, PopulationLoop
from hardjax.training.progress import Silent
from hardjax.training.setting import prepare
from hardjax.training.signals import Asked


def assert_selection_is_sound(strategy: Selection, *, num_slots: int = 12, batch_size: int = 4, seed: int = 0) -> None:
    """Try every promise that a run relies on; the first that is broken is named with what was found.

    The strategy is frozen, hashable, equal to its copies and plain JSON; `round_steps` is at least 1; the first round
    trains every slot; plans are (size,) int32 in range, the same for the same table and key, with and without jit;
    `update` changes the entries of its slots alone, keeps shape and dtype, and never stores a loss that is not finite.

    Args:
        strategy: see `hardjax.selection.Selection`.
        num_slots: size of the loss table: mini-batches (`unit = "batch"`) or samples (`unit = "sample"`). At least 3.
        batch_size: samples a mini-batch; read where slots are samples.
        seed: of the losses and keys that are tried.

    Raises:
        AssertionError: a broken promise, in one line that begins with the name of the check.
        ValueError: sizes out of range.
    """
    _validate.at_least(3, num_slots=num_slots)
    _validate.at_least(1, batch_size=batch_size)
    for check in (_check_frozen, _check_words, _check_json):
        check(strategy)
    of_samples = strategy.unit == "sample"
    num_batches = -(-num_slots // batch_size) if of_samples else num_slots
    _check_round_steps(strategy, num_batches)
    table = _check_init(strategy, num_slots)
    keys = list(jax.random.split(jax.random.key(seed), 3))
    each = batch_size if of_samples else 1
    _check_first_round(strategy, table, keys[0], num_batches * each)
    # As a run does: a batch's loss comes alone, those of samples a batch at a time.
    some = jnp.arange(min(each, num_slots - 1), dtype=jnp.int32) if of_samples else jnp.int32(1)
    everything = jnp.arange(num_slots, dtype=jnp.int32)
    # Hardest last, hardest first, and no order at all: an index that is off by one leaves the range in one of them.
    orders = (jnp.arange(1.0, num_slots + 1), jnp.arange(num_slots, 0.0, -1), jax.random.gamma(keys[0], 2, [num_slots]))
    tables = [_check_update(strategy, table, everything, losses) for losses in orders]
    _check_update(strategy, tables[-1], some, jnp.full(some.shape, 9.0, jnp.float32))
    _check_not_finite(strategy, tables[-1], some)
    full = strategy.round_steps(num_batches) * each
    for size in sorted({each, full}):  # the last round of a run is cut short
        for values in (table, *tables):
            _check_plan(strategy, values, keys, size)


def assert_resumes_everywhere(
    config: TrainConfig,
    dataset: Dataset | None = None,
    *,
    model: Any = None,
    performance: Performance | None = None,
) -> int:
    """Train, saving between all dispatches, also inside rounds; go on from every save; compare the whole rest with the
    run that nothing interrupted: parameters and everything else that decides the future, history (clock times aside),
    rounds and spectra, to the bit.

    Args:
        config, dataset, model: a short run, as for `hardjax.run`: it is trained once for every save.
        performance: `steps_per_dispatch` says how often it is cut; by default every 3 steps.

    Returns:
        The number of places at which it was cut; at least 1.

    Raises:
        AssertionError: a run that went on differs, in one line with the place and what differs.
        ValueError: what `hardjax.run` refuses.
    """
    performance = performance or Performance(steps_per_dispatch=3)
    model = None if model is None else functions_of(model)  # once: every run would compile programs of its own
    setting = prepare(config, dataset, model, performance)
    with tempfile.TemporaryDirectory() as scratch:
        folder, copies = Path(scratch) / "run", Path(scratch) / "copies"
        folder.mkdir()
        cut = _Everywhere(folder, copies)
        saved = _ended(Loop(setting, Silent(), 0.0, folder, cut))  # type: ignore[arg-type]
        whole = _ended(Loop(setting, Silent(), 0.0))
        _compare("saving alone", whole, saved)
        places = sorted(copies.iterdir())
        _say(bool(places), "resume", "the run was over before it could be cut; take a smaller steps_per_dispatch.")
        for place in places:
            start = resume.find(place, setting)
            assert start is not None
            where = f"cut after {start.position.backprops} back-propagations, {start.position.cursor} into a round"
            _compare(where, whole, _ended(Loop(setting, Silent(), 0.0, place, None, start)))
    return len(places)


def assert_member_equals_solo(
    configs: Sequence[TrainConfig],
    dataset: Dataset | None = None,
    *,
    model: Any = None,
    performance: Performance | None = None,
    tolerance: float = 1e-3,
) -> None:
    """Train a population, and each member alone: the same is left, to the bit under "map" on a CPU.

    Elsewhere parameters, statistics and losses are compared: no number of an array differs by more than `tolerance`
    times its largest. Of a member that diverged it is what was found until then.

    Args:
        configs, dataset, model: of short runs, as for `hardjax.run_population`.
        performance: `population` is "map" (where it is left alone too) or "vmap".

    Raises:
        AssertionError: a member differs, in one line with its place and what differs.
        ValueError: what `hardjax.run_population` refuses.
    """
    mode = "vmap" if performance is not None and performance.population == "vmap" else "map"
    model = None if model is None else functions_of(model)
    population = prepare_population(configs, dataset, model, performance, mode=mode)
    members = [Member(one, None, None) for one in population.members]
    loop = PopulationLoop(population, Silent(), members)
    loop.conclude(loop.go(Asked()))
    for index, member in enumerate(members):
        assert member.end is not None
        alone = _ended(Loop(dataclasses.replace(member.setting, population=None), Silent(), 0.0))
        whole, found = (_until(one, len(member.record.history.entries)) for one in (alone, _left(member, member.end)))
        if found["end"] != whole["end"]:  # it diverged before the end
            whole, found = ({"history": one["history"]} for one in (whole, found))
        if mode == "map" and jax.default_backend() == "cpu":
            _compare(f"member {index}", whole, found, "member")
        else:
            _compare_near(f"member {index}", whole, found, tolerance)


def _until(left: Mapping[str, Any], points: int) -> dict[str, Any]:
    return {**left, "history": {name: column[:points] for name, column in left["history"].items()}}


def _compare_near(where: str, whole: Any, found: Any, tolerance: float) -> None:
    def kept(left: Any) -> Any:
        losses = {name: column for name, column in left["history"].items() if name.endswith("_loss")}
        return losses, {name: left.get("state", {}).get(name) for name in ("params", "batch_stats")}

    pairs = zip(*(jax.tree_util.tree_leaves_with_path(kept(left)) for left in (whole, found)), strict=True)
    for (path, expected), (_, got) in pairs:
        finite = np.isfinite(expected)
        apart = np.abs(np.where(finite, got, 0) - np.where(finite, expected, 0)).max(initial=0)
        most = tolerance * np.abs(expected[finite]).max(initial=0)
        same = np.array_equal(finite, np.isfinite(got)) and apart <= most
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        _say(same, "member", f"{where}: {name} differs by {apart:g}, more than {most:g}.")


class _Everywhere:
    """Saves whenever it is asked, and keeps a copy of the folder as a kill at that moment would leave it."""

    def __init__(self, folder: Path, copies: Path) -> None:
        self._folder, self._copies, self._count = folder, copies, 0

    def due(self, tested: int | None) -> bool:
        return True

    def save(self, state: Any, facts: Mapping[str, Any]) -> None:
        checkpoint.save(self._folder, state, facts)
        shutil.copytree(self._folder, self._copies / f"{self._count:04}")
        shutil.rmtree(self._folder / checkpoint.FOLDER)
        self._count += 1


def _ended(loop: Loop) -> dict[str, Any]:
    """Everything that a run leaves, trained to its end."""
    return _left(loop, loop.go(Asked()))


def _left(loop: Any, end: str) -> dict[str, Any]:
    history = loop.record.history.arrays()
    clocks = [name for name in history if "seconds" in name]
    return {
        "end": end,
        "history": {name: values for name, values in history.items() if name not in clocks},
        "replays": loop.record.replays,
        "spectra": loop.record.spectra.arrays(),
        "decisions": loop.record.decisions,
        "state": checkpoint.on_host(loop.state),
        "bad steps": (loop.record.bad_steps, loop.record.first_bad, loop.record.never_finite),
    }


def _compare(where: str, whole: Any, found: Any, check: str = "resume") -> None:
    expected, got = (jax.tree_util.tree_leaves_with_path(tree) for tree in (whole, found))
    names = [
        [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves] for leaves in (expected, got)
    ]
    _say(names[0] == names[1], check, f"{where}: it reports {sorted(set(names[0]) ^ set(names[1]))[:3]} or not.")
    for name, (_, left), (_, right) in zip(names[0], expected, got, strict=True):
        left, right = np.asarray(left), np.asarray(right)
        # By bytes: NaN equals itself, and 0.0 is not -0.0.
        same = left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()
        _say(same, check, f"{where}: {name} differs: {right.ravel()[:3]} instead of {left.ravel()[:3]}.")


def _check_frozen(strategy: Any) -> None:
    """Programs are keyed by the strategy: one that changes afterwards would be trained by a program of its old self."""
    try:
        hash(strategy)
    except TypeError as error:
        raise AssertionError(f"hashable: {type(strategy).__name__} cannot be hashed ({error}).") from None
    twin = copy.deepcopy(strategy)
    _say(twin == strategy and hash(twin) == hash(strategy), "equal", f"a copy of {strategy!r} differs from it.")
    # Subclasses of a frozen dataclass take new attributes, which is harmless; its fields stay as they are.
    fields = dataclasses.fields(strategy) if dataclasses.is_dataclass(strategy) else ()
    name = fields[0].name if fields else "_probe"
    try:
        setattr(twin, name, getattr(twin, name, None))
    except (AttributeError, TypeError):
        return
    _say(dataclasses.is_dataclass(strategy) and not fields, "frozen", f"{name!r} of {strategy!r} can be set.")


def _check_words(strategy: Any) -> None:
    unit, redraws = getattr(strategy, "unit", None), getattr(strategy, "redraws", None)
    _say(unit in ("batch", "sample"), "unit", f"expected 'batch' or 'sample', got {unit!r}.")
    _say(isinstance(redraws, bool), "redraws", f"expected True or False, got {redraws!r}.")
    missing = [name for name in ("first_round", "round_steps", "init", "plan", "update") if not hasattr(strategy, name)]
    _say(not missing, "methods", f"{type(strategy).__name__} has no {', '.join(missing)}.")


def _check_json(strategy: Any) -> None:
    """A run writes its configuration down."""
    try:
        json.dumps(selections.to_dict(strategy))
    except TypeError as error:
        raise AssertionError(f"json: the settings of {strategy!r} are no plain JSON ({error}).") from None


def _check_round_steps(strategy: Any, num_batches: int) -> None:
    for count in sorted({1, 2, 7, num_batches}):
        steps = strategy.round_steps(count)
        whole = isinstance(steps, int) and not isinstance(steps, bool)
        _say(whole and steps >= 1, "round_steps", f"expected at least 1 of {count} batches, got {steps!r}.")


def _check_init(strategy: Any, num_slots: int) -> Array:
    table = strategy.init(num_slots)
    found = f"got {getattr(table, 'shape', type(table).__name__)}."
    _say(isinstance(table, Array) and table.shape[:1] == (num_slots,), "init", f"expected ({num_slots},), {found}")
    return table


def _check_first_round(strategy: Any, table: Array, key: Array, size: int) -> None:
    """Round 0 fills the table: a slot that it leaves out would be planned by a loss that nobody measured."""
    first = strategy.first_round()
    _say(first.unit == strategy.unit, "first_round", f"its unit is {first.unit!r}, the strategy's {strategy.unit!r}.")
    slots = _plan("first_round", first.plan, table, key, size)
    missing = sorted(set(range(len(table))) - set(slots.tolist()))
    _say(not missing, "first_round", f"{len(missing)} slots are never trained, {missing[:3]} among them.")


def _check_plan(strategy: Any, table: Array, keys: list[Array], size: int) -> None:
    compiled = jax.jit(strategy.plan, static_argnums=2)
    twin = copy.deepcopy(strategy)
    before = [_plan("plan", strategy.plan, table, key, size) for key in keys]
    for key, slots in zip(keys, before, strict=True):
        _same("plan_pure", "two calls with one table and key", slots, strategy.plan(table, key, size))
        _same("plan_jit", "with and without jit", slots, _traced("plan_jit", compiled, table, key, size))
        _same("plan_equal", "planned by an equal object", slots, twin.plan(table, key, size))


def _plan(name: str, plan: Callable, table: Array, key: Array, size: int) -> np.ndarray:
    slots = plan(table, key, size)
    shape, dtype = getattr(slots, "shape", None), getattr(slots, "dtype", type(slots).__name__)
    _say(shape == (size,) and dtype == jnp.int32, name, f"expected ({size},) int32, got {shape} {dtype}.")
    found = np.asarray(slots)
    # JAX clips an index that is too large without a word: another batch than the one planned would be trained.
    inside = (found >= 0) & (found < len(table))
    _say(bool(inside.all()), name, f"expected slots in 0..{len(table) - 1}, got {found[~inside][:3].tolist()}.")
    return found


def _check_update(strategy: Any, table: Array, slots: Array, losses: Array) -> Array:
    kept = np.array(table)
    new = strategy.update(table, slots, losses)
    same = isinstance(new, Array) and new.shape == table.shape and new.dtype == table.dtype
    _say(same, "update", f"expected {table.shape} {table.dtype}, got {getattr(new, 'shape', type(new).__name__)}.")
    others = np.setdiff1d(np.arange(len(table)), np.asarray(slots))
    _same("update_others", "entries of other slots", kept[others], new[others])
    _same("update_pure", "two calls with the same arguments", new, strategy.update(table, slots, losses))
    compiled = _traced("update_jit", jax.jit(strategy.update), table, slots, losses)
    _same("update_jit", "with and without jit", new, compiled, exact=False)
    return new


def _check_not_finite(strategy: Any, table: Array, slots: Array) -> None:
    """`lax.top_k` orders NaN by its sign bit: one stored loss of that kind would be replayed for ever, or never."""
    whole = "an entry is not finite after a finite loss: one that mixes both needs an init of its own."
    _say(bool(jnp.isfinite(table).all()), "update", whole)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        new = strategy.update(table, slots, jnp.full(slots.shape, bad, jnp.float32))
        _say(bool(jnp.isfinite(new).all()), "update_finite", f"a loss of {bad} was stored.")


def _traced(name: str, fn: Callable, *args: Any) -> Array:
    try:
        return fn(*args)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        first = str(error).splitlines()[0]
        raise AssertionError(f"{name}: it cannot be traced by jax.jit ({first})") from None


def _same(name: str, what: str, left: Any, right: Any, exact: bool = True) -> None:
    left, right = np.asarray(left), np.asarray(right)
    # Compiled, floating-point sums of a strategy's own may be reordered; slots may not.
    equal = np.array_equal(left, right, equal_nan=True) if exact else np.allclose(left, right, rtol=1e-5, atol=1e-6)
    _say(equal, name, f"{what} differ: {left.ravel()[:4].tolist()}, {right.ravel()[:4].tolist()}.")


def _say(holds: bool, name: str, found: str) -> None:
    if not holds:
        raise AssertionError(f"{name}: {found}")
