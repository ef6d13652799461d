"""What it costs to leave images on the disk: runs on streamed data beside the same runs on resident data.

    python scripts/bench_streaming.py --data-dir DIR [--dataset cifar10] [--models mlp resnet8] [--repeats 3]

Runs in turn in one process, their programs compiled before. The input-bound share is the part of the training time in
which the device waited for images. Then what reading alone brings in a second: images of the data set, and a stand-in
of ImageNet's layout (smooth photographs of 500x375 as JPEG, made here) cut to 224x224 in each of the three ways. Last,
the memory of the process over a longer streamed run.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

import hardjax as hj
from hardjax.data.catalog import Cut

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from prepared import make_several_sizes

STREAMED, RESIDENT = hj.Performance(stream=True), hj.Performance(stream=False)
WIDE, SHARE = (375, 500), 32


def runs(config: hj.TrainConfig, repeats: int) -> None:
    """A line of a model: seconds either way, their ratio, the share of waiting."""
    ways = {"resident": RESIDENT, "streamed": STREAMED}
    found: dict[str, list[dict]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way, performance in ways.items():
            result = hj.run(config, performance=performance, progress=False)
            if repeat:  # the first one compiles
                found[way].append(result.summary)
    seconds = {way: [one["train_seconds"] for one in found[way]] for way in ways}
    ratio = statistics.median(b / a for a, b in zip(seconds["resident"], seconds["streamed"], strict=True))
    waited = statistics.median(one["input_wait_seconds"] / one["train_seconds"] for one in found["streamed"])
    rate = config.epochs * config.train_samples / statistics.median(seconds["streamed"])
    medians = " | ".join(f"{statistics.median(seconds[way]):.2f}" for way in ways)
    print(
        f"| {config.model} | {config.batch_size} | {medians} | {ratio:.2f} | {waited:.2f} | {rate:,.0f} |", flush=True
    )


def rate_of(read: Callable[[np.ndarray], object], count: int, threads: int, seconds: float) -> float:
    """Images a second of a function that reads by index, by so many threads."""
    rng, done, started = np.random.default_rng(0), 0, time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        while (passed := time.perf_counter() - started) < seconds:
            for found in pool.map(read, rng.integers(0, count, (4 * threads, SHARE))):
                done += len(found)  # type: ignore[arg-type]
    return done / passed


def smooth(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """As a photograph compresses: large shapes with a little grain."""
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3)).astype(np.uint8))
    image = np.asarray(coarse.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(image + rng.normal(0, 6, shape), 0, 255).astype(np.uint8)


class _Memory(threading.Thread):
    """Resident memory of the process, MiB, five times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: list[float] = []
        self._over = threading.Event()

    def run(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE") / 2**20
        while not self._over.wait(0.2):
            self.seen.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)

    def end(self) -> None:
        self._over.set()
        self.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--models", nargs="+", default=["mlp", "resnet8"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    base = hj.TrainConfig(
        dataset=options.dataset,
        data_dir=options.data_dir,
        train_samples=options.samples,
        batch_size=options.batch,
        epochs=options.epochs,
        evaluate_train=False,
    )
    cores = len(os.sched_getaffinity(0))
    print(f"{options.dataset}, {options.samples} images, {options.epochs} epochs; {cores} cores", end="")
    print(f", load {os.getloadavg()[0]:.1f}")
    print("| network | batch | resident s | streamed s | ratio | input-bound share | images a second |")
    print("| --- | ---: " + "| ---: " * 5 + "|")
    for model in options.models:
        runs(dataclasses.replace(base, model=model), options.repeats)

    images = hj.data.load(options.dataset, options.data_dir, stream=True).train.images
    shape = "x".join(map(str, images.shape[1:3]))
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, HARDJAX_CACHE=folder):
        make_several_sizes(Path(folder), sizes=[WIDE], train=(64,), draw=smooth)
        wide = hj.data.load("imagenet2012", folder).train.images

        def cut(how: Cut) -> Callable[[np.ndarray], np.ndarray]:
            return lambda rows: wide.read(rows, np.random.default_rng(rows).random((len(rows), 3)), how)

        cases = {
            f"{options.dataset}, {shape}": (lambda rows: images[rows], len(images)),
            "500x375, the centre": (lambda rows: wide[rows], len(wide)),
            "500x375, shorter side 256 to 480": (cut(Cut((256, 480))), len(wide)),
            "500x375, 8 to 100 % of the area": (cut(Cut(area=0.08)), len(wide)),
        }
        print("\n| read and decoded, images a second | 1 thread | 2 threads |\n| --- | ---: | ---: |")
        for name, (read, count) in cases.items():
            rates = " | ".join(f"{rate_of(read, count, threads, 4.0):,.0f}" for threads in (1, 2))
            print(f"| {name} | {rates} |", flush=True)

    memory = _Memory()
    memory.start()
    longer = dataclasses.replace(base, model=options.models[0], epochs=10 * options.epochs)
    hj.run(longer, performance=STREAMED, progress=False)
    memory.end()
    quarters = [statistics.median(part) for part in np.array_split(np.array(memory.seen), 4)]
    print(
        f"\nMiB of the process over {longer.epochs} epochs, by quarters: {', '.join(f'{one:.0f}' for one in quarters)}"
    )


if __name__ == "__main__":
    main()
