"""From stored images to what a model takes, on the device: crop, flip, placement, resize, normalisation."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from hardjax import _settings, _validate
from hardjax._axis import Axis
from hardjax._validate import Refusal
from hardjax.data.dataset import Dataset

# None is "as fits the data set": an eighth of the height, and flips where they keep the label.
PRESETS = {"none": {"pad": 0, "flip": False}, "standard": {"pad": None, "flip": None}}
PLACES = ("center", "random")
_MOST_SIDE = 2**14  # an image of one channel is then 1 GiB; far beyond it sizes no longer fit the compiler's integers


@dataclass(frozen=True)
class Augmentation:
    """What happens to an image before the model, in this order; crops, flips and random places in training only.

    Attributes:
        pad: black pixels added on every side before a random crop back to the old size; None: an eighth of the height.
        flip: mirror left to right with probability 1/2; None: where that keeps the label, as the data set says.
        frame: side of a black square that the image is placed in; None keeps its size.
        place: "center", or "random" (in evaluation always the centre).
        resize: side after a bilinear resize (P1: 128, read from "cropped to the image size"); None keeps the size.
        normalize: subtract the training split's mean and divide by its deviation, per channel.

    Raises:
        ValueError: a size below its least or above 2^14, an unknown place, a random place without a frame.
    """

    pad: int | None = 0
    flip: bool | None = False
    frame: int | None = None
    place: str = "center"
    resize: int | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        _settings.settle(self)
        _validate.one_of(PLACES, place=self.place)
        for name, least in (("pad", 0), ("frame", 1), ("resize", 1)):
            if getattr(self, name) is not None:
                _validate.at_least(least, **{name: getattr(self, name)})
                if getattr(self, name) > _MOST_SIDE:
                    raise Refusal(f"Expected {name}={getattr(self, name)} to be at most 2^14 pixels.")
        if self.place == "random" and self.frame is None:
            raise Refusal("Expected a frame (its side in pixels) with place='random', got frame=None.")


def named(name: str, image_shape: tuple[int, ...], flip: bool) -> Augmentation:
    """ "none", or "standard": crops padded by an eighth of the height (4 of 32), and flips where they keep the label.

    Args:
        image_shape: (H, W, C) of the stored images.
        flip: whether mirroring keeps the label, as `Dataset.flip` says.

    Raises:
        ValueError: unknown name; the closest one is offered.
    """
    _validate.one_of(PRESETS, augmentation=name)
    return _fitted(Augmentation(**PRESETS[name]), image_shape, flip)


def _fitted(augmentation: Augmentation, image_shape: tuple[int, ...], flip: bool) -> Augmentation:
    """Without the Nones of what fits the data set."""
    pad = max(1, image_shape[0] // 8) if augmentation.pad is None else augmentation.pad
    return dataclasses.replace(augmentation, pad=pad, flip=flip if augmentation.flip is None else augmentation.flip)


def resolve(augmentation: Augmentation | str, dataset: Dataset) -> Augmentation:
    """An augmentation, or the one that a name stands for, with all that depends on the data set filled in.

    Raises:
        ValueError: unknown name, a frame that does not hold the images, a pad as wide as they are, or images that move
            where each of their pixels has a label.
    """
    shape = dataset.train.image_shape
    if isinstance(augmentation, str):
        augmentation = named(augmentation, shape, dataset.flip)
    augmentation = _fitted(augmentation, shape, dataset.flip)
    if augmentation.pad >= min(shape[:2]):
        raise Refusal(
            f"Expected pad={augmentation.pad} to be less than the side of images of {shape[0]}x{shape[1]}: a crop could"
            " miss the image."
        )
    output_shape(augmentation, shape)
    moves = augmentation.pad > 0 or augmentation.flip or augmentation.place == "random"
    if moves and dataset.train.labels.ndim > 2:
        raise Refusal(
            f"Expected augmentation without crops, flips and random places: labels of {dataset.train.labels.shape[1:]}"
            " a sample would not move with their image."
        )
    return augmentation


def output_shape(augmentation: Augmentation, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(H, W, C) that the model sees.

    Raises:
        ValueError: the frame is smaller than the image.
    """
    height, width, channels = image_shape
    if augmentation.frame is not None:
        if augmentation.frame < max(height, width):
            raise Refusal(f"Expected frame={augmentation.frame} to hold images of {height}x{width}.")
        height = width = augmentation.frame
    if augmentation.resize is not None:
        height = width = augmentation.resize
    return height, width, channels


@jax.named_scope("data")
def preprocess(images: Array, mean: Array, std: Array, augmentation: Augmentation, key: Array | None = None) -> Array:
    """Stored images (B, H, W, C) to (B, H', W', C) float32, pure.

    Args:
        images: uint8, or float32 scaled to 0..1.
        mean, std: (C,) of pixels scaled to 0..1.
        key: the random draws of training; None is evaluation, without any.

    Raises:
        ValueError: the frame is smaller than the images; what depends on the data set was not filled in (`resolve`).
    """
    if augmentation.pad is None or augmentation.flip is None:
        raise Refusal(f"Expected pad={augmentation.pad}, flip={augmentation.flip} as `resolve` fills them in.")
    output_shape(augmentation, images.shape[1:])
    # Three keys whatever is on: turning flips on leaves the crops of a seed as they were.
    crops, flips, places = (None,) * 3 if key is None else jax.random.split(key, 3)
    count, height, width, _ = images.shape
    if crops is not None and augmentation.pad:
        room = augmentation.pad
        # Black, as stored pixels are: the padding is normalised with the image. P3's published code pads after
        # normalising, which fills with the mean; pairs of single runs of its perceptron on MNIST came within 0.06
        # points of each other either way (shifts of up to 2 and of up to 4 pixels).
        padded = jnp.pad(images, ((0, 0), (room, room), (room, room), (0, 0)))
        images = _windows(padded, jax.random.randint(crops, (count, 2), 0, 2 * room + 1), height, width)
    if flips is not None and augmentation.flip:
        mirrored = jax.random.bernoulli(flips, 0.5, (count, 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    if augmentation.frame is not None:
        images = _place(images, augmentation, places)
    # What only moves pixels is done by now, on uint8: a quarter of the bytes of float32.
    scale = 255.0 if images.dtype == jnp.uint8 else 1.0
    images = images.astype(jnp.float32) / scale
    if augmentation.resize is not None:
        shape = (count, augmentation.resize, augmentation.resize, images.shape[-1])
        images = jax.image.resize(images, shape, "bilinear", antialias=False)
    return (images - mean) / std if augmentation.normalize else images


def _place(images: Array, augmentation: Augmentation, key: Array | None) -> Array:
    count, height, width, _ = images.shape
    frame = augmentation.frame
    assert frame is not None
    if key is None or augmentation.place == "center":
        top, left = (frame - height) // 2, (frame - width) // 2
        return jnp.pad(images, ((0, 0), (top, frame - height - top), (left, frame - width - left), (0, 0)))
    room = (frame - height, frame - width)
    # The image with all its room on every side: a window of the frame's size holds it wherever it begins, and every
    # place is equally likely.
    padded = jnp.pad(images, ((0, 0), (room[0], room[0]), (room[1], room[1]), (0, 0)))
    corners = jax.random.randint(key, (count, 2), 0, jnp.array(room) + 1)
    return _windows(padded, corners, frame, frame)


def _windows(images: Array, corners: Array, height: int, width: int) -> Array:
    """A window of each image: a gather of rows, then of columns."""
    rows = corners[:, :1] + jnp.arange(height)
    columns = corners[:, 1:] + jnp.arange(width)
    each = jnp.arange(len(images))[:, None, None]
    # A gather, not one slice a sample: offsets differ from sample to sample, and are drawn on the device.
    return images[each, rows[:, :, None], columns[:, None, :]]


AXIS = Axis(
    Augmentation,
    flags={"augmentation": "name", "frame": "frame", "place": "place", "resize": "resize"},
    presets=PRESETS,
)
