"""A picture of single samples: those that were trained most often."""

import numpy as np
from matplotlib.figure import Figure

from hardjax.data import Dataset
from hardjax.plots.canvas import figure, headline

_COLUMNS = 8


def hardest(
    dataset: Dataset, samples: np.ndarray, replays: np.ndarray, losses: np.ndarray, predictions: np.ndarray | None
) -> Figure:
    """A grid of the samples trained most often, with label, prediction, loss; a wrong prediction is red.

    Args:
        dataset: they are from its training split.
        samples: (k,) indices, the most often trained first.
        replays, losses, predictions: (k,) times trained, loss under the final model, predicted class (None where
            samples have none: then labels and predictions are left out).
    """
    rows = max(1, -(-len(samples) // _COLUMNS))
    drawn = figure(1.55 * _COLUMNS, 2.0 * rows + 0.5)
    panels = drawn.subplots(rows, _COLUMNS, squeeze=False).ravel()
    images, labels = np.asarray(dataset.train.take(samples)), np.asarray(dataset.train.labels[samples])
    for panel in panels:
        panel.axis("off")
    for i, panel in zip(range(len(samples)), panels, strict=False):
        # Nearest: a digit of 8x8 smoothed would hide which pixels a network sees.
        panel.imshow(_shown(images[i]), cmap="gray_r", interpolation="nearest")
        right, text = True, f"sample {samples[i]}"
        if predictions is not None:
            label, guess = dataset.class_names[labels[i]], dataset.class_names[predictions[i]]
            right = labels[i] == predictions[i]
            text = f"{label}" if right else f"{label}\nread as {guess}"
        panel.set_title(f"{text}\n{replays[i]}x, loss {losses[i]:.2f}", fontsize=7.5, color="black" if right else "C3")
    shown = "times trained; loss now" if predictions is None else "label; times trained; loss now; red: misread"
    headline(drawn, f"{dataset.name}: training samples trained most often ({shown})")
    return drawn


def _shown(image: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3) of an image with any number of channels: others than 1 and 3 are shown as their mean."""
    return image if image.shape[-1] == 3 else image.astype(np.float32).mean(-1)
