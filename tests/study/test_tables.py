"""What is printed of a comparison."""

import pytest
from made_up import comparison, falling, made_up

import hardjax as hj
from hardjax.study import tables
from hardjax.study.arms import make_methods
from hardjax.study.compare import summarise


def _runs(top1, epochs_later=0, **more):
    return [made_up(falling(0.5 + 0.02 * epochs_later), seed, top1=value, **more) for seed, value in enumerate(top1)]


def test_equal_accuracies_of_three_seeds_show_no_width_of_zero():
    result = comparison([_runs([97.5] * 3), _runs([97.5] * 3), _runs([97.5, 97.2, 97.8]), _runs([97.2] * 3)])
    first = {line["selection"]: line["test top-1 (%)"] for line in tables.replay_table(result.rows)}
    assert first == {
        "all-batches": "97.50",
        "hard-batches": "97.50",
        "random-batches": "97.50 ± 0.75",
        "fixed-batches": "97.20",
    }
    lines = {(line["arm"], line["against"]): line for line in tables.difference_table(result.rows)}
    assert lines["hard-batches 0.5", "all-batches"]["test top-1 (points)"] == "+0.00, all 3 alike"
    assert lines["fixed-batches", "all-batches"]["test top-1 (points)"] == "-0.30, all 3 alike"
    assert lines["hard-batches 0.5", "random-batches 0.5"]["test top-1 (points)"] == "+0.00 ± 0.75"
    printed = str(first) + str(lines)
    assert "± 0.00" not in printed and "nan" not in printed
    assert "no interval follows" in tables.replay_legend(result.rows, result.thresholds, result.left_out)


def test_one_seed_shows_no_interval_and_claims_nothing():
    result = comparison([_runs([97.5]), _runs([90.0], 3)], controls=())
    text = str(tables.replay_table(result.rows)) + str(tables.difference_table(result.rows))
    assert "±" not in text and "*" not in text and "nan" not in text and "alike" not in text
    legend = tables.replay_legend(result.rows, result.thresholds, result.left_out)
    assert "One seed: no interval, and nothing is claimed" in legend


def test_what_differs_is_marked_and_the_number_of_intervals_is_said():
    seeds = range(4)
    first = [made_up(falling(), seed, top1=97 + 0.1 * seed) for seed in seeds]
    second = [made_up(falling(), seed, top1=95 + 0.11 * seed, seconds=1.1e-3 + 4e-5 * seed) for seed in seeds]
    result = comparison([first, second], controls=())
    (line,) = tables.difference_table(result.rows)
    assert line["test top-1 (points)"].startswith("-1.9") and line["test top-1 (points)"].endswith(" **")
    assert line["time of a step (ratio)"].endswith(") **") and " to " in line["time of a step (ratio)"]
    assert line["epochs sooner (common)"] == "+0.00, all 4 alike"
    legend = tables.replay_legend(result.rows, result.thresholds, result.left_out)
    assert "That is 2 intervals, not corrected" in legend and "about 0.1 of them" in legend


def test_fewer_pairs_are_told_and_runs_named():
    result = comparison(
        [_runs([97.0, 97.1, 97.3]), [*_runs([96.0, 96.2], C_K=9.0), made_up([2.0, float("nan")], 2)]], controls=()
    )
    (line,) = tables.difference_table(result.rows)
    assert line["pairs"] == "2 to 3"
    rows = tables.replay_table(result.rows)
    assert rows[1]["e (common)"] == "8.0 (2 of 3)" and rows[0]["C_K"] == "-" and rows[1]["C_K"] == "9"
    assert rows[0].keys() == rows[1].keys()
    legend = tables.replay_legend(result.rows, result.thresholds, result.left_out)
    assert "left out of epochs and spectra: hard-batches 0.5, seed 2: not finite from epoch 2 on" in legend


def test_no_run_left():
    result = comparison([[[float("nan")]], [[float("nan")]]], controls=())
    assert tables.replay_table(result.rows)[1]["e (common)"] == "-"
    assert "none: every run is left out" in tables.replay_legend(result.rows, result.thresholds, result.left_out)


def test_trimming_has_its_time_with_an_interval_and_the_papers_form():
    arms = make_methods(("trimmed",), hj.trimming.Trimming())
    first = tuple(made_up(falling(), seed, top1=90 + seed) for seed in range(3))
    second = tuple(
        made_up(falling(), seed, top1=90.5 + seed, seconds=0.5e-3 * (1 + seed / 10), keep_fraction=0.2)
        for seed in range(3)
    )
    result = summarise(hj.TrainConfig(epochs=8), arms, (first, second))
    lines = tables.trimming_table(result.rows)
    assert lines[0]["time of standard"] == "-" and lines[1]["time of standard"].startswith("0.55 (0.4")
    assert lines[1]["test error (%)"] == "8.50 ± 2.48"
    legend = tables.trimming_legend(result.rows, result.thresholds, result.left_out)
    assert "mean over 3 seeds, trimming disabled / enabled: 9.00 / 8.50." in legend


@pytest.mark.parametrize("found, text", [(None, "-"), ({"count": 0}, "-")])
def test_no_difference_is_a_dash(found, text):
    assert tables.difference(found, "+.1f") == text
