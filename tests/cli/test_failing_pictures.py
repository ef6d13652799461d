"""A picture never costs the numbers."""

import json

import pytest
from made_up import falling, made_up

from hardjax.cli import main, prepare

FAST = ["--epochs", "1", "--batch-size", "64", "--model-option", "widths=[8]", "--quiet"]


def _fails(*arguments, **options):
    raise RuntimeError("no font\nat all")


@pytest.mark.parametrize(
    "arguments, picture, drawing",
    [
        (("compare", "--deltas", "0.5", "--controls", "fixed", "--seeds", "1"), "comparison.png", "arms.comparison"),
        (("compare", "--methods", "trimmed", "--seeds", "1"), "comparison.png", "arms.trimming"),
        (("train", "--selection", "hard-batches"), "hardest.png", "samples.hardest"),
        (("train", "--measure-every", "20"), "measures.png", "fisher.measures"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_that_fails_is_a_line_of_warning(tmp_path, capsys, monkeypatch, arguments, picture, drawing):
    monkeypatch.setenv("HARDJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(f"hardjax.plots.{drawing}", _fails)
    monkeypatch.setattr(
        "hardjax.study.compare.train",
        lambda setting, *rest, **more: made_up(falling(), setting.config.seed, epochs=1),
    )
    with pytest.raises(SystemExit) as stop:
        main([arguments[0], *FAST, *arguments[1:], "--output", str(tmp_path / "run")])
    assert stop.value.code == 0
    shown, told = capsys.readouterr()
    assert f"hardjax: {picture} could not be drawn (RuntimeError: no font at all)\n" in told
    assert json.loads((tmp_path / "run/summary.json").read_text())
    assert not (tmp_path / "run" / picture).exists() and picture not in shown
    assert "top" in shown  # the table
