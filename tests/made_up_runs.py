"""Folders of finished runs that nobody trained: the files that `hardjax measure` reads, with numbers by hand."""

import json
from pathlib import Path

import numpy as np

import hardjax as hj
from hardjax.training.lines import LineFile, encode
from hardjax.training.spectra import FILE, Spectra

SAMPLES, EPOCHS = 1024, 20


def write_run(folder, *, c, energy, error, train_error=1.0, epochs=EPOCHS, every=8, summary=None, tested=1, **settings):
    """A run of `epochs` epochs of 1024 samples whose every spectrum has this c and l.

    Args:
        c: of every measurement, a number or a function of its epoch and batch size.
        energy: its l, likewise.
        error: (test points,) test errors in percent, or the one of them all.
        tested: epochs between two test points.
        settings: of the configuration: batch_size or batch_plan, learning_rate, seed ...
    """
    config = hj.TrainConfig(
        model_options={"widths": [8]}, epochs=epochs, measure=hj.fisher.FisherMeasure(every=every), **settings
    )
    folder = Path(folder)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    spectra, rate = Spectra(every), config.peak_learning_rate
    for step, epoch, batch in _measured(config, every):
        wanted = [value(epoch, batch) if callable(value) else value for value in (c, energy)]
        spectra.add(step, epoch, rate, _spectrum(*wanted, rate, batch), 0.0, -1, SAMPLES / batch)
    LineFile(folder / FILE).append(*spectra.entries(0))
    points = np.arange(tested, epochs + 1, tested)
    errors = np.broadcast_to(np.asarray(error, float), len(points))
    lines = [
        {"epoch": float(epoch), "test_top1": 100 - value, "full_train_top1": 100 - train_error, "validation_top1": None}
        for epoch, value in zip(points, errors, strict=True)
    ]
    LineFile(folder / "history.jsonl").append(*lines)
    last = {"final_test_top1": 100 - errors[-1], "final_full_train_top1": 100 - train_error}
    last |= {"diverged": False, "interrupted": False, "end": "budget spent"} | (summary or {})
    (folder / "summary.json").write_text(encode(last))
    return folder


def _measured(config, every):
    """(step, epoch, batch size) of each measurement; every stage lasts a whole number of steps."""
    sizes, step, epoch = config.batch_sizes, 0, 0.0
    for size in sizes:
        steps = round(config.epochs / len(sizes) * SAMPLES / size)
        for own in range(steps):
            if (step + own) % every == 0:
                yield step + own, epoch + own * size / SAMPLES, size
        step, epoch = step + steps, epoch + steps * size / SAMPLES


def _spectrum(c, energy, rate, batch):
    trace = (energy * batch / rate) ** 2
    small = trace / (c**2 + batch - 1)
    return np.array([small] * (batch - 1) + [c**2 * small])
