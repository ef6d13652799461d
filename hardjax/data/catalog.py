"""What is known of each named data set beside its pixels."""

from dataclasses import dataclass

from hardjax import _validate


@dataclass(frozen=True)
class Entry:
    """A data set.

    Attributes:
        tfds_name: its TFDS builder; None where it comes with a package.
        train, test: TFDS split names; several training splits are joined.
        flip: mirroring keeps the label.
        url: where its preparation downloads from.
        about: one line.
    """

    tfds_name: str | None
    train: tuple[str, ...] = ("train",)
    test: str = "test"
    flip: bool = False
    url: str | None = None
    about: str = ""


CATALOG = {
    "digits": Entry(None, about="1,797 scanned digits of 8x8 from scikit-learn; nothing to download"),
    # Digits are not flipped. P3 augments all data alike "as in He et al.", flips included: leaving them out is a
    # departure.
    "mnist": Entry("mnist", url="https://storage.googleapis.com", about="70,000 handwritten digits of 28x28"),
    "fashion_mnist": Entry(
        "fashion_mnist",
        flip=True,
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        about="70,000 pieces of clothing of 28x28",
    ),
    "cifar10": Entry(
        "cifar10", flip=True, url="https://www.cs.toronto.edu", about="60,000 colour images of 32x32, 10 classes"
    ),
    "cifar100": Entry(
        "cifar100", flip=True, url="https://www.cs.toronto.edu", about="60,000 colour images of 32x32, 100 classes"
    ),
    "svhn_cropped": Entry("svhn_cropped", url="http://ufldl.stanford.edu", about="99,289 house-number digits of 32x32"),
    # P3 trains on the extra split as well, P2 does not say: each has a name.
    "svhn_cropped_extra": Entry(
        "svhn_cropped",
        train=("train", "extra"),
        url="http://ufldl.stanford.edu",
        about="svhn_cropped with its extra split: 604,388 training images",
    ),
    "stl10": Entry(
        "stl10",
        flip=True,
        url="http://ai.stanford.edu",
        about="13,000 colour images of 96x96; the unlabelled split is never read",
    ),
}


def find(name: str) -> Entry:
    """The entry of a name.

    Raises:
        ValueError: unknown name; the closest one is offered.
    """
    _validate.one_of(CATALOG, dataset=name)
    return CATALOG[name]
