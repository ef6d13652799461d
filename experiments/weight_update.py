"""P4's argument measured: how the weight update of a step varies with m, and how stale the gradients of large m are.

    python experiments/weight_update.py run DATA_DIR [--models mlp resnet8-plain resnet8] [--seeds 5]
    python experiments/weight_update.py show

The update is that of plain SGD at a fixed base rate r: -r times the **sum** of the gradients of m samples (section 2.2,
equation 5). Networks are trained by it without augmentation; at several epochs, with the same batches for all states of
a seed and every batch a random subset of the training split:

(a) its variance, the trace of its covariance over batches, for m = 1 ... 256, and the exponent b of m in it (least
    squares of logarithms). The text says that it grows linearly: b = 1. Independent samples give that exactly; what may
    differ is batch norm, which couples them, and subsets, which lose (n - m) / (n - 1).
(b) the distance between the weights after n steps of m and after one step of n m on the same samples (equations 7, 8),
    divided by the length of that one step. The text says: further apart early in training than late.

Fixed beforehand, over seeds, 95 % intervals of Student's t:

(a) linear: the interval of b lies within 1 +- 0.05; not linear: it lies outside; else open.
(b) each earlier state against the last one, paired by seed, as a ratio of relative distances: further apart early (or
    late) where the interval lies above (below) 1 and still holds by Holm's correction over all of them of a network.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import hardjax as hj
from hardjax.cli import output
from hardjax.data.augment import preprocess
from hardjax.study.statistics import holm, interval, paired_ratio
from hardjax.training.setting import prepare

SIZES = tuple(2**power for power in range(9))
STEPS, OF = (2, 4, 8, 16), 16  # n, and m of each step
DRAWS = 64
EPOCHS = (0, 1, 4, 16)
LINEAR = 0.05
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"model": "mlp"},
    "resnet8-plain": {"model": "resnet8", "model_options": {"norm": "none"}},
    "resnet8": {"model": "resnet8"},
}
RESULTS = Path(__file__).parent / "results" / "weight_update.jsonl"

# (params, indices (m,)) -> the change of the parameters by one step.
Update = Callable[[Any, Array], Any]


def make_update(apply: Callable, batch_stats: Any, images: Array, labels: Array, rate: float) -> Update:
    """-rate times the sum of the gradients of a batch, in training mode; pure.

    Args:
        apply: (variables, images, train) -> (logits, statistics).
        images, labels: (n, ...) of the training split, as the network takes them.
    """

    def update(params: Any, indices: Array) -> Any:
        def total(params: Any) -> Array:
            logits, _ = apply({"params": params, "batch_stats": batch_stats}, images[indices], True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[indices]).sum()

        return jax.tree.map(lambda gradient: -rate * gradient, jax.grad(total)(params))

    return update


def variance(update: Update, params: Any, batches: Array) -> Array:
    """() the trace of the covariance of the update over batches (draws, m), unbiased over so many draws; pure."""

    # Welford's recursion: a sum of squares less the square of a sum would lose the digits of a small variance.
    def add(carry: tuple[Any, Array], row: tuple[Array, Array]) -> tuple[tuple[Any, Array], None]:
        (mean, squares), (indices, count) = carry, row
        found = update(params, indices)
        before = jax.tree.map(jnp.subtract, found, mean)
        mean = jax.tree.map(lambda mean, apart: mean + apart / count, mean, before)
        return (mean, squares + _dot(before, jax.tree.map(jnp.subtract, found, mean))), None

    draws = len(batches)
    start = jax.tree.map(jnp.zeros_like, params), jnp.zeros(())
    (_, squares), _ = lax.scan(add, start, (batches, jnp.arange(1.0, draws + 1)))
    return squares / (draws - 1)


def apart(update: Update, params: Any, batches: Array) -> tuple[Array, Array]:
    """(draws,) distances between the weights after n steps of m and after one step of n m, and (draws,) lengths of that
    one step; pure.

    Args:
        batches: (draws, n, m).
    """

    def of_draw(indices: Array) -> tuple[Array, Array]:
        def step(current: Any, batch: Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, current, update(current, batch)), None

        several, _ = lax.scan(step, params, indices)
        once = update(params, indices.ravel())
        difference = jax.tree.map(lambda end, begin, change: end - begin - change, several, params, once)
        return jnp.sqrt(_dot(difference, difference)), jnp.sqrt(_dot(once, once))

    return lax.map(of_draw, batches)


def exponent(sizes: Sequence[int], variances: Sequence[float]) -> float:
    """b of variance = a m^b, by least squares of logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(variances), 1)[0])


def measured(
    make: Callable[[Array, Array], Update],
    images: Array,
    labels: Array,
    params: Any,
    rng: np.random.Generator,
    sizes: Sequence[int],
    draws: int,
) -> dict[str, Any]:
    """What a row says of one state; `make` is `make_update` of all but the images and labels."""

    def drawn(count: int) -> np.ndarray:
        return np.stack([rng.permutation(len(labels))[:count] for _ in range(draws)])

    def compiled(measure: Callable) -> Callable:
        # The images as an argument: a constant of their size would be compiled into the program.
        function = jax.jit(lambda images, labels, *given: measure(make(images, labels), *given))
        return lambda batches: function(images, labels, params, batches)

    of_variance, of_apart = compiled(variance), compiled(apart)
    variances = {size: float(of_variance(drawn(size))) for size in sizes}
    relative = {}
    for count in STEPS:
        distances, lengths = of_apart(drawn(count * OF).reshape(draws, count, OF))
        relative[count] = float(distances.mean() / lengths.mean())
    return {"variance": variances, "exponent": exponent(sizes, list(variances.values())), "apart": relative}


def rows(
    config: hj.TrainConfig,
    dataset: hj.data.Dataset | None = None,
    epochs: Iterable[int] = EPOCHS,
    sizes: Sequence[int] = SIZES,
    draws: int = DRAWS,
) -> Iterator[dict[str, Any]]:
    """A row a state: after so many epochs of training, each from the beginning; 0 are the first weights."""
    for count in epochs:
        setting = prepare(dataclasses.replace(config, epochs=max(1, count)), dataset)
        loss = None
        if count:
            result = hj.run(setting.config, dataset=dataset, progress=False)
            if result.summary["interrupted"]:  # its state is of an earlier epoch
                raise KeyboardInterrupt
            state, loss = result.state, float(result.history["full_train_loss"][-1])
        else:
            state = setting.init_state()
        train, recipe = setting.splits["train"], setting.recipe
        images = preprocess(train.take(slice(None)), train.mean, train.std, recipe.augmentation)
        assert config.base_learning_rate is not None
        make = functools.partial(make_update, recipe.apply, state.batch_stats, rate=config.base_learning_rate)
        # Of the seed alone: the same batches for all states.
        rng = np.random.default_rng(config.seed)
        found = measured(make, images, train.labels, state.params, rng, sizes, draws)
        yield {"seed": config.seed, "epochs": count, "train_loss": loss} | found


def verdicts(found: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The tables of one network: (a) a row a state, (b) a row an earlier state and n; by the rule above."""
    states = sorted({row["epochs"] for row in found})
    by_place = {(row["epochs"], row["seed"]): row for row in found}
    seeds = sorted({row["seed"] for row in found if (states[-1], row["seed"]) in by_place})
    linear = []
    for epochs in states:
        b = interval([row["exponent"] for row in found if row["epochs"] == epochs])
        inside = b.low >= 1 - LINEAR and b.high <= 1 + LINEAR
        outside = b.high < 1 - LINEAR or b.low > 1 + LINEAR
        verdict = "linear" if inside else "not linear" if outside else "open"
        linear.append({"epochs": epochs, "b": b.mean, "low": b.low, "high": b.high, "n": b.count, "verdict": verdict})
    stale = []
    for epochs in states[:-1]:
        both = [seed for seed in seeds if (epochs, seed) in by_place]
        for count in STEPS:
            early, late = (
                [_of(by_place[state, seed]["apart"], count) for seed in both] for state in (epochs, states[-1])
            )
            ratio = paired_ratio(early, late)
            row = {"epochs": epochs, "steps": count, "apart": np.mean(early), "at the end": np.mean(late)}
            row |= {"ratio": ratio.mean, "low": ratio.low, "high": ratio.high, "n": ratio.count, "p": ratio.p_value}
            stale.append(row)
    for row, held in zip(stale, holm([row["p"] for row in stale]), strict=True):
        row["verdict"] = "open" if not held else "further apart early" if row["ratio"] > 1 else "further apart late"
    return linear, stale


def _of(content: dict[Any, float], count: int) -> float:
    """JSON has texts for names."""
    return content[str(count)] if str(count) in content else content[count]


def _dot(left: Any, right: Any) -> Array:
    return sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (left, right)), strict=True))


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(options: argparse.Namespace) -> None:
    done = _read(options.rows) if options.rows.exists() else []
    shared = {name: getattr(options, name) for name in ("dataset", "base_rate", "train_samples")}
    there = {(row["network"], row["seed"], row["epochs"]) for row in done if shared.items() <= row.items()}
    for seed in range(options.seeds):
        for name in options.models:
            config = hj.TrainConfig(
                dataset=options.dataset,
                data_dir=options.data_dir,
                train_samples=options.train_samples,
                batch_size=OF,
                base_learning_rate=options.base_rate,
                optimizer="sgd",
                seed=seed,
                **MODELS[name],
            )
            left = [count for count in EPOCHS if (name, seed, count) not in there]
            for row in rows(config, epochs=left):
                line = json.dumps({"network": name} | shared | row)
                print(line, flush=True)
                with options.rows.open("a") as file:
                    file.write(line + "\n")


def show(options: argparse.Namespace) -> None:
    done = _read(options.rows)
    kinds = {(row["network"], row["dataset"], row["base_rate"], row["train_samples"]): None for row in done}
    for kind in kinds:
        found = [row for row in done if (*map(row.get, ("network", "dataset", "base_rate", "train_samples")),) == kind]
        title = "{} on {}, base rate {:g}, {} images".format(*kind)
        for table, what in zip(
            verdicts(found), ("variance of the update ~ m^b", f"n steps of {OF}, relative"), strict=True
        ):
            shown = [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in table]
            output.table(f"{title}: {what}", shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    training = actions.add_parser("run")
    training.add_argument("data_dir")
    training.add_argument("--dataset", default="fashion_mnist")
    training.add_argument("--models", nargs="+", choices=MODELS, default=["mlp", "resnet8-plain"])
    training.add_argument("--seeds", type=int, default=5)
    training.add_argument("--train-samples", type=int, default=10_000)
    training.add_argument("--base-rate", type=float, default=2**-10)
    for action in (training, actions.add_parser("show")):
        action.add_argument("--rows", type=Path, default=RESULTS)
    options = parser.parse_args()
    (run if options.action == "run" else show)(options)


if __name__ == "__main__":
    main()
