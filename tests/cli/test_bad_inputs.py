"""Bad input of every kind: one clear line that says what, the value and what is allowed, and nothing is written."""

import json
import math
import os
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import hardjax as hj
from hardjax._validate import Refusal
from hardjax.choose.selection import HardBatches
from hardjax.choose.trimming import Trimming
from hardjax.cli import main, prepare
from hardjax.data.dataset import Dataset
from hardjax.fisher import FisherMeasure

JUNK = bytes(range(256)) * 4
LONG = "n" * 300
HUGE = 10**5000  # Python itself refuses to write it out
FULL_WIDTH = "".join(chr(ord(digit) + 0xFEE0) for digit in "12")  # digits of another script
IMAGES, LABELS = np.arange(105, 201, dtype=np.uint8).reshape(6, 4, 4, 1), np.arange(6) % 3


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def endless() -> list:
    entries: list = []
    entries.append(entries)
    return entries


def config(**settings):
    return lambda: hj.TrainConfig(**settings)


def read(**plain):
    return lambda: hj.TrainConfig.from_dict(plain)


def arrays(train=IMAGES, labels=LABELS, test=None, test_labels=LABELS, **more):
    return lambda: Dataset.from_arrays(train, labels, train if test is None else test, test_labels, **more)


def held_out(share, **more):
    return lambda: Dataset.from_arrays(IMAGES, LABELS, IMAGES, LABELS).with_validation(share, **more)


def some_of(count, **more):
    return lambda: Dataset.from_arrays(IMAGES, LABELS, IMAGES, LABELS).with_train_samples(count, **more)


CONFIGURATION = {
    "epochs too large to write out": (config(epochs=HUGE), "epochs=<int that cannot be shown> to be a whole number"),
    "epochs beyond 64 bits": (config(epochs=-(2**63)), "epochs=-9223372036854775808 to be a whole number of 64 bits"),
    "epochs without a repr": (config(epochs=Unshowable()), "epochs=<Unshowable that cannot be shown>"),
    "epochs an array": (config(epochs=np.arange(300)), "to be a whole number"),
    "seed too large to write out": (config(seed=HUGE), "to be a whole number of 64 bits"),
    "rate beyond float64": (config(learning_rate=10**400), "to be a number or None"),
    "rate of float32 overflows": (config(base_learning_rate=1e38, batch_size=1000), "learning_rate=1e+41 to be 0 or"),
    "rate nan": (config(learning_rate=np.float32("nan")), "learning_rate=nan to be a finite number above 0"),
    "rate complex": (config(learning_rate=1j), "learning_rate=1j to be a number or None"),
    "decay to nothing": (
        config(schedule=hj.Schedule("step", tuple(np.arange(1, 90) / 100))),
        "learning_rate after 89 decays=",
    ),
    "decay to exactly 0": (config(schedule=hj.Schedule("step", (0.2, 0.5), 1e-300)), "learning_rate after 2 decays=5e"),
    "decay upwards": (lambda: hj.Schedule("step", (0.2, 0.5), 1e300), "decay_factor=1e+300 in (0, 1]"),
    "options that hold themselves": (config(model_options={"widths": endless()}), "to be plain JSON"),
    "options of bytes": (config(model_options={"init": b"torch"}), "to be plain JSON"),
    "options beyond 64 bits": (config(model_options={"widths": [2**63]}), "(whole ones of 64 bits)"),
    "options with an infinity": (config(model_options={"widths": np.array([np.inf])}), "to be plain JSON"),
    "optimizer an array": (config(optimizer=np.array(["sgd", "adam"])), "to be text"),
    "optimizer over two lines": (config(optimizer="sgd\nadam"), "Unknown optimizer 'sgd\\nadam'"),
    "folder with a zero byte": (config(data_dir="a\0b"), "to be a folder"),
    "folder of no home": (config(data_dir="~nobody-of-that-name/x"), "there is no such home"),
    "folder no file can have": (config(data_dir="\ud800"), "no file can have that name"),
    "folder with too long a name": (config(data_dir=LONG), "File name too long"),
    "folder with too long a path": (config(data_dir="a/" * 3000), "File name too long"),
    "folder of bytes": (config(data_dir=b"data"), "data_dir=b'data' to be text or None"),
    "a module as strategy": (config(selection=hj.selection), "to be a strategy"),
    "a name that is an array": (read(selection={"name": np.array(["a", "b"])}), "Unknown selection array("),
    "a name that is a list": (read(selection={"name": ["hard-batches"]}), "Unknown selection ['hard-batches']"),
    "a strategy without a name": (read(selection={}), "Unknown selection None"),
    "a schedule by name": (read(schedule={"name": "step"}), "Unknown setting of schedule 'name'"),
    "an unknown setting": (read(epoch=3), "did you mean 'epochs'"),
    "no object": (lambda: hj.TrainConfig.from_dict("{}"), "settings='{}' to be a JSON object"),
    "a key that is a number": (lambda: hj.TrainConfig.from_dict({1: 2}), "Unknown setting 1"),
    "delta an array": (lambda: HardBatches(np.zeros(300)), "to be a number"),
    "delta beyond float64": (lambda: HardBatches(HUGE), "to be a number"),
    "delta nan": (lambda: HardBatches(float("nan")), "delta=nan in (0, 1]"),
    "decay not rising": (lambda: hj.Schedule("step", (0.5, 0.5)), "decay_at=(0.5, 0.5) to rise"),
    "decay of two axes": (lambda: hj.Schedule("step", np.zeros((2, 2))), "to be a list of numbers"),
    "pad too large to write out": (lambda: hj.Augmentation(pad=HUGE), "to be a whole number of 64 bits or None"),
    "share nan": (lambda: Trimming(end=float("nan")), "end=nan in (0, 1]"),
    "measuring never": (lambda: FisherMeasure(every=0), "every=0 to be a whole number of at least 1"),
    "tolerance 1": (lambda: FisherMeasure(tolerance=Fraction(1)), "tolerance=1.0 in [0, 1)"),
    "steps of a dispatch": (lambda: hj.Performance(steps_per_dispatch=0), "steps_per_dispatch=0"),
    "saving at no test point": (
        lambda: hj.Performance(save_every=0),
        "save_every=0 to be a whole number of at least 1",
    ),
    "saving soon": (
        lambda: hj.Performance(save_every="soon"),
        "save_every='soon' to be a number of test points, a time",
    ),
    "saving in the past": (lambda: hj.Performance(save_every="-5min"), "save_every='-5min' to be"),
    "saving by a truth value": (lambda: hj.Performance(save_every=True), "save_every=True to be"),
    "no disk for checkpoints": (lambda: hj.Performance(checkpoint_gigabytes=0), "checkpoint_gigabytes=0.0 to be a"),
    "a run of a mapping": (lambda: hj.run({"epochs": 1}), "config={'epochs': 1} to be a TrainConfig"),
    "a run of arrays": (lambda: hj.run(hj.TrainConfig(), dataset=IMAGES), "to be a Dataset"),
    "a run from a number": (lambda: hj.run(hj.TrainConfig(), variables=3), "variables=3 to be a Mapping"),
    "a run at any speed": (lambda: hj.run(hj.TrainConfig(), performance={}), "performance={} to be a Performance"),
    "going on with nothing": (lambda: hj.run(hj.TrainConfig(), resume=True), "Expected output= with resume=True"),
    "a share of a loss": (lambda: hj.trimming.trimmed_mean(np.ones(4), 1.5), "keep_count=1.5 to be a whole number"),
    "measures of no batch": (lambda: hj.fisher.measures(np.ones(4), 0.1, 0), "batch_size=0 to be a finite number"),
    "measures at no rate": (lambda: hj.fisher.measures(np.ones(4), math.nan, 4), "learning_rate=nan to be a finite"),
    "weights that are a number": (lambda: hj.models.from_torch("resnet8", 3), "state_dict=3 to be a mapping"),
    "a thousand decays": (lambda: hj.Schedule(decay_at=tuple(range(1000))), "to rise within (0, 1)"),
    "evaluation too large": (lambda: hj.Performance(eval_batch_size=HUGE), "to be a whole number of 64 bits"),
}

DATA = {
    "no images": (arrays(None), "shape (n, H, W, C)"),
    "images a list of whole numbers": (arrays(IMAGES.tolist()), "dtype uint8 or float (0..1), got int64"),
    "images of text": (arrays(IMAGES.astype(str)), "dtype uint8 or float"),
    "complex images": (arrays(IMAGES.astype(complex)), "got complex128"),
    "images up to 200 as floats": (arrays(IMAGES.astype(float)), "values from 105 to 200"),
    "images with nan": (arrays(IMAGES * np.nan), "got 96 NaN or infinite values"),
    "images of several lengths": (arrays([[1], [1, 2]]), "train images as an array: "),
    "images behind a mask": (arrays(np.ma.masked_array(IMAGES, IMAGES > 190)), "without masked values, got 10 of them"),
    "images of one axis": (arrays(np.zeros(6, np.uint8)), "got (6,)"),
    "images without pixels": (arrays(IMAGES[:, :0]), "at least one train image"),
    "images of two sizes": (arrays(test=IMAGES[:, 1:]), "one shape (H, W, C), got (4, 4, 1) and (3, 4, 1)"),
    "images of two dtypes": (arrays(test=IMAGES / 255), "one dtype"),
    "images of two scales": (arrays(test=IMAGES // 200), "one scale"),
    "labels as floats": (arrays(labels=LABELS / 1), "test labels of floats like those of train"),
    "labels of one class in each column": (arrays(labels=np.eye(6, 3, dtype=int)), "of shape (6, 3)"),
    "labels too few": (arrays(labels=LABELS[:5]), "as many train labels as images, got 5 and 6"),
    "labels below 0": (arrays(labels=LABELS - 1, num_classes=3), "train labels in [0, 3), got -1"),
    "a label that decides all": (arrays(labels=LABELS + 2**62), "below the number of training labels"),
    "labels of tests beyond": (arrays(test_labels=LABELS + 1), "test labels in [0, 3), got 3"),
    "classes too many": (arrays(num_classes=2**31), "num_classes=2147483648 to be at most 2^20"),
    "classes as text": (arrays(class_names="abc"), "class_names='abc' to be a list of texts"),
    "a flip that is text": (arrays(flip="no"), "flip='no' to be True or False"),
    "more training samples than there are": (some_of(7), "train_samples=7 to be at most the 6 samples"),
    "one training sample": (some_of(1), "train_samples=1"),
    "training samples by a seed below 0": (some_of(4, seed=-1), "seed=-1"),
    "validation of nothing": (held_out(0.01), "validation=0.01 of 6 samples leaves a split empty"),
    "validation of all": (held_out(0.99), "leaves a split empty"),
    "validation an array": (held_out(np.zeros(1000)), "in [0, 1)"),
    "validation beyond float64": (held_out(10**400), "in [0, 1)"),
    "validation by a seed below 0": (held_out(0.5, seed=-1), "seed=-1"),
    "a data set by number": (lambda: hj.data.load(3), "Unknown dataset 3"),
    "a folder by number": (lambda: hj.data.load("mnist", 3), "data_dir=3 to be a folder"),
}


@pytest.mark.parametrize("call, words", [*(CONFIGURATION | DATA).values()], ids=[*(CONFIGURATION | DATA)])
def test_of_the_library(call, words):
    with pytest.raises(Refusal) as caught:
        call()
    text = str(caught.value)
    assert words in text and len(text) < 500 and not re.search(r"[\x00-\x1f\x7f]", text)


# Folders, made before the command is given.


def a_run(folder: Path, content=None) -> None:
    """A run's folder of which only the configuration is there."""
    (folder / "run").mkdir()
    plain = hj.TrainConfig(model_options={"widths": [8]}, measure=FisherMeasure()).to_dict()
    (folder / "run" / "config.json").write_bytes(json.dumps(plain).encode() if content is None else content)


def with_config(content: bytes):
    return lambda folder: a_run(folder, content)


def with_spectra(content: bytes):
    def make(folder: Path) -> None:
        a_run(folder)
        (folder / "run" / "spectra.jsonl").write_bytes(content)

    return make


def with_checkpoint(make_it):
    def make(folder: Path) -> None:
        a_run(folder, b'{"model_options": {"widths": [8]}}')
        make_it(folder / "run" / "checkpoint")

    return make


def linked(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "config.json").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")


def instead(folder: Path) -> None:
    """Directories where files are."""
    (folder / "run" / "config.json").mkdir(parents=True)


def a_file(folder: Path) -> None:
    (folder / "file").write_text("")


def another_tools(folder: Path) -> None:
    (folder / "out" / "checkpoint").mkdir(parents=True)


def locked(folder: Path) -> None:
    a_run(folder)
    (folder / "run" / "config.json").chmod(0)


def prepared(info):
    def make(folder: Path) -> None:
        where = folder / "data" / "mnist" / "3.0.1"
        where.mkdir(parents=True)
        (where / "dataset_info.json").write_bytes(info if isinstance(info, bytes) else json.dumps(info).encode())

    return make


SPLITS = [{"name": name, "shardLengths": ["3"]} for name in ("train", "test")]
MNIST = ("train", "--dataset", "mnist", "--data-dir", "data")
MEASURE = ("measure", "run", "--batches", "0")
FINAL = ("measure", "run", "--batches", "1")

FILES = {
    "no such run": (None, MEASURE, "No run in 'run'"),
    "a file for a run": (a_file, ("measure", "file"), "No run in 'file'"),
    "a run of an address": (None, ("measure", "gs://bucket/run"), "not an address"),
    "a run without a name": (None, ("measure", ""), "run='' to be a folder"),
    "a run with too long a name": (None, ("measure", LONG), "File name too long"),
    "a run behind a link to itself": (linked, ("measure", "loop"), "loop"),
    "a configuration behind a dangling link": (linked, MEASURE, "No run in 'run'"),
    "a folder for the configuration": (instead, MEASURE, "No run in 'run'"),
    "an empty configuration": (with_config(b""), MEASURE, "Damaged config.json in 'run'"),
    "a configuration of junk": (with_config(JUNK), MEASURE, "Damaged config.json in 'run'"),
    "a configuration in UTF-16": (with_config("{}".encode("utf-16")), MEASURE, "Damaged config.json"),
    "a configuration that is a list": (with_config(b"[1]"), MEASURE, "no JSON object"),
    "a configuration of many digits": (
        with_config(b'{"epochs": ' + b"9" * 6000 + b"}"),
        MEASURE,
        "Damaged config.json",
    ),
    "a configuration cut short": (with_config(b'{"epochs": 3'), MEASURE, "Damaged config.json in 'run'"),
    "a configuration of an infinity": (with_config(b'{"epochs": 1e999}'), MEASURE, "epochs=inf to be a whole number"),
    "a configuration of a strategy of one's own": (
        with_config(b'{"selection": {"name": "Mine"}}'),
        MEASURE,
        "Unknown selection 'Mine'",
    ),
    "a comparison for a run": (with_config(b'{"arms": []}'), MEASURE, "holds a comparison"),
    "no spectra": (a_run, MEASURE, "No spectra in 'run'"),
    "spectra of junk": (with_spectra(JUNK + b"\n{}\n"), MEASURE, "Damaged spectra.jsonl in 'run'"),
    "spectra of something else": (with_spectra(b"{}\n"), MEASURE, "Damaged spectra.jsonl in 'run'"),
    "options of final states without any": (a_run, (*MEASURE, "--float64"), "--float64 goes with final states"),
    "a batch below 0": (a_run, ("measure", "run", "--batches", "-1"), "batches=-1"),
    "a tolerance that is no number": (a_run, ("measure", "run", "--tolerance", "nan"), "tolerance=nan in [0, 1)"),
    "a result over its own run": (a_run, ("measure", "run", "--output", "run"), "already holds a run"),
    "an output that is a file": (a_file, ("train", "--output", "file"), "it is a file"),
    "an output in a file": (a_file, ("train", "--output", "file/run"), "to be a folder to write in"),
    "an output behind a link to itself": (linked, ("train", "--output", "loop"), "loop"),
    "an output behind a dangling link": (
        linked,
        ("train", "--output", "run/config.json"),
        "to be a folder to write in",
    ),
    "an output that nobody may write": (None, ("train", "--output", "/proc/run"), "to be a folder to write in"),
    "an output without a name": (None, ("train", "--output", ""), "output='' to be a folder"),
    "an output at an address": (None, ("train", "--output", "s3://bucket"), "not an address"),
    "an output with too long a name": (None, ("train", "--output", LONG), "File name too long"),
    "an output with a zero byte": (None, ("train", "--output", "a\0b"), "to be a folder"),
    "an output of another tool": (another_tools, ("train", "--output", "out", "--overwrite"), "not written by hardjax"),
    "data of an address": (None, ("train", "--data-dir", "gs://bucket"), "not an address"),
    "data that is not there": (None, MNIST, "hardjax data prepare mnist --data-dir data"),
    "data in a file": (a_file, (*MNIST[:-1], "file"), "No prepared mnist in file"),
    "data with too long a name": (None, (*MNIST[:-1], LONG), "File name too long"),
    "data with an empty description": (prepared(b""), MNIST, "unreadable dataset_info.json"),
    "data with a description of junk": (prepared(JUNK), MNIST, "unreadable dataset_info.json"),
    "data with a description of something else": (prepared({"splits": 3}), MNIST, "unreadable dataset_info.json"),
    "data in another format": (
        prepared({"name": "mnist", "splits": [], "fileFormat": "tfrecord"}),
        MNIST,
        "stored as tfrecord",
    ),
    "data without a split": (
        prepared({"name": "mnist", "splits": SPLITS[:1], "fileFormat": "array_record"}),
        ("data", "check", *MNIST[2:]),
        "has 0 of 1 files of split 'train'",
    ),
    "data without its files": (
        prepared({"name": "mnist", "splits": SPLITS, "fileFormat": "array_record"}),
        MNIST,
        "has 0 of 1 files",
    ),
    "a configuration that may not be read": (locked, MEASURE, "to be readable: Permission denied"),
}

_CHECKPOINTS = {  # behind a compiled initial state
    "no checkpoint": (with_checkpoint(lambda path: None), FINAL, "No checkpoint in 'run'"),
    "a file for the checkpoint": (with_checkpoint(Path.touch), FINAL, "No checkpoint in 'run'"),
    "an empty checkpoint": (with_checkpoint(Path.mkdir), FINAL, "No checkpoint in 'run'"),
}

COMMANDS = {
    "an unknown command": ("trian", "Unknown command 'trian'; did you mean 'train'?"),
    "an option for a command": ("--epochs 3", "Unknown command '--epochs'"),
    "a command in capitals": ("TRAIN", "Unknown command 'TRAIN'"),
    "an unknown option": ("train --epoch 3", "Unknown option '--epoch'; did you mean '--epochs'?"),
    "an unknown option with =": ("train --epoch=3", "Unknown option '--epoch'; did you mean '--epochs'?"),
    "an unknown letter": ("train -e 3", "Unknown option '-e'. `hardjax train --help`"),
    "an option of another command": ("train --deltas 0.5", "Unknown option '--deltas'; did you mean '--delta'?"),
    "an option of a group": ("train --data.dataset mnist", "did you mean '--dataset'"),
    "an option before its action": ("data --data-dir x list", "Unexpected --data-dir in this place"),
    "an option of the parser": ("train --tyro-print-completion foo", "Unknown option '--tyro-print-completion'"),
    "a word too many": ("train mnist", "Unexpected 'mnist'; `hardjax train --help`"),
    "a run after the options": ("measure a --batches 1 b", "Unexpected 'b'"),
    "an unknown action": ("data lst", "Unknown action of data 'lst'; did you mean 'list'?"),
    "no action": ("data", "Expected one of {list, prepare, check}"),
    "no name": ("data check", "Missing from hardjax data check"),
    "no run": ("measure", "Name at least one folder"),
    "no run to show": ("show", "Name at least one folder"),
    "a run to show that is none": ("show nothing", "No run or comparison in 'nothing'"),
    "no value": ("train --epochs", "Missing value for argument '--epochs'"),
    "an option for a value": ("train --output --quiet", "Missing value for argument '--output'"),
    "a word for a number": ("train --epochs three", "--epochs 'three' to be a whole number"),
    "nothing for a number": ("train --epochs=", "--epochs '' to be a whole number"),
    "a fraction for a whole number": ("train --epochs 1.5", "--epochs '1.5' to be a whole number"),
    "an exponent for a whole number": ("train --seed 1e3", "--seed '1e3' to be a whole number"),
    "digits of another script": (f"train --epochs {FULL_WIDTH}", "to be a whole number"),
    "rates of another script": (f"train --learning-rate {FULL_WIDTH}", "to be a number"),
    "a number of 6000 digits": (f"train --epochs {'9' * 6000}", "to be a whole number"),
    "a word among numbers": ("compare --deltas 0.5 x", "--deltas 'x' to be a number"),
    "a word where nothing is the default": ("train --gram-chunk all", "--gram-chunk 'all' to be a whole number"),
    "a value for a switch": ("train --quiet=no", "without a value: give --quiet or --no-quiet"),
    "a value behind a switch": ("train --evaluate-train false", "--evaluate-train without a value, got 'false'"),
    "a switch in front of a run": ("measure --float64=no run", "without a value: give --float64 or --no-float64"),
    "a rate that is nan": ("train --learning-rate nan", "learning_rate=nan to be a finite number above 0"),
    "a rate that is inf": ("train --learning-rate inf", "learning_rate=inf"),
    "a rate beyond float64": ("train --learning-rate 1e400", "learning_rate=inf"),
    "a rate below float64": ("train --learning-rate 1e-400", "learning_rate=0.0"),
    "a rate below 0": ("train --learning-rate -0.1", "learning_rate=-0.1"),
    "two rates": ("train --learning-rate 1 --base-learning-rate 1", "not both"),
    "no epochs": ("train --epochs 0", "epochs=0"),
    "epochs below 0": ("train --epochs -3", "epochs=-3"),
    "steps beyond 2^31": ("train --epochs 1000000000", "to be fewer than 2^31 steps in all"),
    "a seed beyond 2^32": ("train --seed 4294967296", "seed=4294967296 below 2^32"),
    "a seed beyond 2^64": ("train --seed 18446744073709551616", "to be a whole number of 64 bits"),
    "a seed below 0": ("train --seed -1", "seed=-1"),
    "seeds beyond 2^32": ("compare --seed 4294967295 --seeds 3", "seed=4294967297 below 2^32"),
    "no seeds": ("compare --seeds 0", "seeds=0"),
    "a batch larger than the data": ("train --batch-size 5000", "at most the 1437 training samples"),
    "more training samples than the digits": ("train --train-samples 1438", "at most the 1437 samples of digits"),
    "no training samples": ("train --train-samples 0", "train_samples=0"),
    "a validation share of nothing": ("train --validation 1e-9", "leaves a split empty"),
    "a validation share of all": ("train --validation 1", "validation=1.0 in [0, 1)"),
    "a validation share that is nan": ("train --validation nan", "validation=nan in [0, 1)"),
    "an unknown data set": ("train --dataset digit", "did you mean 'digits'"),
    "a data set without a name": ("train --dataset=", "Unknown dataset ''"),
    "data not prepared": ("train --dataset cifar10", "hardjax data prepare cifar10"),
    "data checked that is not prepared": ("data check mnist", "hardjax data prepare mnist"),
    "data that needs no preparation": ("data prepare digits", "needs no preparation"),
    "an unknown network": ("train --model resnet21", "did you mean 'resnet"),
    "an unknown option of a network": ("train --model-option depth=3", "option of mlp 'depth'"),
    "an option that is not the network's": (
        "train --model-option num_classes=3",
        "model_options without num_classes=3",
    ),
    "an unknown option before the data": (
        "train --dataset cifar10 --model-option depth=3",
        "option of mlp 'depth'",
    ),
    "an option without a value": ("train --model-option widths", "key=value"),
    "an option without a name": ("train --model-option =3", "key=value"),
    "an option given twice": ("train --model-option widths=[8] widths=[9]", "'widths' once"),
    "a width that is no list": ("train --model-option widths=8", "widths=8 to be a sequence"),
    "a width of 0": ("train --model-option widths=[0]", "widths[0]=0"),
    "a width that is nan": ("train --model-option widths=[NaN]", "to be plain JSON"),
    "a width beyond float64": ("train --model-option widths=[1e400]", "to be plain JSON"),
    "a width of 6000 digits": (f"train --model-option widths=[{'9' * 6000}]", "with fewer digits or lists"),
    "widths nested for ever": (f"train --model-option widths={'[' * 50000}", "with fewer digits or lists"),
    "a normalisation that is none": ("train --model-option norm=bacth", "did you mean 'batch'"),
    "statistics that do not divide": (
        "train --model-option norm=batch norm_batch_size=7",
        "norm_batch_size=7 to divide the batch",
    ),
    "an unknown strategy": ("train --selection hard-batch", "did you mean 'hard-batches'"),
    "a share above 1": ("train --selection hard-batches --delta 1.5", "delta=1.5 in (0, 1]"),
    "a share of 0": ("train --selection hard-batches --delta 0", "delta=0.0 in (0, 1]"),
    "shares above 1": ("compare --deltas 2", "delta=2.0 in (0, 1]"),
    "an unknown control": ("compare --controls rnadom", "did you mean 'random'"),
    "an unknown method": ("compare --methods trimed", "did you mean 'trimmed'"),
    "trimming to 0": ("train --trim-end 0", "end=0.0 in (0, 1]"),
    "trimming upwards": ("train --trim-end 0.8 --trim-start 0.5", "end=0.8 to be at most start=0.5"),
    "trimming single samples": ("train --trim-end 0.5 --batch-size 1", "batch_size=1 to be at least 2"),
    "batch size beside a plan": ("train --batch-size 128 --batch-plan 16-32", "Give --batch-size 128 or --batch-plan"),
    "methods on single samples": ("compare --methods trimmed --batch-size 1", "batch_size=1 to be at least 2 with tr"),
    "a frame too small": ("train --frame 4", "frame=4 to hold images of 8x8"),
    "an image too large": ("train --resize 100000", "resize=100000 to be at most 2^14"),
    "a place without a frame": ("train --place random", "place='random', got frame=None"),
    # What nothing would read.
    "a share that nothing reads": (
        "train --delta 0.5",
        "--delta 0.5 goes with hard-batches, random-batches, hard-samples",
    ),
    "fixed batches of another strategy": ("train --fixed --selection hard-batches", "--fixed goes with all-batches"),
    "a control that nothing reads": ("train --trim-keep random", "--trim-keep random goes with --trim-end"),
    "a measure that nothing takes": ("train --measure-rows frozen", "--measure-rows frozen goes with --measure-every"),
    "to go on and to overwrite": ("train --resume --overwrite", "--overwrite) or resume=True (--resume), not both"),
    "to go on with a comparison and not": ("compare --resume --overwrite", "(--resume), not both"),
    "saving never": ("train --save-every never", "save_every='never' to be a number of test points, a time such as"),
    "saving at no test point": ("compare --save-every 0", "save_every=0 to be a whole number of at least 1"),
    "no disk at all": ("train --checkpoint-gigabytes -1", "checkpoint_gigabytes=-1.0 to be a finite number above 0"),
    "a network wider than 64 bits": (
        "train --model-option widths=[9223372036854775807]",
        "Expected a network that some memory holds, got one of",
    ),
    "a chunk that nothing reads": ("train --gram-chunk 4", "--gram-chunk 4 goes with --measure-every"),
    "momentum that nothing reads": (
        "train --optimizer adam --momentum 0.5",
        "--momentum goes with --optimizer momentum or nesterov, not with adam",
    ),
    "a decay that nothing reads": ("train --decay-at 0.3", "--decay-at goes with --schedule step, not with constant"),
    "a factor that nothing reads": ("compare --decay-factor 0.3", "--decay-factor goes with --schedule step"),
    "trimming that nothing reads": ("compare --methods standard --trim-end 0.5", "--trim-end goes with --methods"),
    "a chunk of no population": ("sweep --population-chunk 4", "--population-chunk goes with --population vmap, map"),
    "a chunk of workers": ("sweep --population workers --population-chunk 4", "not with workers: one by one"),
    "a sweep drawn and given": ("sweep --plot runs --seeds 3", "Give --plot without --seeds: it trains nothing"),
    "waiting for nobody": ("train --lost-after 5", "--lost-after goes with several processes: --coordinator"),
    "a comparison without its curve": ("compare --no-evaluate-train", "evaluate_train=True in a comparison"),
    "two comparisons": ("compare --methods trimmed --deltas 0.5", "--methods trimmed or --deltas and --controls"),
}


def _listing(folder: Path) -> dict[str, object]:
    """Everything below a folder; of a file its size and time, of a link where it points to."""
    found = {}
    for where, folders, names in os.walk(folder):
        for path in (Path(where) / name for name in folders + names):
            about = path.lstat()
            found[str(path)] = os.readlink(path) if path.is_symlink() else (about.st_size, about.st_mtime_ns)
    return found


def _refused(capsys, folder: Path, arguments, words: str) -> None:
    before = _listing(folder)
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert stop.value.code == 2, err
    assert err.startswith("hardjax: ") and err.count("\n") == 1 and words in err and len(err) < 500
    assert out == "" and _listing(folder) == before


@pytest.fixture
def workplace(tmp_path, tmp_path_factory, monkeypatch):
    """An empty working folder; the user's cache and data folders stay out of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HARDJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("data")))
    monkeypatch.setattr(prepare, "use_compilation_cache", lambda: None)
    return tmp_path


@pytest.mark.parametrize("line, words", [*COMMANDS.values()], ids=[*COMMANDS])
def test_of_the_command_line(workplace, capsys, line, words):
    _refused(capsys, workplace, line.split(" "), words)


@pytest.mark.parametrize(
    "make, arguments, words",
    [*FILES.values(), *(pytest.param(*case, marks=pytest.mark.ci) for case in _CHECKPOINTS.values())],
    ids=[*FILES, *_CHECKPOINTS],
)
def test_of_files_and_folders(workplace, capsys, request, make, arguments, words):
    if make is locked and os.geteuid() == 0:
        pytest.skip("nothing is locked for the superuser")
    if make is not None:
        make(workplace)
    _refused(capsys, workplace, arguments, words)
