"""Does the noise scale of the normalisation layers alone predict the total one in convolutional networks?

    python experiments/noise_scale.py run DATA_DIR [--dataset fashion_mnist] [--models resnet8 densenet8] [--seeds 3]
    python experiments/noise_scale.py show                        # correlations, from the rows

Others report for transformers that it does, at no cost: per-sample gradients of scales and biases are small. Networks
are trained to several epochs (in parts, momentum begins anew in each), and a row a state is written. The **noise
scale** (McCandlish et al., 2018) is the trace of the per-sample covariance of gradients over the squared length of
their mean, in two ways over the same 32 batches of 64 training images:

- `batches`: from the lengths of batches' mean gradients and the products between different batches. This is what the
  word means; it also holds where batch norm couples the samples of a batch.
- `rows`: from the per-sample rows within a batch, as if samples were independent. This is what comes at no cost.

Fixed beforehand: over states, the rank correlation of the cheap figure of a few parameters with the total of all by
batches, 95 % interval by bootstrap over runs (model, rate, seed). The normalisation predicts the total where the
interval lies above 0.5, and better than any few parameters would where it lies above that of the last layer and of the
first convolution. States whose squared mean is not above 0 have no noise scale; they are left out and counted.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hardjax as hj
from hardjax.cli import output
from hardjax.data.augment import preprocess, resolve
from hardjax.fisher.names import named_leaves
from hardjax.models import create
from hardjax.study.statistics import spearman
from hardjax.training import lines

BATCH, BATCHES, EPOCHS, RATES = 64, 32, (1, 2, 4, 8), (0.02, 0.1)
GROUPS = ("all", "normalisation", "last layer", "first convolution")
RESULTS = Path(__file__).parent / "results" / "noise_scale.jsonl"
DRAWS = 2000  # of the bootstrap


def groups(names: list[str]) -> dict[str, list[str]]:
    """Which parameters each noise scale is of."""
    # A normalisation's parameters are those of a module that has a scale.
    normalised = {name.rsplit("/", 1)[0] for name in names if name.endswith("/scale")}
    return {
        "all": names,
        "normalisation": [name for name in names if name.rsplit("/", 1)[0] in normalised],
        "last layer": [name for name in names if name.startswith("fc")],
        "first convolution": [name for name in names if name.startswith("conv")],
    }


def by_rows(grams: Sequence[np.ndarray]) -> tuple[float, float]:
    """(covariance, signal), means over batches, of Gram matrices (B, B) of per-sample gradients."""
    found = []
    for gram in grams:
        size = len(gram)
        covariance = (np.trace(gram) - size * gram.mean()) / (size - 1)
        found.append((covariance, gram.mean() - covariance / size))
    covariance, signal = np.mean(found, 0)
    return float(covariance), float(signal)


def by_batches(gradients: np.ndarray, size: int) -> tuple[float, float]:
    """(covariance, signal) of mean gradients (batches, parameters) of batches of `size` samples."""
    count = len(gradients)
    lengths = np.square(gradients).sum(1)
    signal = (np.square(gradients.sum(0)).sum() - lengths.sum()) / (count * (count - 1))
    return float(size * (lengths.mean() - signal)), float(signal)


def make_gradient(model: Any) -> Callable[..., dict[str, jax.Array]]:
    """(variables, images, labels) -> gradient of the batch's mean loss in training mode, by parameter."""

    def loss(params: Any, variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits, _ = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.jit(lambda variables, *batch: named_leaves(jax.grad(loss)(variables["params"], variables, *batch)))


def rows(config: hj.TrainConfig, dataset: hj.data.Dataset) -> Iterator[dict[str, Any]]:
    """A row a number of epochs."""
    model = create(config.model, dataset.num_outputs)
    augmentation = resolve(config.augmentation, dataset)
    gram, gradient = jax.jit(hj.fisher.make_gram(model, by_parameter=True)), make_gradient(model)
    variables = None
    for part, epochs in enumerate(np.diff((0, *EPOCHS))):
        # Other batches in each part.
        going = dataclasses.replace(config, epochs=int(epochs), seed=config.seed + 1000 * part)
        result = hj.run(going, dataset=dataset, variables=variables, progress=False)
        if result.summary["interrupted"]:
            raise KeyboardInterrupt
        variables = result.state.variables
        # The same batches for all states of a seed.
        order = np.random.default_rng(config.seed).permutation(len(dataset.train.labels))
        grams, gradients = [], []
        for start in range(0, BATCH * BATCHES, BATCH):
            chosen = order[start : start + BATCH]
            images = preprocess(dataset.train.take(chosen), dataset.mean, dataset.std, augmentation)
            batch = images, dataset.train.labels[jnp.asarray(chosen)]
            grams.append(jax.device_get(gram(variables, *batch)))
            gradients.append(jax.device_get(gradient(variables, *batch)))
        row = {"model": config.model, "dataset": dataset.name, "learning_rate": config.learning_rate}
        row |= {"seed": config.seed, "epochs": EPOCHS[part], "train_loss": float(result.history["full_train_loss"][-1])}
        for group, members in groups(list(grams[0])).items():
            of_rows = [sum(np.asarray(one[name], np.float64) for name in members) for one in grams]
            of_batches = np.array(
                [np.concatenate([np.asarray(one[name], np.float64).ravel() for name in members]) for one in gradients]
            )
            row[group] = {"parameters": of_batches.shape[1], "rows": by_rows(of_rows)}
            row[group] |= {"batches": by_batches(of_batches, BATCH)}
        yield row


def run(options: argparse.Namespace) -> None:
    dataset = hj.data.load(options.dataset, options.data_dir).with_train_samples(options.train_samples)
    done = lines.read_lines(RESULTS) if RESULTS.exists() else []
    keys = {(row["model"], row["learning_rate"], row["seed"]) for row in done}
    for seed in range(options.seeds):
        for model in options.models:
            for rate in RATES:
                if (model, rate, seed) in keys:
                    continue
                config = hj.TrainConfig(model=model, batch_size=BATCH, learning_rate=rate, seed=seed)
                for row in list(rows(config, dataset)):  # all states of a run or none
                    lines.append_line(RESULTS, row)
                    print(json.dumps(row), flush=True)


def show(options: argparse.Namespace) -> None:
    del options
    done = lines.read_lines(RESULTS)
    runs = sorted({(row["model"], row["learning_rate"], row["seed"]) for row in done})
    total = _scales(done, "all", "batches")
    table = []
    for way in ("batches", "rows"):
        for group in GROUPS:
            if (way, group) == ("batches", "all"):
                continue
            known = _scales(done, group, way)
            middle, low, high = _bootstrap(done, runs, known, total)
            usable = int((np.isfinite(known) & np.isfinite(total)).sum())
            share = np.mean([row[group]["parameters"] / row["all"]["parameters"] for row in done])
            table.append(
                {
                    "noise scale of": group,
                    "share of the parameters (%)": f"{100 * share:.2g}",
                    "by": way,
                    "states": f"{usable} of {len(done)}",
                    "rank correlation with the total": f"{middle:+.2f} ({low:+.2f} to {high:+.2f})",
                }
            )
    output.table(f"noise scales, {len(runs)} runs, the total of all parameters by batches", table)


def _scales(done: list[dict[str, Any]], group: str, way: str) -> np.ndarray:
    """(states,) noise scales; NaN where there is none."""
    covariance, signal = np.array([row[group][way] for row in done]).T
    return np.where(signal > 0, covariance / np.where(signal > 0, signal, 1), np.nan)


def _bootstrap(
    done: list[dict[str, Any]], runs: list[tuple], known: np.ndarray, total: np.ndarray
) -> tuple[float, float, float]:
    """(correlation, ends of its interval), by drawing runs, whose states are no independent ones."""
    of = [
        np.array([i for i, r in enumerate(done) if (r["model"], r["learning_rate"], r["seed"]) == one]) for one in runs
    ]
    rng, drawn = np.random.default_rng(0), []
    for places in [np.arange(len(runs)), *rng.integers(0, len(runs), (DRAWS, len(runs)))]:
        states = np.concatenate([of[place] for place in places])
        states = states[np.isfinite(known[states]) & np.isfinite(total[states])]
        drawn.append(float(spearman(known[states], total[states])) if len(states) > 2 else np.nan)
    return drawn[0], *np.nanquantile(drawn[1:], [0.025, 0.975])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="the runs that have no row yet")
    running.add_argument("data_dir", help="folder of prepared TFDS data")
    running.add_argument("--dataset", default="fashion_mnist")
    running.add_argument("--models", nargs="+", default=["resnet8", "densenet8"])
    running.add_argument("--seeds", type=int, default=3)
    running.add_argument("--train-samples", type=int, default=5_000)
    running.set_defaults(do=run)
    commands.add_parser("show", help="correlations, from the rows").set_defaults(do=show)
    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    main()
