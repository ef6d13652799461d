"""What is published: the wheel holds the package and its licence, and works where nothing else of it lies."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*command, str(folder), str(ROOT)], check=True, capture_output=True, text=True)
    (file,) = folder.glob("hardjax-*.whl")
    return file


@pytest.mark.ci
def test_the_wheel_holds_the_package_and_its_licence_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "hardjax").rglob("*.py")}
    assert modules == {name for name in names if name.startswith("hardjax/")}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"hardjax"}


@pytest.mark.ci
def test_the_demo_runs_from_the_wheel_in_an_empty_folder(wheel, tmp_path):
    """Its command, with fewer arms, seeds and epochs."""
    site, folder = tmp_path / "site", tmp_path / "empty"
    folder.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    environment = os.environ | {"PYTHONPATH": str(site)}
    where = [sys.executable, "-c", "import hardjax; print(hardjax.__file__)"]
    place = subprocess.run(where, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout
    assert Path(place.strip()).is_relative_to(site)  # not the checkout, which may be installed as well
    command = (
        "compare --dataset digits --model mlp --model-option widths=[16] --epochs 2 --batch-size 128"
        " --learning-rate 0.01 --deltas 1.0 0.5 --controls fixed --seeds 2 --output demo"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "hardjax", *command.split()], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "hard-batches" in ran.stdout and {file.name for file in folder.iterdir()} == {"demo"}
    assert list((folder / "demo").rglob("*.png")) and list((folder / "demo").rglob("*.json"))


def test_every_tool_that_ci_calls_is_an_extra_with_a_pinned_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]}
    extras = project["optional-dependencies"]
    for extra in ("test", "docs", "ci"):
        for requirement in extras[extra]:
            name = requirement.split(">=")[0].split("[")[0].lower()
            assert name == "hardjax" or name in pinned, requirement
    for name in (requirement.split(">=")[0].lower().replace("_", "-") for requirement in project["dependencies"]):
        assert name in pinned, name
