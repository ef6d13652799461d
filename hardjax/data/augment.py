"""From stored images to what a model takes, on the device: crop, flip, placement, resize, normalisation."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hardjax import _settings, _validate
from hardjax._axis import UNWRITTEN, Axis
from hardjax._validate import Refusal
from hardjax.data import views
from hardjax.data.catalog import Cut
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
        sides: of data of images of several sizes: in training the shorter side of each is resized to a length drawn
            from these two, both included, and a crop taken at random (P4: 256 to 480, of 224); () takes the centre as
            in testing; None: with `pad` None what fits the data set, else the centre.
        crop_area: least share of the image's area that a random crop has, resized to the image's size (or `resize`);
            its sides are as 3 to 4 up to 4 to 3 (Inception: 0.08); in testing the whole image, or what is cut of images
            of several sizes without it; None: no such crops.
        jitter: brightness, contrast and saturation of colour images are each multiplied by a number drawn from 1 less
            this to 1 more, just before normalisation; in training only; None: they stay.

    Raises:
        ValueError: a size below its least or above 2^14, two sides that fall, an unknown place, a random place without
            a frame, a share outside (0, 1], two ways to crop.
    """

    pad: int | None = 0
    flip: bool | None = False
    frame: int | None = None
    place: str = "center"
    resize: int | None = None
    normalize: bool = True
    # In no JSON where it is None: the settings of runs and rows of before it was there stay theirs.
    sides: tuple[int, ...] | None = field(default=None, metadata=UNWRITTEN)
    crop_area: float | None = field(default=None, metadata=UNWRITTEN)
    jitter: float | None = field(default=None, metadata=UNWRITTEN)

    def __post_init__(self) -> None:
        _settings.settle(self)
        _validate.one_of(PLACES, place=self.place)
        for name, least in (("pad", 0), ("frame", 1), ("resize", 1)):
            if getattr(self, name) is not None:
                _validate.at_least(least, **{name: getattr(self, name)})
                if getattr(self, name) > _MOST_SIDE:
                    raise Refusal(f"Expected {name}={getattr(self, name)} to be at most 2^14 pixels.")
        if self.sides and (len(self.sides) != 2 or not 1 <= self.sides[0] <= self.sides[1] <= _MOST_SIDE):
            raise Refusal(f"Expected sides={_validate.shown(self.sides)} as two lengths that do not fall, up to 2^14.")
        if self.place == "random" and self.frame is None:
            raise Refusal("Expected a frame (its side in pixels) with place='random', got frame=None.")
        for name in ("crop_area", "jitter"):
            if getattr(self, name) is not None:
                _validate.in_half_open_unit(**{name: getattr(self, name)})
        for name in ("pad", "frame", "sides") if self.crop_area is not None else ():
            if getattr(self, name):
                given = f"crop_area={self.crop_area} or {name}={getattr(self, name)}"
                raise Refusal(f"Give {given}, not both: each is a way to crop.")


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


def _fitted(
    augmentation: Augmentation, image_shape: tuple[int, ...], flip: bool, of_data: tuple[int, ...] = ()
) -> Augmentation:
    """Without the Nones of what fits the data set; of images of one size there are no sides."""
    sides = augmentation.sides
    if sides is None and augmentation.pad is None and augmentation.crop_area is None and of_data:
        sides = of_data
    pad = augmentation.pad
    if pad is None:
        # A crop of a larger image, or one that is resized, needs no padding.
        pad = 0 if sides or augmentation.crop_area is not None else max(1, image_shape[0] // 8)
    flip = flip if augmentation.flip is None else augmentation.flip
    return dataclasses.replace(augmentation, pad=pad, flip=flip, sides=sides)


def resolve(augmentation: Augmentation | str, dataset: Dataset) -> Augmentation:
    """An augmentation, or the one that a name stands for, with all that depends on the data set filled in.

    Raises:
        ValueError: unknown name, a frame that does not hold the images, a pad as wide as they are, or images that move
            where each of their pixels has a label.
    """
    shape = dataset.train.image_shape
    if isinstance(augmentation, str):
        _validate.one_of(PRESETS, augmentation=augmentation)
        augmentation = Augmentation(**PRESETS[augmentation])
    augmentation = _fitted(augmentation, shape, dataset.flip, dataset.sides)
    if augmentation.sides and not dataset.sides:
        raise Refusal(f"Expected sides=() with {dataset.name}, whose images are of one size; got {augmentation.sides}.")
    if augmentation.sides and augmentation.sides[0] < min(shape[:2]):
        raise Refusal(f"Expected sides={augmentation.sides} to hold a crop of {shape[0]}x{shape[1]}.")
    views.check(shape, augmentation.crop_area, augmentation.jitter)
    if augmentation.pad >= min(shape[:2]):
        raise Refusal(
            f"Expected pad={augmentation.pad} to be less than the side of images of {shape[0]}x{shape[1]}: a crop could"
            " miss the image."
        )
    output_shape(augmentation, shape)
    moves = augmentation.pad > 0 or augmentation.flip or augmentation.place == "random"
    moves = moves or augmentation.crop_area is not None
    if moves and dataset.train.labels.ndim > 2:
        raise Refusal(
            f"Expected augmentation without crops, flips and random places: labels of {dataset.train.labels.shape[1:]}"
            " a sample would not move with their image."
        )
    return augmentation


def where_read(augmentation: Augmentation, dataset: Dataset) -> Cut | None:
    """How a resolved augmentation cuts images of several sizes, which is done where they are read; None: from the
    centre, or there are none."""
    if not dataset.sides or not (augmentation.sides or augmentation.crop_area is not None):
        return None
    return Cut(augmentation.sides or (), augmentation.crop_area)


def on_device(augmentation: Augmentation, dataset: Dataset) -> Augmentation:
    """The rest of it."""
    return dataclasses.replace(augmentation, crop_area=None) if dataset.sides else augmentation


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


class Moves(NamedTuple):
    """What is drawn for the images of a batch; None where nothing of the kind is.

    Attributes:
        corners: (B, 2) int32, where the crop of a padded image begins.
        mirrored: (B,) bool.
        places: (B, 2) int32, where an image stands in its frame.
        boxes: (B, 4) int32, the crop that is resized, see `views.draw_boxes`.
        shades: (B, 3) int32, of brightness, contrast and saturation, see `views.jittered`.
    """

    corners: Array | None = None
    mirrored: Array | None = None
    places: Array | None = None
    boxes: Array | None = None
    shades: Array | None = None


def draw_moves(augmentation: Augmentation, image_shape: tuple[int, ...], count: int, key: Array) -> Moves:
    """The random draws of training for a batch, pure: whole numbers and truths, so that they are the same wherever they
    are drawn (a segment's before its loop, where on a GPU each would be a kernel of every step)."""
    height, width, _ = image_shape
    # Three keys whatever is on: turning flips on leaves the crops of a seed as they were.
    crops, flips, places = jax.random.split(key, 3)
    found = Moves()
    if augmentation.pad:
        found = found._replace(corners=jax.random.randint(crops, (count, 2), 0, 2 * augmentation.pad + 1))
    if augmentation.flip:
        mirrored = jax.random.bernoulli(flips, 0.5, (count, 1, 1, 1))
        found = found._replace(mirrored=mirrored.reshape(count))
    if augmentation.frame is not None and augmentation.place == "random":
        room = jnp.array((augmentation.frame - height, augmentation.frame - width))
        found = found._replace(places=jax.random.randint(places, (count, 2), 0, room + 1))
    # Keys that the split above does not give: it counts from 0 as well.
    if augmentation.crop_area is not None:
        boxes = views.draw_boxes(jax.random.fold_in(key, 3), count, image_shape, augmentation.crop_area)
        found = found._replace(boxes=boxes)
    if augmentation.jitter is not None:
        found = found._replace(shades=views.draw_shades(jax.random.fold_in(key, 4), count))
    return found


@jax.named_scope("data")
def fetch(stored: Array, rows: Any, augmentation: Augmentation, moves: Moves | None) -> Array:
    """Images (B, H, W, C) of all (m, H, W, C), cropped and mirrored, in one gather.

    Args:
        rows: (B,) which, or a slice; with moves the former.
        moves: None is evaluation.
    """
    if moves is None or (moves.corners is None and moves.mirrored is None):
        return stored[rows]
    height, width = stored.shape[1:3]
    count, pad = len(rows), augmentation.pad
    assert pad is not None
    # Of every pixel wanted, the row and column in the stored image; beyond its edges is the padding.
    corners = jnp.full((count, 2), pad) if moves.corners is None else moves.corners
    y = corners[:, :1] - pad + jnp.arange(height)
    x = corners[:, 1:] - pad + jnp.arange(width)
    if moves.mirrored is not None:
        x = jnp.where(moves.mirrored[:, None], x[:, ::-1], x)
    picked = stored[rows[:, None, None], jnp.clip(y, 0, height - 1)[:, :, None], jnp.clip(x, 0, width - 1)[:, None, :]]
    if not pad:
        return picked
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    # Black, as stored pixels are: the padding is normalised with the image. P3's published code pads after
    # normalising, which fills with the mean; pairs of single runs of its perceptron on MNIST came within 0.06 points of
    # each other either way (shifts of up to 2 and of up to 4 pixels).
    return jnp.where(inside[..., None], picked, jnp.zeros((), stored.dtype))


@jax.named_scope("data")
def prepare(images: Array, mean: Array, std: Array, augmentation: Augmentation, moves: Moves | None) -> Array:
    """Fetched images (B, H, W, C) to (B, H', W', C) float32: into their frame, cut, resized, coloured, normalised."""
    if augmentation.frame is not None:
        images = _place(images, augmentation, None if moves is None else moves.places)
    # What only moves pixels is done by now, on uint8: a quarter of the bytes of float32.
    scale = 255.0 if images.dtype == jnp.uint8 else 1.0
    images = images.astype(jnp.float32) / scale
    if moves is not None and moves.boxes is not None:
        images = views.cut(images, moves.boxes, output_shape(augmentation, images.shape[1:])[:2])
    elif augmentation.resize is not None:
        shape = (len(images), augmentation.resize, augmentation.resize, images.shape[-1])
        images = jax.image.resize(images, shape, "bilinear", antialias=False)
    if moves is not None and moves.shades is not None:
        assert augmentation.jitter is not None
        images = views.jittered(images, moves.shades, augmentation.jitter)
    return (images - mean) / std if augmentation.normalize else images


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
    if key is None:
        return prepare(images, mean, std, augmentation, None)
    moves = draw_moves(augmentation, images.shape[1:], len(images), key)
    return prepare(fetch(images, jnp.arange(len(images)), augmentation, moves), mean, std, augmentation, moves)


def _place(images: Array, augmentation: Augmentation, corners: Array | None) -> Array:
    _, height, width, _ = images.shape
    frame = augmentation.frame
    assert frame is not None
    if corners is None:
        top, left = (frame - height) // 2, (frame - width) // 2
        return jnp.pad(images, ((0, 0), (top, frame - height - top), (left, frame - width - left), (0, 0)))
    room = (frame - height, frame - width)
    # The image with all its room on every side: a window of the frame's size holds it wherever it begins, and every
    # place is equally likely.
    padded = jnp.pad(images, ((0, 0), (room[0], room[0]), (room[1], room[1]), (0, 0)))
    rows = corners[:, :1] + jnp.arange(frame)
    columns = corners[:, 1:] + jnp.arange(frame)
    each = jnp.arange(len(images))[:, None, None]
    # A gather, not one slice a sample: offsets differ from sample to sample, and are drawn on the device.
    return padded[each, rows[:, :, None], columns[:, None, :]]


AXIS = Axis(
    Augmentation,
    flags={
        "augmentation": "name",
        "frame": "frame",
        "place": "place",
        "resize": "resize",
        "crop_area": "crop_area",
        "jitter": "jitter",
    },
    presets=PRESETS,
)
