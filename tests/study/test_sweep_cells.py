"""Cells: their keys, their grid, and the order in which they are trained."""

import dataclasses

import pytest
from sweeps import BASE, cells

import hardjax as hj
from hardjax._validate import Refusal
from hardjax.study.cells import Cell, grid, key_of, ordered, weight


def test_a_key_names_the_configuration_the_data_and_nothing_else():
    keys = {Cell(BASE, "data").key}
    for setting in (
        {"seed": 1},
        {"batch_size": 64},
        {"base_learning_rate": 2**-8},
        {"model_options": {"widths": [5]}},
        {"schedule": hj.Schedule(warmup=0.05)},
        {"selection": hj.selection.HardBatches(0.5)},
        {"validation": 0.2},
        {"batch_plan": hj.batch_plan.BatchPlan("32-64")},
    ):
        keys.add(Cell(dataclasses.replace(BASE, **setting), "data").key)
    keys |= {Cell(BASE, "other data").key, Cell(BASE, "data", "program").key}
    assert len(keys) == 11 and all(len(key) == 16 and int(key, 16) >= 0 for key in keys)
    # Where the data lie, and how numbers are written, is nothing.
    for same in ({"data_dir": "/elsewhere"}, {"weight_decay": 0}, {"test_every": 1}):
        assert Cell(dataclasses.replace(BASE, **same), "data").key in keys


def test_a_row_of_before_there_was_a_setting_keeps_its_cell():
    plain = BASE.to_dict()
    del plain["on_nan"]
    assert key_of(plain, "data") == Cell(BASE, "data").key


def test_a_grid_is_every_combination():
    found = grid(BASE, batch_size=[8, 32], base_learning_rate=(2**-8, 2**-4), seed=range(2))
    assert [(c.batch_size, c.base_learning_rate, c.seed) for c in found] == [
        (size, rate, seed) for size in (8, 32) for rate in (2**-8, 2**-4) for seed in (0, 1)
    ]
    options = grid(BASE, model_options=[{}, {"norm": "batch"}])
    assert [c.model_options for c in options] == [{"widths": [4]}, {"widths": [4], "norm": "batch"}]
    options = grid(BASE, model_options=[{"norm": "batch"}, {"widths": None}])
    assert [c.model_options for c in options] == [{"widths": [4], "norm": "batch"}, {}]
    assert grid(BASE) == (BASE,)


@pytest.mark.parametrize(
    "axes, said",
    [
        ({"batch_sizes": [8]}, "Unknown setting 'batch_sizes'; did you mean 'batch_size'"),
        ({"seed": []}, "Expected seed with a value at least"),
        ({"seed": [1, 1]}, "every cell of a grid once; mlp widths=.* seed 1 is there twice"),
        ({"batch_size": [0]}, "batch_size=0"),
        ({"learning_rate": [1.0], "base_learning_rate": [1.0]}, "not both"),
    ],
)
def test_a_grid_that_is_none(axes, said):
    with pytest.raises(Refusal, match=said):
        grid(BASE, **axes)


def test_equal_shapes_follow_one_another_the_longest_first_and_seed_by_seed():
    given = grid(BASE, seed=range(2), base_learning_rate=[2**-8, 2**-4], batch_size=[64, 8, 32])
    found = [(c.config.batch_size, c.config.seed) for c in ordered(Cell(config, "data") for config in given)]
    assert found == [(size, seed) for size in (8, 32, 64) for seed in (0, 0, 1, 1)]


def test_what_is_an_input_of_a_program_is_no_part_of_a_shape():
    first, *_ = cells(1)

    def shape(**settings):
        return Cell(dataclasses.replace(BASE, **settings), "data").shape

    for traced in ({"seed": 3}, {"base_learning_rate": 1.0}, {"weight_decay": 1e-4}, {"schedule": "step"}):
        assert shape(**traced) == first.shape
    for static in ({"batch_size": 3}, {"model": "resnet8"}, {"optimizer": "adam"}, {"augmentation": "standard"}):
        assert shape(**static) != first.shape
    # The stages of a plan that is repeated in every phase begin where the rate falls.
    plan = {"batch_plan": hj.batch_plan.BatchPlan("32-64-MS")}
    early, late = ({"schedule": hj.Schedule("step", decay_at=(at,))} for at in (0.25, 0.5))
    assert shape(**plan, **early) != shape(**plan, **late)


def test_the_weight_of_a_cell_is_its_steps_for_each_sample():
    assert weight(dataclasses.replace(BASE, epochs=6, batch_size=4)) == 1.5
    plan = dataclasses.replace(BASE, epochs=6, batch_plan=hj.batch_plan.BatchPlan("2-4"))
    assert weight(plan) == 6 * (1 / 2 + 1 / 4) / 2
