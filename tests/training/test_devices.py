"""Several devices: the cases of eight_devices.py, in a process that has so many, and what follows from one."""

import os

import jax
import numpy as np
import pytest
from processes import ROOT, Child

import hardjax as hj
from hardjax.engine import devices

CASES = ROOT / "tests/training/eight_devices.py"
# Eight devices on two cores meet each other late: the time that XLA waits for them is raised.
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_collective_timeout_seconds=1200"
    " --xla_cpu_collective_call_terminate_timeout_seconds=1200 --xla_cpu_collective_call_warn_stuck_timeout_seconds=600"
)


def _passes(monkeypatch, *arguments):
    monkeypatch.setenv("XLA_FLAGS", FLAGS)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:  # of the process that starts this one
        monkeypatch.delenv(name)
    child = Child("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", CASES, *arguments)
    assert child.ends(3600) == 0, child.printed[-5000:]
    return child.printed


def test_eight_devices_do_what_one_does_under_replay(monkeypatch):
    assert "1 passed" in _passes(monkeypatch, "-k", "test_eight_devices_do_what_one_does and hard and batches")


@pytest.mark.ci
def test_every_case_on_eight_devices(monkeypatch):
    assert "27 passed" in _passes(monkeypatch)


def test_one_device_is_taken_where_there_is_one(tiny):
    result = hj.run(hj.TrainConfig(epochs=1, batch_size=8), dataset=tiny, progress=False)
    assert result.summary["devices"] == len(devices.visible()) or jax.device_count() > 1


@pytest.mark.parametrize(
    ("asked", "sizes", "expected"),
    [
        (None, (16,), 4),
        (None, (6, 9), 3),
        (None, (7,), 1),
        (2, (16,), 2),
        (1, (7,), 1),
    ],
)
def test_how_many_devices_a_run_takes(monkeypatch, asked, sizes, expected):
    monkeypatch.setattr(devices, "visible", lambda: list("abcd"))
    assert devices.count_for(asked, *sizes) == expected


def test_devices_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(devices, "visible", lambda: list("abcd"))
    with pytest.raises(
        ValueError, match=r"devices=4 to divide the samples of a batch \(6 and 12\); allowed here: 1, 2, 3"
    ):
        devices.count_for(4, 6, 12)
    with pytest.raises(ValueError, match="devices=5 to be at most the 4 visible"):
        devices.count_for(5, 10)
    with pytest.raises(ValueError, match="devices=0 to be a whole number of at least 1"):
        hj.Performance(devices=0)
    monkeypatch.setattr(devices, "visible", lambda: ["a"])
    with pytest.raises(ValueError, match="devices=2 to be at most the 1 visible"):
        devices.count_for(2, 4)


def test_other_generators_of_random_numbers_stay_on_one_device(monkeypatch):
    monkeypatch.setattr(devices, "visible", lambda: list("abcd"))
    with jax.default_prng_impl("rbg"):
        assert devices.count_for(None, 16) == 1
        with pytest.raises(ValueError, match="one device with jax_default_prng_impl='rbg', whose draws depend on the"):
            devices.count_for(4, 16)
        # Of several processes none may be left to train the run alone.
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(ValueError, match="one device with jax_default_prng_impl='rbg'"):
            devices.count_for(None, 16)


def test_rows_are_filled_up_to_the_devices():
    """On the one device there is, a mesh of it."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), (devices.BATCH,))
    rows = jax.numpy.arange(6).reshape(3, 2)
    np.testing.assert_array_equal(devices.put_shares(rows, mesh), rows)
    assert devices.put_shares(rows, None) is rows and devices.put(rows, None) is rows
    assert not devices.shares(rows) and not devices.shares(jax.ShapeDtypeStruct((3,), rows.dtype))
