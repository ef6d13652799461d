"""README and the site: their examples run as written, what they name exists, the site builds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "experiments/README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


def _execute(page: str, code: str) -> None:
    exec(compile(code, page, "exec"), {"__name__": "readme"})


def test_the_readme_example_runs_as_written(capsys):
    replay, _ = _examples("README.md")
    assert len(replay.strip().splitlines()) <= 10
    _execute("README.md", replay)
    printed = capsys.readouterr().out
    assert "replayed most often:" in printed and float(printed.split()[0]) > 80


@pytest.mark.ci
def test_a_network_of_ones_own_takes_ten_lines(capsys):
    _, own = _examples("README.md")
    assert len(own.strip().splitlines()) <= 10
    _execute("README.md", own)
    top1, measured = capsys.readouterr().out.split(maxsplit=1)
    assert float(top1) > 80 and measured.startswith("[") and "nan" not in measured.split("]")[0].split()[-1]


@pytest.mark.ci
@pytest.mark.parametrize(
    "page, index, says",
    [
        ("docs/bring-your-own.md", 0, r"^\d"),
        ("docs/bring-your-own.md", 1, r"\(16, 16\)"),
        ("docs/bring-your-own.md", 2, r"^\d"),
        ("docs/bring-your-own.md", 3, r"\d .*\d"),
        ("docs/bring-your-own.md", 4, r"\[.*\]"),
        ("docs/papers.md", 0, "condition_number.*covariance"),
        ("docs/guarantees.md", 0, r"at \d\d places"),
        ("docs/sweep.md", 0, r"8 rows, 0 failed, \d+\.\d* %"),
        ("docs/sweep.md", 1, r"\[\d+\.\d*(, \d+\.\d*){3}\]"),
    ],
)
def test_the_examples_of_the_site_run_as_written(page, index, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write
    _execute(page, _examples(page)[index])
    assert re.search(says, capsys.readouterr().out, re.S)


def test_every_example_of_the_site_is_among_them():
    counts = {str(page.relative_to(ROOT)): len(_examples(page)) for page in PAGES}
    assert {page: count for page, count in counts.items() if count} == {
        "README.md": 2,
        "docs/bring-your-own.md": 5,
        "docs/papers.md": 1,
        "docs/guarantees.md": 1,
        "docs/sweep.md": 2,
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_name_files_that_exist(page):
    text = page.read_text()
    for path in re.findall(r"(?<![\w./])(?:scripts|experiments|hardjax|tests|docs)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target


def test_what_every_project_has():
    assert (ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
    citation = (ROOT / "CITATION.cff").read_text()
    assert citation.startswith("cff-version: 1.2.0") and citation.count("notes: P") == 4


@pytest.mark.ci
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "experiments" / "index.html").exists()
