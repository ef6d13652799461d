"""The folder of a run: whose files it holds, and a checkpoint that can be read whatever the folder is called."""

import json
import os
import shutil

import chex
import jax
import jax.numpy as jnp
import pytest

from hardjax._validate import Refusal
from hardjax.engine.step import TrainState
from hardjax.training import checkpoint, files, lines, lock
from hardjax.training.checkpoint import RunWarning


@pytest.fixture(scope="module")
def state():
    """A state without a network: what is written need not have been trained."""
    fields = {name: jnp.arange(3.0) + i for i, name in enumerate(TrainState.__dataclass_fields__)}
    fields |= {"params": {"fc1": {"kernel": jnp.ones((2, 3))}}, "key": jax.random.key(3), "step": jnp.int32(7)}
    return TrainState(**fields)


def _plain(state):
    return {**state.__dict__, "key": jax.random.key_data(state.key)}


def claim(folder, overwrite=False):
    with files.claim_folder(folder, overwrite) as claimed:
        return claimed


@pytest.mark.parametrize("name", ["plain", "lr[0.1]", "a\\b", "in[1]/q {x} *?", "ü é #", "~x", "%20 'q' \"$HOME\""])
def test_a_checkpoint_is_readable_under_any_name(state, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    checkpoint.save(folder, state)
    chex.assert_trees_all_equal(_plain(checkpoint.restore(folder, state)), _plain(state))
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint"]


def test_a_folder_may_be_renamed_and_a_checkpoint_replaced(state, tmp_path):
    (tmp_path / "before" / "checkpoint.old").mkdir(parents=True)  # somebody's own copy
    for _ in range(2):
        checkpoint.save(tmp_path / "before", state)
    assert sorted(path.name for path in (tmp_path / "before").iterdir()) == ["checkpoint", "checkpoint.old"]
    (tmp_path / "before").rename(tmp_path / "after[2]")
    chex.assert_trees_all_equal(_plain(checkpoint.restore(tmp_path / "after[2]", state)), _plain(state))


def _empty(path):
    path.write_bytes(b"")


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": _empty,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": _flip,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_of_a_checkpoint_damaged_in_turn(state, tmp_path, damage):
    """The one before is taken, and the damaged one named; without one before it is refused."""
    older = TrainState(**{**state.__dict__, "step": jnp.int32(5), "table": state.table + 1})
    (tmp_path / "kept").mkdir()
    checkpoint.save(tmp_path / "kept", older)
    newest = checkpoint.save(tmp_path / "kept", state)
    names = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    assert len(names) >= 6
    for name in names:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "kept", tmp_path / "run")
        DAMAGES[damage](tmp_path / "run" / "checkpoint" / "0000000007" / name)
        with pytest.warns(RunWarning, match="0000000007' is damaged: .*; the one at 5 back-propagations is taken"):
            chex.assert_trees_all_equal(_plain(checkpoint.restore(tmp_path / "run", state)), _plain(older))
        shutil.rmtree(tmp_path / "run" / "checkpoint" / "0000000005")
        with pytest.raises(Refusal, match=r"The checkpoint .* is damaged: ") as caught:
            checkpoint.restore(tmp_path / "run", state)
        assert "\n" not in str(caught.value) and (name.name in str(caught.value) or "files in all" in str(caught.value))


def test_a_digit_of_the_manifest_that_was_changed_is_noticed(state, tmp_path):
    path = checkpoint.save(tmp_path, state, {"position": {"backprops": 7}}) / "hardjax.json"
    assert checkpoint.kept(tmp_path)[0].facts["position"] == {"backprops": 7}
    path.write_text(path.read_text().replace('"backprops": 7', '"backprops": 8'))
    assert checkpoint.kept(tmp_path)[0].facts == {}
    for text in ("[]", "{}", '{"format": "another"}'):
        path.write_text(text)
        with pytest.raises(Refusal, match=r"hardjax.json is missing or unreadable"):
            checkpoint.restore(tmp_path, state)


def test_the_last_two_the_best_and_the_last_finite_are_kept(state, tmp_path):
    top1 = {1: 50.0, 2: 90.0, 3: 70.0, 4: 90.0, 5: 60.0, 6: 61.0}
    for step, found in top1.items():
        at = TrainState(**{**state.__dict__, "step": jnp.int32(step)})
        facts = {"validation": {"top1": found, "loss": 1.0}, "finite": step <= 3}
        checkpoint.save(tmp_path, at, facts)
    checkpoint.prune(tmp_path, last=2)
    assert [one.step for one in checkpoint.kept(tmp_path)] == [2, 3, 5, 6]
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoint" / "0000000006").rglob("*") if path.is_file())
    checkpoint.prune(tmp_path, last=2, limit=2.5 * size)
    assert [one.step for one in checkpoint.kept(tmp_path)] == [5, 6]
    checkpoint.prune(tmp_path, last=2, limit=1)  # the newest stays
    assert [one.step for one in checkpoint.kept(tmp_path)] == [6]
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["0000000006"]


def test_another_shape_or_dtype_is_refused(state, tmp_path):
    checkpoint.save(tmp_path, state)
    kinds = {r"\(3,\) instead of \(4,\)": jnp.zeros(4), "float32 instead of int32": jnp.zeros(3, jnp.int32)}
    for words, table in kinds.items():
        other = TrainState(**{**state.__dict__, "table": table})
        with pytest.raises(Refusal, match=rf"1 arrays differ, such as table \({words}\)"):
            checkpoint.restore(tmp_path, other)


def test_a_linked_checkpoint_folder_is_written_through_and_its_target_never_removed(state, tmp_path):
    elsewhere, folder = tmp_path / "larger disk", claim(tmp_path / "run")
    elsewhere.mkdir()
    (folder / "checkpoint").symlink_to(elsewhere)
    checkpoint.save(folder, state)
    chex.assert_trees_all_equal(_plain(checkpoint.restore(folder, state)), _plain(state))
    assert [path.name for path in elsewhere.iterdir()] == ["0000000007"]
    claim(folder, overwrite=True)
    assert not os.path.lexists(folder / "checkpoint") and [path.name for path in elsewhere.iterdir()] == ["0000000007"]


def test_overwriting_takes_what_a_run_wrote_and_nothing_else(state, tmp_path):
    folder = claim(tmp_path / "run")
    files.write_json(folder / "config.json", {})
    lines.append_line(folder / "history.jsonl", {"epoch": 1})
    checkpoint.save(folder, state)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(Refusal, match=r"already holds a run \(config.json, history.jsonl, checkpoint\)"):
        claim(folder)
    claim(folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["hardjax.json", "notes.txt"]


def test_files_of_other_tools_are_never_deleted(tmp_path):
    other = tmp_path / "other"
    (other / "checkpoint").mkdir(parents=True)
    (other / "checkpoint" / "weights.bin").write_text("hours")
    (other / "config.json").write_text(json.dumps({"format": "another tool"}))
    for marker in (None, "{}", "[]", "not JSON"):
        if marker is not None:
            (other / "hardjax.json").write_text(marker)
        for look in (files.check_folder, claim):
            with pytest.raises(
                Refusal, match=r"holds config\.json, checkpoint(, hardjax\.json)?, not written by hardjax"
            ):
                look(other, overwrite=True)
    assert (other / "checkpoint" / "weights.bin").read_text() == "hours" and (other / "config.json").exists()
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "hardjax.json").write_text("{}")
    with pytest.raises(Refusal, match=r"holds hardjax\.json, not written by hardjax"):
        claim(tmp_path / "named")
    # A checkpoint of another tool that was put into a folder of ours.
    ours = claim(tmp_path / "ours")
    shutil.copytree(other / "checkpoint", ours / "checkpoint")
    with pytest.raises(Refusal, match="holds checkpoint, not written by hardjax"):
        claim(ours, overwrite=True)
    assert (ours / "checkpoint" / "weights.bin").exists()


def test_a_home_is_expanded_and_an_address_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.check_folder("~/run") == tmp_path / "run"
    for address in ("gs://bucket/run", "s3://bucket", "file:///tmp/x", "https://host/x"):
        with pytest.raises(Refusal, match="a folder of this machine, not an address"):
            files.check_folder(address)
    for nothing in ("", "a\0b", None, 3):
        with pytest.raises(Refusal, match=r"Expected output=.* to be a folder"):
            files.check_folder(nothing)
    with pytest.raises(Refusal, match="File name too long"):
        files.check_folder(tmp_path / ("x" * 300))


def test_a_disk_that_refuses_is_one_line(tmp_path):
    (tmp_path / "config.json.part").mkdir()
    with pytest.raises(Refusal, match=r"config\.json' to be writable: Is a directory"):
        files.write_json(tmp_path / "config.json", {})


def test_a_folder_has_one_writer(tmp_path):
    with files.claim_folder(tmp_path / "run") as folder:
        assert lock.is_being_written(folder)
        with pytest.raises(Refusal, match="Another process is writing into"), files.claim_folder(folder, keep=True):
            pass
    assert not lock.is_being_written(folder) and not lock.is_being_written(tmp_path / "none")
    with files.claim_folder(folder, keep=True):
        assert lock.is_being_written(folder)
