"""Progress in a log: whole lines, few of them."""

import pytest

from hardjax.training import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets; no line shown before."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.Lines, "_last", float("-inf"))
    return now


def _train(clock, seconds, updates=100, epochs=10):
    with progress.ProgressBar(epochs, steps=50 * epochs) as bar:
        for update in range(1, updates + 1):
            clock[0] += seconds / updates
            bar.update(epochs * update / updates, 1 / update, 90.0)
            if update % 10 == 0:
                bar.tested({"test_top1": 80.0, "test_loss": 0.5})


def test_lines_at_most_every_half_minute_and_one_at_the_end(clock, capsys):
    _train(clock, seconds=100)
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert "\r" not in text and "\x1b" not in text and text.isascii()
    assert lines[0] == "train: epoch 0.1/10, loss 1.0000, batch accuracy 90.0 %"  # early, no speed to tell yet
    assert lines[1] == (
        "train: epoch 3.1/10, loss 0.0323, batch accuracy 90.0 %, test 80.00 %, 5 steps/s, 0:01:09 left"
    )
    assert [line.split()[2] for line in lines] == ["0.1/10,", "3.1/10,", "6.1/10,", "9.1/10,", "10.0/10,"]
    assert lines[-1].endswith("0:00:00 left")


def test_many_short_runs_are_not_many_lines(clock, capsys):
    for _ in range(30):
        _train(clock, seconds=2)
    assert 3 <= len(capsys.readouterr().err.splitlines()) <= 8


def test_nothing_is_shown_of_a_run_that_never_began(clock, capsys):
    with progress.ProgressBar(3):
        pass
    assert capsys.readouterr().err == ""
