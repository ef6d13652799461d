"""Rows of several files and experiments: what is counted, printed beside them, replaced, and brought over once."""

import dataclasses
import math

import pytest

import hardjax as hj
from hardjax._validate import Refusal
from hardjax.cli.table import PAPERS
from hardjax.plots import progress
from hardjax.plots.published import LAYOUTS
from hardjax.study import experiments_rows, experiments_run
from hardjax.study.experiments import Experiment, Published, Scale, Statement
from hardjax.study.experiments_markdown import results
from hardjax.study.experiments_metrics import value
from hardjax.study.experiments_report import judge, report
from hardjax.study.experiments_rows import Results
from hardjax.training import files, lines

BASE = hj.TrainConfig(model_options={"widths": [4]}, epochs=4)
ARMS = {f"rate {rate:g}": {"learning_rate": rate} for rate in (0.1, 0.2, 0.4)}
GRID = Experiment(
    name="p9-table-1",
    title="made up",
    source="nowhere",
    scales={"reduced": Scale(BASE, ARMS, 3, {"rate 0.4": 1})},
    published=tuple(Published(arm, "test error", 10.0, 0.5) for arm in ARMS),
)
BEST = Statement("0.1 is best", ("rate 0.1",), ("rate 0.2", "rate 0.4", "rate 0.8"), "test error", 0.5, 4)
CLAIM = Experiment(
    name="p9-claim-1",
    title="of it",
    source="nowhere",
    reads=("p9-table-1",),
    arms=(*list(ARMS)[:2],),
    statements=(BEST,),
)
ALL = {one.name: one for one in (GRID, CLAIM)}


def _row(arm, place, error, experiment=GRID):
    row = {
        "config": GRID.scales["reduced"].config(arm, place).to_dict(),
        "data": "d",
        "row_version": 1,
        "status": "done",
        "metrics": {"final_test_error": error, "backprops": 40},
        "history": {"epoch": [4], "test_top1": [100 - error]},
    }
    return experiments_rows.kept(row, experiment.name, "reduced", arm)


def _written(folder, rows):
    for row in rows:
        experiments_rows.write(GRID, folder, row)
    return Results(ALL, folder)


def test_what_was_printed_goes_with_rows_that_another_experiment_reads(tmp_path):
    found = _written(tmp_path, [_row("rate 0.1", 0, 9.0), _row("rate 0.4", 0, 9.0)]).found(CLAIM, "reduced")
    # Of the two arms that it shows; six runs of seven, and what was printed of the one that has a row.
    assert (found.wanted, [one.arm for one in found.printed]) == (6, ["rate 0.1"])
    assert [line["published test error"] for line in report(found).arms] == ["10.00 ± 0.50"]


def test_many_arms_are_told_beside_what_is_printed_of_them(tmp_path):
    rates = [0.1 * place for place in range(1, 11)]
    arms = {f"rate {rate:g}": {"learning_rate": rate} for rate in rates}
    printed = tuple(Published(arm, "test error", 10.0 + place, 0.5) for place, arm in enumerate(arms))
    many = dataclasses.replace(GRID, scales={"reduced": Scale(BASE, arms, 3)}, published=printed)
    errors = [8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 17.0, 16.0]  # two points lower, the last two exchanged
    for place, (rate, error) in enumerate(zip(rates, errors, strict=True)):
        config = dataclasses.replace(BASE, learning_rate=rate).to_dict()
        experiments_rows.write(many, tmp_path, _row("rate 0.1", 0, error) | {"arm": [*arms][place], "config": config})
    notes = report(Results({many.name: many}, tmp_path).found(many, "reduced")).notes
    assert "test error of 10 arms beside what is printed: rank correlation 0.99, median difference -2.00" in notes
    # Of nine the order says little.
    fewer = dataclasses.replace(many, published=printed[1:])
    assert not any("rank" in one for one in report(Results({many.name: fewer}, tmp_path).found(fewer, "reduced")).notes)


def test_a_verdict_before_all_runs_are_there_says_so_and_counts_the_arms_there_are(tmp_path):
    errors = {"rate 0.1": (1.0, 1.1, 1.2), "rate 0.2": (9.0, 9.2, 9.1)}
    rows = [_row(arm, place, error) for arm, those in errors.items() for place, error in enumerate(those)]
    (line,) = report(_written(tmp_path, rows).found(CLAIM, "reduced")).verdicts
    assert (line["verdict"], line["pairs"], line["against"]) == ("holds, so far", "3 of 4", "rate 0.2")


def test_rows_of_a_file_that_several_read_are_no_rows_too_many(tmp_path):
    shared = dataclasses.replace(GRID, also_in={"shared.jsonl": lambda line: line | {"experiment": "somebody else's"}})
    other = _row("rate 0.1", 0, 9.0) | {"config": dataclasses.replace(BASE, epochs=5).to_dict()}
    lines.append_line(tmp_path / "shared.jsonl", other)
    lines.append_line(tmp_path / "p9-table-1.jsonl", other)
    assert Results({shared.name: shared}, tmp_path).found(shared, "reduced").others == 1


def test_what_is_computed_is_replaced_whole_or_not_at_all(tmp_path):
    one = Experiment(name="p9-claim-2", title="", source="", computed=lambda: [{"arm": "a", "value": 1}] * 2)
    path = tmp_path / "p9-claim-2.jsonl"
    assert experiments_rows.compute(one, tmp_path) == 2 and len(lines.read_lines(path)) == 2

    def fails():
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        experiments_rows.compute(dataclasses.replace(one, computed=fails), tmp_path)
    assert len(lines.read_lines(path)) == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match="to be"):
        experiments_rows.compute(one, tmp_path / "file")


def test_a_run_is_brought_over_once(tmp_path):
    # Trained from two versions of its data, each with a key of its own in the sweep.
    row = _row("rate 0.1", 0, 9.0) | {"status": "done"}
    metrics = {"converged": True, "chance_top1": 10.0, "first_class_top1": 10.0}
    metrics |= {"median_test_top1": 90.0, "median_validation_top1": None}
    for data in ("d", "e"):
        lines.append_line(tmp_path / files.SWEEP_ROWS, row | {"data": data, "metrics": row["metrics"] | metrics})
    found = Results(ALL, tmp_path / "results")
    assert experiments_run._Writer(GRID, "reduced", found, tmp_path).bring() == 1
    assert len(lines.read_lines(tmp_path / "results" / "p9-table-1.jsonl")) == 1


def test_nothing_is_trained_on_another_version_of_the_data(tmp_path):
    found = _written(tmp_path, [_row("rate 0.1", 0, 9.0)])
    with pytest.raises(Refusal, match=r"in the version of the rows that there are \(d\), got"):
        experiments_run.run(GRID, "reduced", results=found, folder=tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists() and len(found.found(GRID, "reduced").rows) == 1


def test_times_are_compared_of_rows_that_were_trained_alike(tmp_path):
    claim = Statement("0.1 is faster", ("rate 0.1",), ("rate 0.2",), "seconds", 1.0, 3)
    timed = dataclasses.replace(GRID, statements=(claim, dataclasses.replace(BEST, against=("rate 0.2",))))
    alone = {"device": "here", "threads": 1, "population": {"mode": "workers", "members": 1}}
    together = alone | {"population": {"mode": "vmap", "members": 3}}
    pairs = []
    for place, other in enumerate(
        (alone, together, alone | {"device": "there"}, alone | {"threads": 2}, {"device": "here"})
    ):
        rows = [
            _row(arm, place, 9.0 - place) | how | {"train_seconds": seconds}
            for arm, how, seconds in (("rate 0.1", alone, 4.0), ("rate 0.2", other, 8.0))
            for place in range(3)
        ]
        seconds, error = judge(_written(tmp_path / str(place), rows).found(timed, "reduced"))
        assert error.found.pairs == 3 and math.isnan(error.seconds) == (seconds.found.pairs == 0)
        pairs.append(seconds.found.pairs)
    assert pairs == [3, 0, 0, 0, 3]


def test_a_table_has_no_mean_of_times_that_cannot_be_compared(tmp_path):
    rows = [_row("rate 0.1", place, 9.0) | {"train_seconds": 4.0, "device": "here"} for place in range(2)]
    timed = dataclasses.replace(GRID, metrics=("test error", "ms a step"))
    line, *_ = report(_written(tmp_path / "a", rows).found(timed, "reduced")).arms
    assert line["ms a step"] == "100"
    rows[1]["device"] = "there"
    line, *_ = report(_written(tmp_path / "b", rows).found(timed, "reduced")).arms
    assert line["ms a step"] == "-" and line["test error"].startswith("9.00")


@pytest.mark.parametrize("reader", [None, "seconds", "test error"])
def test_rows_whose_times_another_experiment_reads_are_trained_one_by_one(tmp_path, monkeypatch, reader):
    asked = []
    monkeypatch.setattr(experiments_run, "_check_data", lambda *given: None)
    monkeypatch.setattr(experiments_run, "sweep", lambda configs, **given: asked.append(given["performance"]))
    monkeypatch.setattr(experiments_run, "_failures", lambda *given: [])
    claim = Statement("0.1 is best", ("rate 0.1",), ("rate 0.2",), reader or "test error", 1.0, 3)
    known = {GRID.name: GRID} | ({CLAIM.name: dataclasses.replace(CLAIM, statements=(claim,))} if reader else {})
    with pytest.raises(AttributeError, match="signal"):  # the sweep that was put in its place found nothing
        experiments_run.run(GRID, "reduced", results=Results(known, tmp_path), folder=tmp_path / "sweep")
    assert asked == [hj.Performance(population="workers") if reader == "seconds" else None]


def _judged_together(folder, errors, late=()):
    """Lines of two statements of one family about rates 0.1, 0.2 and 0.4."""
    rows = [
        _row(arm, place, error)
        | {"train_seconds": 4.0, "device": "here"}
        | {"history": {"epoch": [4], "test_top1": [100 - error], "seconds": [5.0 if (arm, place) in late else 4.0]}}
        for arm, values in errors.items()
        for place, error in enumerate(values)
    ]
    said = tuple(Statement(f"0.1 beats {r}", ("rate 0.1",), (f"rate {r}",), "test error", 0.5, 3) for r in (0.2, 0.4))
    one = dataclasses.replace(GRID, statements=said, scales={"reduced": Scale(BASE, ARMS, 3)})
    _written(folder, rows)
    return report(Results({one.name: one}, folder).found(one, "reduced")).verdicts


def test_a_table_says_why_there_is_no_verdict_beside_0(tmp_path):
    # p is 0.035, and has to be 0.025 beside another test without a difference.
    near = {"rate 0.1": (5.0, 5.0, 5.0), "rate 0.2": (7.0, 8.0, 9.0), "rate 0.4": (5.0, 7.0, 3.5)}
    first, second = _judged_together(tmp_path / "a", near)
    assert (first["verdict"], second["verdict"]) == ("too few (Holm's correction)", "too few")
    first, second = _judged_together(tmp_path / "b", near | {"rate 0.4": ()})
    assert (first["verdict"], second["verdict"]) == ("holds, so far", "no pair")


def test_a_verdict_is_so_far_where_what_is_judged_with_it_may_change_it(tmp_path):
    # p is 0.035, and has to be 0.025 beside another test without a difference.
    near = {"rate 0.1": (5.0, 5.0, 5.0), "rate 0.2": (7.0, 8.0, 9.0), "rate 0.4": (9.0, 9.2)}
    first, second = _judged_together(tmp_path / "a", near)
    assert (first["verdict"], second["verdict"]) == ("holds, so far", "too few")
    first, _ = _judged_together(tmp_path / "b", near | {"rate 0.4": (9.0, 9.2, 9.3)})
    assert first["verdict"] == "holds"  # the other one holds too, and leaves it 0.05
    first, _ = _judged_together(tmp_path / "c", near | {"rate 0.2": (9.0, 9.1, 9.3)})
    assert first["verdict"] == "holds"  # whatever comes of the other


def test_a_comparison_at_equal_time_says_on_how_many_pairs_it_rests(tmp_path):
    errors = {"rate 0.1": (5.0, 5.1, 5.2), "rate 0.2": (9.0, 9.1, 9.3), "rate 0.4": (9.0, 9.2, 9.3)}
    first, _ = _judged_together(tmp_path / "a", errors)
    assert first["at equal time"] == f"{first['difference as claimed']}: holds"
    # Within the 4 seconds of the fastest arm one run had not been tested.
    first, _ = _judged_together(tmp_path / "b", errors, [("rate 0.1", 2)])
    assert first["verdict"] == "holds" and first["at equal time"] == "+4.00: too few (2 pairs)"


def test_where_every_run_of_a_seed_blew_up_none_is_sooner():
    rows = [
        _row("rate 0.1", 0, 90.0) | {"history": {"epoch": [1, 2], "full_train_loss": [2.0, None]}} for _ in range(2)
    ]
    assert value("epochs to a common level", rows[0], rows) == math.inf
    rows[1]["history"] = {"epoch": [1, 2], "full_train_loss": [2.0, 1.0]}
    assert value("epochs to a common level", rows[0], rows) == math.inf
    assert value("epochs to a common level", rows[1], rows) == 2
    nothing = [_row("rate 0.1", 0, 90.0)]
    assert math.isnan(value("epochs to a common level", nothing[0], nothing))


def test_measures_of_a_run_that_diverged_are_none():
    measures = {"0": {"L_K": [10.0, 100.0], "C_K": [4.0, 40.0]}}
    row = _row("rate 0.1", 0, 9.0) | {"trail": {"epoch": [2, 4], "measures": measures}}
    names = ("log10 L_K", "log10 L_K at half", "log10 C_K", "log10 growth of C_K in the second half")
    assert [value(name, row) for name in names] == pytest.approx([2, 1, math.log10(40), 1])
    growth = "log10 growth of L_K, first half over second"
    assert value(growth, row) == pytest.approx(math.log10(10 / 90))
    assert all(math.isnan(value(name, row | {"status": "diverged"})) for name in (*names, growth))


def test_neither_way_is_better_of_a_measure():
    with pytest.raises(Refusal, match="Expected higher for 'it rises'"):
        Statement("it rises", ("a",), ("b",), "log10 C_K", 0.05, 3)


def test_experiments_of_ones_own_are_under_a_heading_of_their_own(tmp_path):
    said = report(_written(tmp_path, [_row("rate 0.1", 0, 9.0)]).found(GRID, "reduced"))
    text = results([said], PAPERS)
    assert "## Others" in text and "### p9-table-1" in text and "## P1" not in text


def test_a_picture_of_what_may_be_missed_shows_the_median_with_its_misses(tmp_path):
    rows = [_row("rate 0.1", place, 9.0) for place in range(3)]
    curves = [[1.0, 0.5, 0.2, 0.2], [1.0, 0.5, 0.2, 0.2], [1.0, 2.0, 3.0, 4.0]]  # settled at 3, at 3, and never
    for row, losses in zip(rows, curves, strict=True):
        row["history"] = {"epoch": [1, 2, 3, 4], "full_train_loss": losses}
    found = _written(tmp_path, rows).found(dataclasses.replace(GRID, metrics=("epochs to converge",)), "reduced")
    axes = LAYOUTS["arms"](found).axes[0]
    assert [line.get_xdata()[0] for line in axes.lines[:2]] == [3, 3]
    assert [text.get_text() for text in axes.texts] == ["1 missed"]


def _lost(place=0, arm="rate 0.1", seconds=2.0):
    """Diverged in the second of four epochs of ten steps, and trained no further."""
    row = _row(arm, place, 100.0)
    return row | {
        "status": "diverged",
        "train_seconds": seconds,
        "trained_epochs": 2.0,
        "metrics": row["metrics"] | {"final_test_top1": 0.0, "final_test_loss": None, "first_class_top1": 9.8},
        "history": {"epoch": [1, 2, 3, 4], "test_top1": [60.0, 0.0, 0.0, 0.0], "test_loss": [1.0, None, None, None]},
    }


def test_what_diverged_has_the_error_of_what_it_predicts():
    row = _lost()
    assert value("test error", row) == pytest.approx(90.2) and value("test top-1", row) == 9.8
    epochs, errors = progress.column(row, "test_error")
    assert epochs.tolist() == [1, 2, 3, 4] and errors.tolist() == pytest.approx([40, 90.2, 90.2, 90.2])
    assert progress.column(row, "test_top1")[1].tolist() == [60, 9.8, 9.8, 9.8]
    blown = row | {"metrics": row["metrics"] | {"final_test_top1": 30.0}}  # some samples alone were lost
    assert value("test top-1", blown) == 30


def test_a_run_that_diverged_is_not_the_cheaper_for_it():
    row, whole = _lost(), _row("rate 0.1", 0, 9.0) | {"train_seconds": 4.0}
    assert (value("steps", whole), value("seconds", whole)) == (40, 4.0)
    assert math.isnan(value("steps", row)) and math.isnan(value("seconds", row)) and math.isnan(value("ms a step", row))


def test_runs_that_diverged_set_no_limit_of_time(tmp_path):
    columns = {"epoch": [2, 4], "test_top1": [50.0, 90.0], "test_loss": [1.0, 0.5]}
    rows = [
        _row(arm, place, 10.0) | {"status": "done", "train_seconds": 8.0, "device": "here", "history": columns}
        for arm in ("rate 0.1", "rate 0.2")
        for place in range(3)
    ]
    rows += [_lost(place, "rate 0.4", 1.0) | {"device": "here"} for place in range(1)]
    one = dataclasses.replace(GRID, statements=(dataclasses.replace(BEST, runs=3),))
    _written(tmp_path, rows)
    (said,) = judge(Results({one.name: one}, tmp_path).found(one, "reduced"))
    assert said.seconds == 8


def test_a_picture_of_arms_names_what_is_in_it_and_shows_no_error_below_none(tmp_path):
    _written(tmp_path, [_row("rate 0.1", place, error) for place, error in enumerate((0.1, 0.9, 0.2))])
    for printed in (True, False):
        one = dataclasses.replace(GRID, metrics=("test error",), published=GRID.published if printed else ())
        drawn = LAYOUTS["arms"](Results({one.name: one}, tmp_path).found(one, "reduced"))
        told = [text.get_text() for text in drawn.legends[0].get_texts()]
        assert len(told) == 1 + printed and any("published" in text for text in told) == printed
        assert drawn.axes[0].get_xlim()[0] == 0  # the interval goes from -0.7 to 1.5
