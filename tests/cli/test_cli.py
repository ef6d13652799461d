"""The command line as a user meets it."""

import io
import json

import jax
import numpy as np
import pytest

from hardjax._validate import OutOfMemory, Refusal
from hardjax.cli import main, output, prepare
from hardjax.cli.encoding import degrade
from hardjax.training import spectra

_use_compilation_cache = prepare.use_compilation_cache
FAST = ["--epochs", "2", "--batch-size", "64", "--model-option", "widths=[8]", "--quiet"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """The user's cache and data folders stay out of it; the compilation cache of the tests stays in place."""
    monkeypatch.setenv("HARDJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("data")))
    monkeypatch.setattr(prepare, "use_compilation_cache", lambda: None)


def command(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def test_the_command_line_keeps_compiled_programs_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HARDJAX_CACHE", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        _use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def test_train_writes_its_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ("--selection", "hard-batches", "--delta", 0.5, "--output=~/run", "--no-quiet")
    assert command("train", *FAST, *words) == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    expected = {"config.json", "history.jsonl", "summary.json", "checkpoint", "hardest.png", "replays.npz"}
    assert expected <= names
    lines = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    assert {"epoch", "backprops", "train_loss", "table_loss", "full_train_top1", "test_top1", "seconds"} <= set(
        lines[0]
    )
    shown, log = capsys.readouterr()
    assert "final_test_top1" in shown and log.startswith("train: epoch ") and "epoch 2.0/2, loss " in log


def test_hard_samples_draw_the_hardest_too(tmp_path):
    assert command("train", *FAST, "--selection", "hard-samples", "--output", tmp_path / "run") == 0
    assert (tmp_path / "run/hardest.png").stat().st_size > 10_000


def test_compare_writes_rows_and_picture(tmp_path, capsys):
    folder = tmp_path / "compare"
    assert command("compare", *FAST, "--deltas", 1.0, 0.5, "--seeds", 2, "--output", folder) == 0
    summary = json.loads((folder / "summary.json").read_text())
    rows = {(row["selection"], row["delta"]): row for row in summary["rows"]}
    assert list(rows) == [("all-batches", 1.0), ("hard-batches", 0.5), ("random-batches", 0.5), ("fixed-batches", 1.0)]
    wanted = "train_top1 test_top1 test_top1_ci95 convergence_epoch common_threshold_epoch convergence_change_percent"
    assert set(wanted.split()) | {"seeds", "backprops", "seconds_per_step"} <= set(rows["all-batches", 1.0])
    assert all(row["seeds"] == 2 and row["backprops"] == 2 * 23 for row in rows.values())
    assert (folder / "comparison.png").stat().st_size > 10_000
    assert "change of e (%)" in capsys.readouterr().out


def test_compare_methods_of_trimming(tmp_path, capsys):
    folder = tmp_path / "compare"
    arguments = ("--methods", "trimmed", "random-trimmed", "--seeds", 2, "--trim-end", 0.25, "--output", folder)
    assert command("compare", *FAST, *arguments) == 0
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    assert [row["selection"] for row in rows] == ["standard", "trimmed", "random-trimmed"]
    assert [row["keep_last"] for row in rows] == [1.0, 0.25, 0.25]
    assert (folder / "comparison.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "test error (%)" in printed and "trimming disabled / enabled / kept at random: " in printed


def test_trimmed_training_draws_the_samples_kept_most(tmp_path):
    arguments = ("--trim-end", 0.2, "--on-nan", "skip-step", "--output", tmp_path / "run")
    assert command("train", *FAST, *arguments) == 0
    assert (tmp_path / "run/hardest.png").stat().st_size > 10_000
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["on_nan"] == "skip-step"
    assert config["trimming"] == {"start": 1.0, "end": 0.2, "schedule": "linear", "keep": "hardest"}
    assert np.load(tmp_path / "run/replays.npz")["drops"].sum() > 0


@pytest.mark.parametrize("name", ["train", "compare"])
def test_a_folder_with_a_run_is_refused_and_kept(tmp_path, capsys, name):
    (tmp_path / "summary.json").write_text("{}")
    assert command(name, *FAST, "--output", tmp_path) == 2
    assert "already holds a run" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert command(name, *FAST, "--output", tmp_path / "file" / "run") == 2
    assert "to be a folder to write in" in capsys.readouterr().err
    # Even with --overwrite nothing is lost before the input is known to be good.
    (tmp_path / "hardjax.json").write_text('{"format": "results of hardjax"}')
    assert command(name, *FAST, "--batch-size", 5000, "--output", tmp_path, "--overwrite") == 2
    assert (tmp_path / "summary.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["train", "compare", "show", "measure", "data", "models"])
def test_help_reads_well(capsys, name):
    assert command(name, "--help") == 0
    printed = capsys.readouterr().out
    assert "usage: hardjax" in printed
    assert "{None}" not in printed


def test_an_address_is_no_output(capsys):
    for name in ("train", "compare"):
        assert command(name, *FAST, "--output", "gs://bucket/run") == 2
        assert "output='gs://bucket/run' to be a folder of this machine, not an address" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError, OSError, MemoryError, TypeError])
def test_what_is_our_fault_keeps_its_traceback(monkeypatch, error):
    def fail(*_):
        raise error("ours")

    monkeypatch.setattr("hardjax.models.table", fail)
    with pytest.raises(error, match="ours"):
        main(["models"])


def test_out_of_memory_is_one_line(monkeypatch, capsys):
    def fail():
        raise OutOfMemory("Out of memory: set\n gram_chunk.")

    monkeypatch.setattr("hardjax.models.table", fail)
    assert command("models") == 2 and issubclass(OutOfMemory, MemoryError)
    assert capsys.readouterr().err == "hardjax: Out of memory: set gram_chunk.\n"


@pytest.mark.parametrize("encoding, shown", [("ascii", "+- 0.69 ?"), ("latin-1", "± 0.69 ?"), ("utf-8", "± 0.69 →")])
def test_a_table_is_written_whatever_the_encoding(monkeypatch, encoding, shown):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", stream)
    degrade(stream)
    output.table("mlp ± [/b]", [{"run": "[/b] :smile:", "test": "97.50 ± 0.69 →"}, {"run": "b", "test": "1"}])
    print("± →")
    stream.flush()
    written = stream.buffer.getvalue().decode(encoding)
    assert shown in written and "[/b] :smile:" in written
    rows = [line for line in written.splitlines() if "smile" in line or "| b" in line or "│ b" in line]
    assert len({len(row) for row in rows}) == 1


def test_data_list(capsys):
    assert command("data", "list") == 0
    assert "fashion_mnist" in capsys.readouterr().out


def test_measures_while_training_and_of_the_finished_run(tmp_path, capsys):
    run, report = tmp_path / "run", tmp_path / "report"
    assert command("train", *FAST, "--measure-every", 5, "--output", run) == 0
    assert (run / "measures.png").stat().st_size > 10_000
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert {"c", "l", "C_K", "L_K", "batch_size", "learning_rate"} <= set(lines[0]) and lines[-1]["C_K"] > 1
    assert spectra.load(run)["eigenvalues"].shape == (10, 64)
    capsys.readouterr()
    assert command("measure", run, "--batches", 2, "--output", report) == 0
    shown = capsys.readouterr().out
    assert "C_K at 1e-06" in shown and "final state" in shown
    found = json.loads((report / "measure.json").read_text())["runs"][str(run)]
    assert found["recorded"]["C_K"][-1] == pytest.approx(lines[-1]["C_K"])
    assert len(found["final"]["c"]) == 2 and (report / "measures.png").exists()
    # Where the result would be written over the run, or a later run cannot be read, nothing is measured.
    assert command("measure", run, "--output", f"{run}/../run", "--overwrite") == 2
    assert "to be another folder than the runs measured" in capsys.readouterr().err
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"epochs": ')
    assert command("measure", run, tmp_path / "broken", "--output", tmp_path / "other") == 2
    assert "Damaged config.json in" in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert (run / "checkpoint").is_dir()


def test_a_run_without_spectra_has_nothing_but_its_final_state(tmp_path, capsys):
    run, report = tmp_path / "run", tmp_path / "report"
    assert command("train", *FAST, "--epochs", 1, "--output", run) == 0
    assert command("measure", run, "--batches", 0, "--output", report) == 2
    assert f"--batches above 0: {run} recorded no spectra" in capsys.readouterr().err and not report.exists()


def test_measures_in_a_comparison_stand_in_its_table(tmp_path, capsys):
    arguments = ("--deltas", 0.5, "--controls", "fixed", "--seeds", 1, "--measure-every", 10)
    assert command("compare", *FAST, *arguments, "--output", tmp_path / "run") == 0
    rows = json.loads((tmp_path / "run/summary.json").read_text())["rows"]
    assert all(row["C_K"] > 1 and row["L_K"] > 0 for row in rows)
    assert "L_K" in capsys.readouterr().out
    assert command("measure", tmp_path / "run", "--output", tmp_path / "report") == 2
    assert "holds a comparison; name the folder of one run" in capsys.readouterr().err


def test_models_lists_sizes_beside_the_published_ones(capsys, monkeypatch):
    from hardjax.models import summary

    # Tracing every network takes half a minute; tests/models holds all sizes against the published ones.
    monkeypatch.setattr(summary, "ZOO", {name: summary.ZOO[name] for name in ("mlp", "resnet50")})
    assert command("models") == 0
    shown = capsys.readouterr().out
    for text in ("resnet50", "23,528,522", "1,334.6M", "23.52M, 2.69G", "norm_batch_size"):
        assert text in shown


def test_stream_is_a_switch():
    from hardjax.cli.options import Settings, with_axes
    from hardjax.cli.parsing import parse

    assert parse(with_axes(Settings), "train", ["--stream"]).performance().stream is True
    # By the memory that there is.
    assert parse(with_axes(Settings), "train", []).performance().stream is None
    with pytest.raises(Refusal, match="--stream"):
        parse(with_axes(Settings), "train", ["--stream=True"])
