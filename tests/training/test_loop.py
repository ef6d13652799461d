"""`run` from outside: budget, history, files, compilation, interruption, the matrix of axes."""

import dataclasses
import itertools
import json
import os
import signal
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from platforms import near

import hardjax as hj
from hardjax._validate import OutOfMemory
from hardjax.choose.batch_plan import BatchPlan
from hardjax.choose.selection import AllBatches, HardBatches, HardSamples, RandomBatches
from hardjax.data import Dataset
from hardjax.engine.plan import programs
from hardjax.engine.programs import Programs, programs_for
from hardjax.engine.recipe import functions_of, zoo_functions
from hardjax.study.arms import make_arms
from hardjax.study.compare import compare
from hardjax.training import checkpoint, progress, run
from hardjax.training.setting import prepare

SMALL = dict(model="mlp", model_options={"widths": [8]}, batch_size=8, learning_rate=0.1)
# Where programs or dispatches are counted: on a busy machine a slow step would shorten them.
COUNTED = hj.Performance(steps_per_dispatch=64)


def train(dataset, performance=None, **changes):
    return hj.run(hj.TrainConfig(**{**SMALL, **changes}), dataset=dataset, performance=performance, progress=False)


@pytest.mark.parametrize("delta", [1.0, 0.77, 0.5, 0.3, 0.2, 0.05])
@pytest.mark.parametrize("epochs", [1, 4])
def test_exactly_e_times_n_back_propagations(tiny, delta, epochs):
    result = train(tiny, selection=HardBatches(delta), epochs=epochs)
    assert result.summary["backprops"] == epochs * 9 == result.replays.sum() == int(result.state.step)
    assert result.history["epoch"][-1] == epochs


def test_delta_one_and_fixed_batches_visit_alike(tiny):
    fixed = train(tiny, selection=AllBatches(fixed=True), epochs=3)
    hard = train(tiny, selection=HardBatches(1.0), epochs=3)
    random = train(tiny, selection=RandomBatches(1.0), epochs=3)
    for result in (hard, random):
        np.testing.assert_array_equal(result.replays, fixed.replays)
        np.testing.assert_array_equal(result.state.partition, fixed.state.partition)


def test_it_learns_and_history_agrees_with_a_plain_evaluation(tiny):
    result = train(tiny, epochs=10, selection=HardBatches(0.5))
    split = tiny.test
    images = (np.asarray(split.images) / 255 - tiny.mean) / tiny.std
    model = hj.models.create("mlp", num_classes=3, widths=[8])
    logits = np.asarray(model.apply(result.state.variables, images.astype(np.float32), train=False), np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(21), np.asarray(split.labels)]
    assert result.history["test_loss"][-1] == pytest.approx(losses.mean(), rel=1e-4, abs=1e-6)
    assert result.summary["final_test_top1"] == 100 * np.mean(logits.argmax(-1) == np.asarray(split.labels))
    assert result.summary["final_full_train_top1"] > 90


@pytest.mark.parametrize("eval_batch_size", [1, 4, 21, 500])
def test_evaluation_is_exact_whatever_its_batch(tiny, eval_batch_size):
    exact = train(tiny, epochs=2).history
    other = train(tiny, hj.Performance(eval_batch_size=eval_batch_size), epochs=2).history
    np.testing.assert_allclose(other["full_train_loss"], exact["full_train_loss"], **near(rtol=1e-5))
    np.testing.assert_array_equal(other["test_top1"], exact["test_top1"])


def test_rates_decay_momentum_and_seed_compile_nothing(tiny):
    programs_for.cache_clear()
    settings = dict(selection=HardBatches(0.3), epochs=3, weight_decay=0.1, augmentation="standard")
    setting = prepare(hj.TrainConfig(**{**SMALL, **settings}), tiny)
    train(tiny, COUNTED, **settings)
    traces = dict(setting.programs.traces)
    assert traces["rounds"] <= 4 and traces["init"] == 1
    result = train(
        tiny, COUNTED, **{**settings, "weight_decay": 0.0, "learning_rate": 0.02, "momentum": 0.5, "seed": 5}
    )
    assert setting.programs.traces == traces
    assert result.summary["compile_seconds"] == 0
    train(tiny, **{**settings, "optimizer": "adam"})
    assert setting.programs.traces == traces  # another recipe has programs of its own


@pytest.mark.parametrize("delta", [1.0, 0.35, 0.2])
def test_a_network_is_traced_once_a_program(tiny, delta):
    traced = []

    class Counting(nn.Module):
        @nn.compact
        def __call__(self, images, train):
            if train:
                traced.append(images.shape)
            return nn.Dense(3)(images.reshape(len(images), -1))

    settings = hj.TrainConfig(**{**SMALL, "epochs": 5, "selection": HardBatches(delta)})
    functions = functions_of(Counting())

    def count(work) -> int:
        """Traces at the batch size of training."""
        traced.clear()
        work()
        return traced.count((8, 6, 6, 1))

    count(lambda: prepare(settings, tiny, functions))  # how the network is called is found out
    assert count(lambda: prepare(settings, tiny, functions)) == 0, "what was found out is kept"
    planned = len(programs(prepare(settings, tiny, functions, COUNTED).plan))
    # A program traces the step once more for the shapes of what it reports, where a round is one step.
    first = count(lambda: hj.run(settings, dataset=tiny, model=functions, performance=COUNTED, progress=False))
    assert planned <= first <= 2 * planned
    # The same functions again: no program is traced.
    assert count(lambda: hj.run(settings, dataset=tiny, model=functions, performance=COUNTED, progress=False)) == 0


# N = 9 and two-step rounds: round 0, then five or four rounds to each test point, four of them in one dispatch, and one
# cut short; tested every round, each is a dispatch.
@pytest.mark.parametrize(
    "delta, test_every, calls", [(0.2, "epoch", 9), (0.2, "round", 24), (1.0, "epoch", 6), (None, 1, 6), (None, 4, 3)]
)
def test_dispatches_are_counted(tiny, monkeypatch, delta, test_every, calls):
    counted, original = [], Programs.rounds

    def counting(self, *args):
        counted.append(args)
        return original(self, *args)

    monkeypatch.setattr(Programs, "rounds", counting)
    selection = AllBatches() if delta is None else HardBatches(delta)
    result = train(tiny, COUNTED, selection=selection, epochs=6, test_every=test_every)
    assert len(counted) == calls
    assert result.summary["backprops"] == 54


def _scaled(x):
    return x * _SCALE


_SCALE = 1.0


class Calling(nn.Module):
    """What it computes is decided by a helper, which equality does not see, and by a field of which 1 == True."""

    k: object = 1

    @nn.compact
    def __call__(self, images):
        x = _scaled(images.reshape(len(images), -1))
        return nn.Dense(3)(-x if self.k is True else x)


def test_people_s_own_networks_are_never_found_again_by_equality(tiny, monkeypatch):
    settings = hj.TrainConfig(**{**SMALL, "model_options": {}}, epochs=1)

    def loss(model):
        return hj.run(settings, dataset=tiny, model=model, progress=False).history["test_loss"][-1]

    assert Calling(1) == Calling(True)
    first = loss(Calling(1))
    assert loss(Calling(1)) == first != loss(Calling(True))
    monkeypatch.setattr(sys.modules[__name__], "_SCALE", 0.0)
    assert loss(Calling(1)) != first


def test_networks_of_the_zoo_are_found_by_name_and_typed_options():
    first = zoo_functions("mlp", 3, {"widths": [8]})
    assert zoo_functions("mlp", 3, {"widths": [8]}) is first
    assert zoo_functions("mlp", 3, {"dropout": 0}) is not zoo_functions("mlp", 3, {"dropout": 0.0})
    assert zoo_functions("mlp", 3, {}) is not zoo_functions("mlp", 4, {})


def test_the_runs_of_one_comparison_share_the_programs_of_a_network_of_one_s_own(tiny):
    compiled = []
    compare(
        hj.TrainConfig(**{**SMALL, "model_options": {}}, epochs=1),
        make_arms((1.0,), ()),
        seeds=2,
        dataset=tiny,
        model=Calling(),
        performance=COUNTED,
        progress=False,
        on_result=lambda arm, result: compiled.append(result.summary["compile_seconds"]),
    )
    assert compiled[0] > 0 and compiled[1] == 0


@dataclasses.dataclass(frozen=True)
class Insisting(AllBatches):
    """One batch, 300 times a round."""

    def first_round(self):
        return AllBatches(fixed=True)

    @property
    def redraws(self):
        return False

    def round_steps(self, num_batches):
        return 300

    def plan(self, table, key, size):
        return jnp.full(size, 2, jnp.int32)


def test_a_strategy_may_train_one_batch_as_often_as_it_likes(tiny):
    result = train(tiny, hj.Performance(steps_per_dispatch=100), selection=Insisting(), epochs=35, batch_size=8)
    assert result.replays[1, 2] == 300 and result.replay_counts[2] == 35 * 9 - 9 + 1
    assert result.replays.sum() == 35 * 9 == result.replay_counts.sum()


class _NanForMarked(nn.Module):
    """A linear model whose loss is not finite for batches that hold a marked image."""

    @nn.compact
    def __call__(self, images, train):
        logits = nn.Dense(3)(images.reshape(len(images), -1))
        return jnp.where((images[:, -1, -1, 0] == 1).any(), jnp.nan, logits) if train else logits


class AllNan(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(3)(images.reshape(len(images), -1)) * jnp.nan


def test_no_class_is_predicted_by_what_is_no_number(tiny):
    """The largest of three NaNs is the first: a third of the samples would count as right."""
    settings = dict(model_options={}, batch_size=8, epochs=1)
    setting = prepare(hj.TrainConfig(**settings), tiny, AllNan())
    history = run.train(setting, progress=False).history
    assert history["test_top1"][-1] == history["full_train_top1"][-1] == 0
    assert np.isnan(history["test_loss"][-1])


def test_a_nan_loss_never_enters_the_table():
    images = np.zeros((32, 4, 4, 1), np.float32)
    images[:, 0, 0] = 0.5  # of one colour all over they would be refused
    images[5, -1, -1] = 1.0
    dataset = Dataset.from_arrays(images, np.arange(32) % 3, images[:6], np.arange(6) % 3, num_classes=3)
    settings = hj.TrainConfig(
        batch_size=8,
        epochs=3,
        learning_rate=1e-30,
        selection=HardBatches(0.5),
        augmentation=hj.Augmentation(normalize=False),
    )
    result = hj.run(settings, dataset=dataset, model=_NanForMarked(), progress=False)
    assert np.isneginf(result.state.table).sum() == 1
    assert np.isfinite(result.history["table_loss"]).all()
    assert np.isnan(result.history["train_loss"]).any()
    marked = int(np.flatnonzero((np.asarray(result.state.partition) == 5).any(1))[0])
    assert result.replays[1:, marked].sum() == 0  # and it is not replayed for ever


SELECTIONS = [AllBatches(), AllBatches(fixed=True), HardBatches(0.4), RandomBatches(0.4), HardSamples(0.4)]
AXES = {
    "selection": SELECTIONS,
    "optimizer": ["sgd", "momentum", "nesterov", "adam", "adamw"],
    "schedule": ["constant", "step", "cosine", hj.Schedule("cosine", warmup=0.2)],
    "model": [
        ("mlp", {"widths": [8]}),
        ("tiny", {}),
        ("tiny", {"norm": "none"}),
        ("mlp", {"widths": [8], "norm": "batch", "norm_batch_size": 10}),
    ],
    "augmentation": [
        "none",
        "standard",
        hj.Augmentation(frame=10, place="random"),
        hj.Augmentation(resize=9, flip=True),
    ],
    "trimming": [None, hj.trimming.Trimming(1.0, 0.5)],
    "measure": [None, hj.fisher.FisherMeasure(every=2)],
    "on_nan": ["record", "skip-step"],
    "batch_plan": [None, BatchPlan("30-10")],
}


def _pairwise() -> list[dict]:
    """Few combinations in which every two values of two axes meet (greedy)."""
    wanted = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(AXES, 2)
        for i in range(len(AXES[a]))
        for j in range(len(AXES[b]))
    }
    rows = []
    everything = list(itertools.product(*(range(len(values)) for values in AXES.values())))
    while wanted:
        best = max(everything, key=lambda row: len(_pairs(row) & wanted))
        wanted -= _pairs(best)
        rows.append({name: AXES[name][i] for name, i in zip(AXES, best, strict=True)})
    return rows


def _pairs(row: tuple[int, ...]) -> set:
    return set(itertools.combinations(zip(AXES, row, strict=True), 2))


@pytest.mark.parametrize("row", _pairwise(), ids=lambda row: "-".join(str(v) for v in row.values())[:120])
def test_every_two_axes_work_together(tiny, row):
    programs_for.cache_clear()
    name, options = row["model"]
    model = functions_of(zoo.Tiny(3, **options)) if name == "tiny" else None
    settings = hj.TrainConfig(
        **{**row, "model": name, "model_options": options},
        **({"batch_size": 30} if row["batch_plan"] is None else {}),
        epochs=2,
        learning_rate=0.01,
        evaluate_train=False,
    )
    result = hj.run(settings, dataset=tiny, model=model, performance=COUNTED, progress=False)
    assert result.summary["backprops"] == 2 * 3 if settings.batch_plan is None else 3 + 8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.state.params))
    traces = prepare(settings, tiny, model).programs.traces
    planned = programs(prepare(settings, tiny, model, COUNTED).plan)
    assert sum(traces.get(kind, 0) for kind in ("plan", "segment", "rounds")) == len(planned)
    assert bool(result.measurements) == (settings.measure is not None)
    assert hj.TrainConfig.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_files_of_a_run(tiny, tmp_path):
    folder = tmp_path / "run"
    settings = hj.TrainConfig(**SMALL, epochs=2, selection=HardBatches(0.5))
    result = hj.run(settings, dataset=tiny, output=folder, progress=False)
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    used = dataclasses.replace(settings, dataset="tiny")  # the data that was used, not the default
    assert hj.TrainConfig.from_dict(json.loads((folder / "config.json").read_text())) == used == result.config
    assert [line["backprops"] for line in lines] == result.history["backprops"].tolist()
    assert lines[-1]["validation_loss"] is None
    assert {"seconds_per_step", "compile_seconds", "backprops", "final_test_top1", "versions", "device"} <= set(summary)
    assert np.load(folder / "replays.npz")["by_round"].sum() == 18
    with pytest.raises(ValueError, match="already holds a run"):
        hj.run(settings, dataset=tiny, output=folder, progress=False)
    assert json.loads((folder / "summary.json").read_text()) == summary
    stale = [folder / name for name in ("spectra.jsonl", "measures.png", "hardest.png")]
    for path in stale:
        path.write_text("of another run")
    hj.run(settings, dataset=tiny, output=folder, overwrite=True, progress=False)
    assert not any(path.exists() for path in stale)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="to be a folder to write in: Not a directory"):
        hj.run(settings, dataset=tiny, output=tmp_path / "file" / "run", progress=False)


def test_a_folder_with_any_file_of_a_run_is_refused(tiny, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(ValueError, match=r"already holds a run \(checkpoint\)"):
        hj.run(hj.TrainConfig(**SMALL, epochs=1), dataset=tiny, output=tmp_path, progress=False)


def test_a_checkpoint_of_another_configuration_is_refused_in_one_line(tiny, tmp_path):
    train(tiny, epochs=1)
    hj.run(hj.TrainConfig(**SMALL, epochs=1), dataset=tiny, output=tmp_path, progress=False)
    other = prepare(hj.TrainConfig(**SMALL | {"batch_size": 10}), tiny).init_state()
    with pytest.raises(
        ValueError, match=r"4 arrays differ, such as partition \(\(9, 8\) instead of \(7, 10\)\)"
    ) as error:
        checkpoint.restore(tmp_path, other)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="No checkpoint in"):
        checkpoint.restore(tmp_path / "checkpoint", other)


def test_ctrl_c_ends_cleanly_with_what_was_reached(tiny, tmp_path, monkeypatch):
    class Impatient(progress.Silent):
        def update(self, epoch, loss, top1):
            if epoch >= 3:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(run, "Silent", Impatient)
    before = signal.getsignal(signal.SIGINT)
    settings = hj.TrainConfig(**SMALL, epochs=50)
    result = hj.run(settings, dataset=tiny, output=tmp_path, progress=False)
    assert result.summary["interrupted"] and result.summary["backprops"] == 27 == int(result.state.step)
    assert result.summary["end"] == "interrupted"
    assert json.loads((tmp_path / "summary.json").read_text())["interrupted"]
    assert (tmp_path / "checkpoint").is_dir()
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_in_the_last_dispatch_is_not_forgotten(tiny, monkeypatch):
    class Impatient(progress.Silent):
        def tested(self, entry):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(run, "Silent", Impatient)
    summary = train(tiny, epochs=1).summary
    assert summary["interrupted"] and summary["end"] == "budget spent"


def test_a_comparison_needs_the_loss_of_the_training_split(tiny):
    with pytest.raises(ValueError, match="Expected evaluate_train=True in a comparison"):
        compare(hj.TrainConfig(**SMALL, evaluate_train=False), make_arms((0.5,)), dataset=tiny, progress=False)


def test_a_validation_share_is_reported_beside_the_test_split(tiny):
    result = train(tiny, epochs=2, validation=0.2)
    assert np.isfinite(result.history["validation_loss"]).all()
    assert result.summary["num_batches"] < 9
    assert np.isnan(train(tiny, epochs=1).history["validation_loss"]).all()


def test_data_model_and_configuration_must_fit(tiny):
    with pytest.raises(ValueError, match="batch_size=71 to be at most the 70 training samples"):
        train(tiny, batch_size=71)
    with pytest.raises(ValueError, match=r"epochs=300000000 to be fewer than 2\^31 steps in all, got 2700000000"):
        train(tiny, epochs=300_000_000)
    with pytest.raises(ValueError, match="model_options without num_classes=5"):
        train(tiny, model_options={"num_classes": 5})
    with pytest.raises(ValueError, match="Unknown model 'resnet9'"):
        train(tiny, model="resnet9", model_options={})
    with pytest.raises(ValueError, match="norm_batch_size=3 to divide the batch of 8 samples"):
        train(tiny, model_options={"widths": [8], "norm": "batch", "norm_batch_size": 3})
    with pytest.raises(ValueError, match="6x6 are too small for ReducedAlexNet: at least 15x15"):
        train(tiny, model="alexnet_reduced", model_options={})
    with pytest.raises(ValueError, match=r"Expected logits of shape \(8, 3\).*gives \(8, 2\)"):
        hj.run(hj.TrainConfig(batch_size=8), dataset=tiny, model=hj.models.create("mlp", 2), progress=False)


def test_a_run_starts_from_given_variables_and_leaves_them(tiny):
    settings = hj.TrainConfig(**{**SMALL, "learning_rate": 1e-30}, epochs=1)
    first = hj.run(settings, dataset=tiny, progress=False)
    start = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, first.state.variables)
    second = hj.run(settings, dataset=tiny, variables=start, progress=False)
    jax.tree.map(np.testing.assert_array_equal, second.state.variables, start)
    third = hj.run(settings, dataset=tiny, variables=second.state.variables, progress=False)
    jax.tree.map(np.testing.assert_array_equal, third.state.variables, second.state.variables)
    del start["params"]["fc1"]["bias"]
    start["params"]["fc2"]["kernel"] = np.zeros((3, 8))
    with pytest.raises(ValueError) as error:
        hj.run(settings, dataset=tiny, variables=start, progress=False)
    assert "missing ['params']['fc1']['bias']" in str(error.value)
    only = hj.run(settings, dataset=tiny, variables={"params": first.state.params}, progress=False)
    jax.tree.map(np.testing.assert_array_equal, only.state.params, first.state.params)
    assert "['params']['fc2']['kernel'] (3, 8) instead of (8, 3)" in str(error.value)


def test_a_network_that_no_memory_holds_is_refused(tiny):
    """144 TB are more than a process can address."""
    with pytest.raises(OutOfMemory, match=r"it needs .* GiB .* take a smaller network"):
        train(tiny, model_options={"widths": [10**12]})
