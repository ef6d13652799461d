"""The direction of imports: each wing imports only what stands below it, and a wing that does not is found."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _lint(root: Path) -> subprocess.CompletedProcess:
    """import-linter over the package in that folder (it would take the installed one otherwise)."""
    command = [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports_command as run; run()"]
    settings = ["--no-cache", "--config", str(root / "pyproject.toml")]
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.run([*command, *settings], cwd=root, env=environment, capture_output=True, text=True)


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(ROOT / "hardjax", tmp_path / "hardjax", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_point_downwards():
    found = _lint(ROOT)
    assert found.returncode == 0 and "1 kept, 0 broken" in found.stdout, found.stdout + found.stderr


@pytest.mark.parametrize(
    "lower, statement, higher",
    [
        ("choose/selection.py", "from hardjax.engine import plan as _up", "hardjax.engine"),
        ("fisher/gram.py", "def _late():\n    import hardjax.training.loop", "hardjax.training"),
        ("models/layers.py", "import hardjax.data.dataset", "hardjax.data"),  # beside it, not below
    ],
)
def test_an_import_upwards_is_found(copied, lower, statement, higher):
    file = copied / "hardjax" / lower
    file.write_text(f"{file.read_text()}\n{statement}\n")
    found = _lint(copied)
    assert found.returncode == 1 and "0 kept, 1 broken" in found.stdout, found.stdout + found.stderr
    assert f"hardjax.{lower.split('/')[0]} is not allowed to import {higher}" in " ".join(found.stdout.split())


def test_a_wing_that_no_layer_names_is_found(copied):
    (copied / "hardjax" / "extras").mkdir()
    (copied / "hardjax" / "extras" / "__init__.py").write_text('"""Nobody said where this stands."""\n')
    found = _lint(copied)
    assert found.returncode == 1 and "hardjax.extras" in found.stdout, found.stdout + found.stderr


def test_no_module_takes_a_public_name_from_the_package():
    """`from hardjax import data` imports all wings at once, the higher ones too: a module that does it cannot be the
    first to be imported, and drags everything into what needs little."""
    found = [
        f"{path.relative_to(ROOT)}: {name.name}"
        for path in sorted((ROOT / "hardjax").rglob("*.py"))
        if path != ROOT / "hardjax" / "__init__.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "hardjax" and not node.level
        for name in node.names
        if not name.name.startswith("_")
    ]
    assert not found


def test_a_module_in_the_middle_is_imported_first():
    code = "import hardjax.training.setting, sys; assert 'hardjax.training.run' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
