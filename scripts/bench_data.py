"""What loading costs with the cache warm: reading and verifying it, the checks, the copy to the device, the checksum.

    python scripts/bench_data.py --data-dir DIR [--dataset cifar10] [--repeats 5]

Medians within this one process, after a first load that fills the cache where it is empty.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import numpy as np

import hardjax as hj
from hardjax.data import tfds
from hardjax.data.pixels import count_constant, pixel_statistics


def median(function: Callable[[], object], repeats: int) -> float:
    """Seconds of a call."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(hj.results.environment())

    name, folder = options.dataset, options.data_dir
    dataset = hj.data.load(name, folder)
    decoded, _ = tfds.load_arrays(name, folder)
    # In memory, so that the checks alone are timed.
    train = np.array(decoded.arrays["train_images"])
    cases: dict[str, Callable[[], object]] = {
        "load, cache warm": lambda: hj.data.load(name, folder),
        "of it reading and verifying the cache": lambda: tfds.load_arrays(name, folder),
        "constant images of the training split": lambda: count_constant(train),
        "statistics of the training split (kept in the cache)": lambda: pixel_statistics(train),
        # A replaced data set has computed nothing yet.
        "checksum": lambda: dataclasses.replace(dataset).checksum,
        "a validation share of a tenth": lambda: dataset.with_validation(0.1),
    }
    for case, function in cases.items():
        print(f"{case}: {1e3 * median(function, options.repeats):.0f} ms")


if __name__ == "__main__":
    main()
