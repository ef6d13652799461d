"""Several processes that train one run: real ones, on this machine's loopback."""

import contextlib
import json
import signal
import socket
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import ROOT, Child
from short_runs import CASES, PATH, config_of, of_processes
from wide import wide

import hardjax as hj
from hardjax.training import checkpoint, hosts

PROGRAM = ROOT / "tests/training/several_processes.py"
TRAIN = (
    "--dataset digits --train-samples 200 --model-option widths=[8] --batch-size 100 --learning-rate 0.1 --epochs 150"
    " --save-every 1"
)


@pytest.fixture
def on_cpu(monkeypatch):
    """What the processes inherit: one device each, and where the tests' own modules are."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))


def _port():
    """One that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _trained(folder, processes, *parts):
    """The folder in which so many processes left what they came to."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.delenv("XLA_FLAGS", raising=False)
        patch.setenv("PYTHONPATH", str(ROOT / "tests"))
        port = _port()
        started = [Child(PROGRAM, port, number, processes, folder, *parts) for number in range(processes)]
        for child in started:
            stack.enter_context(child)
        codes = [child.ends(1800) for child in started]
    assert not any(codes), "".join(child.printed[-3000:] for child in started)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return _trained(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def trained_by_four(tmp_path_factory):
    return _trained(tmp_path_factory.mktemp("four"), 4, "resumed", "cases")


def _said(folder, processes=2):
    return [json.loads((folder / f"said {process}.json").read_text()) for process in range(processes)]


@pytest.mark.ci
@pytest.mark.parametrize("name", of_processes(2))
def test_two_processes_do_what_one_does(trained, tiny, name):
    _compare_with_one(trained, 2, tiny, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", of_processes(4))
def test_four_processes_do_what_one_does(trained_by_four, tiny, name):
    _compare_with_one(trained_by_four, 4, tiny, name)


@pytest.mark.slow
def test_four_processes_resume_to_the_same_bits(trained_by_four):
    for said in _said(trained_by_four, 4):
        assert said["cut"] == ["interrupted", "SIGTERM", True]
        assert said["resumed"] == [True, True] and said["finished"] == [True, 3]


def _compare_with_one(folder, processes, tiny, name):
    network, changes = CASES[name]
    first, *others = (dict(np.load(folder / f"{name} {process}.npz")) for process in range(processes))
    assert len(others) == processes - 1 and len(first) > 20
    for other in others:
        assert first.keys() == other.keys()
        for array in first:
            np.testing.assert_array_equal(first[array], other[array], err_msg=array)
    with jax.enable_x64(True):
        alone = hj.run(
            config_of(**changes),
            dataset=tiny,
            model=wide(*network),
            performance=hj.Performance(devices=1, **PATH),
            progress=False,
        )
        plain = checkpoint.on_host(alone.state)
    for path, leaf in jax.tree_util.tree_leaves_with_path(plain):
        array = first[jax.tree_util.keystr(path)]
        assert array.dtype == leaf.dtype
        # The table holds losses, which are float32 in every run.
        tolerance = 2e-6 if "table" in jax.tree_util.keystr(path) else 1e-10
        np.testing.assert_allclose(array, leaf, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))
    np.testing.assert_array_equal(first["replays"], alone.replays)
    np.testing.assert_array_equal(first["history samples_hash"], alone.history["samples_hash"])
    for field in ("full_train_loss", "test_loss", "train_loss", "kept_loss", "dropped_loss", "test_top1"):
        np.testing.assert_allclose(first[f"history {field}"], alone.history[field], rtol=2e-6)
    if "spectra" in name:
        values, expected = first["measured eigenvalues"], alone.measurements["eigenvalues"]
        np.testing.assert_allclose(values, expected, atol=1e-10 * np.nanmax(expected))


@pytest.mark.ci
def test_images_in_parts_and_images_read_while_training_change_no_bit(trained):
    for said in _said(trained):
        assert said["shared out"] is True and said["streamed"] is True


@pytest.mark.ci
def test_a_signal_to_one_process_saves_the_run_of_both_which_goes_on_to_the_same_bits(trained):
    for said in _said(trained):
        assert said["cut"] == ["interrupted", "SIGTERM", True]
        assert said["resumed"] == [True, True]
        assert said["finished"] == [True, 3]
    assert len((trained / "run" / "history.jsonl").read_text().splitlines()) == 3
    summary = json.loads((trained / "run" / "summary.json").read_text())
    assert (summary["processes"], summary["devices"], summary["end"]) == (2, 2, "budget spent")


@pytest.mark.ci
def test_what_one_process_refuses_all_refuse(trained):
    first, second = _said(trained)
    for said in (first, second):
        assert said["seeds"] == "Expected the same config in all processes of this job; process 1 has another."
        assert "samples of a batch (7) in equal parts for the 2 processes of this job" in said["odd"]
        assert "devices=1 to be a multiple of the 2 processes of this job" in said["device"]
        assert "devices=1 to be a multiple" in said["population"] and "populations and sweeps" in said["population"]
        assert said["sweep"] == (
            "Expected one process for a sweep, got 2 of jax.distributed: together they train single runs (hj.run,"
            " hardjax train)."
        )
    assert first["one alone"] == "Process 1 of this job cannot begin this run; its own line says why."
    assert "batch_size=200 to be at most the 70 training samples" in second["one alone"]
    assert "already holds a run" in first["taken"]
    assert second["taken"].startswith("Process 0 of this job cannot")


def _train(folder, *more):
    return Child("-m", "hardjax", "train", *TRAIN.split(), "--output", folder, *more)


def _together(folder, processes, *more):
    """The same command in several processes."""
    job = ("--coordinator", f"127.0.0.1:{_port()}", "--processes", processes, "--lost-after", 60)
    return tuple(_train(folder, *job, "--process-id", number, *more) for number in range(processes))


def _is_saved(folder):
    return list(Path(folder).glob("checkpoint/0*/hardjax.json"))


@pytest.mark.ci
@pytest.mark.parametrize("lost", [0, 1])
def test_the_loss_of_a_process_ends_the_other_with_a_line(tmp_path, on_cpu, lost):
    folder = tmp_path / "run"
    first, second = both = _together(folder, 2)
    with first, second:
        assert both[0].shows(lambda: _is_saved(folder)), first.printed + second.printed
        both[lost].strike(signal.SIGKILL)
        left = both[1 - lost]
        assert left.ends() == 1, left.printed
    lines = left.printed.splitlines()
    assert lines[-1].startswith("hardjax: another process of this job was lost, or has ended")
    assert lines[-1].endswith("with --resume goes on from the newest checkpoint.")
    assert "Traceback" not in left.printed and not (folder / "summary.json").exists()
    if lost:
        return
    with _train(folder, "--resume") as alone:
        assert alone.ends() == 0, alone.printed
    assert "processes is 2 there and 1 here" in alone.printed and "devices is 2 there and 1 here" in alone.printed
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["backprops"] == 300 and summary["resumed_at"] and "processes" not in summary
    with _train(tmp_path / "whole") as whole:
        assert whole.ends() == 0, whole.printed
    found, expected = (
        [json.loads(line) for line in (place / "history.jsonl").read_text().splitlines()]
        for place in (folder, tmp_path / "whole")
    )
    assert len(found) == len(expected) == 150
    for one, other in zip(found, expected, strict=True):
        assert one["samples_hash"] == other["samples_hash"]
        # float32, 300 steps: rounding grows with them.
        np.testing.assert_allclose(one["full_train_loss"], other["full_train_loss"], rtol=1e-3)


@pytest.mark.slow
def test_of_four_processes_one_is_lost_and_two_go_on(tmp_path, on_cpu):
    folder = tmp_path / "run"
    started = _together(folder, 4)
    with contextlib.ExitStack() as stack:
        for child in started:
            stack.enter_context(child)
        assert started[0].shows(lambda: _is_saved(folder)), "".join(child.printed for child in started)
        started[2].strike(signal.SIGKILL)
        for child in (started[0], started[1], started[3]):
            assert child.ends() == 1, child.printed
            assert child.printed.splitlines()[-1].startswith("hardjax: another process of this job was lost")
    first, second = _together(folder, 2, "--resume")
    with first, second:
        assert (first.ends(), second.ends()) == (0, 0), first.printed + second.printed
    assert "processes is 4 there and 2 here" in first.printed
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["backprops"], summary["processes"]) == (300, 2) and summary["resumed_at"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"coordinator": "a:1"}, "together; processes, process_id not given"),
        ({"processes": 2, "process_id": 1}, "together; coordinator not given"),
        ({"coordinator": "here", "processes": 2, "process_id": 0}, "coordinator='here' as address:port"),
        ({"coordinator": "a:1", "processes": 0, "process_id": 0}, "processes=0 to be a whole number of at least 1"),
        ({"coordinator": "a:1", "processes": 2, "process_id": 2}, "process_id=2 below processes=2"),
        ({"coordinator": "a:1", "processes": 2, "process_id": -1}, "process_id=-1"),
        ({"lost_after": 0}, "lost_after=0"),
    ],
)
def test_a_job_that_is_no_job_is_refused(given, said):
    with pytest.raises(ValueError, match="Expected .*" + said.replace("(", r"\(")):
        hosts.join(**given)


def test_one_process_is_alone():
    assert not hosts.several() and hosts.leads() and hosts.told(7) == 7
    hosts.check_alone("a sweep")
    hosts.check_same({"seed": object()})  # nobody to compare with
    with pytest.raises(ValueError, match="own words"), hosts.together("do it"):
        raise hosts.Refusal("own words")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:1"), True),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: tasks are unhealthy"), True),
        (jax.errors.JaxRuntimeError("INTERNAL: a fault of the compiler"), False),
        (KeyError("Gloo"), False),
    ],
)
def test_the_loss_of_a_process_is_told_from_faults(error, lost):
    assert hosts.is_loss(error) is lost


def test_words_that_contradict_each_other_are_one_line(capsys):
    from hardjax.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["train", "--distributed", "--processes", "2"])
    assert stop.value.code == 2
    assert "Give --distributed or --coordinator, --processes and --process-id" in capsys.readouterr().err
