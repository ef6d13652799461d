import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_readme_examples_run_as_written(capsys):
    replay, spectra = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    for code in (replay, spectra):
        assert len(code.strip().splitlines()) <= 14
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert "replayed most often:" in printed and float(printed.split()[0]) > 80
    assert "condition_number" in printed and "covariance" in printed


def test_the_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"(?:scripts|experiments|hardjax|tests)/[\w./]+\w", text):
        assert (ROOT / path).exists(), path
