"""The memory that a run is expected to need, and what it really takes at its peak.

    python scripts/bench_memory.py [--case NAME ...]

Each case is a process of its own: it trains once, so that everything is compiled, and once more while the peak is taken
(of resident memory on a CPU, Linux only; `memory_stats` where the device has one). `ratio` is the estimate over the
peak. Images are random, which changes no size.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

import hardjax as hj
from hardjax.engine.memory import held, shown
from hardjax.training.run import train
from hardjax.training.setting import prepare

ORDINARY = dict(batch_size=128, epochs=2, learning_rate=0.01)
WIDE = dict(model="mlp", model_options={"widths": [4000, 4000]})
MEASURED = dict(measure=hj.fisher.FisherMeasure(every=5))
# Name -> (configuration, image shape, performance).
CASES = {
    "resnet8, batch 128": (dict(model="resnet8"), (32, 32, 3), {}),
    "resnet8, batch 32": (dict(model="resnet8", batch_size=32), (32, 32, 3), {}),
    "resnet8, spectra": (dict(model="resnet8") | MEASURED, (32, 32, 3), {}),
    "resnet8, batch 256, training": (dict(model="resnet8", batch_size=256), (32, 32, 3), dict(eval_batch_size=16)),
    "mlp 500-500, batch 128": (dict(model="mlp", batch_size=128), (28, 28, 1), {}),
    "mlp 4000-4000, momentum": (WIDE | dict(optimizer="momentum"), (28, 28, 1), {}),
    "mlp 4000-4000, adam": (WIDE | dict(optimizer="adam"), (28, 28, 1), {}),
    "mlp 4000-4000, state kept": (WIDE, (28, 28, 1), dict(donate=False)),
    "resnet8, evaluation of 5000": (dict(model="resnet8", batch_size=16), (32, 32, 3), dict(eval_batch_size=5000)),
}


def measure(name: str) -> dict[str, float | str]:
    config, shape, performance = CASES[name]
    rng = np.random.default_rng(0)
    count = 10 * {**ORDINARY, **config}["batch_size"]
    tested = max(500, performance.get("eval_batch_size", 0))
    splits = [(rng.integers(0, 256, (n, *shape), np.uint8), np.arange(n) % 10) for n in (count, tested)]
    dataset = hj.data.Dataset.from_arrays(*splits[0], *splits[1], num_classes=10, name="random")
    config = hj.TrainConfig(**{**ORDINARY, **config})
    setting = prepare(config, dataset, performance=hj.Performance(steps_per_dispatch=10, **performance))
    need = setting.compile(saved=True)
    device = jax.devices()[0]

    def trained() -> None:
        with tempfile.TemporaryDirectory() as folder:
            train(setting, Path(folder) / "run", progress=False)

    trained()
    gc.collect()
    if device.memory_stats() is None:
        # What the compiler has given back stays with the process, and would hide as much of what training takes.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        trained()
        peak = resident("VmHWM") - before
    else:
        before = device.memory_stats()["bytes_in_use"]
        trained()
        peak = device.memory_stats()["peak_bytes_in_use"] - before
    peak += held(setting.splits)
    parts = ", ".join(f"{part.name} {shown(part.size)}" for part in need.programs)
    return {
        "case": name,
        "estimate": need.total,
        "peak": peak,
        "of": f"data {shown(need.data)}, state {shown(need.state)}, copies {shown(need.copies)}, {parts}",
    }


def resident(field: str) -> int:
    """Bytes of a line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 2**10 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--alone", choices=list(CASES), help="this one, in this process")
    options = parser.parse_args()
    if options.alone is not None:
        print(json.dumps(measure(options.alone)))
        return
    print(hj.results.environment())
    print(f"{'case':<28} {'estimate':>10} {'peak':>10} {'ratio':>6}   of it")
    for name in options.case:
        run = [sys.executable, __file__, "--alone", name]
        row = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        ratio = row["estimate"] / row["peak"]
        print(f"{name:<28} {shown(row['estimate']):>10} {shown(row['peak']):>10} {ratio:>6.2f}   {row['of']}")


if __name__ == "__main__":
    main()
