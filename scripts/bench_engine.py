"""What choosing costs: a step of hard replay over an ordinary one, a step of the round over a Python loop; start-up.

    python scripts/bench_engine.py [--dataset cifar10 --data-dir DIR] [--repeats 5]

Ratios are of medians within this one process, arms taken in turn. Without --data-dir the images are random (32x32x3),
which changes no step time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import hardjax as hj
from hardjax.choose.selection import AllBatches, HardBatches
from hardjax.engine.plan import dispatches, step_inputs
from hardjax.engine.state import Batch
from hardjax.engine.step import make_step
from hardjax.training.setting import prepare


def random_images(count: int, shape: tuple[int, int, int]) -> hj.data.Dataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *shape), np.uint8)
    return hj.data.Dataset.from_arrays(
        images, rng.integers(0, 10, count), images[:64], np.arange(64) % 10, num_classes=10, name="random"
    )


def replay_ratio(config: dict, dataset: hj.data.Dataset, repeats: int) -> dict[str, float]:
    """Median seconds per step of `HardBatches(0.2)` and `AllBatches`, runs in turn after a warm-up of each."""
    times: dict[str, list[float]] = {"all": [], "hard": []}
    for repeat in range(repeats + 1):
        for name, selection in {"all": AllBatches(), "hard": HardBatches(0.2)}.items():
            settings = hj.TrainConfig(**config, selection=selection, evaluate_train=False, seed=repeat)
            summary = hj.run(settings, dataset=dataset, progress=False).summary
            if repeat:
                times[name].append(summary["seconds_per_step"])
    all_batches, hard = (statistics.median(times[name]) for name in ("all", "hard"))
    return {"all_ms": 1e3 * all_batches, "hard_ms": 1e3 * hard, "ratio": hard / all_batches}


def scan_ratio(config: dict, dataset: hj.data.Dataset, repeats: int) -> dict[str, float]:
    """A step inside the compiled first round over the same jitted step called from Python, batches ready."""
    setting = prepare(hj.TrainConfig(**config), dataset, performance=hj.Performance(steps_per_dispatch=10_000))
    dispatch = next(dispatches(setting.plan))
    inputs = jax.device_put(step_inputs(setting.plan, dispatch))
    step = jax.jit(make_step(setting.recipe), donate_argnums=0)
    images = (dataset.train.images[: config["batch_size"]] / 255.0).astype(jnp.float32)
    batch = Batch(images, jnp.asarray(dataset.train.labels[: config["batch_size"]]))
    rows = [jax.tree.map(lambda leaf, row=row: leaf[row], inputs) for row in range(dispatch.trained)]
    key, inside, outside = jax.random.key(0), [], []
    for repeat in range(repeats + 1):
        state = setting.init_state()
        started = time.perf_counter()
        state, info = setting.programs.rounds(
            dispatch.spec, True, state, setting.splits["train"], setting.hyper, inputs
        )
        jax.block_until_ready(info)
        first = time.perf_counter() - started
        started = time.perf_counter()
        for row in rows:
            state, info = step(state, batch, setting.hyper, row, key)
        jax.block_until_ready(info)
        second = time.perf_counter() - started
        if repeat:
            inside.append(first / len(rows))
            outside.append(second / len(rows))
    a, b = statistics.median(inside), statistics.median(outside)
    return {"inside_ms": 1e3 * a, "outside_ms": 1e3 * b, "ratio": a / b}


def start_up(repeats: int) -> dict[str, float]:
    """Medians of seconds, each in a process of its own: imports, and a first epoch of `hardjax train` on digits."""

    def imports(code: str) -> float:
        timed = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
        return float(subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True).stdout)

    def first_epoch(cache: str) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder:
            run = [sys.executable, "-m", "hardjax", "train", "--epochs", "1", "--quiet", "--output", f"{folder}/run"]
            started = time.perf_counter()
            subprocess.run(run, capture_output=True, check=True, env={**os.environ, "HARDJAX_CACHE": cache})
            seconds = time.perf_counter() - started
            return seconds, json.loads(Path(folder, "run", "summary.json").read_text())["compile_seconds"]

    rows = []
    for _ in range(repeats):
        base, whole = imports("import jax, flax"), imports("import jax, flax, hardjax")
        with tempfile.TemporaryDirectory() as cache:
            (cold, compiling), (warm, _) = first_epoch(cache), first_epoch(cache)
        rows.append((whole - base, cold, compiling, warm))
    names = ("import_over_jax_flax_s", "train_cold_s", "of_it_compiling_s", "train_warm_s")
    return dict(zip(names, map(statistics.median, zip(*rows, strict=True)), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data-dir")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=20, help="mini-batches an epoch of the ResNet-20 case")
    options = parser.parse_args()
    print(hj.results.environment())

    count = 128 * options.batches
    images = hj.data.load(options.dataset, options.data_dir) if options.data_dir else random_images(count, (32, 32, 3))
    if options.data_dir:
        images = hj.data.Dataset.from_arrays(
            *(leaf[:count] for leaf in images.train[:2]), *(leaf[:64] for leaf in images.test[:2]), num_classes=10
        )
    resnet = dict(model="resnet20", batch_size=128, learning_rate=0.1)
    print("resnet20, hard 0.2 over all:", replay_ratio({**resnet, "epochs": 3}, images, options.repeats))
    print("resnet20, round over step from Python:", scan_ratio(resnet, images, options.repeats))

    mlp = dict(model="mlp", batch_size=128, epochs=200, learning_rate=0.01)
    small = random_images(1280, (28, 28, 1))
    print("mlp, ten batches an epoch, hard 0.2 over all:", replay_ratio(mlp, small, options.repeats))
    print("start-up, mlp on digits, one epoch, compilation cache empty and filled:", start_up(options.repeats))


if __name__ == "__main__":
    main()
