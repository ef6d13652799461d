"""Data sets as TFDS prepares them, of a few images made here without TensorFlow."""

import io
import json

import numpy as np
from PIL import Image

SHARDS = {"train": [5, 3], "test": [4]}


def _field(number: int, payload: bytes) -> bytes:
    size, length = len(payload), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + payload


def example(image: bytes, label: int) -> bytes:
    """A serialised tf.train.Example."""
    image = _field(1, b"image") + _field(2, _field(1, _field(1, image)))
    label = _field(1, b"label") + _field(2, _field(3, _field(1, bytes([label]))))
    return _field(1, _field(1, image) + _field(1, label))


def _feature(kind: str, module: str, **settings) -> dict:
    return {"pythonClassName": f"tensorflow_datasets.core.features.{module}", kind: settings}


def make_several_sizes(root, sizes=((48, 64), (64, 40), (50, 50), (40, 90)), train=(5, 3), draw=None):
    """The layout of imagenet2012: JPEG, images of several sizes, and no split called test."""
    shards = {"train": train, "validation": [4]}
    return make_prepared(root, "imagenet2012", "5.1.0", shards, encoding="JPEG", sizes=sizes, draw=draw)


def _noise(rng, shape):
    return rng.integers(0, 256, shape).astype(np.uint8)


def make_prepared(root, name="mnist", version="3.0.1", shards=SHARDS, encoding="PNG", seed=0, sizes=None, draw=None):
    """A prepared data set as TFDS lays it out; returns its folder and the arrays in it.

    Args:
        sizes: (height, width) of the images in turn; None: all are 6x5.
        draw: (generator, shape) -> one image; None: noise.
    """
    draw = draw or _noise
    from array_record.python import array_record_module

    folder = root / name / version
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    sides = ["6", "5", "3"] if sizes is None else ["-1", "-1", "3"]
    image = _feature("image", "image_feature.Image", dtype="uint8", shape={"dimensions": sides})
    label = _feature("classLabel", "class_label_feature.ClassLabel", numClasses="3")
    features = {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {"features": {"image": image, "label": label}},
    }
    (folder / "features.json").write_text(json.dumps(features))
    (folder / "label.labels.txt").write_text("cat\ndog\nowl\n")
    arrays = {}
    for part, counts in shards.items():
        count = sum(counts)
        if sizes is None:
            images = rng.integers(0, 256, (count, 6, 5, 3)).astype(np.uint8)
        else:
            shapes = [(*sizes[index % len(sizes)], 3) for index in range(count)]
            images = [draw(rng, shape) for shape in shapes]
        labels, at = np.arange(count) % 3, 0
        for shard, size in enumerate(counts):
            file = folder / f"{name}-{part}.array_record-{shard:05d}-of-{len(counts):05d}"
            writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
            for _ in range(size):
                buffer = io.BytesIO()
                Image.fromarray(images[at]).save(buffer, encoding)
                writer.write(example(buffer.getvalue(), int(labels[at])))
                at += 1
            writer.close()
        arrays[part] = (images, labels)
    splits = [
        {
            "name": part,
            "numBytes": "1",
            "shardLengths": [str(size) for size in counts],
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }
        for part, counts in shards.items()
    ]
    info = {"name": name, "version": version, "fileFormat": "array_record", "splits": splits, "description": "made"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder, arrays
