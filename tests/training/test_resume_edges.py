"""Edges of going on: whose a folder is, what a kill between two files leaves, who still writes."""

import contextlib
import dataclasses
import json
import os
import threading
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hardjax as hj
from hardjax._validate import Refusal
from hardjax.choose.selection import AllBatches, HardBatches
from hardjax.study.arms import Arm, make_arms
from hardjax.study.compare import compare
from hardjax.training import checkpoint, files, loop, resume, saver
from hardjax.training.setting import prepare

SMALL = dict(model="mlp", model_options={"widths": [8]}, batch_size=8, learning_rate=0.1, epochs=2)
OFTEN = hj.Performance(steps_per_dispatch=4, save_every="0s")


def config(**changes):
    return hj.TrainConfig(**{**SMALL, **changes})


def run(tiny, folder, settings=None, **given):
    return hj.run(settings or config(), **{"dataset": tiny, "output": folder, "progress": False, **given})


def comparison(tiny, folder, settings=None, arms=None, **given):
    arms = make_arms((0.5,), ()) if arms is None else arms
    return compare(settings or config(), arms, 1, dataset=tiny, output=folder, progress=False, **given)


def killed(tiny, folder, monkeypatch, saves, **given):
    """A run that dies after so many saves."""
    original, count = saver.Saver.save, [0]

    def save(self, *rest):
        original(self, *rest)
        self.wait()
        count[0] += 1
        if count[0] == saves:
            raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(saver.Saver, "save", save)
        run(tiny, folder, performance=OFTEN, **given)


def slow_writes(monkeypatch, seconds=0.3):
    """Every checkpoint takes its time, as on a slow disk."""
    write = checkpoint.write

    def slowly(*rest):
        time.sleep(seconds)
        return write(*rest)

    monkeypatch.setattr(checkpoint, "write", slowly)


def test_a_run_ends_after_its_last_write(tiny, tmp_path, monkeypatch):
    """What is written later would lie in the folder of the run that comes next."""
    slow_writes(monkeypatch)
    before = threading.active_count()
    comparison(tiny, tmp_path / "comparison", performance=OFTEN)
    assert threading.active_count() == before and not (tmp_path / "comparison" / "under-way").exists()

    def failing(self, *rest):
        raise ZeroDivisionError

    monkeypatch.setattr(loop.Loop, "_test", failing)
    with pytest.raises(ZeroDivisionError):
        run(tiny, tmp_path / "run", performance=OFTEN)
    assert threading.active_count() == before


@pytest.mark.ci
def test_a_folder_that_was_being_taken_away_is_still_ours(tiny, tmp_path, monkeypatch):
    """Whatever file a kill is met at, the folder can be overwritten, and the comparison gone on with."""
    folder = tmp_path / "comparison"
    comparison(tiny, folder)
    run(tiny, folder / files.UNDER_WAY)
    done, unlink, rmdir = [0], os.unlink, os.rmdir

    def dying(original, last):
        def instead(*given, **more):
            if done[0] == last:
                raise ZeroDivisionError
            done[0] += 1
            return original(*given, **more)

        return instead

    for last in range(1000):
        done[0] = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", dying(unlink, last))
            patch.setattr(os, "rmdir", dying(rmdir, last))
            try:
                files.clear(folder)
            except ZeroDivisionError:
                files.check_folder(folder, overwrite=True)
                continue
        break
    assert last > 10  # each took away that many more files than the one before
    assert sorted(path.name for path in folder.iterdir()) == [files.MARKER]


def test_the_summary_is_written_last(tiny, tmp_path, monkeypatch):
    """A kill between the last two files: what is missing is written when the run is gone on with."""
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(files, "write_json", lambda path, content: 1 / (path.name != "summary.json"))
        run(tiny, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    for name in ("replays.npz", "history.jsonl"):
        assert (tmp_path / name).exists()
    run(tiny, tmp_path, resume=True)
    assert (tmp_path / "summary.json").exists() and (tmp_path / "replays.npz").exists()


@pytest.mark.ci
@pytest.mark.parametrize("left", ["a measurement", "no summary", "no rows", "damaged settings"])
def test_what_is_no_run_is_not_begun_anew(tiny, tmp_path, left):
    if left == "a measurement":
        with files.claim_folder(tmp_path):
            files.write_json(tmp_path / "measure.json", {})
    else:
        comparison(tiny, tmp_path)
        (tmp_path / "summary.json").unlink()
    if left == "no rows":  # killed in its first run
        (tmp_path / "history.jsonl").unlink()
    if left == "damaged settings":
        (tmp_path / "config.json").write_text("{")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(Refusal, match=f"holds a {'measurement' if left == 'a measurement' else 'comparison'}"):
        run(tiny, tmp_path, resume=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.ci
def test_rows_of_unknown_settings_are_not_taken(tiny, tmp_path):
    comparison(tiny, tmp_path)
    for damage in ("{", None):
        (tmp_path / "config.json").write_text(damage) if damage else (tmp_path / "config.json").unlink()
        with pytest.raises(Refusal, match="gone or damaged: nobody knows whose the results there are"):
            comparison(tiny, tmp_path, config(learning_rate=0.2), resume=True)


def linear(activation):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, images, train):
            return nn.Dense(3)(activation(images.reshape(len(images), -1)))

    return Net()


@pytest.mark.ci
def test_rows_of_another_network_or_arm_are_not_taken(tiny, tmp_path):
    settings = hj.TrainConfig(batch_size=8, epochs=1)
    comparison(tiny, tmp_path / "network", settings, model=linear(nn.relu))
    with pytest.raises(Refusal, match="is another one: network is"):
        comparison(tiny, tmp_path / "network", settings, model=linear(jnp.tanh), resume=True)
    found = comparison(tiny, tmp_path / "network", settings, model=linear(nn.relu), resume=True)
    assert len(found.results) == 2

    def arms(delta):
        return (Arm("mine", 1.0, {"selection": AllBatches()}), Arm("other", 1.0, {"selection": HardBatches(delta)}))

    comparison(tiny, tmp_path / "arms", settings, arms(0.5))
    with pytest.raises(Refusal, match=r"is another one: settings\.other\.selection\.delta is 0\.5 there and 0\.3 here"):
        comparison(tiny, tmp_path / "arms", settings, arms(0.3), resume=True)


@pytest.mark.ci
def test_images_normalised_otherwise_are_other_data(tiny, tmp_path, monkeypatch):
    killed(tiny, tmp_path, monkeypatch, 2)
    with pytest.raises(Refusal, match="images of another mean or standard deviation"):
        run(dataclasses.replace(tiny, mean=tiny.mean + 1), tmp_path, resume=True)
    # Of the last digit, as another machine may sum it.
    nearly = dataclasses.replace(tiny, mean=np.nextafter(tiny.mean, np.float32(1)))
    assert run(nearly, tmp_path, resume=True).summary["end"] == "budget spent"


@pytest.mark.ci
def test_a_network_lowered_by_another_version_is_the_same_one(tiny, tmp_path, monkeypatch):
    killed(tiny, tmp_path, monkeypatch, 2)
    (newest,) = checkpoint.kept(tmp_path)[-1:]
    setting = prepare(config(), tiny, performance=OFTEN)
    facts = json.loads((newest.path / "hardjax.json").read_text())
    flax, network = facts["rounds_like"]["flax"], facts["identity"]["network"]
    # Of another version of flax, of a form before there were any, and of neither.
    for version, text, fits in (("0.0.1", "2:other", True), (flax, "other", True), (flax, network[:-1] + "x", False)):
        facts["rounds_like"]["flax"], facts["identity"]["network"] = version, text
        body = {name: value for name, value in facts.items() if name not in ("checksum", "format", "version")}
        checkpoint._write_manifest(newest.path, body)
        if fits:
            named = pytest.warns(checkpoint.RunWarning, match="flax is '0.0.1' there")
            with named if version != flax else contextlib.nullcontext():
                resume.find(tmp_path, setting)
        else:
            with pytest.raises(Refusal, match="trained another network"):
                resume.find(tmp_path, setting)


@pytest.mark.ci
def test_a_state_that_overflowed_is_not_called_finite(tiny, tmp_path):
    """The loss of the very step that overflows is finite."""
    settings = config(learning_rate=3e38, weight_decay=1e3, epochs=1)
    often = hj.Performance(steps_per_dispatch=1, save_every="0s")
    found = run(tiny, tmp_path / "record", settings, performance=often)
    assert found.summary["first_bad_step"] == 1  # the first step itself had a finite loss
    assert [one.step for one in checkpoint.kept(tmp_path / "record") if one.facts["finite"]] == [0]
    # Of a skipped step nothing is left: there is no reason to keep an old state for it.
    skipping = config(learning_rate=1e30, on_nan="skip-step", epochs=1)
    found = run(tiny, tmp_path / "skip", skipping, performance=often)
    assert found.summary["bad_steps"] > 0
    assert [(one.step, one.facts["finite"]) for one in checkpoint.kept(tmp_path / "skip")] == [(8, True), (9, True)]


@pytest.mark.ci
def test_a_save_without_memory_is_said_at_the_next_one(tiny, tmp_path, monkeypatch):
    write, count = checkpoint.write, [0]

    def failing(*rest):
        count[0] += 1
        if count[0] == 1:
            raise MemoryError("no room")
        return write(*rest)

    monkeypatch.setattr(checkpoint, "write", failing)
    with pytest.warns(checkpoint.RunWarning, match=r"cannot be written: MemoryError: no room. Training goes on"):
        found = run(tiny, tmp_path, performance=OFTEN)
    assert found.summary["end"] == "budget spent"


@pytest.mark.ci
def test_settings_of_jax_are_part_of_what_must_be_alike(tiny, tmp_path, monkeypatch):
    """Doubles round otherwise, which is said; other random numbers are another run."""
    killed(tiny, tmp_path, monkeypatch, 2)
    setting = prepare(config(), tiny, performance=OFTEN)
    with jax.enable_x64(True), pytest.warns(checkpoint.RunWarning, match="jax_enable_x64 is False there and True here"):
        resume.find(tmp_path, setting)
    with jax.threefry_partitionable(False), pytest.raises(Refusal, match="not threefry2x32, not partitionable"):
        resume.find(tmp_path, setting)
    with jax.default_prng_impl("rbg"), pytest.raises(Refusal, match="not rbg, partitionable"):
        resume.find(tmp_path, setting)
