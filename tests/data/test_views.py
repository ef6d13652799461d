"""Crops of any size and shape, and colour jitter, against loops over single pixels."""

import jax
import numpy as np
import pytest
from short_runs import config_of, tiny

import hardjax as hj
from hardjax.data import views
from hardjax.data.augment import Augmentation, draw_moves, preprocess, resolve
from hardjax.testing import assert_resumes_everywhere
from hardjax.training.setting import prepare

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 9, 7, 3)).astype(np.uint8)
MEAN, STD = np.float32([0.5, 0.4, 0.3]), np.float32([0.2, 0.3, 0.1])


def _resized(image, height, width):
    """Bilinear with half-pixel centres, of one image (h, w, C), a pixel at a time."""
    found = np.zeros((height, width, image.shape[-1]))
    for y in range(height):
        for x in range(width):
            row = min(max((y + 0.5) * len(image) / height - 0.5, 0), len(image) - 1)
            column = min(max((x + 0.5) * image.shape[1] / width - 0.5, 0), image.shape[1] - 1)
            top, left = int(row), int(column)
            bottom, right = min(top + 1, len(image) - 1), min(left + 1, image.shape[1] - 1)
            above = image[top, left] * (1 - column + left) + image[top, right] * (column - left)
            below = image[bottom, left] * (1 - column + left) + image[bottom, right] * (column - left)
            found[y, x] = above * (1 - row + top) + below * (row - top)
    return found


def _coloured(image, factors):
    """Of one image (h, w, 3) in 0..1, by its definition."""

    def grey(pixels):
        return 0.299 * pixels[..., 0] + 0.587 * pixels[..., 1] + 0.114 * pixels[..., 2]

    image = np.minimum(image * factors[0], 1)
    mean = grey(image).mean()
    image = np.clip(factors[1] * image + (1 - factors[1]) * mean, 0, 1)
    return np.clip(factors[2] * image + (1 - factors[2]) * grey(image)[..., None], 0, 1)


@pytest.mark.parametrize("resize", [None, 12])
def test_crops_are_cut_and_resized(resize):
    augmentation, key = Augmentation(crop_area=0.1, resize=resize, normalize=False), jax.random.key(3)
    boxes = np.asarray(draw_moves(augmentation, IMAGES.shape[1:], 6, key).boxes)
    out = np.asarray(preprocess(IMAGES, MEAN, STD, augmentation, key))
    shape = (9, 7) if resize is None else (12, 12)
    assert out.shape == (6, *shape, 3) and len({tuple(box) for box in boxes}) > 3
    for image, (top, left, height, width), shown in zip(IMAGES / 255, boxes, out, strict=True):
        expected = _resized(image[top : top + height, left : left + width], *shape)
        np.testing.assert_allclose(shown, expected, rtol=1e-5, atol=1e-6)


def test_the_whole_image_is_the_resized_one_and_testing_sees_it():
    whole = np.broadcast_to(np.int32([0, 0, 9, 7]), (6, 4))
    pixels = (IMAGES / 255).astype(np.float32)
    np.testing.assert_array_equal(views.cut(pixels, whole, (9, 7)), pixels)
    one, other = (preprocess(IMAGES, MEAN, STD, Augmentation(resize=5, crop_area=area)) for area in (None, 0.08))
    np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(views.cut(pixels, whole, (5, 5)), one * STD + MEAN, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 20), (224, 224)])
def test_sizes_are_those_that_inception_draws(height, width):
    sizes = views.crop_sizes(height, width, 0.08)
    assert (sizes >= 1).all() and (sizes <= [height, width]).all()
    shares, ratios = sizes.prod(1) / (height * width), sizes[:, 1] / sizes[:, 0]
    # Whole pixels: half of one on each side.
    slack = (1 + 0.5 / sizes[:, 0]) * (1 + 0.5 / sizes[:, 1])
    assert (shares * slack >= 0.08).all() and (ratios <= 4 / 3 * slack).all() and (ratios * slack >= 3 / 4).all()
    # The same by rejection from continuous draws, as torchvision does.
    rng = np.random.default_rng(0)
    areas = height * width * rng.uniform(0.08, 1, 200_000)
    drawn = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 200_000))
    expected = np.rint(np.stack([np.sqrt(areas / drawn), np.sqrt(areas * drawn)], 1))
    expected = expected[(expected <= [height, width]).all(1)]
    np.testing.assert_allclose(sizes.mean(0), expected.mean(0), rtol=0.01)
    np.testing.assert_allclose(sizes.std(0), expected.std(0), rtol=0.03)


def test_crops_are_anywhere_in_the_image():
    boxes = np.asarray(views.draw_boxes(jax.random.key(0), 20_000, (6, 8, 1), 0.08))
    ends = boxes[:, :2] + boxes[:, 2:]
    assert boxes[:, :2].min() == 0 and (ends <= [6, 8]).all() and (ends.max(0) == [6, 8]).all()
    small = boxes[(boxes[:, 2:] == [2, 2]).all(1)]
    assert len(small) > 50 and {tuple(box) for box in small[:, :2]} == {(y, x) for y in range(5) for x in range(7)}


def test_a_share_of_one_is_the_whole_image():
    assert views.crop_sizes(224, 224, 1.0).tolist() == [[224, 224]] * 256


def test_colours_against_their_definition():
    augmentation, key = Augmentation(jitter=0.4, normalize=False), jax.random.key(1)
    shades = np.asarray(draw_moves(augmentation, IMAGES.shape[1:], 6, key).shades)
    factors = 1 + 0.4 * (2 * shades / 65535 - 1)
    assert (factors >= 0.6).all() and (factors <= 1.4).all() and np.ptp(factors) > 0.4
    out = np.asarray(preprocess(IMAGES, MEAN, STD, augmentation, key))
    for image, own, shown in zip(IMAGES / 255, factors, out, strict=True):
        np.testing.assert_allclose(shown, _coloured(image, own), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(
        preprocess(IMAGES, MEAN, STD, Augmentation(jitter=0.4)), preprocess(IMAGES, MEAN, STD, Augmentation())
    )


def test_colours_come_after_the_crop_and_before_normalisation():
    both, key = Augmentation(crop_area=0.2, jitter=0.3), jax.random.key(7)
    moves = draw_moves(both, IMAGES.shape[1:], 6, key)
    cut = views.cut((IMAGES / 255).astype(np.float32), moves.boxes, (9, 7))
    expected = (views.jittered(cut, moves.shades, 0.3) - MEAN) / STD
    np.testing.assert_allclose(preprocess(IMAGES, MEAN, STD, both, key), expected, rtol=1e-4, atol=1e-4)


def test_other_draws_of_a_seed_stay_as_they_were():
    key, plain = jax.random.key(2), Augmentation(flip=True)
    more = draw_moves(Augmentation(flip=True, crop_area=0.5, jitter=0.1), (9, 7, 3), 64, key)
    np.testing.assert_array_equal(more.mirrored, draw_moves(plain, (9, 7, 3), 64, key).mirrored)


def _colour():
    labels = np.arange(6) % 2
    return hj.data.Dataset.from_arrays(IMAGES, labels, IMAGES, labels, flip=True, name="colour")


def test_with_a_name_they_take_the_place_of_its_crops():
    standard = Augmentation(pad=None, flip=None, crop_area=0.08)
    assert resolve(standard, _colour()) == Augmentation(pad=0, flip=True, crop_area=0.08)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"crop_area": 0}, r"crop_area=0.0 in \(0, 1\]"),
        ({"crop_area": 1.5}, r"crop_area=1.5 in \(0, 1\]"),
        ({"jitter": 2}, r"jitter=2.0 in \(0, 1\]"),
        ({"crop_area": 0.1, "pad": 2}, "Give crop_area=0.1 or pad=2, not both"),
        ({"crop_area": 0.1, "frame": 32}, "Give crop_area=0.1 or frame=32, not both"),
        ({"crop_area": 0.1, "sides": (256, 480)}, "Give crop_area=0.1 or sides="),
    ],
)
def test_settings_that_contradict_each_other(settings, said):
    with pytest.raises(ValueError, match=said):
        Augmentation(**settings)


def test_images_that_have_no_such_views():
    with pytest.raises(ValueError, match=r"jitter=None with images of 1 channels, which have no colours; got 0\.4"):
        resolve(Augmentation(jitter=0.4), tiny())
    strip, labels = np.arange(4 * 30 * 3, dtype=np.uint8).reshape(4, 1, 30, 3), [0, 1, 0, 1]
    wide = hj.data.Dataset.from_arrays(strip, labels, strip, labels)
    with pytest.raises(ValueError, match=r"crop_area=0\.5 to fit images of 1x30"):
        resolve(Augmentation(crop_area=0.5), wide)


def test_settings_of_before_they_were_there_keep_their_names():
    assert (
        not {"crop_area", "jitter"} & hj.TrainConfig(augmentation=Augmentation(pad=2)).to_dict()["augmentation"].keys()
    )
    config = hj.TrainConfig(augmentation=Augmentation(crop_area=0.08, jitter=0.4))
    assert config.to_dict()["augmentation"]["crop_area"] == 0.08
    assert hj.TrainConfig.from_dict(config.to_dict()) == config


def test_on_the_command_line():
    from hardjax.cli.options import Settings, with_axes
    from hardjax.cli.parsing import parse

    words = ["--augmentation", "standard", "--crop-area", "0.08", "--jitter", "0.4"]
    config = parse(with_axes(Settings), "train", words).config()
    assert config.augmentation == Augmentation(pad=None, flip=None, crop_area=0.08, jitter=0.4)


@pytest.mark.ci
def test_a_run_with_them_resumes_everywhere():
    config = config_of(
        augmentation=Augmentation(crop_area=0.3, jitter=0.4, flip=True), batch_size=2, model_options={"widths": [4]}
    )
    assert prepare(config, _colour()).recipe.augmentation.crop_area == 0.3
    assert assert_resumes_everywhere(config, _colour(), performance=hj.Performance(steps_per_dispatch=2)) > 1
