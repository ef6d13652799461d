"""Spectra measured inside the training loop: right, recorded, and without a trace in the training."""

import contextlib
import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from platforms import near

import hardjax as hj
from hardjax._validate import Refusal
from hardjax.choose.selection import AllBatches, HardBatches, HardSamples
from hardjax.data.augment import preprocess
from hardjax.engine.programs import Programs, lowerable, programs_for
from hardjax.engine.state import AUGMENT, DROPOUT, Batch, StepInputs, draw
from hardjax.engine.step import make_step
from hardjax.fisher import FisherMeasure
from hardjax.fisher.observe import derive
from hardjax.study.measure import measure_run
from hardjax.training import checkpoint
from hardjax.training.checkpoint import RunWarning
from hardjax.training.lines import LineFile
from hardjax.training.setting import prepare
from hardjax.training.spectra import Spectra, load

NORMED = dict(model="mlp", model_options={"widths": [8], "norm": "batch"})


def config(**changes) -> hj.TrainConfig:
    settings = NORMED | dict(epochs=4, batch_size=8, learning_rate=0.05, measure=FisherMeasure(every=4))
    return hj.TrainConfig(**{**settings, **changes})


def run(dataset, **changes):
    return hj.run(config(**changes), dataset=dataset, progress=False)


@pytest.mark.parametrize("every", [1, 3, 20])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"selection": HardBatches(0.2)},
        {"selection": HardSamples(0.5), "optimizer": "adam", "augmentation": "standard"},
        {"trimming": hj.trimming.Trimming(), "schedule": "cosine"},
        {"model": "tiny", "model_options": {}, "batch_size": 30},
    ],
    ids=str,
)
def test_measuring_leaves_the_training_as_it_was(tiny, changes, every):
    _check_bit_for_bit(tiny, changes, every, zoo.Tiny(3) if changes.get("model") == "tiny" else None)


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 3, 20])
def test_measuring_leaves_the_training_of_a_residual_network_as_it_was(tiny, every):
    _check_bit_for_bit(tiny, {"model": "resnet8", "model_options": {}, "batch_size": 30}, every, None)


def _check_bit_for_bit(tiny, changes, every, model):
    measured, plain = (
        hj.run(config(**changes, measure=measure), dataset=tiny, model=model, progress=False)
        for measure in (FisherMeasure(every=every), None)
    )
    chex.assert_trees_all_equal(measured.state.variables, plain.state.variables)
    assert len(measured.measurements["step"]) > 0 and plain.measurements == {}
    assert np.isfinite(measured.history["C_K"]).all() and np.isnan(plain.history["C_K"]).all()


@pytest.mark.parametrize("rows", ["contribution", "frozen"])
def test_a_measurement_is_the_gram_of_the_very_batch_that_is_trained(tiny, rows):
    settings = config(measure=FisherMeasure(every=5, rows=rows), augmentation="standard", epochs=1)
    result = hj.run(settings, dataset=tiny, progress=False)
    setting = prepare(dataclasses.replace(settings, measure=None), tiny)
    state, train = setting.init_state(), setting.splits["train"]
    partition = np.asarray(result.state.partition)  # drawn in the one round there was
    spectra = []
    for i in range(9):
        if i % 5 == 0:
            images = preprocess(
                train.images[partition[i]],
                train.mean,
                train.std,
                setting.recipe.augmentation,
                draw(state.key, AUGMENT, state.step),
            )
            labels = train.labels[partition[i]]
            gram = hj.fisher.gram(setting.recipe.apply, state.variables, images, labels, rows, "vmap")
            spectra.append(np.linalg.eigvalsh(np.asarray(gram, np.float64)))
        state, _ = _advance(setting, state, train, partition[i])
    assert result.measurements["step"].tolist() == [0, 5]
    largest = np.max(spectra, axis=1, keepdims=True)
    np.testing.assert_allclose(
        result.measurements["eigenvalues"] / largest, np.array(spectra) / largest, **near(atol=2e-5)
    )


def _advance(setting, state, train, indices):
    """One step on these samples, as the round takes it."""
    key = draw(state.key, AUGMENT, state.step)
    images = preprocess(train.images[indices], train.mean, train.std, setting.recipe.augmentation, key)
    batch = Batch(images, train.labels[indices])
    inputs = StepInputs(jnp.float32(0.05), jnp.int32(8))
    return make_step(setting.recipe)(state, batch, setting.hyper, inputs, draw(state.key, DROPOUT, state.step))


@pytest.mark.parametrize(
    "selection, every, steps",
    [
        (AllBatches(), 4, [0, 4, 8, 12, 16, 20, 24]),
        (AllBatches(), 9, [0, 9, 18]),
        (AllBatches(), 100, [0]),
        # j * every + floor(every * fraction of j * 0.618...): another place in each interval.
        (AllBatches(fixed=True), 9, [0, 14, 20]),
        (HardBatches(0.2), 4, [0, 6, 8, 15, 17, 20, 26]),
        (HardBatches(0.5), 6, [0, 9, 13, 23, 26]),
        (HardBatches(0.5), 14, [0, 22]),
    ],
    ids=str,
)
def test_positions_and_what_each_stands_for(tiny, selection, every, steps):
    result = run(tiny, selection=selection, epochs=3, measure=FisherMeasure(every=every))
    measured = result.measurements
    assert measured["step"].tolist() == steps
    assert measured["stands_for"].tolist() == [every] * len(steps)
    np.testing.assert_allclose(measured["epoch"], np.array(steps) / 9)
    assert measured["eigenvalues"].shape == (len(steps), 8) and set(measured["batch_size"]) == {8}
    if isinstance(selection, HardBatches):
        trained = [int(slot) for row in result.replays for slot in np.flatnonzero(row)]
        assert len(trained) == 27 and set(measured["slot"]) <= set(range(9))
    other = run(tiny, selection=selection, epochs=3, measure=FisherMeasure(every=every), seed=9)
    assert other.measurements["step"].tolist() == steps


def test_the_hardest_batch_is_not_measured_more_often_than_the_others(tiny):
    """A round of four, hardest first, and an interval that it divides: each rank is met."""
    result = run(tiny, selection=HardBatches(0.44), epochs=16, measure=FisherMeasure(every=4))
    ranks = np.bincount((result.measurements["step"][3:] - 9) % 4, minlength=4)
    assert ranks.min() >= 0.6 * ranks.mean()


def test_history_and_derived_measures(tiny, tmp_path):
    folder = tmp_path / "run"
    settings = config(schedule="step", measure=FisherMeasure(every=3))
    result = hj.run(settings, dataset=tiny, output=folder, progress=False)
    measured, values = result.measurements, result.measurements["eigenvalues"].astype(np.float64)
    rates = np.where(measured["step"] < 18, 0.05, np.where(measured["step"] < 27, 0.005, 0.0005))
    np.testing.assert_allclose(measured["learning_rate"], rates, rtol=1e-6)
    clamped = np.maximum(values, 0)
    c = [np.sqrt(row.max() / row[row > 1e-6 * row.max()].min()) for row in clamped]
    energy = rates / 8 * np.sqrt(clamped.sum(1))
    np.testing.assert_allclose(measured["c"], c, rtol=1e-6)
    np.testing.assert_allclose(measured["C_K"], np.cumsum(c) / np.arange(1, len(c) + 1), rtol=1e-6)
    np.testing.assert_allclose(measured["L_K"], np.cumsum(energy * 3), rtol=1e-6)
    assert result.history["C_K"][-1] == measured["C_K"][-1] and result.history["L_K"][-1] == measured["L_K"][-1]
    assert (np.diff(result.history["L_K"]) > 0).all()
    np.testing.assert_allclose(measured["trace"], clamped.sum(1), rtol=1e-5)
    # On disk: the raw record, from which another tolerance can be taken afterwards.
    raw = load(folder)
    np.testing.assert_array_equal(raw["eigenvalues"], measured["eigenvalues"])
    np.testing.assert_allclose(derive(raw)["C_K"], measured["C_K"])
    assert derive(raw, 0.1)["C_K"][-1] < measured["C_K"][-1]
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert lines[-1]["C_K"] == result.history["C_K"][-1]
    written = hj.TrainConfig.from_dict(json.loads((folder / "config.json").read_text()))
    assert written == dataclasses.replace(settings, dataset="tiny")


def test_the_record_is_readable_while_the_run_goes_on(tiny, tmp_path, monkeypatch):
    sizes, original = [], LineFile.append

    def noting(self, *entries, **how):
        original(self, *entries, **how)
        if self.path.name == "spectra.jsonl" and entries:
            sizes.append(len(load(tmp_path)["step"]))

    monkeypatch.setattr(LineFile, "append", noting)
    hj.run(config(), dataset=tiny, output=tmp_path, progress=False)
    assert sizes == [3, 5, 7, 9]


def test_no_callback_in_a_look_and_one_trace_of_it(tiny):
    programs_for.cache_clear()
    settings = config(selection=HardBatches(0.35), epochs=5)
    hj.run(settings, dataset=tiny, progress=False)
    assert prepare(settings, tiny).programs.traces["look"] == 1
    look, args = lowerable(settings, tiny)["look"]
    assert "callback" not in str(jax.make_jaxpr(look)(*args))


@pytest.mark.parametrize("stop", [False, True])
def test_spectra_that_are_not_finite(tiny, stop):
    settings = dict(learning_rate=1e30, measure=FisherMeasure(every=3), epochs=3, model_options={"widths": [8]})
    with pytest.warns(RunWarning, match="The run diverged") if stop else contextlib.nullcontext():
        result = run(tiny, on_nan="stop" if stop else "record", **settings)
    assert np.isnan(result.measurements["c"]).any() and np.isfinite(result.measurements["c"][0])
    assert result.summary["backprops"] == (9 if stop else 27)
    assert result.summary["end"] == ("diverged" if stop else "budget spent")
    assert not result.summary["interrupted"]
    assert np.isfinite(result.history["C_K"]).all()


def test_the_final_state_is_measured_at_the_rate_of_its_last_step(tiny, tmp_path):
    hj.run(config(schedule="step"), dataset=tiny, output=tmp_path, progress=False)
    final = measure_run(tmp_path, batches=1, dataset=tiny).final
    np.testing.assert_allclose(final["l"], 0.0005 / 8 * np.sqrt(final["trace"]), rtol=1e-5)


def test_the_final_state_in_float64(tiny, tmp_path):
    hj.run(config(measure=FisherMeasure(every=4, rows="frozen")), dataset=tiny, output=tmp_path, progress=False)
    short = measure_run(tmp_path / "checkpoint", batches=2, dataset=tiny)
    exact = measure_run(tmp_path, batches=2, dataset=tiny, float64=True)
    assert exact.final["eigenvalues"].dtype == np.float64
    largest = exact.final["eigenvalues"].max()
    error = np.abs(short.final["eigenvalues"] - exact.final["eigenvalues"]).max() / largest
    assert 0 < error < 1e-5
    # The rows are those that the run measured, unless others are asked for.
    other = measure_run(tmp_path, batches=2, rows="contribution", dataset=tiny)
    assert not np.allclose(other.final["trace"], short.final["trace"], rtol=1e-3)


def test_what_was_recorded_needs_no_data(tiny, tmp_path):
    hj.run(config(dataset="cifar10"), dataset=tiny, output=tmp_path, progress=False)
    assert measure_run(tmp_path, batches=0).recorded["C_K"][-1] > 1
    with pytest.raises(ValueError, match="Unknown dataset 'tiny'"):
        measure_run(tmp_path, batches=1)


def test_measure_of_a_finished_run(tiny, tmp_path):
    folder = tmp_path / "run"
    result = hj.run(config(), dataset=tiny, output=folder, progress=False)
    report = measure_run(folder, batches=2, dataset=tiny)
    np.testing.assert_allclose(report.recorded["C_K"], result.measurements["C_K"])
    state = checkpoint.restore(folder, prepare(config(), tiny).init_state())
    images = (tiny.train.images[state.partition[1]] / 255.0 - tiny.mean) / tiny.std
    gram = hj.fisher.gram(
        hj.models.create("mlp", num_classes=3, widths=[8], norm="batch"),
        state.variables,
        images.astype(jnp.float32),
        tiny.train.labels[state.partition[1]],
        method="vmap",
    )
    np.testing.assert_allclose(report.final["trace"][1], np.trace(gram), **near(rtol=1e-4))
    assert report.final["eigenvalues"].shape == (2, 8) and set(report.final_sensitivity) == {0.0, 1e-7, 1e-6, 1e-5}
    unmeasured = tmp_path / "unmeasured"
    hj.run(config(measure=None), dataset=tiny, output=unmeasured, progress=False)
    report = measure_run(unmeasured, batches=1, rows="frozen", dataset=tiny)
    assert report.recorded == {} and np.isfinite(report.final["c"]).all()
    with pytest.raises(ValueError, match="No run in"):
        measure_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FisherMeasure(every=0), "every=0 to be a whole number of at least 1"),
        (lambda: FisherMeasure(rows="contributions"), "did you mean 'contribution'"),
        (lambda: FisherMeasure(method="loop"), "Allowed: layers, vmap"),
        (lambda: FisherMeasure(tolerance=1.0), r"tolerance=1.0 in \[0, 1\)"),
        (lambda: config(batch_size=1), "batch_size=1 to be at least 2 with measure"),
        (lambda: config(measure=50), "measure=50 to be FisherMeasure"),
        (lambda: hj.Performance(gram_chunk=0), "gram_chunk=0 to be a whole number of at least 1"),
    ],
)
def test_bad_input_is_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_network_that_no_rule_covers_is_refused_before_anything_is_written(tiny, tmp_path):
    import flax.linen as nn

    class Backwards(nn.Module):
        @nn.compact
        def __call__(self, images):
            x = nn.Dense(3)(images.reshape(len(images), -1)[::-1])
            return x[::-1] * self.param("temperature", nn.initializers.ones, (3,))

    line = 'rows="coupled" takes any network: parameter Dense_0/kernel meets in dot_general a batch .* out of order'
    with pytest.raises(ValueError, match=line):
        hj.run(config(), dataset=tiny, model=Backwards(), output=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, images):
            layer = nn.Dense(3)
            x = layer(images.reshape(len(images), -1)[:, :3])
            return x @ layer.variables["params"]["kernel"] * self.param("temperature", nn.initializers.ones, (3,))

    found = [
        hj.run(config(measure=FisherMeasure(every=4, method=method)), dataset=tiny, model=Tied(), progress=False)
        for method in ("layers", "vmap")
    ]
    np.testing.assert_allclose(found[0].measurements["l"], found[1].measurements["l"], **near(rtol=1e-4))


def test_out_of_memory_says_what_to_set(tiny, monkeypatch):
    def exhausted(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    monkeypatch.setattr(Programs, "look", exhausted)
    with pytest.raises(MemoryError, match=r"set chunk=2 \(Performance.gram_chunk, --gram-chunk\)"):
        run(tiny)
    monkeypatch.setattr(Programs, "rounds", exhausted)
    with pytest.raises(MemoryError, match="Out of memory in training mlp on batches of 8"):
        run(tiny, measure=None)


def test_optax_losses_are_the_losses_measured(tiny):
    """The noise scale's mean entry is the squared norm of the mean gradient."""
    setting = prepare(config(measure=None), tiny)
    variables = setting.init_state().variables
    images, labels = tiny.train.images[:8] / 255.0, tiny.train.labels[:8]
    gram = hj.fisher.gram(setting.recipe.apply, variables, images, labels)

    def mean_loss(params):
        logits = setting.recipe.apply({**variables, "params": params}, images, True)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    norm = sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(jax.grad(mean_loss)(variables["params"])))
    assert float(gram.mean()) == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("line", ["{}", "[1]", '{"step": 1, "eigenvalues": {"zlib": "?"}}', '{"step": '])
def test_a_damaged_record_is_refused(tmp_path, line):
    (tmp_path / "spectra.jsonl").write_text("")
    assert len(load(tmp_path)["step"]) == 0
    (tmp_path / "spectra.jsonl").write_text(f"{line}\n{line}\n")
    with pytest.raises(Refusal, match=r"Damaged spectra\.jsonl in"):
        load(tmp_path)


def test_spectra_come_back_to_the_bit(tmp_path):
    spectra, read = Spectra(50), Spectra(1)
    for step, values in enumerate(([0.1, np.nan, np.inf], [1e-30, 0.3])):
        spectra.add(step, step / 3, 0.1, np.asarray(values, np.float32), np.nan, -1, 10 / 3)
    read.restore(json.loads(json.dumps(spectra.entries(0))))
    assert not read.all_finite and len(read) == 2
    for name, column in spectra.arrays().items():
        np.testing.assert_array_equal(read.arrays()[name], column)
