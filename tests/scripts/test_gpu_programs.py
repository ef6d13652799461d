"""What is read from a program that was compiled for a GPU, and that it has not become worse."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_programs.py"

# Three steps in a loop, each with a loop of two; a branch that the host chooses; a loop of unknown length.
PROGRAM = """\
HloModule jit_rounds, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

FileNames
1 "rounds.py"

%fused_two (p: f32[4]) -> (f32[4], f32[4], f32[]) {
  %p = f32[4]{0} parameter(0)
  %a = f32[4]{0} add(%p, %p), metadata={op_name="jit(rounds)/while/body/optimiser/add"}
  %b = f32[4]{0} multiply(%p, %p), metadata={op_name="jit(rounds)/while/body/optimiser/mul"}
  %c = f32[] reduce(%p), metadata={op_name="jit(rounds)/while/body/gradient/jvp(loss)/reduce_sum"}
  ROOT %t = (f32[4]{0}, f32[4]{0}, /*index=2*/f32[]) tuple(%a, %b, %c)
}

%fused_pad (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  ROOT %pad = f32[8]{0} pad(%p)
}

%inner (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %sorted = f32[4]{0} custom-call(%p), custom_call_target="__cub$DeviceRadixSort", metadata={op_name="a/data/sort"}
}

%step (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%s), index=1
  %padded = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused_pad
  %conv = (f32[4]{0}, u8[16]{0}) custom-call(%padded), custom_call_target="__cudnn$convForward", \
metadata={op_name="jit(rounds)/while/body/gradient/transpose(jvp(HeResNet))/blocks.0/convolution/conv1/conv"}
  %w = (s32[], f32[4]{0}) while(%s), condition=%two, body=%inner, backend_config={"known_trip_count":{"n":"2"}}
  %dot = f32[4]{0} copy(%x), metadata={op_name="jit(rounds)/while/body/gradient/jvp(HeResNet)/blocks.0/add"}
  %updated = (f32[4]{0}, f32[4]{0}, f32[]) fusion(%x), kind=kLoop, calls=%fused_two
  %i = s32[] fusion(%s), kind=kLoop, calls=%count, metadata={op_name="jit(rounds)/while/body/add"}
  %new = f32[4]{0} get-tuple-element(%updated), index=0, metadata={op_name="jit(rounds)/while/body/optimiser/add"}
  %kept = f32[4]{0} copy(%new)
  ROOT %r = (s32[], f32[4]{0}) tuple(%i, %kept)
}

%branch (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %n = f32[4]{0} copy(%p)
}

%less (p: (s32[], f32[4])) -> pred[] {
  ROOT %l = pred[] fusion(%p), kind=kLoop, calls=%compare
}

ENTRY %main.1 (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %copied = f32[4]{0} copy(%p)
  %w = (s32[], f32[4]{0}) while(%p), condition=%three, body=%step, backend_config={"known_trip_count":{"n":"3"}}
  %chosen = f32[4]{0} conditional(%p, %p, %p), branch_computations={%branch, %branch}
  %again = (s32[], f32[4]{0}) while(%w), condition=%less, body=%branch
  ROOT %out = f32[4]{0} get-tuple-element(%w), index=1
}
"""


@pytest.fixture(scope="module")
def script():
    platforms, level = os.environ.get("JAX_PLATFORMS"), os.environ.get("TF_CPP_MIN_LOG_LEVEL")
    specification = importlib.util.spec_from_file_location("gpu_programs", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules["gpu_programs"] = module  # dataclasses look there
    specification.loader.exec_module(module)
    for name, value in {"JAX_PLATFORMS": platforms, "TF_CPP_MIN_LOG_LEVEL": level}.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    return module


def test_launches_are_counted_where_they_repeat(script):
    found = script.count(PROGRAM, 3)
    # Two sorts of the inner loop; the pad counts for the convolution that reads it; two of the three results of the
    # update are the optimiser's, and so is the copy of one of them that leaves the loop's body.
    assert found.step == {"optimiser": 2, "data": 2, "convolution": 2, "network": 1, "other": 1}
    assert found.kinds == {"copy": 2, "cudnn": 1, "fusion": 3, "sort": 2}
    assert found.launches == 8
    assert found.loops == [3, 2]
    # The copy before, the branch, and predicate and body of the loop of unknown length.
    assert (found.outside, found.unknown, found.transfers) == (4, 1, 1)


def test_what_is_worse_than_before_is_named(script):
    found = script.count(PROGRAM, 3)
    kept = {**vars(found), "step": {"optimiser": 6}, "outside": 3}
    lines = script.worse("mlp, 128, look frozen", found, kept)
    assert lines == ["8 launches a step, 6 before", "4 launches outside the steps, 3 before"]
    assert script.worse("mlp, 128, look frozen", found, vars(found)) == []
    # Of training they are refused, whatever the file says.
    assert script.worse("mlp, 128, round", found, vars(found)) == ["1 loops of unknown length and 1 transfers"]


def test_the_file_keeps_every_program_and_none_waits_for_the_host(script):
    kept = json.loads(script.FILE.read_text())
    keys = {f"{model}, {batch}, {name}" for model, batch, name in script.cases()}
    for programs in kept.values():
        assert set(programs) == keys
        for key, found in programs.items():
            assert script.forbidden(key, script.Found(**found)) == []


@pytest.mark.slow
def test_no_program_launches_more_than_before(script):
    """In an environment with the compiler for CUDA, as `gpu_programs.py --help` makes it."""
    if jax.__version__ not in json.loads(script.FILE.read_text()):
        pytest.skip(f"counts were kept with another jax than {jax.__version__}")
    # A process of its own: JAX looks for platforms once, and the script tells it not to look for GPUs.
    command = [sys.executable, str(SCRIPT), "--check", "--models", "resnet20", "mlp", "--batch", "128"]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode == 3:
        pytest.skip(ran.stderr.strip())
    assert ran.returncode == 0, ran.stderr


def test_the_page_says_what_was_counted():
    """The newest counts of every program; rows with a star say themselves that they are older."""
    (counted,) = json.loads(SCRIPT.with_suffix(".json").read_text()).values()
    page = (SCRIPT.parents[1] / "docs" / "gpu.md").read_text().splitlines()
    heading = next(line for line in page if line.startswith("| network | batch | program"))
    told = 0
    for line in page[page.index(heading) + 2 :]:
        if not line:
            break
        (name, *found), served = _cells(line), _cells(heading)[5:-2]
        batch, program, _, step, *parts, outside, mib = found
        own = counted[f"{name}, {batch}, {program.rstrip('*')}"]
        assert {part: int(count) for part, count in zip(served, parts, strict=True) if count} == own["step"], line
        assert int(step) == sum(own["step"].values()), line
        assert (int(outside), int(mib)) == (own["outside"], round(own["temporary_mib"])), line
        told += 1
    assert told > 40


def _cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]
