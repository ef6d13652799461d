"""Sweeps of real processes, killed, stopped and shared: the rows are those of a sweep that nobody disturbed."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from processes import Child
from sweeps import history_of

from hardjax.study.leases import started
from hardjax.study.sweep_rows import read_rows

pytestmark = pytest.mark.ci
# A cell takes a second or two, nearly all of it in saving itself.
NETWORK = "--model mlp --model-option widths=[8] --optimizer sgd --epochs 20 --save-every 1"
GRID = "--batch-sizes 16 64 --base-learning-rates 2^-10 2^-7 --seeds 1"
CELLS = 4

# A sweep in one process, whose worker can be stopped and woken without a parent that waits for it.
ALONE = """
import sys, hardjax as hj
base = hj.TrainConfig(model="mlp", model_options={"widths": [8]}, optimizer="sgd", epochs=20, batch_size=16)
configs = hj.grid(base, base_learning_rate=[2**-10, 2**-7])
found = hj.sweep(configs, output=sys.argv[1], expiry=2.0, performance=hj.Performance(save_every=1))
print("left", found.left)
"""


def _sweep(folder, *more):
    command = ["-m", "hardjax", "sweep", *NETWORK.split(), *GRID.split(), "--workers", 2, "--output", folder]
    return Child(*command, *more)


def _timeless(folder):
    """Key -> what a row says, times and places aside; each cell once, in a file whose every line is whole."""
    lines = (Path(folder) / "sweep.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({row["key"] for row in rows}) == len(rows) == len(read_rows(folder))
    return {row["key"]: (row["status"], row["config"], row["metrics"], history_of(row)) for row in rows}


def _leases(folder):
    found = {}
    for path in (Path(folder) / "sweep" / "leases").glob("*.json"):
        try:
            found[path.stem] = json.loads(path.read_text())
        except FileNotFoundError:
            continue
    return found


def _rows(folder):
    path = Path(folder) / "sweep.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _saved(folder):
    """A run is in the middle: it has saved itself."""
    return list((Path(folder) / "sweep" / "cells").glob("*/checkpoint/0*/manifest.ocdbt"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    with _sweep(folder) as child:
        assert child.ends() == 0, child.printed
    assert f"{CELLS} of {CELLS} cells have a row ({CELLS} done)" in child.printed
    assert all((folder / f"{name}.png").stat().st_size > 10_000 for name in ("performance", "best", "reliable"))
    assert {row["threads"] for row in read_rows(folder)} == {1}
    return _timeless(folder)


def test_a_sweep_that_is_killed_again_and_again_has_every_row_once(whole, tmp_path):
    assert len(whole) == CELLS
    folder = tmp_path / "sweep"
    for rows in (0, 1, 2):
        with _sweep(folder) as child:
            assert child.shows(lambda rows=rows: _rows(folder) >= rows and _saved(folder)), child.printed
            workers = [lease["pid"] for lease in _leases(folder).values()]
            child.strike(signal.SIGKILL)
            child.ends()
        # Its workers die with it.
        until = time.monotonic() + 60
        while any(started(pid) is not None for pid in workers):
            assert time.monotonic() < until, workers
            time.sleep(0.05)
        assert _rows(folder) < CELLS
    with _sweep(folder) as child:
        assert child.ends() == 0, child.printed
    assert _timeless(folder) == whole
    resumed = sum(bool(row["resumed_at"]) for row in read_rows(folder))
    assert resumed >= 1  # inside the cells that were under way
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".png") == ["hardjax.json", "sweep.jsonl"]


def test_a_sweep_of_chunks_that_is_killed_has_every_row_once(whole, tmp_path):
    folder = tmp_path / "sweep"
    chunked = ("--population", "map", "--population-chunk", 2, "--workers", 1)  # two would share the cells of a shape

    def under_way():
        return any(len(lease["cells"]) == 2 for lease in _leases(folder).values()) and len(_saved(folder)) >= 2

    with _sweep(folder, *chunked) as child:
        assert child.shows(under_way), child.printed
        child.strike(signal.SIGKILL)
        child.ends()
    assert _rows(folder) < CELLS
    with _sweep(folder, *chunked) as child:
        assert child.ends() == 0, child.printed
    assert _timeless(folder) == whole  # to the bit those of cells that were trained one by one
    assert {str(row["population"]) for row in read_rows(folder)} == {"{'mode': 'map', 'members': 2}"}
    assert any(row["resumed_at"] for row in read_rows(folder))


def test_a_worker_that_is_killed_costs_its_own_cell_at_most(whole, tmp_path):
    folder = tmp_path / "sweep"
    with _sweep(folder) as child:
        assert child.shows(lambda: _rows(folder) >= 1 and _leases(folder)), child.printed
        os.kill(next(iter(_leases(folder).values()))["pid"], signal.SIGKILL)
        assert child.ends() == 0, child.printed
    assert _timeless(folder) == whole


def test_two_sweeps_share_a_folder(whole, tmp_path):
    folder = tmp_path / "sweep"
    with _sweep(folder) as first:
        assert first.shows(lambda: _leases(folder)), first.printed
        with _sweep(folder) as second:
            assert first.ends() == 0 and second.ends() == 0, (first.printed, second.printed)
    assert f"{CELLS} of {CELLS} cells have a row" in first.printed and f"{CELLS} of {CELLS} cells" in second.printed
    assert _timeless(folder) == whole


def test_ctrl_c_saves_and_the_same_command_goes_on(whole, tmp_path):
    folder = tmp_path / "sweep"
    with _sweep(folder) as child:
        assert child.shows(lambda: _rows(folder) >= 1 and _leases(folder)), child.printed
        child.strike(signal.SIGTERM)  # to the parent alone, which tells its workers
        assert child.ends() == 128 + signal.SIGTERM, child.printed
    assert "cells are left; the same command goes on" in child.printed and "Traceback" not in child.printed
    assert 1 <= _rows(folder) < CELLS and not _leases(folder)  # given back
    with _sweep(folder) as child:
        assert child.ends() == 0, child.printed
    assert _timeless(folder) == whole


def test_a_worker_that_was_stopped_for_longer_than_its_lease(tmp_path):
    folder = tmp_path / "sweep"
    with Child("-c", ALONE, folder) as first:
        assert first.shows(lambda: _leases(folder) and _saved(folder)), first.printed
        first.strike(signal.SIGSTOP)
        (lease,) = _leases(folder).values()
        assert lease["pid"] == first.process.pid
        with Child("-c", ALONE, folder) as second:
            assert second.ends() == 0 and "left 0" in second.printed, second.printed
        before = _timeless(folder)
        assert len(before) == 2 and lease["cells"][0] in before  # taken over, while the first one stands
        workers = {row["key"]: row["worker"] for row in read_rows(folder)}
        assert workers[lease["cells"][0]] != lease["owner"]
        first.strike(signal.SIGCONT)
        assert first.ends() == 0 and "left 0" in first.printed, first.printed
    assert _timeless(folder) == before  # its late row was dropped
    assert {row["key"]: row["worker"] for row in read_rows(folder)} == workers


def test_a_cell_whose_processes_die_becomes_a_failure_and_the_others_go_on(tmp_path):
    folder, network = tmp_path / "sweep", tmp_path / "deadly.py"
    network.write_text(
        "import os\n"
        "import flax.linen as nn\n"
        "class Net(nn.Module):\n"
        "    dies: bool = False\n"
        "    @nn.compact\n"
        "    def __call__(self, x, train):\n"
        # The parent traces a network of one's own too, to tell it from others.
        "        if self.dies and 'intra_op_parallelism_threads=1' in os.environ.get('XLA_FLAGS', ''):\n"
        "            os.kill(os.getpid(), 9)\n"
        "        return nn.Dense(10)(x.reshape(len(x), -1))\n"
    )
    options = f"--model {network}:Net --model-options dies=true dies=false --epochs 2 --workers 1 --output {folder}"
    with Child("-m", "hardjax", "sweep", *options.split()) as child:
        assert child.ends() == 1, child.printed
    rows = {row["config"]["model_options"]["dies"]: row for row in read_rows(folder)}
    assert rows[False]["status"] == "done" and rows[True]["status"] == "failed"
    assert rows[True]["reason"] == "3 processes ended by SIGKILL while they trained it: out of memory?"
    assert "failed: " in child.printed and "1 done" in child.printed
