"""The runs of a comparison on disk: a line each, written the moment one ends, and the run under way in a folder."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hardjax._validate import Refusal
from hardjax.config import TrainConfig
from hardjax.study.arms import Arm
from hardjax.training import files, lines
from hardjax.training.record import HISTORY, History
from hardjax.training.resume import differences, with_defaults
from hardjax.training.run import RunResult


class Rows:
    """The folder of one comparison, held while it is open.

    Args:
        folder: claimed.
        arms: in order.
    """

    def __init__(self, folder: Path, arms: tuple[Arm, ...]) -> None:
        self._folder, self._arms = folder, {arm.label: arm for arm in arms}
        self._done = {(row["arm"], row["seed"]): row for row in lines.read_lines(folder / HISTORY)}

    def find(self, arm: Arm, config: TrainConfig) -> RunResult | None:
        """The run of this arm and seed, if it is done; its state is not kept."""
        row = self._done.get((arm.label, config.seed))
        return None if row is None else _read(row, config)

    def place(self, config: TrainConfig) -> tuple[Path, bool]:
        """(folder for the run that comes next, whether it is there already, cut short)."""
        path = self._folder / files.UNDER_WAY
        try:
            same = json.loads((path / "config.json").read_text()) == json.loads(lines.encode(config.to_dict()))
        except (OSError, ValueError):
            same = False
        # Another one's is left of a run whose line was written just before the end of the process.
        if not same:
            files.discard(path)
        return path, same

    def add(self, arm: Arm, result: RunResult) -> None:
        """A run that is done.

        Raises:
            ValueError: it cannot be written (a full disk).
        """
        lines.append_line(self._folder / HISTORY, _row(arm, result))
        files.discard(self._folder / files.UNDER_WAY)

    def summarise(self, table: Any, thresholds: Any, left_out: Any, interrupted: bool) -> None:
        """What the comparison came to.

        Raises:
            ValueError: it cannot be written (a full disk).
        """
        found = {"rows": table, "thresholds": thresholds, "left_out": left_out, "interrupted": interrupted}
        files.write_json(self._folder / "summary.json", found | files.environment())
        if not interrupted:  # the end may have come between the line of the last run and the removal of its folder
            files.discard(self._folder / files.UNDER_WAY)


@contextmanager
def opened(
    output: str | os.PathLike, plain: Mapping[str, Any], arms: tuple[Arm, ...], overwrite: bool, resume: bool
) -> Iterator[Rows]:
    """Claim the folder of a comparison.

    Args:
        plain: what config.json says of it.

    Raises:
        ValueError: it holds something else, or another comparison.
    """
    check(output, plain, overwrite, resume)
    with files.claim_folder(output, overwrite, keep=resume) as folder:
        files.write_json(folder / "config.json", plain)
        (folder / "summary.json").unlink(missing_ok=True)
        yield Rows(folder, arms)


def check(output: str | os.PathLike, plain: Mapping[str, Any] | None, overwrite: bool, resume: bool) -> None:
    """Look whether a comparison could write there; touches nothing.

    Args:
        plain: as `opened`; None looks at the kind of what is there alone.

    Raises:
        ValueError: it holds something else, or another comparison.
    """
    if overwrite and resume:
        raise Refusal("Give overwrite=True (--overwrite) or resume=True (--resume), not both.")
    folder = files.check_folder(output, overwrite or resume)
    if not resume:
        return
    files.check_no_sweep(folder)
    try:
        there = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        # Its lines name arm and seed alone: those of another comparison would be taken for this one's.
        if (folder / HISTORY).exists() and lines.read_lines(folder / HISTORY):
            raise Refusal(
                f"The config.json in {str(folder)!r} is gone or damaged: nobody knows whose the results there are; name"
                " another folder, or pass --overwrite (overwrite=True)."
            ) from None
        return
    if not isinstance(there, dict) or "arms" not in there:
        raise Refusal(f"{str(folder)!r} holds a run; name the folder of a comparison.")
    if plain is not None and (differ := differences(with_defaults(there), json.loads(lines.encode(plain)))):
        raise Refusal(f"The comparison in {str(folder)!r} is another one: {'; '.join(differ)}.")


def _row(arm: Arm, result: RunResult) -> dict[str, Any]:
    arrays = {"replays": result.replays, "replay_counts": result.replay_counts, "drop_counts": result.drop_counts}
    return {
        "arm": arm.label,
        "selection": arm.name,
        "delta": arm.delta,
        "seed": result.config.seed,
        "history": result.history,
        "summary": result.summary,
        "arrays": {name: lines.pack(array) for name, array in arrays.items() if array is not None},
        "measurements": {name: lines.pack(array) for name, array in result.measurements.items()},
    }


def _read(row: Mapping[str, Any], config: TrainConfig) -> RunResult:
    history = History()
    columns = row["history"]
    for values in zip(*columns.values(), strict=True):
        history.add(**dict(zip(columns, values, strict=True)))
    arrays = {name: lines.unpack(packed) for name, packed in row["arrays"].items()}
    nothing = float("nan")
    return RunResult(
        config=config,
        history=history.arrays(),
        state=None,
        # A figure that was not finite is written as null.
        summary={
            name: nothing if found is None and name.startswith("final_") else found
            for name, found in row["summary"].items()
        },
        replays=arrays.get("replays"),
        replay_counts=arrays.get("replay_counts", np.zeros(0, np.int32)),
        drop_counts=arrays.get("drop_counts", np.zeros(0, np.int32)),
        measurements={name: lines.unpack(packed) for name, packed in row["measurements"].items()},
    )
