"""What is read off the rows of a sweep: curves, best rates, rates that converge reliably; all worked by hand."""

import dataclasses
import math

import pytest
from sweeps import BASE, row

import hardjax as hj
from hardjax.study.cells import Cell, grid
from hardjax.study.grids import TEST, VALIDATION, base_rate, grids, reliable_rates

RATES = (2**-8, 2**-6, 2**-4)
# Accuracies of two seeds at each of the three rates.
TOPS = {8: [(60, 70), (90, 90), (88, 40)], 64: [(58, 60), (52, 49), (10, 10)]}


def _rows(tops=None, **settings):
    tops = TOPS if tops is None else tops
    rows = []
    for config in grid(BASE, batch_size=list(tops), base_learning_rate=RATES, seed=range(2)):
        top1 = tops[config.batch_size][RATES.index(config.base_learning_rate)][config.seed]
        cell = Cell(dataclasses.replace(config, **settings), "data")
        rows.append(row(cell, top1, status="diverged" if top1 == 10 else "done"))
    return rows


def test_curves_hold_what_belongs_together():
    (found,) = grids(reversed(_rows()))
    assert [curve.batches for curve in found.curves] == ["8", "64"]
    assert [point.rate for point in found.curves[0].points] == list(RATES)
    assert [point.mean for point in found.curves[0].points] == [65, 90, 64]
    assert [point.values().tolist() for point in found.curves[1].points] == [[58, 60], [52, 49], [10, 10]]
    assert [point.diverged for point in found.curves[1].points] == [0, 0, 2]
    assert found.label == "mlp on digits" and found.chance == 10


def test_reliable_rates():
    """Half the way from chance, 10, to the best mean of the grid, 90, is 50."""
    (found,) = grids(_rows())
    eight, sixty_four = found.curves
    assert reliable_rates(found, eight) == [2**-8, 2**-6]  # at 2^-4 one seed has 40
    assert reliable_rates(found, sixty_four) == [2**-8]  # at 2^-6 one has 49
    assert reliable_rates(found, eight, share=0.7) == [2**-6]  # 66
    assert reliable_rates(found, eight, share=0.3) == list(RATES)  # 34
    # A batch size at which nothing learns has none, though all its runs are as good as its best.
    (found,) = grids(_rows({8: TOPS[8], 64: [(11, 11)] * 3}))
    assert reliable_rates(found, found.curves[1]) == []


def test_a_seed_that_failed_or_did_not_converge_makes_a_rate_unreliable():
    rows = _rows()
    failed = row(
        Cell(dataclasses.replace(BASE, batch_size=8, base_learning_rate=2**-6, seed=2), "data"), status="failed"
    )
    (found,) = grids([*rows, failed])
    assert reliable_rates(found, found.curves[0]) == [2**-8] and found.curves[0].points[1].failed == 1
    rows[0]["metrics"]["converged"] = False
    (found,) = grids(rows)
    assert reliable_rates(found, found.curves[0]) == [2**-6]


def test_the_best_rate_is_chosen_by_validation_where_every_run_has_one():
    rows = _rows()
    (found,) = grids(rows)
    assert found.chosen_by == TEST and found.curves[0].best(TEST).rate == 2**-6
    for one in rows:
        one["metrics"]["median_validation_top1"] = -one["metrics"]["median_test_top1"]
    (found,) = grids(rows)
    assert found.chosen_by == VALIDATION and found.curves[0].best(found.chosen_by).rate == 2**-4
    rows[0]["metrics"]["median_validation_top1"] = None
    assert grids(rows)[0].chosen_by == TEST
    assert grids([row(Cell(BASE, "data"), status="failed")])[0].curves[0].best(TEST) is None


def test_a_rate_at_which_a_run_diverged_is_neither_best_nor_reliable():
    rows = _rows()
    assert rows[3]["config"]["base_learning_rate"] == 2**-6
    rows[3]["status"] = "diverged"  # of 90 % all the same
    (found,) = grids(rows)
    assert found.curves[0].best(TEST).rate == 2**-8 and reliable_rates(found, found.curves[0]) == [2**-8]
    for one in rows:
        one["status"] = "diverged"
    assert grids(rows)[0].curves[0].best(TEST) is None


def test_equal_means_take_the_lower_rate():
    (found,) = grids(_rows({8: [(70, 70), (70, 70), (60, 60)], 64: TOPS[64]}))
    assert found.curves[0].best(TEST).rate == 2**-8


def test_grids_are_told_apart_by_what_differs():
    option = {"widths": [4], "norm": "batch"}
    found = grids(_rows() + _rows(model_options=option) + _rows(schedule=hj.Schedule(warmup=0.05)))
    assert [one.label for one in found] == [
        "mlp on digits, warmup 0.0, norm default",
        "mlp on digits, warmup 0.0, norm batch",
        "mlp on digits, warmup 0.05, norm default",
    ]
    other = [one | {"data": "other"} for one in _rows()]
    assert len(grids(_rows() + other)) == 2


def test_a_row_of_before_there_was_a_setting_belongs_to_its_grid():
    rows = _rows()
    del rows[0]["config"]["on_nan"]
    (found,) = grids(rows)
    assert len(found.curves[0].points[0].rows) == 2


def test_a_seed_whose_rate_is_said_in_two_ways_is_one():
    named = [{"learning_rate": 0.5}, {"base_learning_rate": 2**-5}]
    configs = [dataclasses.replace(BASE, batch_size=16, **one) for one in named]
    for first, failed in (("failed", 0), ("done", 0)):
        rows = [row(Cell(configs[0], "data"), status=first), row(Cell(configs[1], "data"))]
        (point,) = grids(rows)[0].curves[0].points
        assert (len(point.rows), point.failed) == (1, failed)


def test_no_two_grids_have_one_label():
    found = grids([row(Cell(BASE, "data", network)) for network in ("a" * 64, "b" * 64)])
    assert [one.label for one in found] == ["mlp on digits, program aaaaaaaa", "mlp on digits, program bbbbbbbb"]
    found = grids([row(Cell(BASE, data)) for data in ("first", "second")])
    assert [one.label for one in found] == ["mlp on digits, data first", "mlp on digits, data second"]
    several = {"optimizer": ("sgd", "adam"), "precision": ("default", "high"), "epochs": (2, 3)}
    configs = grid(BASE, **several, on_nan=("record", "stop"))
    labels = {one.label for one in grids([row(Cell(config, "data")) for config in configs])}
    assert len(labels) == 16 and not any("..." in label for label in labels)


def test_base_rates():
    def rate(**settings):
        return base_rate(dataclasses.replace(BASE, **settings).to_dict())

    assert rate(base_learning_rate=2**-8, batch_size=32) == 2**-8
    assert rate(learning_rate=0.5, batch_size=32) == 2**-6
    assert rate(batch_size=10) == 0.0005  # the default of 0.005
    plan = hj.batch_plan.BatchPlan("16-64")
    assert rate(learning_rate=0.5, batch_plan=plan) == 2**-5
    rows = [row(Cell(dataclasses.replace(BASE, batch_plan=plan, learning_rate=0.5), "data"))]
    second = dataclasses.replace(BASE, batch_plan=plan, base_learning_rate=2**-5, seed=1)
    rows += [row(Cell(second, "data"), 80)]
    (found,) = grids(rows)
    (curve,) = found.curves
    assert (curve.size, curve.batches) == (16, "16-64") and len(curve.points) == 1  # one rate, said in two ways
    assert curve.points[0].mean == pytest.approx(85) and not math.isnan(found.chance)
