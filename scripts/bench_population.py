"""Members an hour of a grid of runs: in turn, as one program (map, vmap), and by a worker a core.

    python scripts/bench_population.py [--models mlp resnet8] [--batches 4 16 64] [--members 8] [--repeats 3]

Members differ in their base rate and train on digits in a frame of 28 pixels (perceptron) or 32. In turn and as one
program all threads are used, and every way has its programs before the clock starts. Workers have one thread each; of
them the time is the difference between a sweep of three times as many members and one of as many, since processes
start once; `lost` is what of that no member's own seconds account for. "auto" is what timing a few steps chose, which
includes that timing. Ratios are medians over repeats, each of all ways in turn.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

import hardjax as hj

FRAMES = {"mlp": 28}
MODES = ("map", "vmap", "auto")


def grid(model: str, batch: int, members: int, options: argparse.Namespace) -> list[hj.TrainConfig]:
    base = hj.TrainConfig(
        train_samples=options.samples,
        model=model,
        batch_size=batch,
        augmentation=hj.Augmentation(frame=FRAMES.get(model, 32)),
        optimizer="sgd",
        epochs=options.epochs,
        evaluate_train=False,
    )
    rates = 2.0 ** np.linspace(-12, -5, members)
    return [dataclasses.replace(base, base_learning_rate=float(rate)) for rate in rates]


def seconds(call: Callable[..., object], *given: object) -> float:
    started = time.perf_counter()
    call(*given)
    return time.perf_counter() - started


def in_turn(configs: Sequence[hj.TrainConfig]) -> None:
    for config in configs:
        hj.run(config, progress=False)


def together(configs: Sequence[hj.TrainConfig], mode: str) -> None:
    hj.run_population(configs, performance=hj.Performance(population=mode), progress=False)


def swept(configs: Sequence[hj.TrainConfig]) -> tuple[float, float, int]:
    """(seconds of a sweep by workers, seconds of its members, workers)."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        found = hj.sweep(configs, output=folder, workers="auto")
        passed = time.perf_counter() - started
    return passed, sum(row["seconds"] for row in found.rows), len({row["worker"] for row in found.rows})


def by_workers(model: str, batch: int, members: int, options: argparse.Namespace) -> tuple[float, float]:
    """(seconds of so many members, share of them that was lost between members), the start of the processes aside."""
    few, many = (swept(grid(model, batch, times * members, options)) for times in (1, 3))
    passed, trained = many[0] - few[0], many[1] - few[1]
    return passed / 2, 1 - trained / (passed * many[2])


def line(model: str, batch: int, members: int, options: argparse.Namespace) -> str:
    configs = grid(model, batch, members, options)
    ways: dict[str, Callable[[], None]] = {"in turn": lambda: in_turn(configs)}
    ways |= {mode: lambda mode=mode: together(configs, mode) for mode in MODES if mode not in options.without}
    found: dict[str, list[float]] = {way: [] for way in ways}
    lost = []
    for repeat in range(options.repeats + 1):
        for way, call in ways.items():
            passed = seconds(call)
            if repeat:  # the first one compiles
                found[way].append(passed)
        if repeat and "workers" not in options.without:
            passed, share = by_workers(model, batch, members, options)
            found.setdefault("workers", []).append(passed)
            lost.append(share)
    hourly = 3600 * members / statistics.median(found["in turn"])
    shown = [f"{model} | {batch} | {members} | {hourly:,.0f}"]
    for way in (*MODES, "workers"):
        pairs = zip(found["in turn"], found.get(way, []), strict=way in found)
        ratios = [alone / passed for alone, passed in pairs]
        shown.append(f"{statistics.median(ratios):.2f}" if ratios else "-")
    shown.append(f"{100 * statistics.median(lost):.1f}" if lost else "-")
    return f"| {' | '.join(shown)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mlp", "resnet8"])
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--members", type=int, nargs="+", default=[8])
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without", nargs="+", default=[], choices=[*MODES, "workers"], help="ways to leave out")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(
        f"{device.platform}: {device.device_kind}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}"
    )
    print(f"{options.samples} images, {options.epochs} epochs; others: speed over in turn")
    print("| network | batch | members | in turn, an hour | map | vmap | auto | workers | lost between members, % |")
    print("| --- " + "| ---: " * 8 + "|")
    for model in options.models:
        for batch in options.batches:
            for members in options.members:
                print(line(model, batch, members, options), flush=True)


if __name__ == "__main__":
    main()
