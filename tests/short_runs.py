"""Short runs that must come out alike however many devices or processes train them."""

import numpy as np

import hardjax as hj
from hardjax.choose.batch_plan import BatchPlan
from hardjax.choose.selection import HardBatches

MLP = ("mlp", {"widths": [8]})
NORMED = ("mlp", {"widths": [8], "norm": "batch"})
CASES = {
    "all batches": (MLP, {}),
    "hard batches, batch norm": (NORMED, {"selection": HardBatches(0.5)}),
    "trimming": (MLP, {"trimming": hj.trimming.Trimming(0.8, 0.3)}),
    "batch norm, a part over processes": (("mlp", {**NORMED[1], "norm_batch_size": 2}), {"batch_size": 2, "epochs": 1}),
    "batch norm, a part over two of four": (
        ("mlp", {**NORMED[1], "norm_batch_size": 2}),
        {"batch_size": 4, "epochs": 1},
    ),
    "batch plan, spectra": (
        NORMED,
        {"batch_plan": BatchPlan.stages([16, 32]), "measure": hj.fisher.FisherMeasure(every=2)},
    ),
}

# Losses are float32 in every run, and under jax 0.12 two paths round them otherwise: by 1e-9 in the end. Several
# devices prefer another path than one does, so that all are given the same.
PATH = {"trim_path": "gather"}


def of_processes(count):
    """Names of the cases that so many processes can share."""
    return [name for name, (_, changes) in CASES.items() if changes.get("batch_size", 16) % count == 0]


def config_of(**changes):
    settings = {"learning_rate": 0.1, "epochs": 2, **({} if "batch_plan" in changes else {"batch_size": 16})}
    return hj.TrainConfig(**{**settings, **changes})


def tiny():
    """70 easily separated 6x6 images of 3 classes, 21 for testing."""
    rng = np.random.default_rng(0)

    def split(count):
        labels = np.arange(count) % 3
        images = rng.integers(0, 120, (count, 6, 6, 1))
        images[np.arange(count), labels] += 100
        return images.astype(np.uint8), labels

    return hj.data.Dataset.from_arrays(*split(70), *split(21), num_classes=3, name="tiny")
