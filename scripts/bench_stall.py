"""What a change of the batch size costs: programs compiled aside against programs that are all there beforehand.

    python scripts/bench_stall.py [--plan 16-32-64-128-256] [--widths 256 256] [--samples 8192] [--epochs 100]

A perceptron on made-up data is trained by a plan, in turn with every program there ("warm") and with the programs of
later stages compiled in a thread ("background"), each run with programs of its own and without a cache on the disk.
Asked: the whole background run takes at most 1.02 times the warm one plus the processor time of compiling over the
cores; at each change it waits for at most one step where the stage before lasted longer than compiling. What a run
begins with (first state, first training, evaluation) is there in both. Other work on the machine moves single figures:
its load stands beside them.
"""

import argparse
import os
import statistics
import time

import jax
import numpy as np

import hardjax as hj
from hardjax.engine.programs import programs_for
from hardjax.training.ahead import Compiler
from hardjax.training.loop import Loop
from hardjax.training.progress import Silent
from hardjax.training.setting import Setting, prepare
from hardjax.training.signals import Asked


class _Watched(Loop):
    """Notes, by stage, what it waited for programs and how long it trained."""

    def __init__(self, *rest: object, **more: object) -> None:
        super().__init__(*rest, **more)  # type: ignore[arg-type]
        stages = len(self.plan.stages)
        self.waits, self.began = [0.0] * stages, [0.0] * (stages + 1)

    def _issue(self, dispatch) -> None:
        if not self.began[dispatch.stage]:
            self.began[dispatch.stage] = time.perf_counter()
        before = self.setting.programs.wait_seconds
        super()._issue(dispatch)
        self.waits[dispatch.stage] += self.setting.programs.wait_seconds - before


def compiling(config: hj.TrainConfig, dataset: hj.data.Dataset, ahead: str) -> tuple[float, Setting]:
    """(processor seconds, setting) of compiling before training, where nobody has compiled anything."""
    jax.clear_caches()
    programs_for.cache_clear()
    setting = prepare(config, dataset, performance=hj.Performance(compile_ahead=ahead))
    # Of the whole process, of which compiling is all that goes on: XLA has threads of its own.
    used = time.process_time()
    setting.compile(saved=False)
    return time.process_time() - used, setting


def trained(setting: Setting) -> tuple[float, float, _Watched]:
    """(seconds, processor seconds, loop) of a run whose first programs are there."""
    with Compiler(setting) as compiler:
        background = setting.performance.compile_ahead == "background"
        started, used = time.perf_counter(), time.process_time()
        loop = _Watched(setting, Silent(), 0.0, compiler=compiler if background else None)
        loop.go(Asked())
        jax.block_until_ready(loop.state)
        loop.began[-1] = time.perf_counter()
        return loop.began[-1] - started, time.process_time() - used, loop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", default="16-32-64-128-256")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 256])
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (options.samples, 16, 16, 1), np.uint8), np.arange(options.samples) % 10
    dataset = hj.data.Dataset.from_arrays(images, labels, images[:500], labels[:500], num_classes=10)
    config = hj.TrainConfig(
        model="mlp",
        model_options={"widths": options.widths},
        batch_plan=hj.batch_plan.BatchPlan(options.plan),
        epochs=options.epochs,
        evaluate_train=False,
    )
    rows = []
    for _ in range(options.repeats):
        begins, _ = compiling(config, dataset, "off")
        everything, setting = compiling(config, dataset, "first")
        *warm, _ = trained(setting)
        _, setting = compiling(config, dataset, "background")
        *aside, loop = trained(setting)
        rows.append((warm, aside, everything - begins, loop))
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, load {os.getloadavg()[0]:.1f}; plan {options.plan}, {options.epochs} epochs")
    print("warm s | background s | ratio | over 1.02 * warm + compiling / cores")
    for (warm, _), (aside, _), later, _ in rows:
        print(f"{warm:.2f} | {aside:.2f} | {aside / warm:.3f} | {aside / (1.02 * warm + later / cores):.3f}")
    print("of the processor: warm s | compiling s | background s | ratio to the sum")
    for (_, warm), (_, aside), later, _ in rows:
        print(f"{warm:.2f} | {later:.2f} | {aside:.2f} | {aside / (warm + later):.3f}")
    print("stage | batch size | lasted s | a step ms | waited ms (median; largest)")
    stages = rows[0][-1].plan.stages
    for index, stage in enumerate(stages):
        lasted = statistics.median(row[-1].began[index + 1] - row[-1].began[index] for row in rows)
        waits = [1e3 * row[-1].waits[index] for row in rows]
        step = 1e3 * lasted / stage.steps
        found = f"{statistics.median(waits):.1f}; {max(waits):.1f}"
        print(f"{index + 1} | {stage.sizes.batch_size} | {lasted:.2f} | {step:.2f} | {found}")


if __name__ == "__main__":
    main()
