"""What devices that share a batch send each other, read from the programs that are compiled for them."""

import re
import subprocess
import sys

import jax
import pytest
from processes import ROOT

import hardjax as hj

BATCH, SIDE = 32, 16
DATA = BATCH * SIDE * SIDE * 3  # bytes of a batch's images


def _told(*options):
    """Devices -> (what the steps send as {kind: (times, bytes)}, what is sent outside them)."""
    command = [sys.executable, str(ROOT / "scripts/bench_devices.py"), "--batch", str(BATCH), "--side", str(SIDE)]
    ran = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT)
    if ran.returncode == 3:
        pytest.skip(ran.stderr.strip())
    assert ran.returncode == 0, ran.stderr[-3000:]
    rows = re.findall(r"^\| (\d+) \| (.*) \| [\d,]+ \| (.*) \|$", ran.stdout, re.MULTILINE)
    found = {}
    for count, step, outside in rows:
        kinds = re.findall(r"(\d+) ([a-z-]+) \(([\d,]+)\)", step)
        found[int(count)] = {kind: (int(times), int(size.replace(",", ""))) for times, kind, size in kinds}, outside
    return found


def _gradient_bytes(norm):
    network = hj.models.create("resnet8", num_classes=10, norm=norm)
    variables = jax.eval_shape(network.init, jax.random.key(0), jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), "float32"))
    return 4 * sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def _check_what_is_sent(norm, *options):
    found = _told("--model", "resnet8", "--norm", norm, *options)
    assert found.pop(1) == ({}, "none")
    for count, (step, outside) in found.items():
        assert outside == "none" and step.keys() == {"all-reduce", "all-gather"}, (count, step, outside)
        (sums, total), gathered = step["all-reduce"], step["all-gather"][1]
        # Gradients in one sum. With batch norm its sums, a few values a channel, forwards and backwards.
        if norm == "group":
            assert (sums, total) == (1, _gradient_bytes(norm)), count
        else:
            assert sums > 1 and 0 < total - _gradient_bytes(norm) < DATA, (count, sums, total)
        # Losses and hits of a batch, 4 bytes and 1 a sample. (A GPU's compiler gathers some small sums instead.)
        least = 5 * BATCH
        assert gathered == least or ("--h100" in options and gathered < least + DATA), (count, gathered)


@pytest.mark.ci
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_step_sends_gradients_and_sums_and_never_the_data(norm):
    _check_what_is_sent(norm, "--devices", "1", "2", "8")


@pytest.mark.ci
def test_of_images_in_parts_each_device_is_sent_those_of_a_batch():
    """The script holds four batches: all of them together would be seen."""
    found = _told("--model", "resnet8", "--norm", "group", "--shard-data", "--devices", "2", "8")
    for count, (step, _) in found.items():
        beside = sum(size for _, size in step.values()) - _gradient_bytes("group") - 5 * BATCH
        # Its images, uint8 or as wider numbers while they are added up, and which they are.
        assert 0 < beside <= 4 * DATA + 64 * BATCH, (count, step)
        assert step.get("all-gather", (0, 0))[1] < DATA, (count, step)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_so_do_programs_for_h100s(norm):
    """In an environment with the compiler for CUDA, as `gpu_programs.py --help` makes it."""
    _check_what_is_sent(norm, "--devices", "1", "4", "--h100")
