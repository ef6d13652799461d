"""Dynamic sampling of the batch size on MNIST (P3, Table 1 and figure 5): the published plans beside fixed sizes.

    python experiments/mnist_dynamic.py run DATA_DIR [--workers 2] [--seeds 3]   # goes on where it was interrupted
    python experiments/mnist_dynamic.py show                                     # table and pictures, from the rows

A row a run in `results/mnist_dynamic.jsonl`: settings, errors, seconds, and where it went in the C_K-L_K plane. Runs
take two to three minutes of one core, longer at a batch of 16.

Fixed beforehand: a plan differs from the best fixed size (lowest mean test error, so that it is chosen by looking: the
comparison leans towards it) only where the 95 % interval of the difference, paired by seed, excludes 0; ** where it
still holds by Holm's correction over all plans. Beside it the paper's own test, of two samples.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from scipy import stats

from hardjax.choose.batch_plan import BatchPlan
from hardjax.cli import output
from hardjax.plots.plane import SHARES, plane
from hardjax.study import beacon_file, beacons, statistics
from hardjax.study.measure import read_trail
from hardjax.training import files, lines

HERE = Path(__file__).parent
ROWS = HERE / "results" / "mnist_dynamic.jsonl"
RUNS = HERE.parent / "runs" / "mnist_dynamic"
# Test error in percent, mean and spread (P3, MNIST, perceptron; train and test rows are printed alike there).
PUBLISHED = {
    "s16-to-64": (1.07, 0.06),
    "s16-to-64-MS": (0.90, 0.12),
    "s16-to-256": (0.98, 0.06),
    "s16-to-256-MS": (0.93, 0.08),
    "s32-to-128": (0.79, 0.10),
    "s32-to-128-MS": (0.73, 0.08),
    "s32-to-512": (0.93, 0.02),
    "s32-to-512-MS": (1.23, 0.10),
    "s128-to-512": (0.88, 0.02),
    "s128-to-512-MS": (0.91, 0.04),
    "s512-to-32": (0.95, 0.05),
    "s512-to-32-MS": None,
}
# The same at fixed sizes.
SIZES = {
    "16": (1.35, 0.05),
    "32": (0.87, 0.03),
    "64": (0.90, 0.00),
    "128": (0.90, 0.02),
    "256": (0.92, 0.07),
    "512": (1.06, 0.03),
}
# Batch norm, and digits placed at random in 32x32: the reading that comes nearest to the published errors.
SETTINGS = (
    "--dataset mnist --model mlp --model-option norm=batch --frame 32 --place random --epochs 40 --optimizer nesterov"
    " --learning-rate 0.1 --weight-decay 1e-4 --schedule step --measure-every 50 --test-every 4 --quiet --resume"
)
ONE_THREAD = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_COMPILATION_CACHE_DIR": str(RUNS.parent / ".programs"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
}


def run(options: argparse.Namespace) -> None:
    """The runs without a row, seed by seed, so that what is there at any time compares all arms."""
    done = {(row["arm"], row["seed"]) for row in lines.read_lines(ROWS)}
    missing = [(a, s) for s in range(options.seeds) for a in (*PUBLISHED, *SIZES) if (a, s) not in done]
    cores: SimpleQueue[int] = SimpleQueue()
    for core in sorted(os.sched_getaffinity(0))[: options.workers]:
        cores.put(core)
    with ThreadPoolExecutor(options.workers) as pool:
        for found in pool.map(lambda one: _one(*one, options.data_dir, cores), missing):
            lines.append_line(ROWS, found)
            print(f"{found['arm']:>15} seed {found['seed']}: {found['trail']['test_error']:.2f} %", flush=True)


def _one(arm: str, seed: int, data_dir: str, cores: SimpleQueue) -> dict[str, Any]:
    size = ["--batch-size" if arm in SIZES else "--batch-plan", arm]
    folder, core = RUNS / f"{arm}-seed{seed}", cores.get()
    command = [sys.executable, "-m", "hardjax", "train", *SETTINGS.split(), *size]
    command += ["--data-dir", data_dir, "--seed", str(seed), "--output", str(folder)]
    try:
        subprocess.run(
            command,
            env=os.environ | ONE_THREAD,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            check=True,
            stdout=subprocess.DEVNULL,
        )
    finally:
        cores.put(core)
    return row(arm, seed, folder)


def row(arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """Of a finished run."""
    trail, settings = read_trail(folder)
    summary = files.read_summary(folder) or {}
    kept = {name: summary[name] for name in ("backprops", "train_seconds", "compile_seconds", "device", "versions")}
    plain = beacon_file.to_plain(trail) | {"run": f"{arm}-seed{seed}"}
    settings["data_dir"] = None
    return {"arm": arm, "seed": seed, **kept, "settings": settings, "trail": json.loads(_short(plain))}


def _short(plain: Any) -> str:
    """JSON with six digits a number: rows stay small, and nothing is known more exactly."""
    return json.dumps(json.loads(lines.encode(plain), parse_float=lambda text: float(f"{float(text):.6g}")))


def show(options: argparse.Namespace) -> None:
    """The table, and a plane for each reading."""
    rows = lines.read_lines(ROWS)
    errors = {arm: _by_seed(rows, arm) for arm in (*PUBLISHED, *SIZES)}
    known = [arm for arm in SIZES if errors[arm]]
    best = min(known, key=lambda arm: np.mean(list(errors[arm].values())))
    pairs = {arm: _paired(errors[arm], errors[best]) for arm in PUBLISHED if errors[arm]}
    held = dict(zip(pairs, statistics.holm([pair.p_value for pair in pairs.values()]), strict=True))
    found = []
    for arm in (*known, *pairs):
        mine = [one for one in rows if one["arm"] == arm]
        own = statistics.interval(list(errors[arm].values()))
        line = {"batches": arm, "runs": len(mine), "test error (%)": f"{own.mean:.2f} ± {own.half_width:.2f}"}
        published = (PUBLISHED | SIZES).get(arm)
        line |= {"published": f"{published[0]:.2f} ± {published[1]:.2f}" if published else "-"}
        # Rows without seconds are of a machine that other work kept busy: their times say nothing.
        seconds = [one["train_seconds"] for one in mine if one["train_seconds"] is not None]
        line |= {"steps": mine[0]["backprops"], "seconds": float(np.median(seconds)) if seconds else "-"}
        line |= {f"against {best} (points)": "-", "p of two samples": "-"}
        if arm in pairs:
            pair, star = pairs[arm], "**" if held[arm] else "*" * pairs[arm].differs
            line[f"against {best} (points)"] = f"{pair.mean:+.2f} ± {pair.half_width:.2f} {star}".strip()
            two = stats.ttest_ind(list(errors[arm].values()), list(errors[best].values()), equal_var=False)
            line["p of two samples"] = f"{two.pvalue:.3f}"
        found.append(line)
    output.table("mlp norm=batch on mnist, 40 epochs, Nesterov, initial rate 0.1", found)
    print("±: 95 % intervals of Student's t over seeds; of what is published, the spread printed there.")
    output.table("way from the beacon of the first size (0) to that of the last (1), logarithmic", _ways(rows, options))
    for reading in beacons.READINGS:
        _plane(rows, options.tolerance, reading)


def _by_seed(rows: list[dict[str, Any]], arm: str) -> dict[int, float]:
    return {one["seed"]: one["trail"]["test_error"] for one in rows if one["arm"] == arm}


def _paired(first: dict[int, float], second: dict[int, float]) -> statistics.Interval:
    seeds = sorted(first.keys() & second.keys())
    return statistics.paired([first[seed] for seed in seeds], [second[seed] for seed in seeds])


def _ways(rows: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """How far each plan went in the plane, by each reading."""
    found: dict[str, dict[str, Any]] = {name: {"batches": name} for name in PUBLISHED}
    trails = [beacon_file.from_plain(one["trail"]) for one in rows]
    for reading in beacons.READINGS:
        placed = {one.batches: one for one in beacons.configurations(trails, options.tolerance, reading)}
        for name, line in found.items():
            plan = BatchPlan(name)
            first, last = (int(part) for part in name.removesuffix("-MS")[1:].split("-to-"))
            for word, field in {"C_K": "condition", "L_K": "energy"}.items():
                at = [float(np.log(getattr(placed[key], field)[-1])) for key in (first, last, plan.text)]
                line[f"{word}, each {reading} alike"] = f"{(at[2] - at[0]) / (at[1] - at[0]):.2f}"
    return list(found.values())


def _plane(rows: list[dict[str, Any]], tolerance: float, reading: str) -> None:
    trails = {one["arm"] + str(one["seed"]): beacon_file.from_plain(one["trail"]) for one in rows}
    fixed = [trail for trail in trails.values() if isinstance(trail.batches, int)]
    travels = [_at_shares(trail) for trail in trails.values() if isinstance(trail.batches, str)]
    names = {BatchPlan(name).text: name for name in PUBLISHED}
    named = [(names[str(one.batches)], one) for one in beacons.configurations(travels, tolerance, reading)]
    found = beacons.configurations(fixed, tolerance, reading)
    title = f"mlp norm=batch on mnist, 40 epochs; tolerance {tolerance:g}, each {reading} alike"
    output.picture(HERE / "results" / f"mnist_plane_{reading}.png", lambda: plane(found, named, title=title))


def _at_shares(trail: beacons.Trail) -> beacons.Trail:
    """A travelling history, of whole epochs."""
    at = np.searchsorted(trail.epoch, np.array(SHARES) * trail.epoch[-1] - 1e-9)
    measures = {key: {name: found[at] for name, found in one.items()} for key, one in trail.measures.items()}
    errors = {name: found[at] for name, found in trail.errors.items()}
    return dataclasses.replace(trail, epoch=trail.epoch[at], measures=measures, errors=errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="the runs that have no row yet")
    running.add_argument("data_dir", help="folder of prepared TFDS data")
    running.add_argument("--workers", type=int, default=2)
    running.add_argument("--seeds", type=int, default=3)
    running.set_defaults(do=run)
    showing = commands.add_parser("show", help="table and pictures from the rows")
    showing.add_argument("--tolerance", type=float, choices=beacons.TOLERANCES, default=0.0)
    showing.set_defaults(do=show)
    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    main()
