"""Experiments as data: rows find their arms, statements their verdicts, and the repository's own are what they say."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import pytest

import hardjax as hj
from hardjax._validate import Refusal
from hardjax.cli.table import PAPERS
from hardjax.plots.published import LAYOUTS
from hardjax.study import experiments, experiments_rows
from hardjax.study.experiments import Experiment, Published, Scale, Statement, identity
from hardjax.study.experiments_copy import program
from hardjax.study.experiments_markdown import results
from hardjax.study.experiments_metrics import METRICS, value, value_within
from hardjax.study.experiments_prices import Operations, Prices, all_operations, known_operations, missing, prices_of
from hardjax.study.experiments_report import judge, report
from hardjax.study.experiments_rows import Results

FOLDER = Path(__file__).parents[2] / "experiments"
BASE = hj.TrainConfig(model_options={"widths": [4]}, epochs=4, learning_rate=1 / 3)
SCALE = Scale(BASE, {"plain": {}, "hard": {"selection": hj.selection.HardBatches(0.5)}}, 3, {"hard": 2})
ONE = Experiment(
    name="p9-table-1",
    title="made up",
    source="nowhere",
    scales={"reduced": SCALE},
    published=(Published("plain", "test error", 10.0, 0.5),),
    statements=(
        Statement("hard tests better", ("hard",), ("plain",), "test error", 0.5, 3),
        Statement("hard is sooner", ("hard",), ("plain",), "epochs to a common level", 1.0, 3),
        Statement("somebody else's", ("other",), ("plain",), "test error", 0.5, 3),
    ),
)


def _row(arm, place, error, *, seconds=10.0, losses=(1.0, 0.5, 0.2, 0.1), data="d"):
    config = SCALE.config(arm, place)
    top1 = [100 - error - more for more in (3, 2, 1, 0)]
    row = {
        "config": config.to_dict(),
        "data": data,
        "status": "done",
        "metrics": {"final_test_error": error, "backprops": 40},
        "history": {"epoch": [1, 2, 3, 4], "seconds": [2.5, 5, 7.5, 10], "test_top1": top1, "full_train_loss": losses},
        "seconds": seconds,
        "train_seconds": seconds,
        "device": "here",
        "worker": "left out",
    }
    return experiments_rows.kept(row, ONE.name, "reduced", arm)


def _found(folder, rows, experiment=ONE):
    for row in rows:
        experiments_rows.write(experiment, folder, row)
    return Results({experiment.name: experiment}, folder).found(experiment, "reduced")


def test_runs_are_planned_seed_by_seed_and_an_arm_may_have_fewer():
    assert [(one.arm, one.config.seed) for one in SCALE.planned()] == [
        *(("plain", 0), ("hard", 0), ("plain", 1), ("hard", 1)),
        ("plain", 2),
    ]
    assert SCALE.count == 5


def test_rows_find_their_arms_by_configuration_to_the_last_digit(tmp_path):
    rows = [_row("plain", 0, 10.0), _row("hard", 0, 9.0), _row("plain", 0, 77.0)]
    rows[1]["arm"] = "as it was called once"
    other = dict(rows[0], config=dataclasses.replace(BASE, epochs=5).to_dict())
    found = _found(tmp_path, [*rows, other])
    assert {arm: sorted(those) for arm, those in found.arms.items()} == {"plain": [0], "hard": [0]}
    assert found.arms["plain"][0]["metrics"]["final_test_error"] == 10.0  # the first of two
    assert (found.wanted, found.others) == (5, 1)
    assert [(one.arm, one.config.seed) for one in missing(found)] == [("plain", 1), ("hard", 1), ("plain", 2)]
    assert rows[0]["config"]["learning_rate"] == 1 / 3 and "worker" not in rows[0]


def test_rows_of_two_versions_of_the_data_are_refused(tmp_path):
    with pytest.raises(Refusal, match="two versions of 'digits'"):
        _found(tmp_path, [_row("plain", 0, 10.0), _row("hard", 0, 9.0, data="e")])


def _price(found):
    return Prices(found.rows).of(found)


def test_prices_are_measured_or_said_to_be_unmeasured(tmp_path):
    rows = [_row("plain", 0, 10.0, seconds=8.0), _row("hard", 0, 9.0, seconds=20.0)]
    assert _price(_found(tmp_path / "a", rows)).seconds == 8 + 20 + 8
    # Of an arm without a row by its operations, which are those of the other.
    assert _price(_found(tmp_path / "b", rows[:1])) == (pytest.approx(4 * 8), False)
    # Another device tells nothing of this one; neither does a run that was cut short where it diverged.
    elsewhere = [dict(_row("plain", 1, 10.0, seconds=0.5), device="gpu: H100")]
    assert _price(_found(tmp_path / "e", [*rows, *elsewhere])).seconds == 20 + 8
    lost = [dict(_row("hard", 1, 10.0, seconds=0.1), status="diverged", trained_epochs=1.0)]
    assert _price(_found(tmp_path / "f", [*rows, *lost])).seconds == 8 + 8
    assert math.isnan(_price(_found(tmp_path / "c", [dict(rows[0], seconds=None)])).seconds)
    assert math.isnan(_price(_found(tmp_path / "d", [])).seconds)


def _at(size, seconds, **changes):
    return dict(
        _row("plain", 0, 10.0, seconds=seconds), config=dataclasses.replace(BASE, batch_size=size, **changes).to_dict()
    )


def test_prices_of_other_batch_sizes_and_networks_follow_from_what_was_timed():
    """A step of 1 ms besides 2 ns an operation, which two batch sizes tell apart."""

    def seconds(config):
        work = Operations({}).work(config)
        return 1e-3 * work.steps + 2e-9 * work.operations

    of = {size: dataclasses.replace(BASE, batch_size=size) for size in (2, 32, 256)}
    prices = Prices([_at(size, seconds(of[size])) for size in (32, 256)])
    found = prices.of_run(of[2])
    assert found == (pytest.approx(seconds(of[2]), rel=1e-4), False)
    # Another perceptron goes by its operations alone, a network of convolutions by nothing that is known here.
    wide = dataclasses.replace(BASE, model_options={"widths": [512]})
    assert prices.of_run(wide).by_operations
    deep = dataclasses.replace(BASE, model="resnet8", model_options={})
    assert math.isnan(prices.of_run(deep).seconds)
    # Three passes over 1,437 digits, four epochs of them, and a test of all digits after each.
    work = Operations({}).work(dataclasses.replace(BASE, model_options={"widths": [8]}, batch_size=128))
    assert work.operations == (64 * 8 + 8 * 10) * 4 * (3 * 1437 + 360 + 1437) and work.steps == 4 * 12


@pytest.mark.ci
def test_the_operations_that_prices_go_by_are_those_of_the_networks(ours):
    assert known_operations(FOLDER) == all_operations(ours.values()), "python scripts/operations.py"


def test_statements_are_judged_at_equal_steps_and_at_equal_time(tmp_path):
    # Hard is better by 2 at the end, and slower: within 10 seconds it is at its second test point, 2 above its end.
    rows = [_row("plain", place, 10.0 + place) for place in (0, 1)]
    slow = [dict(_row("hard", place, 8.1 + place * 0.9), train_seconds=20.0) for place in (0, 1)]
    for row in slow:
        row["history"] |= {"seconds": [5, 10, 15, 20], "full_train_loss": [1.0, 0.1, 0.1, 0.1]}
    first, second = judge(_found(tmp_path, [*rows, *slow]))
    assert first.found.middle == pytest.approx(1.95) and first.verdict == "too few"
    assert first.seconds == 10 and first.in_time[0].middle == pytest.approx(-0.05)
    # The common level is 0.1: two epochs against four.
    assert second.found.by_sign and second.found.middle == 2 and second.in_time is None


def test_of_several_arms_the_best_is_chosen_by_the_other_seeds(tmp_path):
    arms = {name: {"batch_size": size} for name, size in (("a", 8), ("b", 16), ("c", 32))}
    scale = Scale(BASE, arms, 3)
    claim = Statement("a or b is best", ("a", "b"), ("c",), "test error", 0.5, 3)
    one = dataclasses.replace(ONE, scales={"reduced": scale}, statements=(claim,))
    errors = {"a": (5, 1, 1), "b": (2, 2, 2), "c": (4, 4, 5)}
    rows = [
        dict(_row("plain", place, float(errors[arm][place])), config=scale.config(arm, place).to_dict())
        for arm in arms
        for place in range(3)
    ]
    (found,) = judge(_found(tmp_path, rows, one))
    # Seed 0 is left to a (1 and 1), which has 5 there; seeds 1 and 2 to b (means 2 against 3).
    assert found.found.middle == pytest.approx(((4 - 5) + (4 - 2) + (5 - 2)) / 3)


def test_a_report_sets_ours_beside_what_was_printed(tmp_path):
    rows = [_row("plain", place, error) for place, error in enumerate((9.0, 10.0, 11.0))]
    said = report(_found(tmp_path, rows))
    (line,) = said.arms
    # Deviation 1; t(0.975, 2) / sqrt(3) = 2.484.
    assert line["published test error"] == "10.00 ± 0.50" and line["test error"] == "10.00 ± 2.48 (sd 1.00)"
    assert "left: 2 runs, about 1 minutes of one worker" in said.notes
    text = results([said], {"p9-": "Nowhere"})
    assert "### p9-table-1: Made up" in text and "| plain | 10.00 ± 0.50 | 10.00 ± 2.48 (sd 1.00) | 3 |" in text


def test_metrics_of_a_row():
    row = _row("plain", 0, 10.0)
    assert value("ms a step", row) == 250 and value("epochs to converge", row) == 4
    assert value_within("test error", row, 7.5) == 11 and math.isnan(value_within("test error", row, 1.0))
    assert (
        value("epochs to converge", dict(row, history=row["history"] | {"full_train_loss": [1, 2, 3, 4]})) == math.inf
    )
    # A level of 0.2 is first met at the third test point, one of 0.05 never.
    peers = [row, dict(row, history=row["history"] | {"full_train_loss": [1.0, 0.9, 0.8, 0.2]})]
    assert (value("epochs to a common level", row, peers), value("seconds to a common level", row, peers)) == (3, 7.5)
    peers[1]["history"]["full_train_loss"] = [0.05] * 4
    assert value("seconds to a common level", row, [peers[1]]) == math.inf
    # A rise is one over fixed epochs: over the lowest error of the run it could not be negative.
    row["config"]["epochs"] = 5
    assert value("late rise of the test error", row) == 10 - 11
    del row["history"]["seconds"]  # epochs are taken to be alike
    assert value_within("test error", row, 7.4) == 12
    row["config"]["batch_plan"] = {"text": "16-to-64"}  # of which they are not
    assert math.isnan(value_within("test error", row, 7.4))
    assert math.isnan(value("log10 C_K", row))


def test_a_copied_program_has_the_very_configurations():
    space = {"__name__": "copied"}
    exec(compile(program(ONE, "reduced"), "copied", "exec"), space)
    copied = [(identity(one.to_dict()), one.seed) for one in space["configs"]()]
    assert copied == [(identity(one.config.to_dict()), one.config.seed) for one in SCALE.planned()]
    with pytest.raises(Refusal, match="no configurations at the paper scale"):
        program(ONE, "paper")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "P1 Table"}, "as in p1-table-3"),
        ({"scales": {}}, "one of scales, reads and computed"),
        ({"scales": {"huge": SCALE}}, "Unknown scale 'huge'"),
        ({"metrics": ("test eror",)}, "did you mean 'test error'"),
    ],
)
def test_what_is_no_experiment_is_refused(settings, words):
    with pytest.raises(Refusal, match=words):
        dataclasses.replace(ONE, **settings)


def test_a_folder_without_experiments_is_refused(tmp_path):
    (tmp_path / "other.py").write_text("raise AssertionError('never run')\n")
    with pytest.raises(Refusal, match="No experiments in"):
        experiments.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = 1\nEXPERIMENTS = (b,)\n", r"table.py' line 2: NameError: name 'b' is not defined"),
        ("\n\nEXPERIMENTS = (\n", r"table.py' line 3: SyntaxError: "),
        ("import nowhere\nEXPERIMENTS = ()\n", r"table.py' line 1: ModuleNotFoundError: No module named 'nowhere'"),
        ("EXPERIMENTS = (1,)\n", "to hold experiments alone"),
    ],
)
def test_a_faulty_module_is_one_line(tmp_path, text, said):
    (tmp_path / "table.py").write_text(text)
    with pytest.raises(Refusal, match=said):
        experiments.load(tmp_path)


@pytest.fixture(scope="module")
def ours():
    return experiments.load(FOLDER)


def test_every_published_table_and_figure_is_there(ours):
    wanted = [f"p1-table-{n}" for n in range(1, 7)] + [f"p1-figure-{n}" for n in (1, 3, 4, 5)] + ["p2-table-1"]
    wanted += ["p3-table-1", *(f"p3-figure-{n}" for n in range(1, 15)), *(f"p4-figure-{n}" for n in range(1, 19))]
    claims = {"p1": 16, "p2": 3, "p3": 25, "p4": 23}
    wanted += [f"{paper}-claim-{n}" for paper, count in claims.items() for n in range(1, count + 1)]
    wanted += [f"p3-relation-{n}" for n in range(1, 14)]
    assert [name for name in wanted if name not in ours] == []
    assert sum(name.startswith(("p3-grid", "p3-dynamic")) for name in ours) == 18


def test_ours_name_layouts_metrics_and_arms_that_are_there(ours):
    for one in ours.values():
        assert one.layout in LAYOUTS, one.name
        assert one.name[:3] in PAPERS
        if one.scales and one.name != "p3-extra-reading":
            known = {arm for scale in one.scales.values() for arm in scale.arms}
            assert {p.arm for p in one.published} <= known, one.name
            # A statement whose arms no scale has would never be judged.
            for claim in one.statements:
                assert known & set(claim.arms) and known & set(claim.against or known), (one.name, claim.says)
    assert all(metric.form for metric in METRICS.values())


IMAGENET = {"p4-figure-12", "p4-figure-14", *(f"p4-claim-{number}" for number in (14, 15, 17, 20, 23))}


def _is_known(found, statement):
    return bool(_known(found, statement.arms) and (_known(found, statement.against) or not statement.against))


def _known(found, side):
    """Arms of a side of a statement that there are at a scale."""
    return [arm for arm in side if arm in found.arms]


def test_every_statement_can_be_judged_by_the_runs_that_its_scale_has(ours, tmp_path):
    """At the paper's scale and ours: as many seeds as it asks for, and a sign test that Holm's correction can keep."""
    nothing = Results(ours, tmp_path)
    for one in ours.values():
        at = {scale: nothing.found(one, scale) for scale in ("paper", "reduced", "smoke")}
        judged = {scale: [s for s in one.statements if _is_known(found, s)] for scale, found in at.items()}
        assert [s.says for s in one.statements if not any(s in those for those in judged.values())] == [], one.name
        for scale in ("paper", "reduced"):
            found, said = at[scale], judged[scale]
            families = Counter(s.family for s in said)
            for claim in said:
                seeds = min(_runs(ours, one, scale, arm) for arm in _known(found, (*claim.arms, *claim.against)))
                assert seeds >= claim.runs, (one.name, scale, claim.says)
                # The paper has two runs of ImageNet, which the rule can say nothing of.
                assert claim.runs >= 3 or one.name in IMAGENET, (one.name, scale, claim.says)
                if METRICS[claim.metric].may_miss:
                    assert 2 / 2**claim.runs <= 0.05 / families[claim.family], (one.name, scale, claim.says)


def _runs(ours, one, scale, arm):
    """Seeds of an arm, of the experiment that has it."""
    if one.scales:
        return one.scales[scale].runs_of(arm)
    source, _, label = arm.rpartition(": ")
    (size,) = [ours[name].scales[scale] for name in one.reads if name == (source or one.reads[0])]
    return size.runs_of(label)


def test_published_numbers_are_those_of_the_tables(ours):
    printed = {(p.arm, p.metric): p.value for p in ours["p1-table-3"].published}
    assert printed["ResNet-18 ordinary", "test top-1"] == 69.6 and printed["ResNet-18 0.2", "epochs to converge"] == 74
    cells = {p.arm: (p.value, p.spread) for p in ours["p3-grid-resnet-cifar10"].published if p.metric == "test error"}
    assert len(cells) == 35 and cells["s32-lr0.05"] == (4.67, 0.22)
    assert ours["p3-grid-mlp-mnist"].scales["paper"].runs == 5 and ours["p2-table-1"].scales["paper"].runs == 10


def test_rows_of_the_script_for_mnist_are_found(ours):
    path = FOLDER / "results" / "mnist_dynamic.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = Results(ours, FOLDER / "results").found(ours["p3-dynamic-mlp-mnist"], "reduced")
    for row in rows:
        if "-to-" in row["arm"] and row["seed"] < 3:
            there = found.arms[row["arm"]][row["seed"]]
            assert there["metrics"]["final_test_error"] == pytest.approx(row["trail"]["test_error"])


@pytest.mark.ci
def test_results_are_what_the_rows_say(ours):
    found = Results(ours, FOLDER / "results")
    prices = prices_of(found, FOLDER)
    text = results([report(rows, prices) for one in ours.values() for rows in found.shown(one)], PAPERS)
    written = (FOLDER / "RESULTS.md").read_text(encoding="utf-8")
    assert text == written, "hardjax table show all --markdown > experiments/RESULTS.md"
