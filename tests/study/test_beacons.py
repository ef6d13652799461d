"""Beacons: where finished runs went, the error between them, their file."""

import fcntl
import json
import os

import numpy as np
import pytest
from made_up_runs import write_run

import hardjax as hj
from hardjax._validate import Refusal
from hardjax.choose.batch_plan import BatchPlan
from hardjax.study import beacon_file, beacons
from hardjax.study.beacons import Trail
from hardjax.study.measure import read_trail
from hardjax.training import lock
from hardjax.training.lines import encode

SETTINGS = hj.TrainConfig(measure=hj.fisher.FisherMeasure()).to_dict()


def trail(batches=32, rate=0.1, seed=0, *, condition=(10.0, 20.0), energy=(1.0, 2.0), error=1.0, **more):
    fields = {name: np.array(condition if name[:1].lower() == "c" else energy) for name in beacons.FIELDS}
    points = len(condition)
    given = dict(
        run=f"s{batches}-{rate}-{seed}",
        batches=batches,
        learning_rate=rate,
        seed=seed,
        diverged=False,
        test_error=error,
        train_error=error / 2,
        epoch=np.arange(1.0, points + 1),
        measures={
            tolerance: {name: values + (tolerance == 0) for name, values in fields.items()} for tolerance in (0.0, 1e-6)
        },
        errors={"test": np.full(points, error), "train": np.full(points, 0.1), "validation": np.full(points, np.nan)},
    )
    return Trail(**given | more)


def test_what_a_run_of_one_size_came_past(tmp_path):
    """64 of 1,024 samples: 16 steps an epoch, two measurements of eight steps each."""
    folder = write_run(
        tmp_path / "run",
        c=lambda epoch, batch: 2 + int(epoch),
        energy=0.01,
        error=[5.0, 4.0],
        tested=10,
        batch_size=64,
        learning_rate=0.2,
        seed=3,
    )
    found, settings = read_trail(folder)
    assert (found.batches, found.learning_rate, found.seed, found.diverged) == (64, 0.2, 3, False)
    assert (found.test_error, found.train_error, found.run) == (4.0, 1.0, str(folder))
    np.testing.assert_array_equal(found.epoch, np.arange(1, 21))
    for fields in found.measures.values():
        np.testing.assert_allclose(fields["c"], np.arange(2, 22), rtol=1e-6)
        for ending in ("", " by epoch"):  # the same where the size is
            np.testing.assert_allclose(fields[f"C_K{ending}"], 1.5 + np.arange(1, 21) / 2, rtol=1e-6)
            np.testing.assert_allclose(fields[f"L_K{ending}"], 0.01 * 16 * np.arange(1, 21), rtol=1e-6)
    tested = np.full(20, np.nan)
    tested[[9, 19]] = 5.0, 4.0
    np.testing.assert_array_equal(found.errors["test"], tested)
    assert np.isnan(found.errors["validation"]).all() and np.nanmax(found.errors["train"]) == 1.0
    assert settings["batch_size"] == 64 and json.loads(json.dumps(settings)) == settings


def test_what_a_run_under_a_plan_came_past(tmp_path):
    """Ten epochs of 64 steps at batch 16, ten of 16 at 64: c 2 then 6, l 0.01 then 0.02."""
    folder = write_run(
        tmp_path / "run",
        c=lambda epoch, batch: 2 if batch == 16 else 6,
        energy=lambda epoch, batch: 0.01 if batch == 16 else 0.02,
        error=1.0,
        batch_plan=BatchPlan("16-64"),
    )
    found, _ = read_trail(folder, (0.05, 0.5, 1.0))
    assert found.batches == "16-64"
    fields = found.measures[0.0]
    np.testing.assert_allclose(found.epoch, [1, 10, 20])
    np.testing.assert_allclose(fields["C_K"], [2, 2, (80 * 2 + 20 * 6) / 100], rtol=1e-6)
    np.testing.assert_allclose(fields["C_K by epoch"], [2, 2, 4], rtol=1e-6)
    np.testing.assert_allclose(fields["L_K"], [0.64, 6.4, 6.4 + 160 * 0.02], rtol=1e-6)
    np.testing.assert_allclose(fields["L_K by epoch"], [0.64, 6.4, 64 * (10 * 0.01 + 10 * 0.02)], rtol=1e-6)


def test_the_tolerances_tell_spectra_of_low_rank_apart(tmp_path):
    found, _ = read_trail(write_run(tmp_path / "run", c=1e4, energy=0.1, error=1.0, batch_size=64))
    np.testing.assert_allclose(found.measures[0.0]["C_K"][-1], 1e4, rtol=1e-6)
    np.testing.assert_allclose(found.measures[1e-6]["C_K"][-1], 1)


def test_epochs_shorter_than_an_interval_keep_the_measures_of_before(tmp_path):
    """One step of 1,024 samples an epoch, a measurement every eight."""
    folder = write_run(tmp_path / "run", c=lambda epoch, batch: 1 + epoch, energy=0.5, error=1.0, batch_size=1024)
    fields = read_trail(folder)[0].measures[1e-6]
    np.testing.assert_allclose(fields["C_K"], [1.0] * 8 + [5.0] * 8 + [(1 + 9 + 17) / 3] * 4, rtol=1e-6)
    assert np.isfinite(fields["c"]).nonzero()[0].tolist() == [0, 8, 16]


@pytest.mark.ci
def test_a_trained_run_has_the_measures_of_its_history(tiny, tmp_path):
    config = hj.TrainConfig(
        model="mlp", model_options={"widths": [4]}, epochs=3, batch_size=16, measure=hj.fisher.FisherMeasure(every=2)
    )
    result = hj.run(config, dataset=tiny, output=tmp_path / "run", progress=False)
    found, _ = read_trail(tmp_path / "run")
    for name in ("C_K", "L_K"):
        np.testing.assert_array_equal(found.measures[1e-6][name], result.history[name])
    np.testing.assert_allclose(found.errors["test"], 100 - result.history["test_top1"])
    assert found.test_error == 100 - result.summary["final_test_top1"] and not found.diverged


def test_a_run_that_diverged_is_kept_with_the_error_of_what_it_predicts(tmp_path):
    def diverging(epoch, batch):
        return 4.0 if epoch < 5 else np.nan

    kept = dict(c=diverging, energy=0.1, error=90.2, train_error=89.5)
    for name, summary in (("went on", {"diverged": True}), ("stopped", {"end": "diverged", "diverged": False})):
        found, _ = read_trail(write_run(tmp_path / name, **kept, summary=summary, batch_size=64))
        assert found.diverged and (found.test_error, found.train_error) == (90.2, 89.5)
        np.testing.assert_allclose(found.measures[0.0]["C_K"], 4, rtol=1e-6)
        np.testing.assert_allclose(found.measures[0.0]["L_K"][-1], 5 * 16 * 0.1, rtol=1e-6)
        assert np.isnan(found.measures[0.0]["c"][5:]).all()


@pytest.mark.parametrize("state", ["no summary", "interrupted", "half a summary", "being written"])
def test_a_run_that_is_not_finished_is_refused(tmp_path, state):
    folder = write_run(tmp_path / "run", c=2.0, energy=0.1, error=1.0, summary={"interrupted": state == "interrupted"})
    if state == "no summary":
        (folder / "summary.json").unlink()
    if state == "half a summary":
        (folder / "summary.json").write_text('{"final_test')
    descriptor = os.open(folder / lock.MARKER, os.O_RDWR | os.O_CREAT)
    try:
        if state == "being written":
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"run' is not finished; `hardjax show` says how far it is\."):
            read_trail(folder)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(end=None), "Expected end=None to be text"),
        (dict(end=3), "Expected end=3 to be text"),
        (dict(diverged="x"), "Expected diverged='x' to be True or False"),
        (dict(final_test_top1="90"), "Expected final_test_top1='90' to be a number or null"),
        (dict(final_full_train_top1=[1]), r"Expected final_full_train_top1=\[1\] to be a number or null"),
        (dict(final_test_top1=...), "lacks final_test_top1"),
        (dict(end=...), "lacks end"),
    ],
    ids=str,
)
def test_a_damaged_summary_is_refused(tmp_path, change, words):
    folder = write_run(tmp_path / "run", c=2.0, energy=0.1, error=1.0)
    summary = json.loads((folder / "summary.json").read_text()) | change
    summary = {name: value for name, value in summary.items() if value is not ...}
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(Refusal, match=f"Damaged summary.json in '.*run': .*{words}") as caught:
        read_trail(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line", ['{"test_top1": 3}', '{"epoch": "x"}', "[1]", '{"epoch": 1, "test_top1": "x"}', '{"epoch": null}']
)
def test_a_damaged_history_is_refused(tmp_path, line):
    folder = write_run(tmp_path / "run", c=2.0, energy=0.1, error=1.0)
    with (folder / "history.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(Refusal, match=r"Damaged history\.jsonl in '.*run'") as caught:
        read_trail(folder)
    assert "\n" not in str(caught.value)


def test_seeds_are_averaged_where_they_are_drawn():
    runs = [
        trail(condition=(10.0, 100.0), error=1.0),
        trail(seed=1, condition=(1000.0, np.nan), error=2.0, diverged=True),
        trail(batches="16-32", error=3.0),
        trail(batches=8, rate=0.05, error=4.0),
    ]
    found = beacons.configurations(runs, 1e-6, "measurement")
    assert [(one.batches, one.learning_rate, one.seeds, one.diverged) for one in found] == [
        (8, 0.05, 1, 0),
        (32, 0.1, 2, 1),
        ("16-32", 0.1, 1, 0),
    ]
    np.testing.assert_allclose(found[1].condition, [100, 100])  # 10 and 1000; what one of them never measured
    np.testing.assert_allclose(found[1].energy, [1, 2])
    assert found[1].error == {"test": 1.5, "train": 0.75} and found[1].errors["test"].tolist() == [1.5, 1.5]
    assert beacons.configurations(runs, 0.0, "epoch")[0].condition[-1] == pytest.approx(21)
    np.testing.assert_allclose(beacons.positions(found, 0), [[1, 0], [2, 0], [1, 0]], atol=1e-12)
    lost = beacons.configurations([trail(condition=(np.nan, np.nan))], 1e-6, "measurement")[0]
    assert not lost.is_placed("test") and found[0].is_placed("test")
    assert not beacons.configurations([trail(error=np.nan)], 1e-6, "measurement")[0].is_placed("test")


def test_the_surface_is_the_mean_of_the_five_nearest_in_the_planes_own_unit():
    rng = np.random.default_rng(0)
    places = rng.normal(size=(12, 2)) * [1, 100] + [3, -40]  # what one axis spans must not decide alone
    errors, wanted = rng.uniform(0, 9, 12), rng.normal(size=(30, 2)) * [1, 100]
    found = beacons.surface(places, errors, wanted)
    width = [np.ptp(places[:, 0]), np.ptp(places[:, 1])]
    for value, (x, y) in zip(found, wanted, strict=True):
        apart = [((x - a) / width[0]) ** 2 + ((y - b) / width[1]) ** 2 for a, b in places]
        nearest = sorted(range(12), key=apart.__getitem__)[:5]
        assert value == pytest.approx(sum(errors[i] for i in nearest) / 5)
    # Alike in one measure: the other alone decides.
    line = np.column_stack([np.arange(6.0), np.ones(6)])
    np.testing.assert_allclose(beacons.surface(line, np.arange(6.0), np.array([[0, 5.0], [5, 1]])), [2, 3])
    with pytest.raises(ValueError, match="at least 5 configurations with finite measures and errors, got 4"):
        beacons.surface(places[:4], errors[:4], wanted)


def test_both_published_regions():
    values = np.array([[3.0, 1.0], [1.0 + 1e-15, 2.0]])
    assert beacons.lowest(values).tolist() == [[False, True], [True, False]]
    assert beacons.best(np.array([5.0, 1, 4, 1, 0, 9, 8])).tolist() == [4, 1, 3, 2, 0]


def test_a_file_gives_back_what_was_written():
    runs = [trail(), trail(8, 0.2, 5, condition=(1.0, np.nan), diverged=True, train_error=np.nan)]
    again, settings = beacon_file.from_dict(json.loads(encode(beacon_file.to_dict(runs, SETTINGS), indent=2)))
    assert settings["model"] == "mlp" and settings["measure"] == {"rows": "contribution"}
    assert not {"batch_size", "learning_rate", "seed", "data_dir"} & set(settings)
    for one, kept in zip(again, runs, strict=True):
        for name in ("run", "batches", "learning_rate", "seed", "diverged"):
            assert getattr(one, name) == getattr(kept, name)
        np.testing.assert_array_equal(
            [one.test_error, one.train_error, *one.epoch], [kept.test_error, kept.train_error, *kept.epoch]
        )
        for name, values in kept.errors.items():
            np.testing.assert_array_equal(one.errors[name], values)
        for tolerance, fields in kept.measures.items():
            for name, values in fields.items():
                np.testing.assert_array_equal(one.measures[tolerance][name], values)


def _with(**fields):
    """A file of one beacon in which these fields are others."""
    content = json.loads(encode(beacon_file.to_dict([trail()], SETTINGS)))
    content["beacons"][0] |= fields
    return content


def _twice(**fields):
    """A file of a beacon, and of another one that differs in these fields."""
    content = _with()
    content["beacons"].append(content["beacons"][0] | fields)
    return content


def _without(name):
    content = json.loads(encode(beacon_file.to_dict([trail()], SETTINGS)))
    del content["beacons"][0][name]
    return content


def _changed(**how):
    return json.loads(encode(beacon_file.to_dict([trail()], SETTINGS) | how))


@pytest.mark.parametrize(
    "content, message",
    [
        ([], "a file that `hardjax measure --write-beacons` wrote"),
        ({"format": "results of hardjax", "version": 1}, "a file that `hardjax measure --write-beacons` wrote"),
        (_changed(version=2), "Expected version 1 of the beacons, got 2"),
        (_changed(beacons=[]), "at least one beacon"),
        (_changed(beacons=[3]), "Damaged beacons: Expected a beacon to be an object, got 3"),
        (_changed(beacons=None), "Damaged beacons: Expected beacons=None to be a list"),
        (_changed(settings=[["epochs", 3]]), "Damaged beacons: Expected settings=.* to be an object"),
        (_changed(settings={"measure": {}}), "Damaged beacons: Expected rows=None to be text"),
        (_changed(settings={"measure": [1]}), r"Damaged beacons: Expected measure=\[1\] to be an object"),
        (_without("seed"), "Damaged beacons: Expected seed=None to be a whole number"),
        (_without("measures"), "Damaged beacons: Expected measures=None to be an object"),
        (_without("test_error"), "Damaged beacons: Expected a number test_error, or null"),
        (_without("epoch"), "Damaged beacons: Expected epoch=None to be a list"),
        (_with(run=3), "Damaged beacons: Expected run=3 to be text"),
        (_with(batches=None), "Damaged beacons: Expected batches=None to be a whole number"),
        (_with(batches=[32]), r"Damaged beacons: Expected batches=\[32\] to be a whole number"),
        (_with(batches="16-32"), "batch_plan='16-32'; a beacon keeps one batch size"),
        (_with(seed="3"), "Damaged beacons: Expected seed='3' to be a whole number"),
        (_with(learning_rate=None), "Damaged beacons: Expected learning_rate=None to be a finite number above 0"),
        (_with(learning_rate=float("nan")), "Damaged beacons: Expected learning_rate=nan to be a finite number"),
        (_with(learning_rate=float("inf")), "Damaged beacons: Expected learning_rate=inf to be a finite number"),
        (_with(learning_rate=[0.1]), r"Damaged beacons: Expected learning_rate=\[0.1\] to be a finite number"),
        (_with(diverged="x"), "Damaged beacons: Expected diverged='x' to be True or False"),
        (_with(test_error=[1.0]), r"Damaged beacons: Expected test_error to hold numbers or null, got \[1.0\]"),
        (_with(test_error=10**400), "Damaged beacons: Expected test_error to hold numbers of float64"),
        (_with(errors=[1.0, 1.0]), r"Damaged beacons: Expected errors=\[1.0, 1.0\] to be an object"),
        (_with(errors={"test": [1, 1], "train": [1, 1]}), "Damaged beacons: Expected validation=None to be a list"),
        (_with(errors={"test": [1, "x"]}), "Damaged beacons: Expected test to hold numbers or null, got 'x'"),
        (_with(measures={"0": 3, "1e-06": {}}), "Damaged beacons: Expected 0=3 to be an object"),
        (_with(epoch=[2.0, 1.0]), r"Damaged beacons: Expected epoch=\[2.0, 1.0\] to be rising numbers"),
        (_with(epoch=[1.0, None]), r"Damaged beacons: Expected epoch=\[1.0, nan\] to be rising numbers"),
        (_with(epoch=[]), r"Damaged beacons: Expected epoch=\[\] to be rising numbers"),
        (_twice(), "'s32-0.1-0' and 's32-0.1-0' are one configuration with one seed"),
        (_twice(run="b", seed=0, diverged=True), "'b' and 's32-0.1-0' are one configuration with one seed"),
        (_twice(seed=1, epoch=[1.0, 3.0]), "Damaged beacons: 's32-0.1-0' and 's32-0.1-0' have other epochs"),
        (_with(epoch=[1.0]), "Damaged beacons: Expected 1 values, as many as epochs, in every column of a beacon"),
    ],
)
def test_what_is_no_file_of_beacons(content, message):
    with pytest.raises(ValueError, match=message) as error:
        beacon_file.from_dict(content)
    assert "\n" not in str(error.value)


def test_one_configuration_and_seed_counts_once():
    with pytest.raises(ValueError, match=r"'b' and 's32-0\.1-0' are one configuration with one seed"):
        beacon_file.to_dict([trail(), trail(run="b")], SETTINGS)
    with pytest.raises(ValueError, match="batch_plan='16-32'; a beacon keeps one batch size"):
        beacon_file.to_dict([trail(batches="16-32")], SETTINGS)


def test_runs_of_a_plane_differ_in_batch_size_rate_and_seed_alone():
    def settings(**how):
        return hj.TrainConfig(measure=hj.fisher.FisherMeasure(every=how.pop("every", 50)), **how).to_dict()

    alike = {
        "a": settings(),
        "b": settings(batch_size=8, learning_rate=0.3, seed=4, data_dir="x", test_every=4, every=9),
    }
    beacons.check_shared(alike)
    for how, message in (
        ({"epochs": 3}, "'c' has epochs=3, 'a' 10"),
        ({"batch_plan": BatchPlan("16-32")}, "'c' has batch_plan="),
        ({"model_options": {"widths": [9]}}, "'c' has model_options="),
        ({"measure": None}, "'c' has measure=None"),
    ):
        other = hj.TrainConfig(**{"measure": hj.fisher.FisherMeasure(), **how}).to_dict()
        with pytest.raises(ValueError, match=message):
            beacons.check_shared(alike | {"c": other})
    planned = settings(batch_plan=BatchPlan("16-32"), rate_scaling="sqrt")
    beacons.check_shared({"file": beacons.shared(settings()), "c": planned}, plans=True)
