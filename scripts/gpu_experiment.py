"""The most telling GPU work in under ten minutes on one GPU, without a network; the same command goes on next time.

    python scripts/gpu_experiment.py [--data-dir DIR] [--minutes 10] [--output runs/gpu_experiment] [--smoke]

In this order, each with a row in OUTPUT/full (OUTPUT/smoke) the moment it is known: throughput of ResNet-20 (ms a
step), ours and PyTorch's where torch is installed; 8 and 32 runs of batch 16 as one program beside one after another;
rows of P1's table 3 and P2's table 1 at the reduced scale; ResNet-18 on CIFAR-10 to 94 % with ordinary training, hard
and random replay, trimming and random trimming, seed after seed. summary.json there has medians over seeds, of rows of
this device; a target that was missed counts as infinitely late. --smoke: tiny, on digits, for the tests.
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import hardjax as hj
from hardjax.study import experiments, verdict
from hardjax.study.experiments_rows import Results
from hardjax.study.experiments_run import run
from hardjax.training import files, lines

TARGET = 94.0
ARMS: dict[str, dict[str, Any]] = {
    "ordinary": {},
    "hard 0.5": {"selection": hj.selection.HardBatches(0.5)},
    "random 0.5": {"selection": hj.selection.RandomBatches(0.5)},
    "trimmed": {"trimming": hj.trimming.Trimming()},
    "random-trimmed": {"trimming": hj.trimming.Trimming(keep="random")},
}
FULL = hj.TrainConfig(
    dataset="cifar10",
    model="resnet18",
    model_options={"stem": "cifar"},
    epochs=20,
    batch_size=512,
    optimizer="nesterov",
    learning_rate=0.4,
    weight_decay=5e-4,
    schedule=hj.Schedule("cosine", warmup=0.1),
    augmentation="standard",
    evaluate_train=False,
)
SMOKE = hj.TrainConfig(model="mlp", model_options={"widths": [8]}, epochs=2, batch_size=64, evaluate_train=False)
TIMED = {"model": "resnet20", "model_options": {}}
SIZES = (128, 512)  # of the batches timed
POPULATIONS, SMALL = (8, 32), 16  # members, and the batch size of each
TABLES = ("p1-table-3", "p2-table-1")
EXPERIMENTS = Path(__file__).parents[1] / "experiments"
Task = tuple[str, Callable[[], dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder of prepared TFDS data")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", default="runs/gpu_experiment")
    parser.add_argument("--smoke", action="store_true", help="tiny, on digits")
    options = parser.parse_args()
    base = SMOKE if options.smoke else dataclasses.replace(FULL, data_dir=options.data_dir)
    folder = Path(options.output) / ("smoke" if options.smoke else "full")
    folder.mkdir(parents=True, exist_ok=True)
    dataset = hj.data.load(base.dataset, base.data_dir)
    until = time.monotonic() + 60 * options.minutes
    wanted = list(tasks(base, dataset, options.seeds))
    first = [task for task in wanted if task[0].startswith(("throughput", "population"))]
    work(iter(first), folder / "rows.jsonl", until)
    tables(folder, options.data_dir, "smoke" if options.smoke else "reduced", until)
    work(iter(wanted), folder / "rows.jsonl", until)
    found = summary(rows_of(folder / "rows.jsonl"), TARGET)
    files.write_json(folder / "summary.json", found | files.environment())
    print(json.dumps(found, indent=1))


def work(wanted: Iterator[Task], path: Path, until: float) -> None:
    """Do what has no row yet from this device, one after another, as long as the longest of before would still fit."""
    done = {row["task"]: row for row in rows_of(path)}
    longest = max((row["wall_seconds"] for row in done.values()), default=0.0)
    for name, task in wanted:
        if name in done:
            continue
        began = time.monotonic()
        if began + longest > until:
            print(f"time is up before {name}; the same command goes on")
            return
        found = task()
        taken = time.monotonic() - began
        # Seconds that compiling took are spent once: the next run of the kind is shorter.
        longest = max(longest, taken - found.get("compile_seconds", 0.0))
        environment = {"device": files.environment()["device"], "commit": files.commit()}
        lines.append_line(path, {"task": name, "wall_seconds": taken} | found | environment)
        print(f"{name}: {taken:.1f} s", flush=True)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Of this device, without what a package that was missing then could not tell."""
    device = files.environment()["device"]
    return [row for row in lines.read_lines(path) if row["device"] == device and not row.get("reason")]


def tasks(base: hj.TrainConfig, dataset: hj.data.Dataset, seeds: int) -> Iterator[Task]:
    """(name, what finds its row): throughput, populations, then runs seed by seed."""
    full = base.model != SMOKE.model
    for size in SIZES if full else (64,):
        timed = dataclasses.replace(base, **TIMED) if full else base
        yield f"throughput, ours, batch {size}", lambda timed=timed, size=size: ours(timed, dataset, size)
        if full:
            yield f"throughput, torch, batch {size}", lambda size=size: torchs(size)
    for model in ("mlp", "resnet8") if full else (base.model,):
        for members in POPULATIONS if full else (2,):
            one = dataclasses.replace(base, model=model, model_options={} if full else base.model_options)
            name = f"population, {model}, {members} members"
            yield name, lambda one=one, members=members: together(one, dataset, members)
    for seed in range(seeds):
        for arm, settings in ARMS.items():
            config = dataclasses.replace(base, **settings, seed=seed)
            yield f"{arm}, seed {seed}", lambda config=config, arm=arm: trained(config, dataset, arm)


def tables(folder: Path, data_dir: str | None, scale: str, until: float) -> None:
    """Rows of the papers' tables, in FOLDER/results as `hardjax table` writes them; half of the time at most."""
    found = Results(experiments.load(EXPERIMENTS), folder / "results")
    began = time.monotonic()
    for name in TABLES:
        hours = ((began + until) / 2 - time.monotonic()) / 3600
        if hours > 0:
            one = found.experiments[name]
            done = run(one, scale, results=found, folder=folder / "sweep", data_dir=data_dir, max_hours=hours)
            print(f"{name}: {done.written} rows written, {done.left} left", flush=True)


def ours(base: hj.TrainConfig, dataset: hj.data.Dataset, size: int) -> dict[str, Any]:
    """Milliseconds a step over two epochs, compiling and testing aside."""
    config = dataclasses.replace(base, batch_size=size, epochs=2, test_every=2)
    summary = hj.run(config, dataset=dataset, progress=False).summary
    return {
        "kind": "throughput",
        "ms_a_step": 1e3 * summary["seconds_per_step"],
        "compile_seconds": summary["compile_seconds"],
    }


def together(base: hj.TrainConfig, dataset: hj.data.Dataset, members: int) -> dict[str, Any]:
    """Seconds of runs that differ in their base rate, one after another (one is timed) and as one program."""
    few = {"batch_size": SMALL, "learning_rate": None, "augmentation": "none", "epochs": 2, "test_every": 2}
    base = dataclasses.replace(base, **few, train_samples=min(4096, dataset.train.num_samples))
    rates = 2.0 ** np.linspace(-12, -6, members)
    configs = [dataclasses.replace(base, base_learning_rate=float(rate)) for rate in rates]
    alone = hj.run(configs[0], dataset=dataset, progress=False).summary
    how = hj.Performance(population="vmap")
    found = hj.run_population(configs, dataset=dataset, performance=how, progress=False)
    # A member's seconds are its share.
    trained, compiled = (sum(one.summary[name] for one in found) for name in ("train_seconds", "compile_seconds"))
    return {
        "kind": "population",
        "seconds_alone": alone["train_seconds"],
        "seconds_together": trained,
        "times_in_turn": members * alone["train_seconds"] / trained,
        "compile_seconds": alone["compile_seconds"] + compiled,
    }


def torchs(size: int) -> dict[str, Any]:
    """Of PyTorch: ResNet-20, channels last, eager, over and over on one batch (ours draws, fetches and augments too);
    None where torch is not installed, or without CUDA beside a GPU."""
    try:
        import torch
        from torch_networks import he_resnet
    except ImportError as error:
        return {"kind": "throughput", "ms_a_step": None, "reason": f"{error.name} is not installed"}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and jax.default_backend() != "cpu":
        return {"kind": "throughput", "ms_a_step": None, "reason": "this torch has no CUDA"}
    model = he_resnet(3).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    images = torch.randn(size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (size,), device=device)

    def steps(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / count

    steps(10)
    return {"kind": "throughput", "ms_a_step": 1e3 * steps(100), "torch": torch.__version__, "on": device}


def trained(config: hj.TrainConfig, dataset: hj.data.Dataset, arm: str) -> dict[str, Any]:
    """A whole run, with the points at which it was tested."""
    result = hj.run(config, dataset=dataset, progress=False)
    history = {name: result.history[name].tolist() for name in ("epoch", "seconds", "test_top1")}
    kept = {name: result.summary[name] for name in ("train_seconds", "compile_seconds", "backprops", "diverged")}
    return {"kind": "run", "arm": arm, "seed": config.seed, **kept, **history}


def summary(rows: list[dict[str, Any]], target: float) -> dict[str, Any]:
    """Throughput, speed of populations over runs in turn, and of each arm its accuracy and the median seconds to the
    target, misses infinite."""
    found: dict[str, Any] = {
        "ms_a_step": {row["task"]: row["ms_a_step"] for row in rows if row["kind"] == "throughput"}
    }
    found["times_in_turn"] = {row["task"]: row["times_in_turn"] for row in rows if row["kind"] == "population"}
    for arm in ARMS:
        those = [row for row in rows if row["kind"] == "run" and row["arm"] == arm]
        if those:
            seconds = [seconds_to(row, target) for row in those]
            found[arm] = {
                "seeds": len(those),
                "test_top1": float(np.mean([row["test_top1"][-1] for row in those])),
                "train_seconds": float(np.median([row["train_seconds"] for row in those])),
                f"seconds to {target:g} %": verdict.median(seconds) if any(map(math.isfinite, seconds)) else None,
                "missed": sum(map(math.isinf, seconds)),
            }
    return found


def seconds_to(row: dict[str, Any], target: float) -> float:
    """Training seconds until the first test point at a test accuracy; infinite where it was missed."""
    return next(
        (s for s, top1 in zip(row["seconds"], row["test_top1"], strict=True) if top1 is not None and top1 >= target),
        math.inf,
    )


if __name__ == "__main__":
    main()
