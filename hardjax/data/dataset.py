"""A data set on the device: uint8 images, their labels, statistics of the training split."""

import dataclasses
import functools
import hashlib
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from hardjax import _settings, _validate
from hardjax._validate import Refusal
from hardjax.data import pixels
from hardjax.data.labels import check_differ, checked, evenly
from hardjax.data.pixels import pixel_statistics

_READ = 1024  # images that are read at a time


class Split(NamedTuple):
    """Samples with their labels; a share of other data holds no images of its own. Read images by `take`.

    Attributes:
        images: (m, H, W, C) uint8, or float32 scaled to 0..1: the split's, or all of those that it is a share of. What
            is not on the device (a NumPy array, a `source.Records`) is read from there when it is needed.
        labels: the split's own: (n,) int32 classes; (n, ...) int32 classes of a sample's positions (pixels); or
            (n, ...) float32 values, never of rank 1.
        rows: (n,) int32, where in `images` each of its samples is; None: sample i is image i, and n = m.
    """

    images: Array
    labels: Array
    rows: Array | None = None

    @property
    def num_samples(self) -> int:
        """n; `len` would be that of the tuple."""
        return self.labels.shape[0]

    @property
    def streamed(self) -> bool:
        """Whether the images are not on the device."""
        return not isinstance(self.images, Array)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C)."""
        return tuple(self.images.shape[1:])

    def take(self, indices: Any) -> Array:
        """Images (k, H, W, C) of these samples of the split, by index (k,) or slice; pure, so it may be traced."""
        return self.images[indices if self.rows is None else self.rows[indices]]


def _add(digest: Any, *arrays: Any) -> None:
    for leaf in arrays:
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array)


@dataclass(frozen=True)
class Dataset:
    """Splits with what is known of them; build one with `from_arrays`.

    Attributes:
        name: for titles and summaries.
        train, test: the splits; choosing is done on `validation`, reporting on `test`.
        num_classes: integer labels lie in [0, num_classes); 0 where labels are values.
        class_names: one a class; none where labels are values.
        mean, std: (C,) float32, of the training split's pixels scaled to 0..1.
        flip: whether mirroring an image keeps its label.
        validation: a share split off the training data, or None.
        sides: of images of several sizes, the least and the greatest length that the shorter side is resized to before
            a random crop; else ().
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    class_names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    flip: bool = False
    validation: Split | None = None
    sides: tuple[int, ...] = ()

    @classmethod
    def from_arrays(
        cls,
        train_images: np.ndarray,
        train_labels: np.ndarray,
        test_images: np.ndarray,
        test_labels: np.ndarray,
        *,
        num_classes: int | None = None,
        class_names: tuple[str, ...] | None = None,
        name: str = "custom",
        flip: bool = False,
    ) -> "Dataset":
        """People's own arrays, copied: changing them afterwards changes nothing here.

        Args:
            train_images, test_images: (n, H, W, C) or (n, H, W); uint8, or finite floats scaled to 0..1; both alike.
            train_labels, test_labels: (n,) integer classes; (n, ...) integer classes of positions (a segmentation:
                (n, H, W)); or (n, ...) finite floats, the values of a regression, of which (n,) become (n, 1). What
                they are compared with, and how, is for the network and `TrainConfig.loss`.
            num_classes: of integer labels, at most 2^20; highest training label + 1 if not given, which must then be at
                most the number of training labels: one wrong label would otherwise decide how large the network is.
            class_names: one a class; the labels as text if not given.
            flip: whether mirroring an image keeps its label.

        Raises:
            ValueError: rank, dtype, lengths, shapes, values, scales or labels are not as above; one class or value
                alone in training; more than half of a split's images constant.
        """
        name, flip = (_settings.plain(*given) for given in (("name", name, str), ("flip", flip, bool)))
        class_names = _settings.plain("class_names", class_names, tuple[str, ...] | None)
        return assemble(
            {"train": train_images, "test": test_images},
            {"train": train_labels, "test": test_labels},
            num_classes=num_classes,
            class_names=class_names,
            name=name,
            flip=flip,
        )

    @property
    def num_outputs(self) -> int:
        """Numbers that a network of the zoo gives for a sample: the classes, or the values of its label."""
        return self.num_classes or math.prod(self.train.labels.shape[1:])

    @property
    def streamed(self) -> bool:
        """Whether images are read when they are needed, see `Split.images`."""
        return self.train.streamed

    def on_host(self) -> "Dataset":
        """The same data with its images in the host's memory, to be streamed to the device."""
        held: dict[int, np.ndarray] = {}

        def moved(split: Split | None) -> Split | None:
            if split is None or split.streamed:
                return split
            # Shares of the same images stay so.
            return split._replace(images=held.setdefault(id(split.images), np.asarray(split.images)))

        splits = {name: moved(getattr(self, name)) for name in ("train", "test", "validation")}
        return dataclasses.replace(self, **splits)

    @functools.cached_property
    def checksum(self) -> str:
        """32 hex digits of the images and labels of every split and of `num_classes`, and of nothing else.

        The same wherever the images are; of those that stay on the disk it is kept in the cache folder once they have
        all been read for it. Of images of several sizes it is of the names and sizes of their files. With a validation
        share it is that of the whole data, before the share was split off. Computed on first use (0.2 s for CIFAR-10,
        of the disk as long as decoding takes), from the host's bytes: the same on every device.
        """
        splits = self._unshared()
        records = [split.images for split in splits if hasattr(split.images, "remembered")]
        if not records:
            return self._digest(splits, read=True)
        named = self._digest(splits, read=False)  # by the files: all that is needed to know it again
        if any(one.sides for one in records):
            return named
        return records[0].remembered(named, lambda: self._digest(splits, read=True))

    def _digest(self, splits: list[Split], read: bool) -> str:
        """Of splits with their images, or with the files that hold them."""
        digest = hashlib.blake2b(str(self.num_classes).encode(), digest_size=16)
        for images, labels, rows in splits:
            if isinstance(images, Array | np.ndarray):
                _add(digest, images, labels, *([] if rows is None else [rows]))
                continue
            if not read:
                digest.update(images.checksum.encode())
                _add(digest, labels, *([] if rows is None else [rows]))
                continue
            order = np.arange(len(images)) if rows is None else np.asarray(rows)
            # As `_add` takes an array of those images.
            digest.update(f"{images.dtype.str}{(len(order), *images.shape[1:])}".encode())
            for start in range(0, len(order), _READ):
                digest.update(np.ascontiguousarray(images[order[start : start + _READ]]))
            _add(digest, labels)
        return digest.hexdigest()

    def _unshared(self) -> list[Split]:
        """The splits, training and validation together again where they are shares of the same images."""
        if self.validation is None:
            return [self.train, self.test]
        if self.validation.images is not self.train.images or self.validation.rows is None:
            return [self.train, self.test, self.validation]
        one = self.train.labels
        labels = np.full((len(self.train.images), *one.shape[1:]), -1, one.dtype)
        for split in (self.train, self.validation):
            labels[np.asarray(split.rows)] = split.labels
        rows = np.sort(np.concatenate([self.train.rows, self.validation.rows]))
        if len(rows) < len(labels):  # some of the training samples were left out before
            return [Split(self.train.images, labels[rows], rows), self.test]
        return [Split(self.train.images, labels), self.test]

    def with_train_samples(self, count: int | None, seed: int = 0) -> "Dataset":
        """Train on so many of the training samples alone, each class in proportion to within one; the others are gone.

        Args:
            count: of at least 2; None changes nothing.
            seed: which samples; the same seed takes the same ones, in their order.

        Raises:
            ValueError: more than there are, fewer than 2, a seed below 0, one class alone would be left, or a
                validation share was split off before.
        """
        if count is None:
            return self
        _validate.at_least(2, train_samples=count)
        _validate.at_least(0, seed=seed)
        if self.validation is not None:
            raise Refusal(f"Expected {self.name} without a validation split: train_samples are taken before it is.")
        labels = np.asarray(self.train.labels)
        if count > len(labels):
            raise Refusal(f"Expected train_samples={count} to be at most the {len(labels)} samples of {self.name}.")
        kept = np.sort(self._chosen(labels, count, seed))
        check_differ(f"train (train_samples={count})", labels[kept])
        if self.streamed:
            rows = kept if self.train.rows is None else np.asarray(self.train.rows)[kept]
            train = Split(self.train.images, jnp.asarray(labels[kept]), jnp.asarray(rows, jnp.int32))
        else:
            rows, train = None, Split(self.train.take(kept), jnp.asarray(labels[kept]))
        published = getattr(self.train.images, "statistics", None)
        mean, std = published or pixel_statistics(train.images, rows)
        return dataclasses.replace(self, train=train, mean=mean, std=std)

    def _chosen(self, labels: np.ndarray, count: int, seed: int) -> np.ndarray:
        """Indices (count,) of samples, where they have classes each in proportion to within one."""
        # NumPy's generator: which samples are taken depends on no device and on no setting of jax.
        order = np.random.default_rng(seed).permutation(len(labels))
        return evenly(labels, count, order) if self.num_classes and labels.ndim == 1 else order[:count]

    def with_validation(self, share: float, seed: int = 0) -> "Dataset":
        """Split a stratified share off the training data; the statistics are those of what remains.

        Args:
            share: in [0, 1); 0 changes nothing.
            seed: which samples; the same seed takes the same ones.

        Returns:
            A data set with round(share * n) validation samples, where samples have classes each in proportion to within
            one sample; both splits share the images that there are (`Split.rows`), none are copied.

        Raises:
            ValueError: share outside [0, 1), a seed below 0, a split would be left empty, one class alone would be left
                to train, or one was split off before.
        """
        _validate.in_unit(validation=share)
        _validate.at_least(0, seed=seed)
        if share == 0:
            return self
        if self.validation is not None:
            raise Refusal(f"{self.name} already has a validation split of {len(self.validation.labels)} samples.")
        labels = np.asarray(self.train.labels)
        count = round(share * len(labels))
        if count in (0, len(labels)):
            raise Refusal(f"validation={share} of {len(labels)} samples leaves a split empty.")
        held = np.sort(self._chosen(labels, count, seed))
        kept = np.setdiff1d(np.arange(len(labels)), held)
        check_differ(f"train (validation={share})", labels[kept])
        rows = np.arange(len(labels)) if self.train.rows is None else np.asarray(self.train.rows)
        train, validation = (
            Split(self.train.images, jnp.asarray(labels[part]), jnp.asarray(rows[part], jnp.int32))
            for part in (kept, held)
        )
        # Of what remains: held-out samples have no part in the training, not even in its mean; published ones stay.
        published = getattr(self.train.images, "statistics", None)
        mean, std = published or pixel_statistics(self.train.images, rows[kept])
        return dataclasses.replace(self, train=train, validation=validation, mean=mean, std=std)


def assemble(
    images: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    *,
    num_classes: int | None,
    class_names: tuple[str, ...] | None,
    name: str,
    flip: bool,
    statistics: tuple[np.ndarray, np.ndarray] | None = None,
) -> Dataset:
    """Checked arrays on the device, see `Dataset.from_arrays`; "train" and "test" are the keys.

    Args:
        statistics: mean and deviation of the training images where they are known; None computes them.

    Raises:
        ValueError: see `Dataset.from_arrays`.
    """
    images = {split: pixels.checked(split, images[split]) for split in ("train", "test")}
    labels = {split: pixels.as_array(f"{split} labels", labels[split]) for split in ("train", "test")}
    counts = {split: len(images[split]) for split in images}
    labels, num_classes = checked(labels, counts, num_classes, class_names)
    if images["train"].shape[1:] != images["test"].shape[1:]:
        shapes = f"{images['train'].shape[1:]} and {images['test'].shape[1:]}"
        raise Refusal(f"Expected training and test images of one shape (H, W, C), got {shapes}.")
    pixels.check_scales(images["train"], images["test"])
    for split in images:
        pixels.check_constant(split, images[split])
    mean, std = pixel_statistics(images["train"]) if statistics is None else statistics
    return Dataset(
        name=name,
        train=_on_device(images["train"], labels["train"]),
        test=_on_device(images["test"], labels["test"]),
        num_classes=num_classes,
        class_names=tuple(class_names or (str(i) for i in range(num_classes))),
        mean=mean,
        std=std,
        flip=flip,
    )


def _on_device(images: np.ndarray, labels: np.ndarray) -> Split:
    # A copy: on CPU device_put may share memory with the caller's array, or with a file mapped into memory.
    kind = jnp.float32 if np.issubdtype(labels.dtype, np.floating) else jnp.int32
    return Split(jnp.array(images, copy=True), jnp.array(labels, kind, copy=True))
