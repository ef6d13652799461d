"""What a checkpoint at every epoch costs: the time that training waits for it, and all of its work beside an epoch.

    python scripts/bench_saving.py --data-dir DIR [--dataset NAME] [--model NAME] [--batch-size 128] [--saves 20]

One epoch is trained and timed; then its state is saved again and again, each time into a folder that keeps two, while
nothing else runs. "Waits" is what training stands still for (the copy to the host and what lies beside it); "works" is
the writer's own time, which a second core takes while training goes on. Medians within this one process.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import hardjax as hj
from hardjax.training.loop import Loop
from hardjax.training.progress import Silent
from hardjax.training.saver import Saver
from hardjax.training.setting import prepare
from hardjax.training.signals import Asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--data-dir")
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--saves", type=int, default=20)
    options = parser.parse_args()
    print(hj.results.environment())

    config = hj.TrainConfig(
        dataset=options.dataset,
        data_dir=options.data_dir,
        model=options.model,
        batch_size=options.batch_size,
        epochs=1,
        selection=hj.selection.HardBatches(0.5),
    )
    setting = prepare(config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        loop = Loop(setting, Silent(), 0.0, folder)
        loop.go(Asked())
        saver = Saver(folder, 1)
        waits, works, processor = [], [], []
        for _ in range(options.saves):
            before, used = time.perf_counter(), time.process_time()
            saver.save(loop.state, loop.facts(None))
            waited = time.perf_counter()
            saver.wait()
            waits.append(waited - before)
            works.append(time.perf_counter() - waited)
            processor.append(time.process_time() - used)
    wait, work, used = (statistics.median(times) for times in (waits, works, processor))
    print(f"epoch of {setting.plan.steps} steps: {loop.seconds:.2f} s of training")
    print(f"a save: training waits {1e3 * wait:.1f} ms ({100 * wait / loop.seconds:.3f} % of the epoch)")
    print(f"the writer works {1e3 * work:.0f} ms beside it; {1e3 * used:.0f} ms of processor time in all")
    print(f"all of it, were it not beside training: {100 * (wait + work) / loop.seconds:.2f} % of the epoch")


if __name__ == "__main__":
    main()
