"""Trimmed steps against loops over samples and ordinary training; which paths a network allows."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from platforms import near

import hardjax as hj
from hardjax.choose.selection import AllBatches, HardBatches, HardSamples, RandomBatches
from hardjax.choose.trimming import Trim, Trimming, make_plan
from hardjax.engine.plan import programs
from hardjax.engine.recipe import make_run_plan
from hardjax.engine.rounds import RoundSpec, make_rounds
from hardjax.engine.state import Batch, StepInputs
from hardjax.engine.step import make_step
from hardjax.engine.trials import trim_paths
from hardjax.models.apply import init_variables, make_apply, samples_are_independent
from hardjax.study.hardest import sample_counts
from hardjax.training.setting import prepare


def config(**changes) -> hj.TrainConfig:
    settings = dict(model="mlp", model_options={"widths": [8]}, epochs=5, batch_size=8, learning_rate=0.1)
    return hj.TrainConfig(**{**settings, **changes})


@pytest.mark.parametrize("path", ["plain", "masked", "gather", "reuse"])
@pytest.mark.parametrize("keep", ["hardest", "random"])
def test_a_step_equals_a_loop_over_the_kept_samples(tiny, path, keep):
    setting = prepare(config(optimizer="sgd", weight_decay=0.0), tiny)
    state = setting.init_state()
    images = (tiny.train.images[:8] / 255.0 - 0.4).astype(jnp.float32)
    labels, key = tiny.train.labels[:8], jax.random.key(5)
    step = jax.jit(make_step(setting.recipe, Trim(path, 5, keep)))
    after, info = step(state, Batch(images, labels), setting.hyper, inputs(3), key)

    def loss_of(params, i):
        logits = setting.recipe.apply({"params": params, "batch_stats": {}}, images[i : i + 1], True)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[i : i + 1])[0]

    losses = [float(loss_of(state.params, i)) for i in range(8)]
    kept = np.flatnonzero(info.kept)
    assert len(kept) == 3
    if keep == "hardest":
        assert set(kept) == set(np.argsort(losses)[-3:])
    grads = [jax.grad(loss_of)(state.params, i) for i in kept]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *grads)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, mean)
    for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **near(rtol=1e-5, atol=1e-7))
    np.testing.assert_allclose(info.losses, losses, **near(rtol=1e-5))


def test_both_paths_train_alike(tiny):
    settings, model = config(trimming=Trimming(), learning_rate=0.01), zoo.Tiny(3, norm="none")
    runs = {
        path: hj.run(settings, dataset=tiny, model=model, progress=False, performance=hj.Performance(trim_path=path))
        for path in ("plain", "gather", "reuse")
    }
    for path in ("gather", "reuse"):
        for name in ("train_loss", "kept_loss", "dropped_loss", "test_loss"):
            np.testing.assert_allclose(
                runs[path].history[name], runs["plain"].history[name], **near(rtol=2e-3, atol=1e-5)
            )
        np.testing.assert_array_equal(runs[path].drop_counts, runs["plain"].drop_counts)


def test_keeping_everything_is_ordinary_training_exactly(tiny):
    plain = hj.run(config(), dataset=tiny, progress=False)
    whole = hj.run(config(trimming=Trimming(1.0, 1.0)), dataset=tiny, progress=False)
    one = hj.run(config(epochs=1, trimming=Trimming()), dataset=tiny, progress=False)
    for a, b in zip(jax.tree.leaves(plain.state.params), jax.tree.leaves(whole.state.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.history["keep_fraction"].tolist() == [1.0] and one.drop_counts.sum() == 0


@pytest.mark.parametrize("selection", [AllBatches(), HardBatches(0.4), RandomBatches(0.4), HardSamples(0.4)], ids=str)
def test_history_under_trimming(tiny, selection):
    result = hj.run(config(selection=selection, trimming=Trimming()), dataset=tiny, progress=False)
    history = result.history
    assert result.summary["backprops"] == 45
    if isinstance(selection, AllBatches):
        np.testing.assert_allclose(history["keep_fraction"], [1.0, 0.8, 0.6, 0.4, 0.2])
        # Of 8 samples round(p * 8) are kept: 8, 6, 5, 3, 2.
        assert result.drop_counts.sum() == 9 * (0 + 2 + 3 + 5 + 6)
    assert np.isnan(history["dropped_loss"][0]) and np.isfinite(history["dropped_loss"][1:]).all()
    assert (history["kept_loss"][1:] > history["dropped_loss"][1:]).all()
    # The table keeps plain means over whole batches (for samples: their own losses).
    if selection.unit == "batch" and not isinstance(selection, AllBatches):
        assert history["table_loss"][-1] < history["kept_loss"][-1]


def test_table_and_losses_are_those_of_the_whole_batch(tiny):
    setting = prepare(config(selection=HardBatches(0.4)), tiny)
    args = (setting.init_state(), setting.splits["train"], setting.hyper, jax.tree.map(jnp.atleast_1d, inputs(2)))
    _, whole = make_rounds(setting.recipe, RoundSpec(AllBatches(fixed=True), 1))(*args)
    for path in ("plain", "masked", "gather", "reuse"):
        state, part = make_rounds(setting.recipe, RoundSpec(AllBatches(fixed=True), 1, trim=Trim(path, 3)))(*args)
        assert part.loss[0] == pytest.approx(float(whole.loss[0]), rel=1e-6)
        assert state.table[0] == pytest.approx(float(whole.loss[0]), rel=1e-6)
        assert (part.kept_loss[0] * 2 + part.dropped_loss[0] * 6) / 8 == pytest.approx(float(part.loss[0]))
        assert state.drops.sum() == 6


@pytest.mark.parametrize("batch_size", [32, 64, 128])
@pytest.mark.parametrize("delta", [None, 0.2, 0.35, 0.8])
def test_few_programs_for_150_epochs_of_cifar(batch_size, delta, tiny):
    """Whole rounds: eight. Cut ones: two segments and a plan for each way to trim, and one more for the last round."""
    selection = AllBatches() if delta is None else HardBatches(delta)
    settings = config(epochs=150, batch_size=batch_size, selection=selection, trimming=Trimming())
    recipe = dataclasses.replace(prepare(config(trimming=Trimming()), tiny).recipe, num_samples=50_000)
    whole = [call for call in programs(make_run_plan(settings, recipe, bound=10_000)) if call[1].rounds == 1]
    cut = programs(make_run_plan(settings, recipe, bound=64))
    assert len(whole) <= 9 and len(cut) <= 8 * 3 + 2


def inputs(keep) -> StepInputs:
    """Of one step."""
    return StepInputs(jnp.float32(0.1), jnp.int32(keep))


class Overflowing(nn.Module):
    """Finite, except for an image whose corner is marked."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, images, train):
        x = images.reshape(len(images), -1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x) if self.dropout else x
        return nn.Dense(3)(jnp.exp(1e4 * images[:, :1, 0, 0]) * jnp.sin(nn.Dense(4)(x)))


@pytest.mark.parametrize("path, dropout", [("masked", 0.0), ("masked", 0.5), ("gather", 0.0), ("reuse", 0.0)])
def test_a_dropped_sample_that_is_not_finite_does_not_reach_the_gradient(tiny, path, dropout):
    setting = prepare(config(optimizer="sgd"), tiny, Overflowing(dropout))
    state, step = setting.init_state(), jax.jit(make_step(setting.recipe, Trim(path, 8, "random")))
    if path in ("gather", "reuse"):
        step = jax.jit(make_step(setting.recipe, Trim(path, 6, "random")))
    images = jnp.zeros((8, 6, 6, 1)).at[:, 1, 1].set(0.5).at[3, 0, 0, 0].set(1.0)
    finite = dropped = 0
    for seed in range(12):
        after, info = step(state, Batch(images, jnp.arange(8) % 3), setting.hyper, inputs(4), jax.random.key(seed))
        assert not np.isfinite(info.losses[3]) and np.isfinite(np.delete(info.losses, 3)).all()
        dropped += not info.kept[3]
        finite += all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))
    assert finite == dropped > 0  # and where it is kept, the step is as bad as it should be


def test_random_control_takes_the_path_that_keeps_dropped_samples_out(tiny):
    """The plain program is the one for shares above those of all others."""
    for dropout, paths in ((0.0, ("reuse", "gather", "plain")), (0.5, ("plain",))):
        found = trim_paths(prepare(config(), tiny, Overflowing(dropout)).recipe)
        assert found.isolated and found.exact == paths
        settings = config(trimming=Trimming(1.0, 0.5, keep="random"))
        trims = prepare(settings, tiny, Overflowing(dropout)).plan.stages[0].trims
        assert trims.plain.path == "masked"
    assert not trim_paths(prepare(config(), tiny, Centred()).recipe).isolated
    assert not trim_paths(prepare(config(), tiny, zoo.Tiny(3)).recipe).isolated


@pytest.mark.parametrize("batch_size, end", [(4, 0.2), (2, 0.5), (3, 0.01)])
def test_one_sample_kept_of_few(tiny, batch_size, end):
    """A program with room for one sample would have residuals of another structure."""
    result = hj.run(config(batch_size=batch_size, trimming=Trimming(1.0, end)), dataset=tiny, progress=False)
    assert result.summary["end"] == "budget spent" and np.isfinite(result.history["test_loss"]).all()


def test_times_trained_add_up(tiny):
    """Visits and drops are counted by one rule, the fillers of the last batch among both."""
    result = hj.run(config(trimming=Trimming(0.5, 0.5), epochs=3), dataset=tiny, progress=False)
    assert sample_counts(result.state).sum() == 3 * 9 * 4
    assert (sample_counts(result.state) >= 0).all()


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        x = nn.Dropout(0.5, deterministic=not train)(images.reshape(len(images), -1))
        return nn.Dense(3)(x)


@pytest.mark.parametrize(
    "model, independent",
    [
        (hj.models.create("mlp"), True),
        (hj.models.create("mlp", norm="batch"), False),
        (zoo.Tiny(norm="none"), True),
        (zoo.Tiny(norm="group"), True),
        (zoo.Tiny(), False),
        (Dropping(), False),
    ],
    ids=str,
)
def test_networks_that_need_not_differentiate_the_dropped(model, independent, tiny):
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), (8, 8, 3)))
    assert samples_are_independent(make_apply(model), variables, (8, 8, 3)) == independent
    paths = trim_paths(prepare(config(), tiny, model).recipe).exact
    assert paths == (("reuse", "gather", "plain") if independent else ("plain",))


class Mixing(nn.Module):
    """Folds the batch into a later axis and back."""

    @nn.compact
    def __call__(self, images):
        x = jnp.sin(nn.Dense(6)(images.reshape(-1, 6)))
        return nn.Dense(3)(x.reshape(len(images), -1))


class TimeMajor(nn.Module):
    """Folds the batch into an earlier axis: residuals of shape (6 * B, 6) with the batch inside."""

    @nn.compact
    def __call__(self, images):
        rows = images[..., 0].transpose(1, 0, 2)
        x = jnp.sin(nn.Dense(6)(rows.reshape(-1, 6))).reshape(rows.shape)
        return nn.Dense(3)(x.transpose(1, 0, 2).reshape(len(images), -1))


class Centred(nn.Module):
    """Couples samples without keeping any statistics."""

    @nn.compact
    def __call__(self, images):
        x = images.reshape(len(images), -1)
        return nn.Dense(3)(jnp.sin(x - x.mean(0, keepdims=True)))


def test_a_second_forward_pass_must_save_memory(tiny):
    for model, lean in ((hj.models.create("mlp", 3), False), (zoo.Tiny(3, norm="none"), True)):
        paths = trim_paths(prepare(config(), tiny, model).recipe)
        assert paths.lean(8) == lean and paths.exact[0] == "reuse"
        plan = make_plan(Trimming(), 150, 128, paths.exact, lean=lean)
        assert plan.trim(26).path == ("gather" if lean else "reuse")


@pytest.mark.parametrize("model, paths", [(TimeMajor(), ("gather", "plain")), (Centred(), ("plain",))], ids=str)
def test_what_shapes_do_not_show_is_tried_out(tiny, model, paths):
    assert trim_paths(prepare(config(), tiny, model).recipe).exact == paths


def test_residuals_that_merge_the_batch_with_later_axes(tiny):
    setting = prepare(config(), tiny, Mixing())
    assert trim_paths(setting.recipe).exact[0] == "reuse"
    state, batch = setting.init_state(), Batch(tiny.train.images[:8] / 255.0, tiny.train.labels[:8])
    after = [
        make_step(setting.recipe, Trim(path, 4))(state, batch, setting.hyper, inputs(3), jax.random.key(0))[0].params
        for path in ("plain", "reuse")
    ]
    for a, b in zip(*map(jax.tree.leaves, after), strict=True):
        np.testing.assert_allclose(a, b, **near(rtol=1e-5, atol=1e-7))


def test_gathering_is_refused_where_it_would_change_the_result(tiny):
    settings = config(model_options={"widths": [8], "norm": "batch"}, trimming=Trimming())
    with pytest.raises(ValueError, match="trim_path='gather' would change the result"):
        hj.run(settings, dataset=tiny, progress=False, performance=hj.Performance(trim_path="gather"))
    result = hj.run(settings, dataset=tiny, progress=False)
    assert result.drop_counts.sum() > 0
