"""A sweep by tasks of Ray: real workers of a local cluster, one of which is killed."""

import importlib.util
import json
import os
import signal
import sys
import types

import pytest
from processes import Child
from sweeps import history_of

import hardjax as hj
from hardjax.study import ray_tasks
from hardjax.study.ray_tasks import RayTasks
from hardjax.study.sweep_rows import read_rows

with_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'hardjax[ray]'"
)

SWEEP = """
import sys, hardjax as hj
base = hj.TrainConfig(model="mlp", model_options={"widths": [8]}, optimizer="sgd", epochs=20)
configs = hj.grid(base, batch_size=[16, 64], base_learning_rate=[2**-10, 2**-7])
seen = []
found = hj.sweep(
    configs, output=sys.argv[1], launcher=sys.argv[2], workers=2 if sys.argv[2] == "ray" else 1,
    performance=hj.Performance(save_every=1), on_progress=seen.append,
)
print("left", found.left, "failed", len(found.failed), "told", len(seen), "rows", seen[-1].rows, "of", seen[-1].total)
"""


def _said(folder):
    """Key -> what a row says, times and places aside."""
    rows = read_rows(folder)
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: (row["status"], row["config"], row["metrics"], history_of(row)) for row in rows}


def _leases(folder):
    found = {}
    for path in (folder / "sweep" / "leases").glob("*.json"):
        try:
            found[path.stem] = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            continue
    return found


@with_ray
@pytest.mark.ci
def test_a_sweep_goes_on_although_a_worker_is_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "600")  # a machine that is busy with other tests
    folder = tmp_path / "ray"
    with Child("-c", SWEEP, folder, "ray") as child:
        assert child.shows(lambda: any(lease["cells"] for lease in _leases(folder).values()), 600), child.printed
        victim = next(lease["pid"] for lease in _leases(folder).values() if lease["cells"])
        assert victim != child.process.pid
        os.kill(victim, signal.SIGKILL)
        assert child.ends(900) == 0, child.printed
    assert "left 0 failed 0 told" in child.printed and "rows 4 of 4" in child.printed
    rows = read_rows(folder)
    assert [row["status"] for row in rows] == ["done"] * 4 and {row["threads"] for row in rows} == {1}
    # A name a claim: every cell was a task of its own, and the killed one's was trained by another.
    assert len({row["worker"] for row in rows}) == 4
    assert not _leases(folder)
    with Child("-c", SWEEP, tmp_path / "local", "local") as child:
        assert child.ends(900) == 0, child.printed
    assert _said(folder) == _said(tmp_path / "local")


def test_without_ray_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"launcher='ray' with Ray installed: pip install 'hardjax\[ray\]'"):
        hj.sweep([hj.TrainConfig()], output=tmp_path / "sweep", launcher="ray")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"launcher": "slurm"}, "Unknown launcher 'slurm'"),
        ({"launcher": "ray", "task_cpus": 0}, "task_cpus or task_gpus above 0"),
        ({"launcher": "ray", "task_cpus": -1}, "task_cpus=-1"),
        ({"launcher": "ray", "model": lambda: None}, "model= with launcher='local'"),
        ({"launcher": "ray", "workers": 0}, "workers=0 to be a whole number of at least 1"),
    ],
)
def test_what_tasks_cannot_do_is_refused(tmp_path, monkeypatch, given, said):
    monkeypatch.setattr(ray_tasks, "_imported", lambda: _Ray())
    with pytest.raises(ValueError, match=said):
        hj.sweep([hj.TrainConfig()], output=tmp_path / "sweep", **given)
    assert not (tmp_path / "sweep").exists()


class _Ray:
    """Of what is asked before anything begins."""

    def remote(self, function):
        return function


class _AtOnce(_Ray):
    """A cluster whose tasks are over when they are begun: what is left of the launcher without Ray."""

    exceptions = types.SimpleNamespace(TaskCancelledError=OSError, OutOfMemoryError=MemoryError, RayError=KeyError)

    def __init__(self):
        self.asked = []

    def is_initialized(self):
        return True

    def cluster_resources(self):
        return {"CPU": 4.0}

    def remote(self, function):
        def options(**given):
            self.asked.append(given)
            return types.SimpleNamespace(remote=function)

        return types.SimpleNamespace(options=options)

    def put(self, orders):
        return json.loads(json.dumps(orders))

    def wait(self, results, timeout):
        return results, []

    def get(self, result):
        return result

    def cancel(self, result): ...


@pytest.mark.ci
def test_each_task_trains_what_it_claims_and_ends(tmp_path, monkeypatch):
    there, seen = _AtOnce(), []
    monkeypatch.setattr(ray_tasks, "_imported", lambda: there)
    configs = hj.grid(hj.TrainConfig(model_options={"widths": [4]}, epochs=1), seed=range(3))
    found = hj.sweep(
        configs, output=tmp_path / "sweep", launcher="ray", workers=2, task_cpus=2, on_progress=seen.append
    )
    assert [row["status"] for row in found.rows] == ["done"] * 3 and found.left == 0
    assert len({row["worker"] for row in found.rows}) == 3 and seen[-1].rows == 3
    assert {(one["num_cpus"], one["num_gpus"], one["max_retries"]) for one in there.asked} == {(2, 0.0, 0)}
    # More than one processor: as many threads as there are.
    assert not any("XLA_FLAGS" in one["runtime_env"]["env_vars"] for one in there.asked)
    assert RayTasks(2).places() == 2 and RayTasks(0.5).places() == 8


def test_what_a_task_says_is_printed_once(monkeypatch, capsys):
    there = _AtOnce()
    monkeypatch.setattr(ray_tasks, "_imported", lambda: there)
    tasks, task = RayTasks(), ray_tasks.Task((3, "disk full"), "me")
    assert tasks.ended(task) == 3 and tasks.end(task, 0.0) == 3
    assert capsys.readouterr().err == "hardjax: worker: disk full\n"


@pytest.mark.ci
def test_tasks_take_chunks_of_as_many_as_there_is_room_for(tmp_path, monkeypatch):
    there = _AtOnce()  # four processors
    monkeypatch.setattr(ray_tasks, "_imported", lambda: there)
    base = hj.TrainConfig(model_options={"widths": [4]}, epochs=1, optimizer="sgd")
    configs = hj.grid(base, base_learning_rate=[2.0**power for power in range(-12, -4)])
    found = hj.sweep(configs, output=tmp_path / "s", launcher="ray", performance=hj.Performance(population="vmap"))
    assert {(row["population"]["mode"], row["population"]["members"]) for row in found.rows} == {("vmap", 2)}


def test_options_that_nothing_would_read(capsys):
    from hardjax.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["sweep", "--task-gpus", "1"])
    assert stop.value.code == 2
    assert "--task-gpus goes with --launcher ray, not with local" in capsys.readouterr().err
