"""Real processes killed, stopped and starved, then gone on with: what they leave is the undisturbed run's, to the bit.

Each fault is asserted to have fired while there was work left; a process that was faster is started again and struck
sooner. Moments are drawn from seeds, after the first sign of work, so that not all of them hit the imports.
"""

import contextlib
import dataclasses
import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from prepared import make_prepared
from processes import Child

import hardjax as hj
from hardjax._validate import Refusal
from hardjax.config import Performance, TrainConfig
from hardjax.data import decoded
from hardjax.study import rows
from hardjax.study.measure import measure_run
from hardjax.training import checkpoint, lines, opening
from hardjax.training import run as running
from hardjax.training.checkpoint import RunWarning
from hardjax.training.saver import Saver
from hardjax.training.setting import Setting, prepare

KEPT = Path(__file__).parents[1] / "data"
NETWORK = ["--model", "mlp", "--model-option", "widths=[8]", "--batch-size", "16", "--quiet"]
AXES = "--selection hard-batches --delta 0.5 --trim-start 0.5 --trim-end 0.5 --augmentation standard --validation 0.2"
SETTINGS = {
    # The writer of checkpoints is busy nearly all the time.
    "plain": f"train --epochs 40 --save-every 1 {AXES}",
    "everything": f"train --epochs 30 --save-every 1 --measure-every 40 {AXES}",
    "compare": "compare --epochs 30 --save-every 1 --deltas 0.5 --controls --seeds 2",
}


class Run:
    """A command and the folder that it writes to.

    Args:
        command: as the command line takes it, without --output.
        folder: for the run.
    """

    def __init__(self, command: list[Any], folder: Path) -> None:
        self.command, self.folder = command, folder

    def start(self, *more: str) -> Child:
        return Child(*self.command, "--output", self.folder, *more)

    def saves(self) -> set[str]:
        """Names of checkpoints, those that are being written too."""
        homes = (self.folder / checkpoint.FOLDER, self.folder / "under-way" / checkpoint.FOLDER)
        return {f"{home.parent.name}/{name}" for home in homes if home.is_dir() for name in os.listdir(home)}

    def works(self) -> Callable[[], object]:
        """A sign that is seen as soon as a checkpoint is begun that is not there now."""
        there = self.saves()
        return lambda: self.saves() - there

    @property
    def finished(self) -> bool:
        """Its last file is there."""
        try:
            summary = json.loads((self.folder / "summary.json").read_text())
        except FileNotFoundError:
            return False
        return not summary["interrupted"]


def command(name: str) -> list[Any]:
    return ["-m", "hardjax", *SETTINGS[name].split(), *NETWORK]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Name -> (folder of the run that nothing disturbed, its seconds from the first checkpoint to the end)."""
    done: dict[str, tuple[Path, float]] = {}

    def find(name: str, words: list[Any] | None = None) -> tuple[Path, float]:
        if name not in done:
            run = Run(words or command(name), tmp_path_factory.mktemp("undisturbed") / "run")
            with run.start() as child:
                assert child.shows(run.works()), child.printed
                begun = time.monotonic()
                assert child.shows(lambda: run.finished), child.printed
                took = time.monotonic() - begun
                assert child.ends() == 0, child.printed
            done[name] = run.folder, took
        return done[name]

    return find


def kill_and_go_on(run: Run, kills: int, seconds: float, seed: int) -> int:
    """Kill the run that many times, each time going on from what was there, then let it end.

    Args:
        seconds: that the undisturbed run takes.

    Returns:
        Processes that were faster than their kill.
    """
    rng, missed = np.random.default_rng(seed), 0
    for turn in range(kills):
        before = run.folder.with_name("before")
        shutil.rmtree(before, ignore_errors=True)
        if run.folder.exists():
            shutil.copytree(run.folder, before)
        share, faster = seconds / (kills - turn), 0
        while True:
            with run.start(*(["--resume"] if turn else [])) as child:
                if child.shows(run.works()):
                    time.sleep(rng.uniform(0, share))
                child.strike(signal.SIGKILL)
                code = child.ends()
            if code == -signal.SIGKILL and not run.finished:
                break
            assert code in (0, -signal.SIGKILL), child.printed
            missed, faster, share = missed + 1, faster + 1, share / 2
            assert faster < 8, "the process was faster than every kill"
            shutil.rmtree(run.folder)
            if before.exists():
                shutil.copytree(before, run.folder)
    with run.start("--resume") as child:
        assert child.ends() == 0, child.printed
    return missed


def outcome(folder: Path, setting: Setting | None = None) -> dict[str, Any]:
    """Everything that a run left and that must not depend on when it was cut, as bytes or plain values."""
    setting = setting or _setting(folder)
    state = checkpoint.on_host(checkpoint.restore(folder, setting.state_shapes()))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    with np.load(folder / "replays.npz") as arrays:
        replays = {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()}
    history = lines.read_lines(folder / "history.jsonl")
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "state": {jax.tree_util.keystr(path): (leaf.dtype.str, leaf.tobytes()) for path, leaf in leaves},
        "history": [_timeless(entry) for entry in history],
        "rounds": (folder / "rounds.jsonl").read_bytes() if (folder / "rounds.jsonl").exists() else b"",
        "spectra": (folder / "spectra.jsonl").read_bytes() if (folder / "spectra.jsonl").exists() else b"",
        "replays": replays,
        "summary": _timeless(summary),
    }


def _setting(folder: Path) -> Setting:
    config = TrainConfig.from_dict(json.loads((folder / "config.json").read_text()))
    key = json.dumps(config.to_dict())
    if key not in _SETTINGS:
        _SETTINGS[key] = prepare(config)
    return _SETTINGS[key]


_SETTINGS: dict[str, Setting] = {}


def _timeless(tree: Any) -> Any:
    """Without clock times and where the run was cut."""
    if isinstance(tree, list):
        return [_timeless(branch) for branch in tree]
    if not isinstance(tree, dict):
        return tree
    other = ("resumed_at", "time_ratio")
    return {name: _timeless(found) for name, found in tree.items() if "seconds" not in name and name not in other}


def compared(folder: Path) -> dict[str, Any]:
    """`outcome` of a comparison."""
    runs = {}
    for row in lines.read_lines(folder / "history.jsonl"):
        plain = {"summary": _timeless(row.pop("summary")), "history": _timeless(row.pop("history"))}
        assert (row["arm"], row["seed"]) not in runs, "a run is written twice"
        runs[row["arm"], row["seed"]] = row | plain
    summary = json.loads((folder / "summary.json").read_text())
    return {"runs": runs, "summary": _timeless(summary)}


def _nothing_left(folder: Path) -> None:
    """No file that a killed writer left."""
    left = [path for path in folder.rglob("*") if path.name.endswith(".part") or path.name.startswith(".writing-")]
    assert not left and not (folder / "under-way").exists()


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in expected:
        assert found[name] == expected[name], f"{name} differs"


# --- kills


@pytest.mark.ci
def test_a_training_killed_twice_ends_as_if_undisturbed(undisturbed, tmp_path):
    folder, seconds = undisturbed("plain")
    run = Run(command("plain"), tmp_path / "run")
    kill_and_go_on(run, 2, seconds, seed=0)
    same(outcome(run.folder), outcome(folder))
    assert len(json.loads((run.folder / "summary.json").read_text())["resumed_at"]) <= 2
    _nothing_left(run.folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_training_with_everything_killed_again_and_again(undisturbed, tmp_path, seed):
    folder, seconds = undisturbed("everything")
    run = Run(command("everything"), tmp_path / "run")
    kill_and_go_on(run, 4, seconds, seed)
    same(outcome(run.folder), outcome(folder))
    _nothing_left(run.folder)


# Long epochs of tiny batches, cut by the clock: kills and saves fall inside rounds.
_IN_ROUNDS = """
import sys
import hardjax as hj
from hardjax.cli.main import main
from hardjax.cli import prepare
from hardjax.config import Performance, TrainConfig
prepare.use_compilation_cache()
config = TrainConfig(
    model="mlp", model_options={"widths": [8]}, epochs=4, batch_size=2, validation=0.2, learning_rate=0.001,
    selection=hj.selection.HardBatches(0.5), measure=hj.fisher.FisherMeasure(every=100),
)
often = Performance(steps_per_dispatch=7, save_every="0.05s")
resume = "--resume" in sys.argv
hj.run(config, performance=often, output=sys.argv[2], resume=resume, progress=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [4, 5])
def test_a_training_killed_inside_rounds(undisturbed, tmp_path, seed):
    words = ["-c", _IN_ROUNDS]
    folder, seconds = undisturbed("in rounds", words)
    run = Run(words, tmp_path / "run")
    kill_and_go_on(run, 3, seconds, seed)
    same(outcome(run.folder), outcome(folder))
    assert any(step % 575 for step in json.loads((run.folder / "summary.json").read_text())["resumed_at"])
    _nothing_left(run.folder)


@pytest.mark.parametrize(
    "kills, seed", [pytest.param(1, 6, marks=pytest.mark.ci), pytest.param(4, 7, marks=pytest.mark.slow)]
)
def test_a_comparison_that_is_killed(undisturbed, tmp_path, kills, seed):
    folder, seconds = undisturbed("compare")
    run = Run(command("compare"), tmp_path / "run")
    kill_and_go_on(run, kills, seconds, seed)
    same(compared(run.folder), compared(folder))
    _nothing_left(run.folder)


_LOAD = """
import sys, time
import numpy, tensorflow_datasets
from hardjax import data
save = numpy.save
def slowly(*given, **more):
    time.sleep(float(sys.argv[2]))
    save(*given, **more)
numpy.save = slowly  # a slow disk
print("reading", flush=True)
print(data.load("mnist", sys.argv[1]).checksum)
"""


@pytest.mark.parametrize(
    "kills, seed", [pytest.param(1, 8, marks=pytest.mark.ci), pytest.param(4, 9, marks=pytest.mark.slow)]
)
def test_a_decoded_cache_whose_writer_is_killed(tmp_path, kills, seed):
    folder, arrays = make_prepared(tmp_path / "data", shards={"train": [3000], "test": [500]})
    cache, rng = tmp_path / "cache", np.random.default_rng(seed)
    entry = cache / "datasets" / decoded.entry("mnist", folder).name

    def start(place: Path = cache, slowness: float = 0.0) -> Child:
        return Child("-c", _LOAD, tmp_path / "data", slowness, cache=place)

    def half_written() -> list[Path]:
        return list(entry.parent.glob(f".{entry.name}-*"))

    def appears(there: set[Path]) -> bool:
        return bool(set(half_written()) - there)

    def reads(child: Child) -> bool:
        return "reading" in child.printed

    with start(tmp_path / "first", 0.1) as child:
        assert child.shows(lambda: "reading" in child.printed)
        begun = time.monotonic()
        assert child.ends() == 0, child.printed
        seconds, checksum = time.monotonic() - begun, child.printed.split()[-1]
    fired, missed, torn = 0, 0, 0
    while fired < kills:
        with start(slowness=0.1) as child:
            # In turn while it is written and at any moment of reading, decoding and writing.
            there = set(half_written())
            writing, reading = functools.partial(appears, there), functools.partial(reads, child)
            assert child.shows((writing, reading)[fired % 2]), child.printed
            time.sleep(rng.uniform(0, 0.4 if fired % 2 == 0 else seconds))
            child.strike(signal.SIGKILL)
            code = child.ends()
        if code == -signal.SIGKILL and not entry.exists():
            fired, torn = fired + 1, torn + bool(half_written())
            continue
        missed, seconds = missed + 1, seconds / 2
        assert missed < 8, "processes were faster than every kill"
        shutil.rmtree(entry, ignore_errors=True)
    assert torn
    for left in half_written():
        os.utime(left, (0, 0))  # of long ago, not of a writer that has just begun
    for _ in range(2):
        with start() as child:
            assert child.ends() == 0 and child.printed.split() == ["reading", checksum], child.printed
    for name, array in zip(("train_images", "train_labels"), arrays["train"], strict=True):
        np.testing.assert_array_equal(np.load(entry / f"{name}.npy"), array)
    assert not half_written()


_SAVE = """
import sys, jax, jax.numpy as jnp
from hardjax.config import TrainConfig
from hardjax.training import checkpoint
from hardjax.training.setting import prepare
state = prepare(TrainConfig(model="mlp", model_options={"widths": [8]}, batch_size=256)).init_state()
first = int(sys.argv[2])
for turn in range(first, first + 3000):
    # Each step twice: the second time it replaces the first.
    changed = {"step": jnp.int32(turn // 2), "table": jnp.full_like(state.table, turn)}
    saved = type(state)(**{**state.__dict__, **changed})
    checkpoint.save(sys.argv[1], saved, {"turn": turn, "finite": turn % 7 == 0})
    checkpoint.prune(sys.argv[1], 2)
    print(turn, flush=True)
"""


@pytest.mark.parametrize(
    "kills, seed", [pytest.param(1, 10, marks=pytest.mark.ci), pytest.param(4, 11, marks=pytest.mark.slow)]
)
def test_a_writer_of_checkpoints_that_is_killed(tmp_path, kills, seed):
    folder, rng, turn = tmp_path / "run", np.random.default_rng(seed), 0
    folder.mkdir()
    setting = prepare(TrainConfig(model="mlp", model_options={"widths": [8]}, batch_size=256))
    for _ in range(kills):
        with Child("-c", _SAVE, folder, turn) as child:
            assert child.shows(lambda child=child: child.printed), child.printed
            time.sleep(rng.uniform(0, 1.5))
            child.strike(signal.SIGKILL)
            assert child.ends() == -signal.SIGKILL, child.printed
        announced = int(child.printed.split("\n")[-2])
        assert announced < turn + 2999
        checkpoint.clean(folder)
        found, state = checkpoint.newest(folder, setting.state_shapes())
        turn = found.facts["turn"]
        # The one that was announced, or the next one: whole either way.
        assert announced <= turn <= announced + 1
        assert int(state.step) == found.step == turn // 2 and set(np.asarray(state.table).tolist()) == {turn}
        assert len(checkpoint.kept(folder)) <= 5
        _nothing_left(folder)
        turn += 1


def test_a_checkpoint_that_was_to_be_replaced_comes_back(tmp_path):
    home = tmp_path / checkpoint.FOLDER
    for name in (".writing-a/replaced-0000000007", ".writing-b/replaced-0000000008", "0000000008", ".writing-c/fresh"):
        (home / name).mkdir(parents=True)
        (home / name / "file").write_text(name)
    checkpoint.clean(tmp_path)
    assert sorted(os.listdir(home)) == ["0000000007", "0000000008"]
    assert (home / "0000000007" / "file").read_text() == ".writing-a/replaced-0000000007"
    assert (home / "0000000008" / "file").read_text() == "0000000008"


# --- signals


@pytest.mark.parametrize(
    "name, number",
    [
        pytest.param("plain", signal.SIGTERM, marks=pytest.mark.ci),
        pytest.param("everything", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("compare", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("compare", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_ends_within_seconds(undisturbed, tmp_path, name, number):
    folder, seconds = undisturbed(name)
    run, rng, share = Run(command(name), tmp_path / "run"), np.random.default_rng(int(number)), seconds / 2
    for _ in range(8):
        with run.start() as child:
            assert child.shows(run.works()), child.printed
            time.sleep(rng.uniform(0, share))
            child.strike(number)
            begun = time.monotonic()
            code = child.ends()
            took = time.monotonic() - begun
        if not run.finished:
            break
        share /= 2
        shutil.rmtree(run.folder)
    assert code == 128 + number and took < 20, child.printed
    assert "interrupted" in child.printed and "Traceback" not in child.printed
    with run.start("--resume") as child:
        assert child.ends() == 0, child.printed
    outcomes = compared if name == "compare" else outcome
    same(outcomes(run.folder), outcomes(folder))
    _nothing_left(run.folder)


@pytest.mark.slow
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(undisturbed, tmp_path, second):
    folder, _ = undisturbed("plain")
    run = Run(command("plain"), tmp_path / "run")
    with run.start() as child:
        assert child.shows(run.works()), child.printed
        # Two of one kind that wait together are one.
        child.strike(signal.SIGINT if second == signal.SIGTERM else signal.SIGTERM)
        time.sleep(0.003)
        child.strike(second)
        begun = time.monotonic()
        # Whichever of the two was met first: by the signal itself, or as Python ends at Ctrl-C.
        assert child.ends(30) in (-signal.SIGTERM, 128 + signal.SIGINT), child.printed
        assert time.monotonic() - begun < 5 and not run.finished
    assert "Traceback" not in child.printed
    with run.start("--resume") as child:
        assert child.ends() == 0, child.printed
    same(outcome(run.folder), outcome(folder))
    _nothing_left(run.folder)


# --- two processes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "compare"])
def test_a_second_process_is_refused_and_the_first_undisturbed(undisturbed, tmp_path, name):
    folder, _ = undisturbed(name)
    run = Run(command(name), tmp_path / "run")
    with run.start() as child:
        assert child.shows(run.works()), child.printed
        child.strike(signal.SIGSTOP)  # so that it is not over before the others have come so far
        for more in ("--resume", "--overwrite"):
            with run.start(more) as other:
                assert other.ends() == 2, other.printed
                assert "Another process is writing" in other.printed and other.printed.count("\n") == 1
        child.strike(signal.SIGCONT)
        assert child.ends() == 0, child.printed
    outcomes = compared if name == "compare" else outcome
    same(outcomes(run.folder), outcomes(folder))


# --- full disk


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip() or mounted.returncode}")
    yield place
    subprocess.run(["umount", place], check=True)


def _fill(place: Path, free: int) -> Path:
    """A file that leaves so many bytes of the disk."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    size = filler.stat().st_size
    os.truncate(filler, max(0, size - free))
    return filler


def _one_line_at_the_end(child: Child) -> str:
    *before, last = child.printed.strip().split("\n")
    assert all(line.startswith("hardjax: warning: ") for line in before), child.printed
    assert last.startswith("hardjax: ") and "Traceback" not in child.printed
    return last


@pytest.mark.slow
def test_a_disk_that_fills_up_while_it_saves(undisturbed, small_disk):
    folder, _ = undisturbed("plain")
    run = Run(command("plain"), small_disk / "run")
    with run.start() as child:
        assert child.shows(lambda: len(checkpoint.kept(run.folder)) >= 2), child.printed
        child.strike(signal.SIGSTOP)
        filler = _fill(small_disk, 6 * 4096)
        child.strike(signal.SIGCONT)
        # Checkpoints have no room, lines have: the save that failed is said at the next one, and training goes on.
        assert child.shows(lambda: "Training goes on" in child.printed), child.printed
        assert child.ends() == 2, child.printed
    assert "No space left" in _one_line_at_the_end(child)
    whole = lines.read_lines(run.folder / "history.jsonl")
    expected = lines.read_lines(folder / "history.jsonl")
    assert [_timeless(entry) for entry in whole] == [_timeless(entry) for entry in expected[: len(whole)]]
    assert len(whole) > 2 and checkpoint.restore(run.folder, _setting(folder).state_shapes()) is not None
    with run.start("--resume") as child:
        assert child.ends() == 2, child.printed
    _one_line_at_the_end(child)
    filler.unlink()
    with run.start("--resume") as child:
        assert child.ends() == 0, child.printed
    same(outcome(run.folder), outcome(folder))
    _nothing_left(run.folder)


@pytest.mark.slow
def test_saves_that_fail_for_a_while(undisturbed, small_disk):
    folder, _ = undisturbed("plain")
    run = Run(command("plain"), small_disk / "run")
    with run.start() as child:
        assert child.shows(lambda: len(checkpoint.kept(run.folder)) >= 2), child.printed
        child.strike(signal.SIGSTOP)
        filler = _fill(small_disk, 6 * 4096)
        child.strike(signal.SIGCONT)
        assert child.shows(lambda: "Training goes on" in child.printed), child.printed
        filler.unlink()
        assert child.ends() == 0, child.printed
    same(outcome(run.folder), outcome(folder))
    _nothing_left(run.folder)


@pytest.mark.ci
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process are set on Linux alone")
def test_files_that_may_not_grow(undisturbed, tmp_path):
    """As a full disk, without one: a limit on the size of files, set while the process runs."""
    folder, _ = undisturbed("plain")
    run = Run(command("plain"), tmp_path / "run")
    history = run.folder / "history.jsonl"
    with run.start() as child:
        assert child.shows(lambda: len(checkpoint.kept(run.folder)) >= 2), child.printed
        # Less than a checkpoint, some lines more than the history.
        resource.prlimit(child.process.pid, resource.RLIMIT_FSIZE, (history.stat().st_size + 2000, -1))
        assert child.ends() == 2, child.printed
    assert "history.jsonl" in _one_line_at_the_end(child)
    assert "cannot be written" in child.printed and "Training goes on" in child.printed
    whole, expected = lines.read_lines(history), lines.read_lines(folder / "history.jsonl")
    assert [_timeless(entry) for entry in whole] == [_timeless(entry) for entry in expected[: len(whole)]]
    with run.start("--resume") as child:
        assert child.ends() == 0, child.printed
    same(outcome(run.folder), outcome(folder))
    _nothing_left(run.folder)


# --- damaged files


def _halved(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _emptied(path: Path) -> None:
    os.truncate(path, 0)


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for at in {len(content) // 3, len(content) - 2}:
        content[at] ^= 1
    path.write_bytes(content)


def _gone(path: Path) -> None:
    path.unlink()


class _Interrupting(Saver):
    """Asks the run to end at its fourth save."""

    def save(self, *given: Any) -> None:
        super().save(*given)
        self.count = getattr(self, "count", 0) + 1
        if self.count == 4:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    "interrupted, damages",
    [
        pytest.param(True, (_halved, _flipped), marks=pytest.mark.ci),
        pytest.param(True, (_emptied, _gone), marks=pytest.mark.slow),
        pytest.param(False, (_halved, _emptied, _flipped, _gone), marks=pytest.mark.slow),
    ],
    ids=["cut short", "cut short and more lost", "finished"],
)
def test_whatever_file_is_damaged_nothing_else_comes_out(tiny, tmp_path, monkeypatch, interrupted, damages):
    config = TrainConfig(
        model="mlp",
        model_options={"widths": [4]},
        epochs=7,
        batch_size=10,
        selection=hj.selection.HardBatches(0.5),
        measure=hj.fisher.FisherMeasure(every=5),
        validation=0.2,
        learning_rate=0.01,
    )
    setting = prepare(config, tiny, performance=Performance(save_every=1))
    running.train(setting, tmp_path / "whole", progress=False)
    expected = outcome(tmp_path / "whole", setting)
    with monkeypatch.context() as patch:
        if interrupted:
            patch.setattr(opening, "Saver", _Interrupting)
        running.train(setting, tmp_path / "run", progress=False)
    kept = checkpoint.kept(tmp_path / "run")
    assert len(kept) >= 2 and (kept[-1].step < setting.plan.steps) == interrupted
    newest = kept[-1].path
    names = [path.relative_to(tmp_path / "run") for path in sorted(newest.rglob("*")) if path.is_file()]
    names += map(Path, ("history.jsonl", "rounds.jsonl", "spectra.jsonl", "config.json", "summary.json"))
    at_the_end = dataclasses.replace(setting.performance, save_every="end")
    setting = dataclasses.replace(setting, performance=at_the_end)
    fallen_back, refused = 0, []
    for name in names:
        for damage in damages:
            where = f"{name} {damage.__name__}"
            copy = tmp_path / "copy"
            shutil.copytree(tmp_path / "run", copy)
            damage(copy / name)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", RunWarning)
                try:
                    running.train(setting, copy, resume=True, progress=False)
                except Refusal as refusal:
                    assert "\n" not in str(refusal), where
                    refused.append(where)
                else:
                    same(outcome(copy, setting), expected)
                    # One that is damaged is not kept as one of the newest.
                    assert all(one.facts and len(checkpoint.kept(copy)) <= 4 for one in checkpoint.kept(copy)), where
                    _nothing_left(copy)
            said = [str(one.message) for one in caught if issubclass(one.category, RunWarning)]
            if checkpoint.FOLDER in name.parts and where not in refused:
                fallen_back += 1
                assert len(said) == 1 and f"{copy / newest.relative_to(tmp_path / 'run')!s}" in said[0], (where, said)
            shutil.rmtree(copy)
    unmarked = [where for where in refused if where.endswith("hardjax.json _gone")]  # of whoever's it then is
    assert fallen_back == len(damages) * (len(names) - 5) - len(unmarked)
    # Of a record that was lost further back than the oldest checkpoint nothing can be gone on with.
    lost = {where.split(" ")[0] for where in refused if where not in unmarked}
    assert lost <= {"history.jsonl", "rounds.jsonl", "spectra.jsonl"}, refused


@pytest.mark.ci
def test_a_finished_run_whose_last_files_are_lost(tiny, tmp_path):
    """As a kill between them leaves it, or a disk that damages one."""
    config = TrainConfig(model="mlp", model_options={"widths": [4]}, epochs=2, batch_size=10, learning_rate=0.01)
    setting = prepare(config, tiny)
    running.train(setting, tmp_path / "run", progress=False)
    expected = outcome(tmp_path / "run", setting)
    summary, replays = tmp_path / "run" / "summary.json", tmp_path / "run" / "replays.npz"
    inode = summary.stat().st_ino
    running.train(setting, tmp_path / "run", resume=True, progress=False)
    assert summary.stat().st_ino == inode  # what is whole stays as it is
    text = summary.read_text()
    for damaged in (None, text[:-9], text.replace('"backprops": 14', '"backprops": 15')):
        assert damaged != text
        summary.unlink()
        replays.unlink()
        if damaged is not None:
            summary.write_text(damaged)
        running.train(setting, tmp_path / "run", resume=True, progress=False)
        same(outcome(tmp_path / "run", setting), expected)


@pytest.mark.ci
def test_replays_are_written_before_the_summary(tiny, tmp_path, monkeypatch):
    """Where summary.json is, everything is: a kill between the two leaves a run whose last files are written anew."""
    config = TrainConfig(model="mlp", model_options={"widths": [4]}, epochs=1, batch_size=10, learning_rate=0.01)
    present = []
    write = running.files.write_json

    def watched(path: Path, content: Any) -> None:
        present.append((path.name, (path.parent / "replays.npz").exists()))
        write(path, content)

    monkeypatch.setattr(running.files, "write_json", watched)
    running.train(prepare(config, tiny), tmp_path / "run", progress=False)
    assert present[-1] == ("summary.json", True)


def test_a_save_under_way_is_waited_for(tiny, tmp_path, monkeypatch):
    """A comparison removes the folder of a run that is done: a writer must not put a checkpoint there afterwards."""
    config = TrainConfig(model="mlp", model_options={"widths": [4]}, epochs=3, batch_size=10, learning_rate=0.01)
    write, ended = checkpoint.write, []

    def slowly(*given: Any) -> Path:
        time.sleep(0.3)
        path = write(*given)
        ended.append(path)
        return path

    monkeypatch.setattr(checkpoint, "write", slowly)
    setting = prepare(config, tiny, performance=Performance(save_every=2))
    running.train(setting, tmp_path / "run", progress=False, keep=False)
    assert len(ended) == 1


@pytest.mark.ci
def test_what_killed_writers_of_the_cache_left_is_cleared_and_what_others_write_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HARDJAX_CACHE", str(tmp_path / "cache"))
    folder, _ = make_prepared(tmp_path / "data")
    entry = decoded.entry("mnist", folder)
    dead, young, held = (entry.parent / f".{entry.name}-{name}" for name in ("dead", "young", "held"))
    for path in (dead, young, held):
        path.mkdir(parents=True)
        (path / "train_images.npy").write_bytes(b"half")
    for path in (dead, held):
        os.utime(path, (0, 0))
    with decoded._held(held) as ours:
        assert ours
        hj.data.load("mnist", tmp_path / "data")
    assert entry.exists() and not dead.exists() and young.exists() and held.exists()


def test_a_comparison_whose_configuration_is_lost(tmp_path):
    (tmp_path / "hardjax.json").write_text(json.dumps({"format": "results of hardjax", "version": 1}))
    (tmp_path / "config.json").write_text("{")
    rows.check(tmp_path, {}, False, True)
    (tmp_path / "history.jsonl").write_text("{}\n")
    with pytest.raises(Refusal, match=r"config\.json .* is gone or damaged"):
        rows.check(tmp_path, {}, False, True)


# --- saved by an earlier version: run_v1 holds a state alone, run_v2 was cut short by SIGTERM


@pytest.mark.ci
def test_a_run_that_an_earlier_version_saved(tmp_path):
    shutil.copytree(KEPT / "run_v2", tmp_path / "run")
    config = TrainConfig.from_dict(json.loads((tmp_path / "run" / "config.json").read_text()))
    setting = prepare(config)
    whole = running.train(setting, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)  # it names what differs from where it was saved
        resumed = running.train(setting, tmp_path / "run", resume=True, progress=False)
    assert resumed.summary["resumed_at"] == [376] and resumed.summary["end"] == "budget spent"
    np.testing.assert_array_equal(resumed.history["samples_hash"], whole.history["samples_hash"])
    for name in ("train_loss", "full_train_loss", "validation_loss", "C_K", "learning_rate"):
        np.testing.assert_allclose(resumed.history[name], whole.history[name], rtol=1e-3)
    for left, right in zip(*(jax.tree.leaves(one.state.variables) for one in (whole, resumed)), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-4)


@pytest.mark.ci
def test_a_state_of_the_first_format_is_measured_and_not_gone_on_with(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(KEPT / "run_v1", run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    config = TrainConfig.from_dict(json.loads((run / "config.json").read_text()))
    setting = prepare(config)
    state = checkpoint.restore(run, setting.state_shapes())
    assert int(state.step) == setting.plan.steps and not np.asarray(state.samples_hash).any()
    assert np.asarray(state.table).all()
    report = measure_run(run, batches=1)
    assert np.isfinite(report.final["c"]).all()
    with pytest.raises(Refusal, match="without its place in the run: it can be measured, but not gone on with"):
        running.train(setting, run, resume=True, progress=False)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
