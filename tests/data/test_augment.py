"""Augmentation against loops over single samples."""

import jax
import numpy as np
import pytest

from hardjax.data import Dataset
from hardjax.data.augment import Augmentation, named, output_shape, preprocess, resolve

IMAGES = np.random.default_rng(0).integers(1, 256, (6, 5, 4, 3)).astype(np.uint8)
MEAN, STD = np.float32([0.5, 0.4, 0.3]), np.float32([0.2, 0.3, 0.1])
RAW = dict(normalize=False)


def run(augmentation, key=None, images=IMAGES):
    out = preprocess(images, MEAN, STD, augmentation, None if key is None else jax.random.key(key))
    assert out.shape[1:] == output_shape(augmentation, images.shape[1:]) and out.dtype == np.float32
    return np.asarray(out)


def test_normalisation_by_hand():
    np.testing.assert_allclose(run(Augmentation()), (IMAGES / 255 - MEAN) / STD, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        run(Augmentation(**RAW), images=(IMAGES / 255).astype(np.float32)), IMAGES / 255, rtol=1e-6
    )


def test_every_crop_is_a_window_of_the_padded_image_and_all_windows_come():
    seen = set()
    for key in range(40):
        out = np.round(run(Augmentation(pad=1, **RAW), key) * 255).astype(int)
        for image, crop in zip(IMAGES, out, strict=True):
            padded = np.pad(image, ((1, 1), (1, 1), (0, 0))).astype(int)
            found = [(i, j) for i in range(3) for j in range(3) if (padded[i : i + 5, j : j + 4] == crop).all()]
            assert len(found) == 1
            seen.add(found[0])
    assert len(seen) == 9


def test_flips_mirror_about_half_of_the_images():
    flips = 0
    for key in range(30):
        out = np.round(run(Augmentation(flip=True, **RAW), key) * 255).astype(int)
        for image, shown in zip(IMAGES, out, strict=True):
            mirrored = (shown == image[:, ::-1]).all()
            assert mirrored or (shown == image).all()
            flips += mirrored
    assert 60 < flips < 120


@pytest.mark.parametrize("place", ["center", "random"])
def test_placement_keeps_the_image_whole_in_a_black_frame(place):
    corners = set()
    for key in range(30):
        out = np.round(run(Augmentation(frame=7, place=place, **RAW), key) * 255).astype(int)
        for image, shown in zip(IMAGES, out, strict=True):
            top, left = (axis.min() for axis in np.nonzero(shown.sum(-1)))
            assert (shown[top : top + 5, left : left + 4] == image).all() and shown.sum() == image.astype(int).sum()
            corners.add((int(top), int(left)))
    assert corners == ({(1, 1)} if place == "center" else {(i, j) for i in range(3) for j in range(4)})


def test_bilinear_resize_against_a_loop():
    out = run(Augmentation(resize=8, **RAW))
    for y in range(8):
        for x in range(8):
            row = np.clip((y + 0.5) * 5 / 8 - 0.5, 0, 4)
            column = np.clip((x + 0.5) * 4 / 8 - 0.5, 0, 3)
            top, left = int(row), int(column)
            bottom, right = min(top + 1, 4), min(left + 1, 3)
            a, b = row - top, column - left
            corners = IMAGES[:, top, left] * (1 - a) * (1 - b) + IMAGES[:, bottom, left] * a * (1 - b)
            expected = corners + IMAGES[:, top, right] * (1 - a) * b + IMAGES[:, bottom, right] * a * b
            np.testing.assert_allclose(out[:, y, x], expected / 255, rtol=1e-5, atol=1e-6)


def test_a_key_decides_the_draws_and_evaluation_has_none():
    augmentation = Augmentation(pad=2, flip=True, frame=9, place="random")
    np.testing.assert_array_equal(run(augmentation, 1), run(augmentation, 1))
    assert (run(augmentation, 1) != run(augmentation, 2)).any()
    np.testing.assert_array_equal(run(augmentation), run(Augmentation(frame=9)))


def test_crops_move_each_image_by_itself():
    images = np.repeat(IMAGES[:1], 64, axis=0)
    crops = {bytes(image) for image in run(Augmentation(pad=1), 0, images)}
    assert len(crops) == 9


def test_steps_come_in_the_stated_order():
    # Framed after the crop and resized after the frame; black is 0 before normalisation, not the mean.
    out = run(Augmentation(pad=2, frame=10, resize=5), 3)
    half = run(Augmentation(pad=2, frame=10), 3)  # halving with half-pixel centres averages 2x2 blocks
    np.testing.assert_allclose(out, half.reshape(6, 5, 2, 5, 2, 3).mean((2, 4)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(half[:, 0, 0], np.broadcast_to(-MEAN / STD, (6, 3)), rtol=1e-5)


def test_inside_a_compiled_scan_it_is_the_same():
    augmentation = Augmentation(pad=1, flip=True, frame=8, place="random", resize=12)
    keys = jax.random.split(jax.random.key(0), 3)

    @jax.jit
    def scanned(images, mean, std):
        return jax.lax.scan(lambda _, key: (None, preprocess(images, mean, std, augmentation, key)), None, keys)[1]

    for key, out in zip(keys, scanned(IMAGES, MEAN, STD), strict=True):
        np.testing.assert_allclose(out, preprocess(IMAGES, MEAN, STD, augmentation, key), rtol=1e-5, atol=1e-5)


def test_a_name_is_resolved_on_the_data_set():
    labels = np.arange(6) % 2
    dataset = Dataset.from_arrays(IMAGES, labels, IMAGES, labels, flip=True)
    assert resolve("standard", dataset) == Augmentation(pad=1, flip=True)
    assert resolve(Augmentation(pad=3), dataset) == Augmentation(pad=3)
    with pytest.raises(ValueError, match="frame=4 to hold images of 5x4"):
        resolve(Augmentation(frame=4), dataset)
    with pytest.raises(ValueError, match="pad=4 to be less than the side of images of 5x4"):
        resolve(Augmentation(pad=4), dataset)
    for name in ("pad", "frame", "resize"):
        with pytest.raises(ValueError, match=f"{name}=10000000000 to be at most"):
            Augmentation(**{name: 10**10})


def test_named():
    assert named("none", (32, 32, 3), True) == Augmentation()
    assert named("standard", (32, 32, 3), True) == Augmentation(pad=4, flip=True)
    assert named("standard", (8, 8, 1), False) == Augmentation(pad=1)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(pad=-1), "pad=-1"),
        (dict(pad=1.5), "pad=1.5 to be a whole number"),
        (dict(flip=1), "flip=1 to be True or False"),
        (dict(frame=9, place="left"), "Unknown place 'left'"),
        (dict(place="random"), "Expected a frame .* with place='random'"),
        (dict(frame=0), "frame=0"),
        (dict(resize=0), "resize=0"),
        (dict(normalize=None), "normalize=None to be True or False"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)


def test_a_frame_too_small_and_an_unknown_name():
    for refused in (lambda: output_shape(Augmentation(frame=4), (5, 4, 3)), lambda: run(Augmentation(frame=4))):
        with pytest.raises(ValueError, match="frame=4 to hold images of 5x4"):
            refused()
    with pytest.raises(ValueError, match="did you mean 'standard'"):
        named("standrd", (8, 8, 1), False)
