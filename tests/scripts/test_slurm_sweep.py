"""The script of a Slurm array, run where there is no Slurm."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/slurm_sweep.sh"


@pytest.fixture
def script(tmp_path):
    """Runs it with these variables and words, and a `hardjax` that prints what it is given."""
    command = tmp_path / "hardjax"
    command.write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\n")
    command.chmod(0o755)

    def run(*words, **variables):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        path = os.pathsep.join([str(tmp_path), kept["PATH"]])
        return subprocess.run(
            ["bash", str(SCRIPT), *words], env=kept | {"PATH": path} | variables, capture_output=True, text=True
        )

    return run


def test_it_hands_its_words_to_a_sweep_with_a_worker_for_each_processor(script):
    words = ("--batch-sizes", "8", "32", "--output", "a folder")
    found = script(*words, SLURM_ARRAY_TASK_ID="3", SLURM_CPUS_PER_TASK="4")
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.splitlines() == ["sweep", "--workers", "4", *words]
    found = script("--output=x", SLURM_ARRAY_TASK_ID="0")
    assert found.stdout.splitlines() == ["sweep", "--workers", "1", "--output=x"]


@pytest.mark.parametrize(
    ("words", "task", "said"),
    [
        ("--output x", None, "to run in a task of an array: sbatch --array=0-7"),
        ("--output x", "all", "to run in a task of an array"),
        ("--seeds 3", "0", "--output DIR, a folder that all nodes share"),
        ("--outputs x", "0", "--output DIR"),
        ("--output x --overwrite", "0", "no --overwrite, which every task would be given"),
        ("--retry-failed --output x", "0", "no --retry-failed"),
        ("--output x --workers=2", "0", "no --workers"),
    ],
)
def test_what_it_refuses(script, words, task, said):
    found = script(*words.split(), **({} if task is None else {"SLURM_ARRAY_TASK_ID": task}))
    assert found.returncode == 2 and found.stdout == ""
    (line,) = found.stderr.splitlines()
    assert line.startswith("slurm_sweep.sh: Expected ") and said in line


def test_it_is_ten_lines():
    assert len(SCRIPT.read_text().splitlines()) == 10
