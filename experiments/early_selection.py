"""Early model selection (P3, section 3.1): do C_K and L_K of the first epochs tell which configuration ends up best?

    python experiments/early_selection.py DATA_DIR [--seeds 1]     # goes on where it was interrupted
    hardjax measure --beacons experiments/results/early_beacons.json --early 1 2 4 10 --output runs/early

Six batch sizes by six learning rates of the perceptron with batch norm on 10,000 images of MNIST, 40 epochs, 5,000
others for validation; the first command trains them and writes the file of beacons, the second ranks them.

Fixed beforehand: at each epoch the rank correlation with the final test error of C_K, L_K, c and the distance to the
best beacon, with 95 % intervals by bootstrap over configurations. They tell something where the interval excludes 0,
and more than is known without them only where it lies above that of the validation error at the same epoch.
"""

import argparse
import dataclasses
import itertools
import os
from pathlib import Path

import numpy as np

import hardjax as hj
from hardjax.cli import beacons

HERE = Path(__file__).parent
RUNS = HERE.parent / "runs" / "early_selection"
SIZES, RATES = (16, 32, 64, 128, 256, 512), (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
TRAINED, VALIDATED = 10_000, 5_000


def subset(data_dir: str) -> hj.data.Dataset:
    """The first images, as training and validation data; all test images."""
    whole = hj.data.load("mnist", data_dir)
    count = TRAINED + VALIDATED
    kept = np.asarray(whole.train.images)[:count], np.asarray(whole.train.labels)[:count]
    return hj.data.Dataset.from_arrays(*kept, whole.test.images, whole.test.labels, name=f"mnist, {count:,} images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", help="folder of prepared TFDS data")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    dataset, folders = subset(options.data_dir), []
    base = hj.TrainConfig(
        dataset="custom",
        validation=VALIDATED / (TRAINED + VALIDATED),
        model="mlp",
        model_options={"norm": "batch"},
        augmentation=hj.Augmentation(frame=32, place="random"),
        epochs=40,
        optimizer="nesterov",
        weight_decay=1e-4,
        schedule="step",
        measure=hj.fisher.FisherMeasure(every=10),
    )
    for seed, size, rate in itertools.product(range(options.seeds), SIZES, RATES):
        config = dataclasses.replace(base, batch_size=size, learning_rate=rate, seed=seed)
        folders.append(str(RUNS / f"batch{size}-rate{rate:g}-seed{seed}"))
        result = hj.run(config, dataset=dataset, output=folders[-1], resume=True, progress=False)
        print(f"{folders[-1]}: test top-1 {result.summary['final_test_top1']:.2f} %", flush=True)
    # By names that mean the same on every machine: they are written into the file.
    os.chdir(HERE.parent)
    folders = [os.path.relpath(folder) for folder in folders]
    beacons.write(folders, str(HERE / "results" / "early_beacons.json"), overwrite=True)


if __name__ == "__main__":
    main()
