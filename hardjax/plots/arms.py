"""Pictures: the comparison of arms, and the samples replayed most. Drawn off screen, returned as Matplotlib figures."""

from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from hardjax.data import Dataset
from hardjax.study.compare import Comparison, half_width_95

_STYLES = {"hard-batches": "-", "random-batches": "--", "all-batches": "-", "fixed-batches": ":"}


def comparison(result: Comparison) -> Figure:
    """Training loss and test accuracy over back-propagations with 95 % bands, and which batches were replayed when."""
    replayed = [i for i, arm in enumerate(result.arms) if arm.delta < 1]
    hard = [i for i in replayed if result.arms[i].name == "hard-batches"]
    random = [i for i in replayed if result.arms[i].name == "random-batches"]
    maps = [chosen[-1] for chosen in (hard, random) if chosen]
    figure = Figure(figsize=(13, 5 if not maps else 9), layout="constrained")
    rows = figure.subfigures(2, 1, height_ratios=[1.15, 1]) if maps else [figure]
    loss, accuracy = rows[0].subplots(1, 2)
    loss.set(yscale="log", xlabel="epochs of back-propagations", ylabel="loss of the whole training split (nats)")
    for axes, field in ((loss, "full_train_loss"), (accuracy, "test_top1")):
        means = [_curve(axes, result, i, field, arm.label) for i, arm in enumerate(result.arms)]
        _frame(axes, np.concatenate(means))
    seeds = len(result.results[0])
    if np.isfinite(result.threshold):
        loss.axhline(result.threshold, color="0.6", linewidth=0.8)
        loss.annotate(
            "common threshold", (0.01, result.threshold), xycoords=("axes fraction", "data"), fontsize=8, va="bottom"
        )
    accuracy.set(xlabel="epochs of back-propagations", ylabel="test accuracy (%)")
    accuracy.legend(fontsize=8, loc="lower right", ncols=2)
    config = result.config
    rows[0].suptitle(
        f"{config.title}, batch {config.batch_size}, {config.epochs} epochs; "
        f"mean of {seeds} seed{'s' * (seeds > 1)}" + (", 95 % confidence band" if seeds > 1 else "")
    )
    if maps:
        panels = rows[1].subplots(1, len(maps), squeeze=False)[0]
        for panel, i in zip(panels, maps, strict=True):
            _replay_map(panel, result.results[i][0].replays, result.arms[i].label)
    return figure


def trimming(result: Comparison) -> Figure:
    """Test error and training loss over epochs with 95 % bands, and what trimming kept and dropped."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    error, loss, parts = figure.subplots(1, 3)
    epochs = result.results[0][0].history["epoch"]
    for axes, field, scale in ((error, "test_top1", "linear"), (loss, "full_train_loss", "log")):
        axes.set(yscale=scale, xlabel="epoch")
        means = []
        for i, (arm, runs) in enumerate(zip(result.arms, result.results, strict=True)):
            values = np.stack([run.history[field] for run in runs])
            values = 100 - values if field == "test_top1" else values
            means.append(_band(axes, epochs, values, arm.label, f"C{i}", "-"))
        _frame(axes, np.concatenate(means))
    error.set(ylabel="test error (%)")
    loss.set(ylabel="loss of the whole training split (nats)")
    error.legend(fontsize=9)
    parts.set(xlabel="epoch", ylabel="training loss in the batch, first seed (nats)", yscale="log")
    for i, (arm, runs) in enumerate(zip(result.arms, result.results, strict=True)):
        history = runs[0].history
        if (history["keep_fraction"] == 1).all():
            continue
        parts.plot(epochs, history["kept_loss"], "-", color=f"C{i}", label=f"{arm.label}: kept")
        parts.plot(epochs, history["dropped_loss"], ":", color=f"C{i}", label=f"{arm.label}: dropped")
    if parts.lines:
        parts.legend(fontsize=9)
    config, seeds = result.config, len(result.results[0])
    figure.suptitle(
        f"{config.title}, batch {config.batch_size}; mean of {seeds} seed{'s' * (seeds > 1)}"
        + (", 95 % confidence band" if seeds > 1 else "")
    )
    return figure


def hardest(
    dataset: Dataset, samples: np.ndarray, replays: np.ndarray, losses: np.ndarray, predictions: np.ndarray
) -> Figure:
    """A grid of the samples replayed most, with label, prediction, loss; a wrong prediction is red.

    Args:
        dataset: they are from its training split.
        samples: (k,) indices, the most replayed first.
        replays, losses, predictions: (k,) times trained, nats under the final model, predicted class.
    """
    columns = 8
    rows = -(-len(samples) // columns)
    figure = Figure(figsize=(1.55 * columns, 2.0 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    images, labels = (np.asarray(leaf[samples]) for leaf in dataset.train)
    for i, panel in enumerate(panels):
        panel.axis("off")
        if i >= len(samples):
            continue
        picture = images[i].squeeze(-1) if images.shape[-1] == 1 else images[i]
        panel.imshow(picture, cmap="gray_r", interpolation="nearest")
        label, guess = dataset.class_names[labels[i]], dataset.class_names[predictions[i]]
        right = labels[i] == predictions[i]
        text = f"{label}" if right else f"{label}\nread as {guess}"
        panel.set_title(f"{text}\n{replays[i]}x, loss {losses[i]:.2f}", fontsize=7.5, color="black" if right else "C3")
    figure.suptitle(f"{dataset.name}: training samples replayed most (label; times trained; loss now; red: misread)")
    return figure


def _curve(axes: Any, result: Comparison, index: int, field: str, label: str) -> np.ndarray:
    """Mean over seeds with its band (both of the logarithm on a logarithmic axis); returns the mean."""
    arm, runs = result.arms[index], result.results[index]
    values = np.stack([run.history[field] for run in runs])
    shares = sorted({arm.delta for arm in result.arms}, reverse=True)
    color = f"C{shares.index(arm.delta)}"
    return _band(axes, runs[0].history["epoch"], values, label, color, _STYLES.get(arm.name, "-."))


def _band(axes: Any, epochs: np.ndarray, values: np.ndarray, label: str, color: str, style: str) -> np.ndarray:
    """Mean of (seeds, points) with its band; returns the mean."""
    logarithmic = axes.get_yscale() == "log"
    values = np.log(values) if logarithmic else values
    mean = values.mean(0)
    back = np.exp if logarithmic else np.asarray
    axes.plot(epochs, back(mean), style, color=color, label=label, linewidth=1.4)
    if len(values) > 1:
        width = np.array([half_width_95(column) for column in values.T])
        axes.fill_between(epochs, back(mean - width), back(mean + width), color=color, alpha=0.1, linewidth=0)
    return back(mean)


def _frame(axes: Any, values: np.ndarray) -> None:
    """Limits from the curves, not from their bands, which few seeds make wide."""
    values = values[np.isfinite(values)]
    if len(values) == 0 or values.min() == values.max():
        return
    if axes.get_yscale() == "log":
        axes.set_ylim(values.min() / 1.6, values.max() * 1.6)
    else:
        room = 0.25 * (values.max() - values.min())
        axes.set_ylim(values.min() - room, min(100.5, values.max() + room))


def _replay_map(axes: Any, replays: np.ndarray, label: str) -> None:
    order = np.argsort(-replays.sum(0), kind="stable")
    shown = replays[:, order].T > 0
    axes.imshow(shown, aspect="auto", interpolation="nearest", cmap=ListedColormap(["white", "C0"]), origin="lower")
    share = replays.sum(0)[order] / len(replays)
    axes.set(
        xlabel="round",
        ylabel="mini-batch (most replayed at the bottom)",
        title=f"{label}, first seed: replayed in {share[-1]:.0%} to {share[0]:.0%} of rounds",
    )
