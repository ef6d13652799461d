"""Does the noise scale of the normalisation layers alone predict the total one in convolutional networks?

Trains networks to several epochs, takes Gram matrices of per-sample gradients parameter by parameter over the same
batches, and writes a row a state: the noise scale (McCandlish et al., 2018) of all parameters, of the normalisation's
scales and biases, and of two controls of few parameters, the last layer and the first convolution.

    python experiments/noise_scale.py DATA_DIR [--dataset fashion_mnist] [--models resnet8 densenet8] [--seeds 3]
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

import hardjax as hj
from hardjax.data.augment import preprocess, resolve
from hardjax.models import create

BATCH, BATCHES, EPOCHS, RATES = 64, 32, (1, 2, 4, 8), (0.02, 0.1)
RESULTS = Path(__file__).parent / "results" / "noise_scale.jsonl"


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


def noise(grams: list[dict[str, np.ndarray]], names: list[str]) -> tuple[float, float]:
    """(covariance, signal), means over the batches."""
    found = []
    for by_name in grams:
        gram = sum(np.asarray(by_name[name], np.float64) for name in names)
        size = len(gram)
        covariance = (np.trace(gram) - size * gram.mean()) / (size - 1)
        found.append((covariance, gram.mean() - covariance / size))
    covariance, signal = np.mean(found, 0)
    return float(covariance), float(signal)


def rows(config: hj.TrainConfig, dataset: hj.data.Dataset):
    """A row a number of epochs."""
    model = create(config.model, dataset.num_outputs)
    augmentation = resolve(config.augmentation, dataset)
    gram = jax.jit(hj.fisher.make_gram(model, by_parameter=True))
    for epochs in EPOCHS:
        result = hj.run(dataclasses.replace(config, epochs=epochs), dataset=dataset, progress=False)
        # The same batches for all states of a seed.
        order = np.random.default_rng(config.seed).permutation(len(dataset.train.labels))
        grams = []
        for start in range(0, BATCH * BATCHES, BATCH):
            chosen = order[start : start + BATCH]
            images = preprocess(dataset.train.images[chosen], dataset.mean, dataset.std, augmentation)
            grams.append(jax.device_get(gram(result.state.variables, images, dataset.train.labels[chosen])))
        names = list(grams[0])
        row = {"model": config.model, "dataset": dataset.name, "learning_rate": config.learning_rate}
        row |= {"seed": config.seed, "epochs": epochs, "train_loss": float(result.history["full_train_loss"][-1])}
        for group, members in groups(names).items():
            covariance, signal = noise(grams, members)
            row[group] = {"parameters": len(members), "covariance": covariance, "signal": signal}
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir")
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--models", nargs="+", default=["resnet8", "densenet8"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--validation", type=float, default=5 / 6, help="share of the training split left out")
    options = parser.parse_args()
    dataset = hj.data.load(options.dataset, options.data_dir).with_validation(options.validation)
    done = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    keys = {(row["model"], row["learning_rate"], row["seed"]) for row in done if row["epochs"] == EPOCHS[-1]}
    for seed in range(options.seeds):
        for model in options.models:
            for rate in RATES:
                if (model, rate, seed) in keys:
                    continue
                config = hj.TrainConfig(model=model, batch_size=BATCH, learning_rate=rate, seed=seed)
                for row in rows(config, dataset):
                    print(json.dumps(row), flush=True)
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
