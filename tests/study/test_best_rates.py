"""Base rates taken from another sweep: which cell is best, what a row says of it, and what is refused."""

import dataclasses
import json

import pytest
from sweeps import BASE, row

import hardjax as hj
from hardjax._validate import Refusal
from hardjax.study.best_rates import told, with_best_rates
from hardjax.study.cells import Cell, grid, key_of
from hardjax.study.sweep_rows import read_rows

RATES = (2**-8, 2**-6, 2**-4)
# Means of two seeds at each rate: 70, 85, 60 and 50, 45 and one that diverged.
TOPS = {8: [(60, 80), (90, 80), (60, 60)], 64: [(50, 50), (40, 50), (95, 10)]}
NORMED = {"widths": [4], "norm": "batch"}


def rows(base=BASE, data="data", **changes):
    found = []
    for config in grid(base, batch_size=list(TOPS), base_learning_rate=RATES, seed=range(2)):
        top1 = TOPS[config.batch_size][RATES.index(config.base_learning_rate)][config.seed]
        found.append(row(Cell(config, data), top1, status="diverged" if top1 == 10 else "done", **changes))
    return found


@pytest.fixture
def source(tmp_path):
    def write(*found):
        (tmp_path / "sweep.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
        return tmp_path

    return write


def taken(folder, *configs, data="data"):
    return with_best_rates([Cell(config, data) for config in configs], folder, folder / "of the sweep")


def test_each_cell_has_the_rate_of_the_best_cell_at_its_batch_size(source):
    folder = source(*rows())
    configs = grid(dataclasses.replace(BASE, model_options=NORMED), batch_size=[8, 64], seed=range(2))
    found = taken(folder, *configs)
    assert [(c.config.batch_size, c.config.seed, c.config.base_learning_rate) for c in found] == [
        (8, 0, 2**-6),
        (8, 1, 2**-6),
        (64, 0, 2**-8),  # at 2^-4 a run diverged
        (64, 1, 2**-8),
    ]
    assert found[0].rate_from == {
        "sweep": str(folder),
        "grid": "mlp on digits",
        "batches": "8",
        "base_learning_rate": 2**-6,
        "chosen_by": "median_test_top1",
        "value": 85.0,
        "seeds": 2,
        "rates": 3,
    }
    assert told(found[0].rate_from) == (
        f"batch 8: base rate 0.015625 of {folder} (mlp on digits), the best of 3 by test: 85.00 % over 2 seeds"
    )
    # The cell is the one that was asked for with this rate.
    said = dataclasses.replace(configs[0], base_learning_rate=2**-6)
    assert found[0].key == Cell(said, "data").key == key_of(said.to_dict(), "data")
    assert Cell.from_dict(json.loads(json.dumps(found[0].to_dict()))).rate_from == found[0].rate_from
    assert row(found[0])["key"] == found[0].key


def test_the_validation_share_decides_where_the_source_has_one(source):
    found = rows()
    for one in found:
        one["metrics"]["median_validation_top1"] = 100 * one["config"]["base_learning_rate"]
    (cell,) = taken(source(*found), dataclasses.replace(BASE, batch_size=8))
    assert cell.config.base_learning_rate == 2**-4 and cell.rate_from["chosen_by"] == "median_validation_top1"
    assert cell.rate_from["value"] == 6.25 and " by validation: 6.25 %" in told(cell.rate_from)


def test_of_several_grids_the_one_with_the_same_settings_is_read(source):
    warm = dataclasses.replace(BASE, schedule=hj.Schedule(warmup=0.05))
    both = [*rows(), *rows(warm)]
    for one in both[12:]:  # the best rate with warm-up is another one
        one["metrics"]["median_test_top1"] = 100 * one["config"]["base_learning_rate"]
    folder = source(*both)
    cells = taken(folder, *(dataclasses.replace(base, batch_size=8) for base in (BASE, warm)))
    assert [cell.config.base_learning_rate for cell in cells] == [2**-6, 2**-4]
    assert [cell.rate_from["grid"] for cell in cells] == [
        "mlp on digits, warmup 0.0",
        "mlp on digits, warmup 0.05",
    ]
    # Sub-batches are what the new sweep varies.
    parts = {**NORMED, "norm_batch_size": 4}
    folder = source(*rows(dataclasses.replace(BASE, model_options=NORMED)), *both[12:])
    (cell,) = taken(folder, dataclasses.replace(BASE, model_options=parts, batch_size=8))
    assert cell.config.base_learning_rate == 2**-6
    with pytest.raises(Refusal, match=r"Expected one grid of mlp on digits, batch 8, in .*; 2 fit: mlp on digits, .*;"):
        taken(folder, dataclasses.replace(BASE, optimizer="adam", batch_size=8))


def test_what_has_no_best_rate_is_refused_in_one_line(source, tmp_path):
    failed = [one | {"status": "failed", "metrics": {}} for one in rows() if one["config"]["batch_size"] == 64]
    folder = source(*rows()[:6], *failed)
    lost = [one | {"status": "diverged"} for one in rows()]
    here = dataclasses.replace(BASE, batch_size=8)
    for settings, data, said in (
        ({"batch_size": 64}, "data", "Expected a base rate of mlp on digits, batch 64, in"),
        ({"batch_size": 32}, "data", "mlp on digits, batch 32, in"),
        ({"model": "resnet8", "model_options": {}}, "data", "Expected a base rate of resnet8 on digits, batch 8"),
        ({}, "other data", "none diverged; there is none"),
        ({"learning_rate": 0.1}, "data", "or rates, not both; got a base rate of 0.0125"),
        ({"base_learning_rate": 0.5}, "data", "got a base rate of 0.5"),
    ):
        with pytest.raises(Refusal, match=said) as caught:
            taken(folder, dataclasses.replace(here, **settings), data=data)
        assert "\n" not in str(caught.value)
    with pytest.raises(Refusal, match="there is none"):
        taken(source(*lost), here)
    with pytest.raises(Refusal, match="of another sweep than the one that is trained"):
        with_best_rates([Cell(here, "data")], folder, folder)
    with pytest.raises(Refusal, match="No sweep in"):
        taken(tmp_path / "nowhere", here)


@pytest.mark.parametrize("how", [{"status": "diverged"}, {"status": "failed", "metrics": {}}])
def test_a_grid_without_a_best_rate_does_not_hand_over_that_of_another_network(source, how):
    lost = [one | how for one in rows()]
    folder = source(*lost, *rows(dataclasses.replace(BASE, model_options=NORMED)))
    with pytest.raises(Refusal, match="none diverged; there is none"):
        taken(folder, dataclasses.replace(BASE, batch_size=8))


@pytest.mark.parametrize("how", ["failed", "not there"])
def test_a_rate_that_lacks_a_seed_is_not_the_best(source, how):
    found = rows()
    assert found[2]["config"]["base_learning_rate"] == 2**-6  # of 90 and 80, the best one
    changed = [found[2] | {"status": "failed", "metrics": {}}] if how == "failed" else []
    (cell,) = taken(source(*found[:2], *changed, *found[3:]), dataclasses.replace(BASE, batch_size=8))
    assert cell.config.base_learning_rate == 2**-8


def test_a_further_seed_of_one_rate_does_not_make_it_the_best(source):
    further = grid(BASE, batch_size=[8], base_learning_rate=[2**-8], seed=[2])
    (cell,) = taken(source(*rows(), row(Cell(*further, "data"), 60)), dataclasses.replace(BASE, batch_size=8))
    assert cell.config.base_learning_rate == 2**-6


@pytest.mark.ci
def test_a_sweep_names_the_source_and_the_choice_in_its_rows(tiny, tmp_path):
    base = hj.TrainConfig(model_options={"widths": [4], "norm": "batch"}, epochs=1, batch_size=16, optimizer="sgd")
    hj.sweep(hj.grid(base, base_learning_rate=[2**-8, 2**-3]), output=tmp_path / "first", dataset=tiny)
    parts = hj.grid(base, model_options=[{"norm_batch_size": part} for part in (4, 8)])
    given = {"output": tmp_path / "second", "dataset": tiny, "rates_from": tmp_path / "first"}
    found = hj.sweep(parts, **given)
    best = max(read_rows(tmp_path / "first"), key=lambda one: one["metrics"]["median_test_top1"])
    for one in found.rows:
        assert one["status"] == "done" and one["rate_from"]["sweep"] == str(tmp_path / "first")
        assert one["config"]["base_learning_rate"] == one["rate_from"]["base_learning_rate"]
        assert one["rate_from"]["value"] == best["metrics"]["median_test_top1"]
    assert [one["key"] for one in hj.sweep(parts, **given).rows] == [one["key"] for one in found.rows]
    assert len(read_rows(tmp_path / "second")) == 2
