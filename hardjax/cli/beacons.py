"""`hardjax measure` with beacons: writing them, the plane between them, early model selection."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hardjax import _validate
from hardjax._validate import Refusal
from hardjax.choose.batch_plan import BatchPlan
from hardjax.cli import output
from hardjax.config import TrainConfig
from hardjax.plots.plane import SHARES, plane
from hardjax.study import beacon_file, beacons
from hardjax.study.beacons import Configuration, Trail
from hardjax.study.early import Correlation, rank_early
from hardjax.study.measure import read_trail
from hardjax.training import files
from hardjax.training.lines import refused


def write(runs: Sequence[str], path: str, overwrite: bool) -> None:
    """A file of beacons from finished runs of one batch size each, and a table of them.

    Raises:
        ValueError: a run is not finished, under a plan, without spectra or of another plane; the file is there already.
    """
    target = _target(path, overwrite)
    found = [_of_one_size(run) for run in runs]
    beacons.check_shared({run: settings for run, (_, settings) in zip(runs, found, strict=True)})
    trails = [trail for trail, _ in found]
    content = beacon_file.to_dict(trails, found[0][1])
    with refused(target, "to be a file that can be written"):
        target.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(target, content)
    rows: dict[Any, dict[str, Any]] = {}
    for tolerance in beacons.TOLERANCES:
        for one in beacons.configurations(trails, tolerance, "measurement"):
            row = rows.setdefault((one.batches, one.learning_rate), _row(one) | {"L_K": float(one.energy[-1])})
            row[f"C_K at {tolerance:g}"] = float(one.condition[-1])
    output.table(f"{len(trails)} beacons (C_K, L_K: geometric means over seeds)", list(rows.values()))
    print(f"written to {target}")


def draw(options: Any) -> None:
    """The plane of a file of beacons, with the travelling histories of runs under a plan; early model selection.

    Args:
        options: of `hardjax measure`.

    Raises:
        ValueError: no file of beacons, too few of them, or a run that does not belong to their plane.
    """
    trails, settings = _load(options.beacons)
    found = beacons.configurations(trails, options.tolerance, options.reading)
    epochs = TrainConfig.from_dict(settings).epochs
    for epoch in options.early:
        if not 1 <= epoch < epochs:
            raise Refusal(
                f"Expected --early {epoch} to be an epoch from 1 to {epochs - 1}, before the end of training."
            )
    travels, of_one_size = _travels(options, settings)
    placed = [one for one in found if one.is_placed(options.error)]
    beacons.check_enough(placed)
    how = f"tolerance {options.tolerance:g}, each {options.reading} alike"
    ranked = rank_early(found, options.early)
    with files.claim_folder(options.output, options.overwrite) as folder:
        told = {"beacons": [_plain(one) for one in found], "runs": {name: _plain(one) for name, one in travels}}
        told |= {"early": [vars(one) | {"differs": one.differs} for one in ranked]}
        files.write_json(folder / "measure.json", {"options": vars(options)} | told)
    title = f"{TrainConfig.from_dict(settings).title}, {epochs} epochs; {how}"
    kept = dict(title=title, error=options.error, linear=options.linear_axes)
    drawn = output.picture(folder / "plane.png", lambda: plane(found, travels, **kept))
    rows = [
        _row(one) | _place(one) for one in sorted(found, key=lambda one: np.nan_to_num(one.error["test"], nan=np.inf))
    ]
    output.table(f"beacons, the best first; {how}", rows)
    if travels:
        output.table(f"runs under a plan; {how}", [_row(one) | _place(one) for _, one in travels])
    if of_one_size:
        print(
            f"{of_one_size} of the runs keep one batch size and are not drawn: --write-beacons makes beacons of such."
        )
    if len(placed) < len(found):
        print(f"{len(found) - len(placed)} configurations have no finite place or error and are not drawn.")
    if ranked:
        _tell(ranked, how)
    print(f"written to {folder}: measure.json{', plane.png' if drawn else ''}")


def _target(path: str, overwrite: bool) -> Path:
    """Where the beacons go: nowhere that holds anything else."""
    target = _validate.local_folder(write_beacons=path)
    with refused(target, "to be a file that can be written"):
        if target.is_dir():
            raise Refusal(f"Expected write_beacons={path!r} to be a file; it is a folder.")
        if os.path.lexists(target):
            if not overwrite:
                raise Refusal(f"{path!r} is there already; name another file, or pass --overwrite.")
            _load(path)  # only beacons are written over
    return target


def _of_one_size(run: str) -> tuple[Trail, dict[str, Any]]:
    """A beacon and its settings; a plan is refused before any spectrum is read."""
    if plan := _plan(run):
        raise Refusal(f"The run in {run!r} has batch_plan={plan!r}; beacons keep one batch size.")
    return read_trail(run)


def _plan(run: str) -> str | None:
    plan = TrainConfig.from_dict(files.read_config(run)).batch_plan
    return None if plan is None else plan.text


def _load(path: str) -> tuple[list[Trail], dict[str, Any]]:
    file = _validate.local_folder(beacons=path)
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise Refusal(f"Expected beacons={path!r} to be readable: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise Refusal(f"Expected beacons={path!r} to be JSON: {error}.") from None
    try:
        return beacon_file.from_dict(content)
    except Refusal as refusal:
        raise Refusal(f"Cannot take beacons={path!r}: {refusal}") from None


def _travels(options: Any, settings: dict[str, Any]) -> tuple[list[tuple[str, Configuration]], int]:
    """(name, travelling history) of the runs under a plan, averaged over seeds, and how many have none."""
    planned = [run for run in options.runs if _plan(run)]
    read = [read_trail(run, SHARES) for run in planned]
    own = {run: settings for run, (_, settings) in zip(planned, read, strict=True)}
    beacons.check_shared({options.beacons: settings} | own, plans=True)
    trails = [trail for trail, _ in read]
    beacons.check_distinct(trails)
    found = beacons.configurations(trails, options.tolerance, options.reading)
    rates = len({one.learning_rate for one in found})
    named = [(_name(str(one.batches)) + (f", rate {one.learning_rate:g}" if rates > 1 else ""), one) for one in found]
    return named, len(options.runs) - len(planned)


def _name(plan: str) -> str:
    """The paper's name of a plan, where it is one of the paper's: short enough for a picture."""
    sizes, end = BatchPlan(plan).sizes, "-MS" if BatchPlan(plan).multi_step else ""
    published = f"s{sizes[0]}-to-{sizes[-1]}{end}"
    try:
        return published if BatchPlan(published).text == plan else plan
    except Refusal:
        return plan


def _row(one: Configuration) -> dict[str, Any]:
    return {
        "batch": one.batches if isinstance(one.batches, int) else _name(one.batches),
        "rate": one.learning_rate,
        "seeds": one.seeds,
        "diverged": one.diverged,
        "test error (%)": one.error["test"],
        "train error (%)": one.error["train"],
    }


def _place(one: Configuration) -> dict[str, Any]:
    return {"C_K": float(one.condition[-1]), "L_K": float(one.energy[-1])}


def _plain(one: Configuration) -> dict[str, Any]:
    return vars(one) | {"error": dict(one.error), "errors": dict(one.errors)}


def _tell(ranked: Sequence[Correlation], how: str) -> None:
    rows: dict[str, dict[str, Any]] = {}
    count = max(one.count for one in ranked)
    for one in ranked:
        # Of fewer configurations than the others where some have nothing yet: not to be compared as it stands.
        few = f" of {one.count}" if one.count < count else ""
        text = f"{one.value:+.2f} ({one.low:+.2f} to {one.high:+.2f}){' *' * one.differs}{few}"
        text = "-" if one.value != one.value else text
        rows.setdefault(one.known, {"known": one.known})[f"epoch {one.epoch}"] = text
    output.table(f"rank correlation with the final test error over {count} configurations; {how}", list(rows.values()))
    print(
        "(to): 95 % intervals, bootstrap over configurations; * excludes 0, not corrected for their number. Distance:"
        " to the best of the other configurations at the same epoch. -: not known then, or alike for all."
    )
