"""Labels of people's own data: classes of samples, classes of positions, or values; what cannot be meant is refused."""

from typing import Any

import numpy as np

from hardjax import _settings, _validate
from hardjax._validate import Refusal

_MOST_CLASSES = 2**20  # the names alone of 2^31 classes would take all memory; ImageNet-21k has 21,841


def checked(
    labels: dict[str, np.ndarray],
    counts: dict[str, int],
    num_classes: int | None,
    class_names: tuple[str, ...] | None,
) -> tuple[dict[str, np.ndarray], int]:
    """Labels of "train" and "test" as they are stored, and the number of classes (0 of values).

    Args:
        labels: see `Dataset.from_arrays`.
        counts: images of each split.
        num_classes, class_names: as given, or None.

    Raises:
        ValueError: they are not as `Dataset.from_arrays` says.
    """
    for split, given in labels.items():
        if not given.ndim or 0 in given.shape[1:]:
            raise Refusal(f"Expected {split} labels (n,) or (n, ...), got shape {given.shape}.")
        if len(given) != counts[split]:
            raise Refusal(f"Expected as many {split} labels as images, got {len(given)} and {counts[split]}.")
    if np.issubdtype(labels["train"].dtype, np.floating):
        labels, classes = {split: _values(split, labels[split], num_classes, class_names) for split in labels}, 0
    else:
        for split in labels:
            _check_integers(split, labels[split])
        classes = _count_classes(num_classes, class_names, labels["train"])
        for split in labels:
            _check_range(split, labels[split], classes)
    if (shapes := [labels[split].shape[1:] for split in labels])[0] != shapes[1]:
        raise Refusal(f"Expected training and test labels of one shape a sample, got {shapes[0]} and {shapes[1]}.")
    check_differ("train", labels["train"])
    return labels, classes


def check_differ(split: str, labels: np.ndarray) -> None:
    """With one class there is nothing to learn: every network is right from its first step."""
    if (labels == (first := labels.flat[0])).all():
        kinds = "classes" if np.issubdtype(labels.dtype, np.integer) else "values"
        raise Refusal(f"Expected {split} labels of at least two {kinds}, got {first.item()} alone.")


def evenly(labels: np.ndarray, count: int, order: np.ndarray | None = None) -> np.ndarray:
    """Indices (count,) spread evenly over the classes, the first ones of `order` in each stretch."""
    order = np.arange(len(labels)) if order is None else order
    by_class = order[np.argsort(labels[order], kind="stable")]
    # Equal strides through the samples sorted by class: every class gets its share to within one sample.
    return by_class[np.arange(count) * len(labels) // count]


def _check_integers(split: str, labels: np.ndarray) -> None:
    if not np.issubdtype(labels.dtype, np.integer) or _of_samples(labels):
        raise Refusal(f"Expected {split} labels (n,) of integers, got {labels.dtype} of shape {labels.shape}.")


def _check_range(split: str, labels: np.ndarray, num_classes: int) -> None:
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise Refusal(f"Expected {split} labels in [0, {num_classes}), got {int(outside[0])}.")


def _count_classes(num_classes: int | None, class_names: tuple[str, ...] | None, labels: np.ndarray) -> int:
    if num_classes is None and class_names is not None:
        num_classes = len(class_names)
    if num_classes is None:
        return _counted_classes(labels)
    count: int = _settings.plain("num_classes", num_classes, int)
    _validate.at_least(1, num_classes=count)
    if count > _MOST_CLASSES:
        raise Refusal(f"Expected num_classes={count} to be at most 2^20.")
    if class_names is not None and len(class_names) != count:
        raise Refusal(f"Expected {count} class_names, got {len(class_names)}.")
    return count


def _counted_classes(labels: np.ndarray) -> int:
    """Highest label + 1; refused where it says more of one label than of the data."""
    found = int(labels.max()) + 1
    if found > min(labels.size, _MOST_CLASSES):
        raise Refusal(
            f"Expected train labels below the number of training labels, {labels.size}, got {found - 1}; if there are "
            "so many classes, give num_classes."
        )
    return found


def _values(split: str, labels: np.ndarray, num_classes: Any, class_names: Any) -> np.ndarray:
    """Float labels as values; a number a sample as a row of one, which outputs (n, 1) are compared with."""
    if num_classes is not None or class_names is not None:
        raise Refusal(f"Expected num_classes and class_names with integer labels alone, got {split} {labels.dtype}.")
    if not np.issubdtype(labels.dtype, np.floating):
        raise Refusal(f"Expected {split} labels of floats like those of train, got {labels.dtype}.")
    with np.errstate(over="ignore"):
        labels = labels.astype(np.float32)
    if bad := int((~np.isfinite(labels)).sum()):
        raise Refusal(f"Expected finite {split} labels, got {bad} NaN or infinite values.")
    return labels[:, None] if labels.ndim == 1 else labels


def _of_samples(labels: np.ndarray) -> bool:
    """Whether integers of several axes are meant as (n,): a column, or a class in each column. Taken for classes of
    positions, they would be refused far from here."""
    if labels.ndim == 1:
        return False
    rows = labels.reshape(len(labels), -1)
    marks = labels.ndim == 2 and rows.min() >= 0 and rows.max() == 1 and rows.sum(1).max() == 1
    return bool(rows.shape[1] == 1 or marks)
