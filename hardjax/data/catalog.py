"""What is known of each named data set beside its pixels."""

from dataclasses import dataclass
from typing import NamedTuple

from hardjax import _validate


class Fit(NamedTuple):
    """From images of several sizes to one, as Simonyan and Zisserman and He et al. do (P4, section 4.3).

    Attributes:
        crop: side of the square that the network sees.
        side: the shorter side of a test image is resized to it, and the centre taken.
        sides: in training it is drawn from these, least and greatest, and the crop anywhere.
    """

    crop: int
    side: int
    sides: tuple[int, int]


class Cut(NamedTuple):
    """What crops of images of several sizes are drawn from in training; see `Augmentation` for either.

    Attributes:
        sides: least and greatest length of the shorter side, of crops as P4 has them.
        area: least share of the image's area, of Inception's crops; None: by `sides`.
    """

    sides: tuple[int, ...] = ()
    area: float | None = None


@dataclass(frozen=True)
class Entry:
    """A data set.

    Attributes:
        tfds_name: its TFDS builder; None where it comes with a package.
        counts: images of both splits.
        shape: (H, W, C) of the images as they are trained on.
        classes: how many.
        train, test: TFDS split names; several training splits are joined.
        flip: mirroring keeps the label.
        url: where its preparation downloads from; None where nothing can be downloaded without being asked for.
        about: one line.
        fit: of images of several sizes, which are streamed: how each is brought to one.
        statistics: published mean and deviation of the pixels scaled to 0..1, a number a channel; None computes them.
    """

    tfds_name: str | None
    counts: tuple[int, int]
    shape: tuple[int, int, int]
    classes: int = 10
    train: tuple[str, ...] = ("train",)
    test: str = "test"
    flip: bool = False
    url: str | None = None
    about: str = ""
    fit: Fit | None = None
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None


CATALOG = {
    "digits": Entry(
        None, (1_437, 360), (8, 8, 1), about="1,797 scanned digits of 8x8 from scikit-learn; nothing to download"
    ),
    # Digits are not flipped. P3 augments all data alike "as in He et al.", flips included: leaving them out is a
    # departure.
    "mnist": Entry(
        "mnist",
        (60_000, 10_000),
        (28, 28, 1),
        url="https://storage.googleapis.com",
        about="70,000 handwritten digits of 28x28",
    ),
    "fashion_mnist": Entry(
        "fashion_mnist",
        (60_000, 10_000),
        (28, 28, 1),
        flip=True,
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        about="70,000 pieces of clothing of 28x28",
    ),
    "cifar10": Entry(
        "cifar10",
        (50_000, 10_000),
        (32, 32, 3),
        flip=True,
        url="https://www.cs.toronto.edu",
        about="60,000 colour images of 32x32, 10 classes",
    ),
    "cifar100": Entry(
        "cifar100",
        (50_000, 10_000),
        (32, 32, 3),
        100,
        flip=True,
        url="https://www.cs.toronto.edu",
        about="60,000 colour images of 32x32, 100 classes",
    ),
    "svhn_cropped": Entry(
        "svhn_cropped",
        (73_257, 26_032),
        (32, 32, 3),
        url="http://ufldl.stanford.edu",
        about="99,289 house-number digits of 32x32",
    ),
    # P3 trains on the extra split as well, P2 does not say: each has a name.
    "svhn_cropped_extra": Entry(
        "svhn_cropped",
        (604_388, 26_032),
        (32, 32, 3),
        train=("train", "extra"),
        url="http://ufldl.stanford.edu",
        about="svhn_cropped with its extra split: 604,388 training images",
    ),
    "stl10": Entry(
        "stl10",
        (5_000, 8_000),
        (96, 96, 3),
        flip=True,
        url="http://ai.stanford.edu",
        about="13,000 colour images of 96x96; the unlabelled split is never read",
    ),
    # TFDS prepares it from archives that must be downloaded by hand. Mean and deviation are those that the networks of
    # torchvision and timm are trained with.
    "imagenet2012": Entry(
        "imagenet2012",
        (1_281_167, 50_000),
        (224, 224, 3),
        1_000,
        test="validation",
        flip=True,
        about="1,331,167 photographs of several sizes, 1,000 classes, streamed as crops of 224x224",
        fit=Fit(crop=224, side=256, sides=(256, 480)),
        statistics=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ),
}


def find(name: str) -> Entry:
    """The entry of a name.

    Raises:
        ValueError: unknown name; the closest one is offered.
    """
    _validate.one_of(CATALOG, dataset=name)
    return CATALOG[name]
