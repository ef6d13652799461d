"""Going on with a run that was cut short: what was saved, whether it is the same run, and how alike the machine is."""

import dataclasses
import json
import os
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hardjax._validate import Refusal, shown
from hardjax.config import TrainConfig
from hardjax.data.augment import resolve
from hardjax.engine.plan import Position
from hardjax.engine.state import TrainState
from hardjax.training import checkpoint, files, lines
from hardjax.training.checkpoint import Kept, RunWarning
from hardjax.training.lines import Mark
from hardjax.training.setting import Setting

_LOWERED_BY = ("jax", "jaxlib", "flax", "hardjax", "device")  # what the text of a network's program depends on
_SHOWN = 4  # differing fields named in one line


@dataclass(frozen=True)
class Start:
    """Where a run goes on.

    Attributes:
        state: on the device.
        position: for `next_dispatch`.
        record: for `Record.restore`.
        seconds, compile_seconds, compile_wait_seconds: of training, of compiling and of waiting for it so far.
        input_wait_seconds: of waiting for images.
        resumed_at: back-propagations at which it was gone on with, this time included.
        end: why the run ended; None where it did not.
    """

    state: TrainState
    position: Position
    record: Mapping[str, Any]
    seconds: float
    compile_seconds: float
    compile_wait_seconds: float
    input_wait_seconds: float
    resumed_at: tuple[int, ...]
    end: str | None


def find(folder: Path, setting: Setting, step: int | None = None) -> Start | None:
    """Where the run in this folder goes on; None where nothing was saved.

    Args:
        step: back-propagations of the checkpoint to take; None takes the newest.

    Differences that change results by rounding alone (versions, threads, `rounding` settings) are named in a
    `RunWarning`.

    Raises:
        ValueError: another configuration, data or network, naming what differs; or every checkpoint is damaged.
    """
    kept = checkpoint.kept(folder)
    if not kept:
        _same_configuration(_written_config(folder), setting.config.to_dict(), folder)
        return None
    found, state = checkpoint.newest(
        folder, lambda one: shapes_of(setting, one), lambda one: _unusable(folder, one, setting), step
    )
    facts = found.facts
    position = Position(**facts["position"])
    ended = facts["end"] is not None
    made = facts["rounds_like"]
    here = {name: value for name, value in rounds_like(setting).items() if name in made}
    if not ended and (differ := differences(made, here)):
        said = f"Going on from {found.step:,} back-propagations, equal to rounding and not to the bit"
        warnings.warn(f"{said}: {'; '.join(differ)}.", RunWarning, stacklevel=2)
    resumed = tuple(facts["resumed_at"])
    return Start(
        state=state,
        position=position,
        record=facts["record"],
        seconds=facts["seconds"],
        compile_seconds=facts["compile_seconds"],
        # Before there was a thread for it, all compiling was waited for.
        compile_wait_seconds=facts.get("compile_wait_seconds", facts["compile_seconds"]),
        input_wait_seconds=facts.get("input_wait_seconds") or 0.0,
        resumed_at=resumed if ended else (*resumed, position.backprops),
        end=facts["end"],
    )


def followed(folder: Path, setting: Setting, step: int) -> Start:
    """Where process 0 goes on, read by another one, which says nothing of it and writes nothing.

    Raises:
        ValueError: it is not there, or not what process 0 found: the processes do not share the folder.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)
        found = find(folder, setting, step)
    if found is None:
        raise Refusal(f"Expected output={str(folder)!r} on a file system that all processes of a job share.")
    return found


def shared(setting: Setting) -> dict[str, Any]:
    """What all processes of a job must have in common: what is trained, and how it is cut into programs."""
    there = identity(setting) | {"versions": files.environment()["versions"]}
    there["performance"] = dataclasses.asdict(setting.performance)
    there["speed"] = setting.plan.bound
    return there


def shapes_of(setting: Setting, one: Kept) -> TrainState:
    """Of the state that a checkpoint holds; of one without its place in the run that of the beginning."""
    return setting.state_shapes(Position(**one.facts["position"]) if "position" in one.facts else Position())


def placed(setting: Setting, one: Kept) -> Setting:
    """The setting with what a controller had decided by a checkpoint."""
    decided = Position(**one.facts["position"]).decided if "position" in one.facts else ()
    return dataclasses.replace(setting, plan=setting.plan.following(decided))


def identity(setting: Setting) -> dict[str, Any]:
    """What makes two runs the same one: settings, data, first variables, network."""
    start = 0
    for leaf in jax.tree.leaves(setting.start):
        start = zlib.crc32(np.asarray(leaf).tobytes(), start)
    return {
        "config": setting.config.to_dict(),
        "data": setting.whole.checksum,
        # To a tolerance: they are sums, which another machine may round otherwise.
        "augmentation": _augmentation(setting),
        "normalisation": [np.ravel(found).tolist() for found in (setting.dataset.mean, setting.dataset.std)],
        "variables": start,
        "draws": _draws(),
        "network": setting.network,
    }


def _augmentation(setting: Setting) -> dict[str, Any]:
    """In full: what "standard" means is the data's to say (digits are not flipped), and no part of its checksum."""
    return json.loads(json.dumps(dataclasses.asdict(resolve(setting.config.augmentation, setting.dataset))))


def rounds_like(setting: Setting) -> dict[str, Any]:
    """What two machines must have in common for equal bits."""
    made, performance = files.environment(), setting.performance
    # Of populations by what became of them: a run alone is the same whatever was asked for.
    names = [name for name, effect in performance.effects().items() if effect != "exact" and "population" not in name]
    settings = {name: getattr(performance, name) for name in names}
    return {
        **made["versions"],
        "device": made["device_kind"],
        "threads": threads(),
        "processes": jax.process_count(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "jax_enable_x64": bool(jax.config.jax_enable_x64),  # type: ignore[attr-defined]
        **settings,
        "population": setting.population,
    }


def with_defaults(there: Mapping[str, Any]) -> dict[str, Any]:
    """What was written before there was a setting held its default."""
    return TrainConfig().to_dict() | dict(there)


def differences(there: Mapping[str, Any], here: Mapping[str, Any], above: str = "") -> list[str]:
    """What differs between two JSON objects, each as `name is old there and new here`; where data lies aside, which
    is no part of a run."""
    found = []
    for name in {**there, **here}:
        old, new = there.get(name), here.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{above}{name}.")
        elif old != new and name != "data_dir":
            found.append(f"{above}{name} is {shown(old)} there and {shown(new)} here")
    return found


def _unusable(folder: Path, one: Kept, setting: Setting) -> str:
    """Why an undamaged checkpoint cannot be gone on from, or ""; raises where it is another run's."""
    if one.version < 2 or "position" not in one.facts:
        raise Refusal(
            f"The checkpoint in {str(folder)!r} holds a state without its place in the run: it can be measured, but"
            " not gone on with."
        )
    there, here = one.facts["identity"], identity(setting)
    _same_configuration(there["config"], here["config"], folder)
    if there["data"] != here["data"]:
        raise Refusal(f"The run in {str(folder)!r} was trained on other data (checksum {there['data']}).")
    if differ := differences(there.get("augmentation", here["augmentation"]), here["augmentation"]):
        raise Refusal(f"The run in {str(folder)!r} augments its images otherwise: {'; '.join(differ)}.")
    if there["variables"] != here["variables"]:
        raise Refusal(f"The run in {str(folder)!r} started from other variables than those given.")
    if there.get("draws", here["draws"]) != here["draws"]:
        raise Refusal(f"The run in {str(folder)!r} drew its random numbers as {there['draws']}, not {here['draws']}.")
    if "normalisation" in there and not np.allclose(there["normalisation"], here["normalisation"], rtol=1e-5):
        raise Refusal(f"The run in {str(folder)!r} was trained on images of another mean or standard deviation.")
    check_network(folder, one, setting)
    lost = [name for name, mark in one.facts["record"]["files"].items() if not lines.holds(folder / name, Mark(*mark))]
    return f"{lost[0]} is not as it was then" if lost else ""


def check_network(folder: Path, one: Kept, setting: Setting) -> None:
    """That a checkpoint is of this network, and of this loss where it is of one's own.

    Raises:
        ValueError: it is of another one.
    """
    there = one.facts.get("identity", {}).get("network", setting.network)
    made = files.environment()
    now = {**made["versions"], "device": made["device_kind"]}
    # Lowered by another version, the same network has another text; a fingerprint of another form is of other programs.
    alike = there.partition(":")[0] == setting.network.partition(":")[0] and all(
        one.facts.get("rounds_like", {}).get(name) == now[name] for name in _LOWERED_BY
    )
    if there != setting.network and alike:
        raise Refusal(
            f"The run in {str(folder)!r} trained another network or loss: its programs are not those of the one given."
        )


def _same_configuration(there: Mapping[str, Any] | None, here: Mapping[str, Any], folder: Path) -> None:
    if there is None:
        return
    if not (differ := differences(with_defaults(there), here)):
        return
    more = f" and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
    raise Refusal(
        f"The run in {str(folder)!r} is another one: {'; '.join(differ[:_SHOWN])}{more}. Give the same settings to go"
        " on, or name another folder."
    )


def _written_config(folder: Path) -> dict[str, Any] | None:
    """config.json, or None where there is none that can be read: nothing that would be lost hangs on it."""
    try:
        return files.read_config(folder)
    except Refusal:
        return None


def threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _draws() -> str:
    """What jax makes random numbers of, besides the key."""
    kind = "partitionable" if jax.config.jax_threefry_partitionable else "not partitionable"  # type: ignore[attr-defined]
    return f"{jax.config.jax_default_prng_impl}, {kind}"  # type: ignore[attr-defined]


def facts(setting: Setting, position: Position, **rest: Any) -> dict[str, Any]:
    """What is saved beside a state."""
    return {
        "identity": identity(setting),
        "rounds_like": rounds_like(setting),
        "commit": files.commit(),
        "position": dataclasses.asdict(position),
        **rest,
    }
