"""One of several processes that train together: test_hosts.py starts this file as often, and compares what it writes.

several_processes.py PORT PROCESS_ID PROCESSES FOLDER [PART ...]
"""

import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
from short_runs import CASES, PATH, config_of, of_processes, tiny
from wide import wide

import hardjax as hj
from hardjax.training import checkpoint, hosts, points

PORT, ME, COUNT, FOLDER = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
SAID = {}


def _kept(result):
    """Arrays of what a run came to, and its history."""
    plain = checkpoint.on_host(result.state)
    found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(plain)}
    found |= {f"history {name}": values for name, values in result.history.items() if name != "seconds"}
    found |= {f"measured {name}": values for name, values in result.measurements.items()}
    return found | ({} if result.replays is None else {"replays": result.replays})


def _equal(one, other):
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def cases():
    for name in of_processes(COUNT):
        network, changes = CASES[name]
        with jax.enable_x64(True):
            how = hj.Performance(**PATH)
            result = hj.run(config_of(**changes), dataset=tiny(), model=wide(*network), performance=how, progress=False)
        assert (result.summary["devices"], result.summary["processes"]) == (COUNT, COUNT)
        np.savez(FOLDER / f"{name} {ME}.npz", **_kept(result))


def other_ways():
    """Images in parts, and images that are read while training: no bit changes."""
    config = config_of(validation=0.2, augmentation="standard", model_options={"widths": [8]})
    whole, shares, streamed = (
        _kept(hj.run(config, dataset=tiny(), performance=hj.Performance(**how), progress=False))
        for how in ({}, {"shard_data": True}, {"stream": True})
    )
    SAID["shared out"], SAID["streamed"] = _equal(whole, shares), _equal(whole, streamed)


def resumed():
    """Process 1 alone is told to end; all save, end, and go on to the bits of a run that nobody interrupted."""
    config = config_of(
        model_options={"widths": [8], "norm": "batch"}, selection=hj.selection.HardBatches(0.5), epochs=3
    )
    whole = hj.run(config, dataset=tiny(), progress=False)
    test, seen = points.test, []

    def told(*given):
        seen.append(given)
        if ME == 1 and len(seen) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return test(*given)

    points.test = told
    cut = hj.run(config, dataset=tiny(), output=FOLDER / "run", progress=False)
    points.test = test
    SAID["cut"] = [cut.summary["end"], cut.summary["signal"], cut.summary["backprops"] < whole.summary["backprops"]]
    rest = hj.run(config, dataset=tiny(), output=FOLDER / "run", resume=True, progress=False)
    SAID["resumed"] = [_equal(_kept(whole), _kept(rest)), rest.summary["resumed_at"] == [cut.summary["backprops"]]]
    again = hj.run(config, dataset=tiny(), output=FOLDER / "run", resume=True, progress=False)
    SAID["finished"] = [_equal(_kept(whole), _kept(again)), len(again.history["epoch"])]


def refusals():
    def refused(name, call):
        try:
            call()
        except ValueError as error:
            SAID[name] = str(error)

    short = {"dataset": tiny(), "progress": False}
    refused("seeds", lambda: hj.run(config_of(seed=ME), **short))
    refused("one alone", lambda: hj.run(config_of(batch_size=16 if ME == 0 else 200), **short))
    refused("taken", lambda: hj.run(config_of(), output=FOLDER / "run", **short))
    refused("odd", lambda: hj.run(config_of(batch_size=7), **short))
    refused("device", lambda: hj.run(config_of(), performance=hj.Performance(devices=1), **short))
    refused("population", lambda: hj.run_population([config_of(), config_of(seed=1)], dataset=tiny(), progress=False))
    refused("sweep", lambda: hj.sweep([config_of()], output=FOLDER / "sweep", dataset=tiny()))


hosts.join(f"127.0.0.1:{PORT}", COUNT, ME, lost_after=60)
try:
    parts = {part.__name__: part for part in (resumed, refusals, other_ways, cases)}
    for name in sys.argv[5:] or parts:
        parts[name]()
        (FOLDER / f"said {ME}.json").write_text(json.dumps(SAID))
except BaseException as error:
    hosts.end(error)
