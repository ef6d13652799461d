"""A run that was cut short goes on as if nothing had happened, or says why not."""

import dataclasses
import json
import shutil
import signal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hardjax as hj
from hardjax._validate import Refusal
from hardjax.choose.selection import AllBatches, HardBatches, HardSamples, RandomBatches
from hardjax.fisher import FisherMeasure
from hardjax.study.arms import make_arms
from hardjax.study.compare import compare
from hardjax.testing import assert_resumes_everywhere
from hardjax.training import checkpoint, record, saver
from hardjax.training.checkpoint import RunWarning
from hardjax.training.signals import Asked

SMALL = dict(model="mlp", model_options={"widths": [8]}, batch_size=8, learning_rate=0.1, epochs=2)


def config(**changes):
    return hj.TrainConfig(**{**SMALL, **changes})


class Noisy(nn.Module):
    """A network of one's own, with draws and statistics."""

    @nn.compact
    def __call__(self, images, train):
        hidden = nn.Dense(8)(images.reshape(len(images), -1))
        hidden = nn.BatchNorm(use_running_average=not train)(hidden)
        return nn.Dense(3)(nn.Dropout(0.3, deterministic=not train)(nn.relu(hidden)))


@dataclasses.dataclass(frozen=True)
class Twice(HardBatches):
    """A strategy of one's own: the hardest batch twice."""

    def plan(self, table, key, size):
        slots = super().plan(table, key, size)
        return slots.at[-1].set(slots[0])


# Every strategy, trimming, measure, schedule of tests and way with steps that are not finite: no exceptions.
EVERYTHING = {
    "all batches": dict(selection=AllBatches()),
    "fixed batches": dict(selection=AllBatches(fixed=True)),
    "hard batches": dict(selection=HardBatches(0.5)),
    "hard batches in short rounds": dict(selection=HardBatches(0.2), epochs=3),
    "random batches": dict(selection=RandomBatches(0.5)),
    "hard samples": dict(selection=HardSamples(0.3)),
    "a strategy of one's own": dict(selection=Twice(0.5)),
    "trimming": dict(trimming=hj.trimming.Trimming(1.0, 0.3), epochs=3),
    "random trimming": dict(trimming=hj.trimming.Trimming(0.6, 0.3, keep="random")),
    "a measure": dict(measure=FisherMeasure(every=4)),
    "a measure under replay": dict(measure=FisherMeasure(every=3, rows="frozen"), selection=HardBatches(0.5)),
    "a measure of hard samples": dict(measure=FisherMeasure(every=5), selection=HardSamples(0.5)),
    "a test point every round": dict(test_every="round", selection=HardBatches(0.5)),
    "augmentation and adam": dict(augmentation="standard", optimizer="adam", schedule="cosine", weight_decay=0.01),
    "a validation share": dict(validation=0.2, evaluate_train=False),
    "skipped steps": dict(on_nan="skip-step", learning_rate=1e30, selection=HardBatches(0.5)),
    "recorded steps that are not finite": dict(on_nan="record", learning_rate=1e30, measure=FisherMeasure(every=4)),
    "a stop": dict(on_nan="stop", learning_rate=1e30, epochs=3),
    "a network of one's own": dict(model=Noisy(), model_options={}, optimizer="nesterov", selection=HardBatches(0.5)),
    "convolutions": dict(model="resnet8", model_options={}, selection=HardBatches(0.5), augmentation="standard"),
    "all at once": dict(
        selection=HardBatches(0.35),
        trimming=hj.trimming.Trimming(1.0, 0.4),
        measure=FisherMeasure(every=4),
        augmentation="standard",
        validation=0.1,
        on_nan="skip-step",
        optimizer="adam",
    ),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_run_resumes_everywhere(tiny, name):
    settings = {**SMALL, **EVERYTHING[name]}
    model = settings.pop("model") if name == "a network of one's own" else None
    performance = hj.Performance(steps_per_dispatch=5)
    assert assert_resumes_everywhere(hj.TrainConfig(**settings), tiny, model=model, performance=performance) >= 3


@pytest.mark.parametrize("what", ["sums", "under way", "table", "step", "key", "slots"])
def test_the_check_notices_what_is_forgotten(tiny, monkeypatch, what):
    """Each part that decides the future, left out once."""
    if what == "sums":
        original = record.Record.marks
        monkeypatch.setattr(
            record.Record, "marks", lambda self: original(self) | {"sums": dict.fromkeys(record._MEANS, (0.0, 0))}
        )
    elif what == "under way":
        original = record.Record.marks
        monkeypatch.setattr(record.Record, "marks", lambda self: original(self) | {"under_way": None})
    else:
        original = checkpoint.on_host

        def forgetful(state):
            plain = original(state)
            return plain | {what: np.zeros_like(plain[what])}

        saved = checkpoint.save
        monkeypatch.setattr(
            checkpoint, "save", lambda folder, state, facts: checkpoint.write(folder, forgetful(state), facts)
        )
        assert saved is not checkpoint.save
    with pytest.raises(AssertionError, match=r"^resume: cut after \d+ back-propagations, .* differs"):
        assert_resumes_everywhere(config(selection=HardBatches(0.5)), tiny)


def cut(tiny, folder, settings, after, performance=None, model=None):
    """A run that was asked to end after some back-propagations."""

    class Impatient(Asked):
        def __bool__(self):
            return seen[0] >= after

    seen, original = [0], record.Record.trained

    def counting(self, dispatch, info):
        original(self, dispatch, info)
        seen[0] = dispatch.after.backprops

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record.Record, "trained", counting)
        patch.setattr("hardjax.training.signals.Asked", Impatient)
        return hj.run(settings, dataset=tiny, model=model, performance=performance, output=folder, progress=False)


def go_on(tiny, folder, settings, **more):
    return hj.run(settings, dataset=tiny, output=folder, resume=True, progress=False, **more)


def test_an_interrupted_run_goes_on_to_the_same_end(tiny, tmp_path):
    settings = config(selection=HardBatches(0.5), epochs=4, measure=FisherMeasure(every=4))
    whole = hj.run(settings, dataset=tiny, output=tmp_path / "whole", progress=False)
    short = cut(tiny, tmp_path / "run", settings, after=13, performance=hj.Performance(steps_per_dispatch=4))
    assert short.summary["end"] == "interrupted" and 13 <= short.summary["backprops"] < 36
    resumed = go_on(tiny, tmp_path / "run", settings)
    assert resumed.summary["resumed_at"] == [short.summary["backprops"]] and resumed.summary["end"] == "budget spent"
    chex.assert_trees_all_equal(checkpoint.on_host(resumed.state), checkpoint.on_host(whole.state))
    np.testing.assert_array_equal(resumed.replays, whole.replays)
    for name, values in whole.history.items():
        if "seconds" not in name:
            np.testing.assert_array_equal(resumed.history[name], values, err_msg=name)
    chex.assert_trees_all_equal(resumed.measurements, whole.measurements)
    for name in ("rounds.jsonl", "spectra.jsonl", "config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # Finished: its result is read again, and nothing is written.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = go_on(tiny, tmp_path / "run", settings)
    assert again.summary["resumed_at"] == resumed.summary["resumed_at"]
    chex.assert_trees_all_equal(again.state.params, whole.state.params)
    written = {path for path, at in before.items() if path.stat().st_mtime_ns != at}
    assert written == set()


@pytest.mark.parametrize("left", ["nothing", "a record", "damaged settings"])
def test_without_a_checkpoint_it_begins_anew_and_says_so(tiny, tmp_path, left):
    settings = config()
    if left != "nothing":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "hardjax.json").write_text("")
        (tmp_path / "run" / "history.jsonl").write_text('{"epoch": 1}\n{"ep')
        (tmp_path / "run" / "config.json").write_text(
            json.dumps(dataclasses.replace(settings, dataset="tiny").to_dict()) if left == "a record" else "{"
        )
    with pytest.warns(RunWarning, match="Nothing to go on from in .*: the run begins at its start"):
        found = go_on(tiny, tmp_path / "run", settings)
    whole = hj.run(settings, dataset=tiny, progress=False)
    chex.assert_trees_all_equal(found.state.params, whole.state.params)
    assert found.history["backprops"].tolist() == [9, 18] and found.summary["resumed_at"] == []


def test_another_run_is_refused_with_what_differs(tiny, tmp_path):
    settings = config(selection=HardBatches(0.5))
    hj.run(settings, dataset=tiny, output=tmp_path, progress=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changes = {
        "epochs is 2 there and 3 here": dict(epochs=3),
        "selection.delta is 0.5 there and 0.4 here": dict(selection=HardBatches(0.4)),
        "seed is 0 there and 1 here": dict(seed=1, learning_rate=0.2),
        "trimming is None there and {'start'": dict(trimming=hj.trimming.Trimming()),
        "on_nan is 'record' there and 'stop' here": dict(on_nan="stop"),
    }
    for words, changed in changes.items():
        with pytest.raises(Refusal, match=rf"is another one: .*{words}") as caught:
            go_on(tiny, tmp_path, dataclasses.replace(settings, **changed))
        assert "\n" not in str(caught.value)
    images = np.asarray(tiny.train.images).copy()
    images[0, 0, 0, 0] ^= 1
    other = hj.data.Dataset.from_arrays(
        images, np.asarray(tiny.train.labels), *map(np.asarray, tiny.test[:2]), name="tiny"
    )
    with pytest.raises(Refusal, match="was trained on other data"):
        go_on(other, tmp_path, settings)
    variables = hj.run(settings, dataset=tiny, progress=False).state.variables
    with pytest.raises(Refusal, match="started from other variables"):
        go_on(tiny, tmp_path, settings, variables=variables)
    with pytest.raises(Refusal, match=r"Give overwrite=True \(--overwrite\) or resume=True"):
        go_on(tiny, tmp_path, settings, overwrite=True)
    with pytest.raises(Refusal, match="Expected output= with resume=True"):
        hj.run(settings, dataset=tiny, resume=True, progress=False)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_data_whose_images_are_augmented_otherwise_is_refused(tiny, tmp_path):
    settings = config(augmentation="standard")
    given = [np.asarray(part) for split in (tiny.train, tiny.test) for part in split[:2]]
    plain, mirrored = (hj.data.Dataset.from_arrays(*given, name="tiny", flip=flip) for flip in (False, True))
    assert plain.checksum == mirrored.checksum
    hj.run(settings, dataset=plain, output=tmp_path, progress=False)
    with pytest.raises(Refusal, match="augments its images otherwise: flip is False there and True here"):
        go_on(mirrored, tmp_path, settings)
    assert go_on(plain, tmp_path, settings).summary["end"] == "budget spent"


@pytest.mark.parametrize(
    "other",
    [{"activation": nn.tanh}, {"momentum": 0.5}, {"tested": 2.0}],
    ids=["forward pass", "batch statistics", "testing"],
)
def test_another_network_of_the_same_shapes_is_refused(tiny, tmp_path, other):
    def network(activation=nn.relu, momentum=0.9, tested=1.0):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, images, train):
                hidden = activation(nn.Dense(4)(images.reshape(len(images), -1)))
                hidden = nn.BatchNorm(use_running_average=not train, momentum=momentum)(hidden)
                return nn.Dense(3)(hidden) * (1.0 if train else tested)

        return Net()

    settings = hj.TrainConfig(epochs=3, batch_size=8)
    cut(tiny, tmp_path, settings, after=9, model=network(), performance=hj.Performance(steps_per_dispatch=4))
    with pytest.raises(Refusal, match="trained another network or loss: its programs are not those of the one given"):
        go_on(tiny, tmp_path, settings, model=network(**other))
    assert go_on(tiny, tmp_path, settings, model=network()).summary["end"] == "budget spent"


def test_what_is_equal_to_rounding_alone_is_named(tiny, tmp_path, monkeypatch):
    settings = config(epochs=3)
    cut(tiny, tmp_path, settings, after=9, performance=hj.Performance(steps_per_dispatch=4))
    monkeypatch.setattr("hardjax.training.resume.threads", lambda: 64)
    with pytest.warns(
        RunWarning, match="not to the bit: threads is .* there and 64 here; eval_batch_size is 500 there"
    ):
        go_on(tiny, tmp_path, settings, performance=hj.Performance(eval_batch_size=7))


def test_a_record_that_was_changed_falls_back_or_is_refused(tiny, tmp_path):
    settings = config(epochs=4)
    often = hj.Performance(steps_per_dispatch=4, save_every=1)
    whole = hj.run(settings, dataset=tiny, progress=False)
    cut(tiny, tmp_path / "run", settings, after=27, performance=often)
    steps = [one.step for one in checkpoint.kept(tmp_path / "run")]
    assert len(steps) >= 2
    history = tmp_path / "run" / "history.jsonl"
    lines = history.read_text().splitlines(keepends=True)
    history.write_text("".join(lines[:-1]) + lines[-1].replace("9", "8"))
    shutil.copytree(tmp_path / "run", tmp_path / "broken")
    with pytest.warns(RunWarning, match=rf"is damaged: history.jsonl is not as it was then; the one at {steps[-2]:,}"):
        found = go_on(tiny, tmp_path / "run", settings)
    chex.assert_trees_all_equal(found.state.params, whole.state.params)
    (tmp_path / "broken" / "history.jsonl").write_text("{}\n" + "".join(lines))
    with pytest.raises(Refusal, match=r"is damaged: history\.jsonl is not as it was then"):
        go_on(tiny, tmp_path / "broken", settings)


def test_a_finished_run_without_its_checkpoints_and_a_comparison_are_left_alone(tiny, tmp_path):
    settings = config()
    hj.run(settings, dataset=tiny, output=tmp_path / "run", progress=False)
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    with pytest.raises(Refusal, match="is finished and its checkpoints are gone"):
        go_on(tiny, tmp_path / "run", settings)
    compare(settings, make_arms((0.5,), ()), 1, dataset=tiny, output=tmp_path / "comparison", progress=False)
    with pytest.raises(Refusal, match="holds a comparison"):
        go_on(tiny, tmp_path / "comparison", settings)
    with pytest.raises(Refusal, match="holds a run"):
        compare(settings, make_arms((0.5,), ()), 1, dataset=tiny, output=tmp_path / "run", resume=True, progress=False)


def test_a_comparison_goes_on_inside_the_run_that_was_cut(tiny, tmp_path):
    settings, arms = config(epochs=4, measure=FisherMeasure(every=4)), make_arms((0.5,), ("fixed",))
    whole = compare(settings, arms, 2, dataset=tiny, output=tmp_path / "whole", progress=False)
    count, original = [0], record.Record.trained

    class Impatient(Asked):
        def __bool__(self):
            if count[0] >= 75 and self.signal is None:
                self.signal = signal.SIGTERM
            return self.signal is not None

    def counting(self, dispatch, info):
        original(self, dispatch, info)
        count[0] += dispatch.trained

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record.Record, "trained", counting)
        patch.setattr("hardjax.training.signals.Asked", Impatient)
        performance = hj.Performance(steps_per_dispatch=4)
        short = compare(
            settings, arms, 2, dataset=tiny, performance=performance, output=tmp_path / "run", progress=False
        )
    assert short.signal == "SIGTERM" and len(short.arms) == 2  # of three, with the first seed
    assert (tmp_path / "run" / "under-way" / "checkpoint").is_dir()
    trained = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record.Record, "trained", lambda self, *rest: (trained.append(1), original(self, *rest)))
        found = compare(settings, arms, 2, dataset=tiny, output=tmp_path / "run", resume=True, progress=False)
    for one, other in zip(found.results, whole.results, strict=True):
        for left, right in zip(one, other, strict=True):
            for name, values in right.history.items():
                if "seconds" not in name:
                    np.testing.assert_array_equal(left.history[name], values, err_msg=name)
            np.testing.assert_array_equal(left.replays, right.replays)
            chex.assert_trees_all_equal(left.measurements, right.measurements)
            assert left.config == right.config
    assert not (tmp_path / "run" / "under-way").exists() and len(found.results) == 3
    for left, right in zip(found.rows, whole.rows, strict=True):
        plain = [
            name
            for name, value in right.items()
            if not isinstance(value, dict | list) and "second" not in name and "time" not in name
        ]
        assert len(plain) > 5 and str([left[name] for name in plain]) == str([right[name] for name in plain])
    with pytest.raises(Refusal, match=r"is another one: .*seeds is 2 there and 3 here"):
        compare(settings, arms, 3, dataset=tiny, output=tmp_path / "run", resume=True, progress=False)


def test_a_diverged_run_names_the_last_checkpoint_that_was_finite(tiny, tmp_path, monkeypatch):
    """The rate grows until a loss overflows; saved at every test point, the finite ones are kept."""
    from hardjax.training import loop

    inputs = loop.step_inputs

    def growing(plan, dispatch):
        found = inputs(plan, dispatch)
        after = np.arange(dispatch.before.backprops, dispatch.after.backprops) >= 30
        return found._replace(learning_rate=np.where(after, np.float32(1e30), found.learning_rate))

    monkeypatch.setattr(loop, "step_inputs", growing)
    often = hj.Performance(save_every=1)
    named = r"The run diverged at step 3\d; the last checkpoint before that is '.*checkpoint/0000000027'"
    with pytest.warns(RunWarning, match=named):
        result = hj.run(
            config(epochs=9, on_nan="stop"), dataset=tiny, output=tmp_path, performance=often, progress=False
        )
    assert result.summary["end"] == "diverged" and result.summary["backprops"] == 36
    assert [one.facts["finite"] for one in checkpoint.kept(tmp_path)] == [True, False]
    # Gone on with, it has ended.
    monkeypatch.undo()
    assert go_on(tiny, tmp_path, config(epochs=9, on_nan="stop")).summary["end"] == "diverged"


def test_saves_at_test_points_at_times_or_at_the_end(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(saver.time, "monotonic", lambda: clock[0])

    def due(every, tested, seconds):
        one = saver.Saver(tmp_path, every)
        clock[0] += seconds
        return one.due(tested)

    assert [due(2, tested, 1e9) for tested in (None, 1, 2, 3, 4)] == [False, False, True, False, True]
    assert [due(None, tested, seconds) for tested, seconds in ((1, 59), (1, 60), (None, 1e9))] == [False, True, False]
    assert [due("10min", None, seconds) for seconds in (599, 600)] == [False, True]
    assert not due("end", 1, 1e9)
    assert [saver.seconds_of(text) for text in ("90s", "1.5min", "2 h", "end")] == [90, 90, 7200, None]


def test_checkpoints_that_do_not_fit_their_space_are_refused(tiny, tmp_path):
    with pytest.raises(Refusal, match=r"checkpoint_gigabytes=1e-06 to hold two states of this run"):
        hj.run(
            config(),
            dataset=tiny,
            output=tmp_path,
            performance=hj.Performance(checkpoint_gigabytes=1e-6),
            progress=False,
        )
    assert not list(tmp_path.iterdir())


def test_the_samples_hash_says_which_samples_were_trained_in_which_order(tiny):
    from hardjax.engine.state import hash_samples

    schedule = np.random.default_rng(0).integers(0, 1000, (12, 5)).astype(np.int32)
    start = jnp.zeros(2, jnp.uint32)

    def reference(indices):
        """One sample after the other, in whole numbers."""
        found = []
        for base in (0x85EBCA77, 0xC2B2AE3D):
            total = 0
            for index in indices:
                mixed = (int(index) + 1) * 0x9E3779B1 % 2**32
                total = (total * base + (mixed ^ mixed >> 15)) % 2**32
            found.append(total)
        return found

    whole = hash_samples(start, schedule)
    assert whole.tolist() == reference(schedule.ravel())
    for cut_at in (1, 4, 11):
        parts = hash_samples(hash_samples(start, schedule[:cut_at]), schedule[cut_at:])
        np.testing.assert_array_equal(parts, whole)
    swapped = schedule.copy()
    swapped[3, 1], swapped[3, 2] = schedule[3, 2], schedule[3, 1]
    assert hash_samples(start, swapped).tolist() != whole.tolist()
    first, second = (hj.run(config(seed=seed), dataset=tiny, progress=False).history["samples_hash"] for seed in (0, 1))
    assert len(set(first) | set(second)) == 4 and all(len(text) == 16 for text in first)
    assert jax.jit(hash_samples)(start, schedule).tolist() == whole.tolist()
