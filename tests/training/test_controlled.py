"""Runs whose batch size a controller decides: what is decided, written down, gone on with and replayed."""

import json

import jax
import numpy as np
import pytest

import hardjax as hj
from hardjax.choose import control
from hardjax.choose.batch_plan import BatchPlan, replayed
from hardjax.choose.control import Decision
from hardjax.choose.selection import AllBatches, HardBatches, HardSamples
from hardjax.cli import main
from hardjax.engine.programs import programs_for
from hardjax.study.measure import measure_run
from hardjax.training import lines
from hardjax.training.loop import Loop
from hardjax.training.saver import Saver
from hardjax.training.setting import prepare

# 70 samples: 5 steps an epoch at 16, 9 at 8. Halved after two epochs, then at the least.
HALVING = BatchPlan("controlled:start=16,least=8,most=16,every=2,share=0.1")
# Nothing is that low: the rate falls at every epoch.
LOWERING = BatchPlan.controlled(16, 16, 16, trajectory=([0], [0.5], [0]), reading="epochs")
SMALL = dict(
    model="mlp",
    model_options={"widths": [4]},
    learning_rate=0.05,
    epochs=5,
    schedule="cosine",
    optimizer="adam",
    measure=hj.fisher.FisherMeasure(every=4),
)
CLOCKS = ("seconds",)


def run(tiny, plan=HALVING, performance=None, **settings):
    where = {name: settings.pop(name) for name in ("output", "resume") if name in settings}
    config = hj.TrainConfig(**SMALL | dict(batch_plan=plan) | settings)
    return hj.run(config, dataset=tiny, performance=performance, progress=False, **where)


def same(one, other):
    for name, column in one.history.items():
        if name not in CLOCKS:
            np.testing.assert_array_equal(other.history[name], column, name)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, other.state.params, one.state.params)))
    for name, column in one.measurements.items():
        np.testing.assert_array_equal(other.measurements[name], column, name)


@pytest.mark.ci
def test_it_decides_and_its_log_decides_and_trains_the_same(tiny, tmp_path):
    found = run(tiny, selection=HardBatches(0.4), output=tmp_path)
    assert [(line["backprops"], line["seen"]["size"], line["action"], line["size"]) for line in found.decisions] == [
        (10, 16, "halve", 8),
        (28, 8, "keep", 8),
    ]
    assert found.summary["backprops"] == 2 * 5 + 3 * 9
    size = found.measurements["batch_size"]
    np.testing.assert_array_equal(size, np.where(found.measurements["step"] < 10, 16, 8))
    assert "8 is the least" in found.decisions[1]["reason"]
    # The facts are those of the record: the noise scale of what was measured since the decision before.
    first = found.measurements["step"] < 10
    for name in ("covariance", "signal"):
        total = found.measurements[name][first].sum()
        np.testing.assert_allclose(found.decisions[0]["seen"][name], total, rtol=1e-5)
    assert found.decisions[0]["seen"]["batches"] == first.sum() == 3
    np.testing.assert_allclose(found.decisions[0]["seen"]["condition"], found.measurements["C_K"][first][-1])
    np.testing.assert_allclose(found.decisions[0]["seen"]["energy"], found.measurements["L_K"][first][-1])
    written = lines.read_lines(tmp_path / "decisions.jsonl")
    assert written == found.decisions
    for line in written:
        again = control.decide(HALVING.controller, control.seen_in(line))
        assert again == Decision(*(line[name] for name in Decision._fields))
    open_loop = replayed(written)
    assert open_loop.text == "2/5*16-3/5*8;every=2"
    same(found, run(tiny, open_loop, selection=HardBatches(0.4)))
    # The final state is measured at the size and rate of its last step, which the plan of the beginning does not know.
    final = measure_run(tmp_path, batches=1, dataset=tiny).final
    assert final["eigenvalues"].shape == (1, 8)
    np.testing.assert_allclose(
        final["l"][0], found.history["learning_rate"][-1] / 8 * np.sqrt(final["trace"][0]), rtol=1e-5
    )


@pytest.mark.ci
@pytest.mark.parametrize("selection", [AllBatches(), HardSamples(0.5)])
def test_a_lower_rate_is_replayed(tiny, selection):
    found = run(tiny, LOWERING, selection=selection)
    assert [line["action"] for line in found.decisions] == ["lower-rate"] * 4
    assert found.decisions[0]["reading"] == "epochs"
    plain = run(tiny, BatchPlan("16;every=1"), selection=selection)
    rates = found.history["learning_rate"] / plain.history["learning_rate"]
    np.testing.assert_allclose(rates, [1, 0.5, 0.25, 0.125, 0.0625])
    same(found, run(tiny, replayed(found.decisions), selection=selection))


@pytest.mark.ci
@pytest.mark.parametrize(
    "plan, settings",
    [
        (HALVING, dict(selection=HardBatches(0.4))),
        (HALVING, dict(selection=HardSamples(0.5), test_every="round")),
        (LOWERING, dict(rate_scaling="sqrt", trimming=hj.trimming.Trimming(end=0.5))),
    ],
    ids=["halving", "of samples", "lowering"],
)
def test_a_controlled_run_resumes_everywhere(tiny, plan, settings):
    hj.testing.assert_resumes_everywhere(hj.TrainConfig(**SMALL, batch_plan=plan, **settings), dataset=tiny)


@pytest.mark.parametrize("every", [6, 12], ids=["several a stage", "one a stage"])
def test_a_controller_reads_epochs_as_the_record_does(tiny, every):
    """Doubled at every decision: C_K is far below its target."""
    plan = BatchPlan.controlled(8, 8, 32, trajectory=([0], [1e9], [0]), reading="epochs", every=2)
    found = run(tiny, plan, epochs=6, measure=hj.fisher.FisherMeasure(every=every))
    assert [line["size"] for line in found.decisions] == [16, 32]
    for line in found.decisions:
        last = np.searchsorted(found.measurements["step"], line["backprops"]) - 1
        for name, field in (("condition", "C_K by epoch"), ("energy", "L_K by epoch")):
            np.testing.assert_allclose(line["seen"][name], found.measurements[field][last], rtol=1e-12)


class Killed(Exception):
    pass


@pytest.mark.ci
@pytest.mark.parametrize("at", [10, 13], ids=["at a control point", "within a stage"])
def test_it_goes_on_from_its_files(tiny, tmp_path, monkeypatch, at):
    """Saved there; what comes after, a decision with it, is lost."""
    whole = run(tiny, selection=HardBatches(0.4))

    def due(self, tested):
        (step,) = steps
        return step == at

    steps = [0]
    original = Loop._issue

    def noting(self, dispatch):
        if dispatch.before.backprops > at + 15:
            raise Killed
        original(self, dispatch)
        steps[0] = dispatch.after.backprops

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "due", due)
        patch.setattr(Loop, "_issue", noting)
        with pytest.raises(Killed):
            run(tiny, selection=HardBatches(0.4), output=tmp_path, performance=hj.Performance(steps_per_dispatch=1))
    found = run(tiny, selection=HardBatches(0.4), output=tmp_path, resume=True)
    assert found.summary["resumed_at"] == [at]
    assert found.decisions == whole.decisions
    same(whole, found)
    again = run(tiny, selection=HardBatches(0.4), output=tmp_path, resume=True)  # of a finished run all is read
    assert again.decisions == whole.decisions


@pytest.mark.ci
def test_neighbours_are_compiled_aside(tiny):
    """Off or aside the bits are the same; what is compiled aside is no more than what may be decided next."""
    made = {}
    for ahead in ("off", "background"):
        programs_for.cache_clear()
        config, performance = hj.TrainConfig(**SMALL, batch_plan=HALVING), hj.Performance(compile_ahead=ahead)
        found = hj.run(config, dataset=tiny, performance=performance, progress=False)
        made[ahead] = prepare(config, tiny, performance=performance).programs.traces, found
    same(made["off"][1], made["background"][1])
    assert made["off"][0]["restage"] == 1 and made["background"][0]["restage"] <= 2  # and back to 16, perhaps
    for traces, _ in made.values():
        # Two sizes, a dispatch of one rung.
        assert sum(traces.get(kind, 0) for kind in ("plan", "segment", "rounds")) <= 2 * 9
        assert traces["look"] == 2


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(measure=None), r"with measure \(--measure-every\), which its controller decides by"),
        (dict(plan=BatchPlan("controlled:start=16,least=16,most=128")), "batch_size=128 to be at most the 70 training"),
        (dict(plan=BatchPlan("controlled:start=2,least=1,most=2")), "batch_size=1 to be at least 2 with measure"),
        (dict(batch_size=16), "Give batch_size=16 or batch_plan='controlled:"),
        (dict(epochs=2), "every=2 below epochs=2, or it never decides"),
        (
            dict(model_options={"widths": [4], "norm": "batch"}),
            "samples of a batch are not independent",
        ),
        (dict(performance=hj.Performance(compile_ahead="first")), "what it will need is not known before it trains"),
    ],
)
def test_refusals(tiny, settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        run(tiny, **settings)
    assert "\n" not in str(caught.value)


def test_the_configuration_as_json():
    for plan in (HALVING, LOWERING):
        config = hj.TrainConfig(**SMALL, batch_plan=plan)
        assert hj.TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert config.batch_sizes[0] == 16 and hash(config.batch_plan) == hash(BatchPlan(plan.text))


@pytest.mark.ci
def test_the_command_line(tmp_path, capsys):
    words = "train --epochs 3 --batch-plan controlled:start=256,least=128,most=256 --measure-every 5 --quiet"
    with pytest.raises(SystemExit) as ended:
        main([*words.split(), "--model-option", "widths=[4]", "--output", str(tmp_path)])
    assert ended.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "sizes of controlled:start=256,least=128,most=256" in printed
    assert len(lines.read_lines(tmp_path / "decisions.jsonl")) == 2
