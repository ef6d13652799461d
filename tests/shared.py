"""Files of the shared folder: reference outputs and published numbers, kept outside the repository."""

import os
from pathlib import Path

import pytest


def shared(path: str) -> Path:
    """The file, or a skip with a reason: HARDJAX_SHARED, or `shared` beside the repository."""
    root = Path(os.environ.get("HARDJAX_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (root / path).exists():
        pytest.skip(f"{path} is not in {root} (set HARDJAX_SHARED)")
    return root / path
