"""Tests that a GPU would pass: what is asked of it, and what is left to a CPU."""

import re
from pathlib import Path

import platforms
import pytest


def test_a_gpu_asked_for_computes_in_float32_and_twice_alike():
    asked = {"JAX_PLATFORMS": "cuda,cpu", "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=true"}
    added = platforms.settings(asked)
    flags = added.pop("XLA_FLAGS").split()
    assert added == {"NVIDIA_TF32_OVERRIDE": "0"}
    # The last of equal flags counts: the one that was asked for.
    assert "--xla_gpu_deterministic_ops=true" in flags and flags[-1] == "--xla_gpu_enable_triton_gemm=true"


@pytest.mark.parametrize("asked", [{}, {"JAX_PLATFORMS": ""}, {"JAX_PLATFORMS": "cpu"}], ids=str)
def test_a_cpu_is_left_as_it_is(asked):
    assert platforms.settings(asked) == {}


def test_tolerances_are_those_stated_on_cpu_and_wider_elsewhere():
    assert platforms.near(rtol=1e-5, atol=1e-7, on="cpu") == {"rtol": 1e-5, "atol": 1e-7}
    wider = platforms.near(rtol=1e-5, atol=1e-7, on="gpu")
    assert wider == pytest.approx({"rtol": 2e-4, "atol": 2e-6})
    assert wider["rtol"] < 2**-11, "TF32 rounds to eleven bits, and may not pass unseen"


def test_equal_bits_are_left_to_a_cpu_by_name():
    sources = (file.read_text() for file in Path(__file__).parent.rglob("test_*.py"))
    names = {name for source in sources for name in re.findall(r"def (test_\w+)", source)}
    assert not platforms.EQUAL_BITS_ON_CPU_ALONE - names
    name = "test_a_run_cut_anywhere_equals_an_uncut_one"
    assert platforms.not_here(name, "cpu") is None and "not on gpu" in platforms.not_here(name, "gpu")
    assert platforms.not_here("test_equal_bits_are_left_to_a_cpu_by_name", "gpu") is None
