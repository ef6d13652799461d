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
from hardjax.training import checkpoint, files


@pytest.fixture(scope="module")
def state():
    """A state without a network: what is written need not have been trained."""
    fields = {name: jnp.arange(3.0) + i for i, name in enumerate(TrainState.__dataclass_fields__)}
    fields |= {"params": {"fc1": {"kernel": jnp.ones((2, 3))}}, "key": jax.random.key(3)}
    return TrainState(**fields)


def _plain(state):
    return {**state.__dict__, "key": jax.random.key_data(state.key)}


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


def _largest_array(folder):
    return max((path for path in folder.rglob("*") if path.parent.name == "d"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda folder: (folder / "_METADATA").unlink(), "_METADATA is missing"),
        (lambda folder: _empty(folder / "manifest.ocdbt"), "manifest.ocdbt is not as it was written"),
        (lambda folder: (folder / "manifest.ocdbt").unlink(), "manifest.ocdbt is missing"),
        (lambda folder: _empty(folder / "hardjax.json"), "hardjax.json is missing or unreadable"),
        (lambda folder: (folder / "hardjax.json").write_text("[]"), "hardjax.json is missing or unreadable"),
        (lambda folder: _flip(_largest_array(folder)), ".*d/.* is not as it was written"),
        (lambda folder: shutil.rmtree(folder / "d"), "d/.* is missing"),
    ],
)
def test_damage_is_named_in_one_line(state, tmp_path, damage, words):
    damage(checkpoint.save(tmp_path, state))
    with pytest.raises(Refusal, match=f"The checkpoint in .* is damaged: {words}") as caught:
        checkpoint.restore(tmp_path, state)
    assert "\n" not in str(caught.value)


def test_another_shape_or_dtype_is_refused(state, tmp_path):
    checkpoint.save(tmp_path, state)
    kinds = {r"\(3,\) instead of \(4,\)": jnp.zeros(4), "float32 instead of int32": jnp.zeros(3, jnp.int32)}
    for words, table in kinds.items():
        other = TrainState(**{**state.__dict__, "table": table})
        with pytest.raises(Refusal, match=rf"1 arrays differ, such as table \({words}\)"):
            checkpoint.restore(tmp_path, other)


def test_a_linked_checkpoint_is_unlinked_and_its_target_kept(state, tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", files.claim_folder(tmp_path / "run")
    elsewhere.mkdir()
    kept = checkpoint.save(elsewhere, state)
    (folder / "checkpoint").symlink_to(kept)
    chex.assert_trees_all_equal(_plain(checkpoint.restore(folder, state)), _plain(state))
    checkpoint.save(folder, state)
    assert not (folder / "checkpoint").is_symlink() and checkpoint.restore(elsewhere, state)
    shutil.rmtree(folder / "checkpoint")
    (folder / "checkpoint").symlink_to(kept)
    files.claim_folder(folder, overwrite=True)
    assert not os.path.lexists(folder / "checkpoint") and checkpoint.restore(elsewhere, state)


def test_overwriting_takes_what_a_run_wrote_and_nothing_else(state, tmp_path):
    folder = files.claim_folder(tmp_path / "run")
    files.write_json(folder / "config.json", {})
    files.append_line(folder / "history.jsonl", {"epoch": 1})
    checkpoint.save(folder, state)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(Refusal, match=r"already holds a run \(config.json, history.jsonl, checkpoint\)"):
        files.claim_folder(folder)
    files.claim_folder(folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["hardjax.json", "notes.txt"]


def test_files_of_other_tools_are_never_deleted(tmp_path):
    other = tmp_path / "other"
    (other / "checkpoint").mkdir(parents=True)
    (other / "checkpoint" / "weights.bin").write_text("hours")
    (other / "config.json").write_text(json.dumps({"format": "another tool"}))
    for marker in (None, "{}", "[]", "not JSON"):
        if marker is not None:
            (other / "hardjax.json").write_text(marker)
        for look in (files.check_folder, files.claim_folder):
            with pytest.raises(
                Refusal, match=r"holds config\.json, checkpoint(, hardjax\.json)?, not written by hardjax"
            ):
                look(other, overwrite=True)
    assert (other / "checkpoint" / "weights.bin").read_text() == "hours" and (other / "config.json").exists()
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "hardjax.json").write_text("{}")
    with pytest.raises(Refusal, match=r"holds hardjax\.json, not written by hardjax"):
        files.claim_folder(tmp_path / "named")
    # A checkpoint of another tool that was put into a folder of ours.
    ours = files.claim_folder(tmp_path / "ours")
    shutil.copytree(other / "checkpoint", ours / "checkpoint")
    with pytest.raises(Refusal, match="holds checkpoint, not written by hardjax"):
        files.claim_folder(ours, overwrite=True)
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
