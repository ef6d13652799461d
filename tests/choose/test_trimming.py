"""Trimming (P2) against sorted NumPy losses, loops over samples and ordinary training."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo

import hardjax as hj
from hardjax.choose.selection import AllBatches, HardBatches, HardSamples, RandomBatches
from hardjax.choose.trimming import Trim, Trimming, kept_mask, make_plan, mean_of_first, take_samples, trimmed_mean
from hardjax.engine.plan import dispatches
from hardjax.engine.rounds import RoundSpec, make_rounds
from hardjax.engine.step import Batch, make_step
from hardjax.models.apply import init_variables, make_apply, samples_are_independent
from hardjax.training.probe import trim_paths
from hardjax.training.setting import prepare


def config(**changes) -> hj.TrainConfig:
    settings = dict(model="mlp", model_options={"widths": [8]}, epochs=5, batch_size=8, learning_rate=0.1)
    return hj.TrainConfig(**{**settings, **changes})


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_trimmed_mean_equals_a_float64_sort(count):
    losses = np.random.default_rng(0).normal(size=7) ** 2
    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(trimmed_mean)(jnp.asarray(losses), count)
    order = np.argsort(-losses, kind="stable")[:count]
    expected = np.zeros(7)
    expected[order] = 1 / count
    assert float(value) == pytest.approx(losses[order].mean(), rel=1e-14)
    np.testing.assert_allclose(gradient, expected, rtol=1e-14)


@pytest.mark.parametrize("count, kept", [(1, [1]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3])])
def test_ties_keep_the_lower_index(count, kept):
    losses = jnp.array([1.0, 2.0, 1.0, 2.0, 1.0])
    expected = np.zeros(5)
    expected[kept] = 1 / count
    np.testing.assert_allclose(jax.grad(trimmed_mean)(losses, count), expected)
    order = Trim("plain", 5).choose(losses, jax.random.key(0))
    assert np.flatnonzero(kept_mask(order, count, 5)).tolist() == kept


@pytest.mark.parametrize("capacity", [3, 4, 6])
def test_a_traced_count_equals_the_static_one(capacity):
    losses = jnp.array([0.5, 3.0, 0.1, 2.0, jnp.inf, 1.0])
    trim = Trim("gather", capacity)

    @jax.jit
    def masked(losses, count):
        return mean_of_first(losses[trim.choose(losses, None)], count)

    finite = losses.at[4].set(0.7)
    for count in range(1, capacity + 1):
        assert masked(finite, count) == pytest.approx(float(trimmed_mean(finite, count)), rel=1e-6)
        np.testing.assert_allclose(jax.grad(masked)(finite, count), jax.grad(trimmed_mean)(finite, count), rtol=1e-6)
    # Beyond the count nothing leaks in, not even what is not finite.
    assert mean_of_first(jnp.array([2.0, 4.0, jnp.nan, jnp.inf]), 2) == 3.0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_share_falls_from_exactly_start_to_exactly_end(schedule):
    trimming = Trimming(schedule=schedule)
    shares = [trimming.share(epoch, 150) for epoch in range(150)]
    assert shares[0] == 1.0 and shares[-1] == 0.2
    assert all(a > b for a, b in itertools.pairwise(shares))
    if schedule == "linear":
        np.testing.assert_allclose(shares, 1 - 0.8 * np.arange(150) / 149, rtol=1e-12)
    assert trimming.share(0, 1) == 1.0
    assert [Trimming(0.9, 0.01).keep_count(epoch, 3, 8) for epoch in range(3)] == [7, 4, 1]


@pytest.mark.parametrize("path", ["plain", "gather", "reuse"])
@pytest.mark.parametrize("keep", ["hardest", "random"])
def test_a_step_equals_a_loop_over_the_kept_samples(tiny, path, keep):
    setting = prepare(config(optimizer="sgd", weight_decay=0.0), tiny)
    state = setting.init_state()
    images = (tiny.train.images[:8] / 255.0 - 0.4).astype(jnp.float32)
    labels, key = tiny.train.labels[:8], jax.random.key(5)
    hyper = setting.hyper._replace(keep=jnp.int32(3))
    after, info = jax.jit(make_step(setting.recipe, Trim(path, 5, keep)))(state, Batch(images, labels), hyper, key)

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
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(info.losses, losses, rtol=1e-5)


def test_random_keeps_are_uniform_and_hardest_are_not():
    losses = jnp.arange(10.0)
    keys = jax.random.split(jax.random.key(0), 2000)

    def counts(trim):
        return np.asarray(jax.vmap(lambda key: kept_mask(trim.choose(losses, key), 3, 10))(keys)).sum(0)

    # 2000 draws of 3 in 10: 600 expected, standard deviation 20.5.
    assert np.abs(counts(Trim("plain", 10, "random")) - 600).max() < 5 * 20.5
    assert counts(Trim("plain", 10, "hardest")).tolist() == [0] * 7 + [2000] * 3


def test_both_paths_train_alike(tiny):
    settings, model = config(trimming=Trimming(), learning_rate=0.01), zoo.Tiny(3, norm="none")
    runs = {
        path: hj.run(settings, dataset=tiny, model=model, progress=False, performance=hj.Performance(trim_path=path))
        for path in ("plain", "gather", "reuse")
    }
    for path in ("gather", "reuse"):
        for name in ("train_loss", "kept_loss", "dropped_loss", "test_loss"):
            np.testing.assert_allclose(runs[path].history[name], runs["plain"].history[name], rtol=2e-3, atol=1e-5)
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
    hyper = setting.hyper._replace(keep=jnp.int32(2))
    args = (setting.init_state(), setting.splits["train"], hyper, jnp.int32(1))
    _, whole = make_rounds(setting.recipe, RoundSpec(AllBatches(fixed=True), 1))(*args)
    for path in ("plain", "gather", "reuse"):
        state, part = make_rounds(setting.recipe, RoundSpec(AllBatches(fixed=True), 1, trim=Trim(path, 3)))(*args)
        assert part.loss == pytest.approx(float(whole.loss[0, 0]), rel=1e-6)
        assert state.table[0] == pytest.approx(float(whole.loss[0, 0]), rel=1e-6)
        assert (part.trim.kept_loss * 2 + part.trim.dropped_loss * 6) / 8 == pytest.approx(float(part.loss[0, 0]))
        assert part.trim.dropped.sum() == 6


def test_few_programs_serve_a_long_run():
    trimming = Trimming()
    for allowed in (("reuse", "gather", "plain"), ("gather", "plain"), ("plain",)):
        plan = make_plan(trimming, 150, 128, allowed)
        trims = [plan.trim(trimming.keep_count(epoch, 150, 128)) for epoch in range(150)]
        assert trims[0] is None and len(set(trims)) <= 8
        for epoch, trim in enumerate(trims[1:], 1):
            count = trimming.keep_count(epoch, 150, 128)
            assert trim is None or count <= trim.capacity <= (128 if trim.path == "plain" else count + 0.2 * 128)
        assert trims[-1].path == ("plain" if len(allowed) == 1 else "gather") and trims[5].path == "plain"
        assert trims[80].path == allowed[0]

    def programs(**options):
        plan = make_plan(trimming, 5, 100, ("reuse", "gather", "plain"), **options)
        return [(trim.path, trim.capacity) for trim in plan.programs]

    # Few counts have a program of their own.
    assert programs() == [("gather", 20), ("reuse", 40), ("reuse", 60), ("reuse", 80)]
    assert programs(path="gather") == [("gather", 20), ("gather", 40), ("gather", 60), ("gather", 80)]
    assert programs(path="reuse", most_programs=2) == [("reuse", 40), ("reuse", 80)]
    assert programs(path="plain") == []
    for most in range(1, 5):
        assert len(programs(most_programs=most)) <= most


@pytest.mark.parametrize("batch_size", [32, 64, 128])
@pytest.mark.parametrize("delta", [None, 0.2, 0.35, 0.8])
def test_at_most_eight_programs_for_150_epochs(batch_size, delta):
    trimming, num_batches = Trimming(), -(-50_000 // batch_size)
    selection = AllBatches() if delta is None else HardBatches(delta)
    plan = make_plan(
        trimming, 150, batch_size, ("reuse", "gather", "plain"), most_programs=hj.Performance().trim_programs
    )
    programs, done = set(), 0
    for call in dispatches(num_batches, selection.round_steps(num_batches), 150):
        trim = plan.trim(trimming.keep_count(done // num_batches, 150, batch_size))
        programs.add((call.first and delta is not None, call.steps, call.max_rounds, trim))
        done += call.steps * call.rounds
    assert len(programs) <= 8


def test_a_run_compiles_as_planned(tiny):
    from hardjax.engine.programs import programs_for

    programs_for.cache_clear()
    settings = config(epochs=30, batch_size=35, trimming=Trimming())
    hj.run(settings, dataset=tiny, progress=False, performance=hj.Performance(trim_programs=3))
    assert prepare(settings, tiny).programs.traces["round"] <= 4


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
        assert paths.lean == lean and paths.exact[0] == "reuse"
        plan = make_plan(Trimming(), 150, 128, paths.exact, lean=lean)
        assert plan.trim(26).path == ("gather" if lean else "reuse")


@pytest.mark.parametrize("model, paths", [(TimeMajor(), ("gather", "plain")), (Centred(), ("plain",))], ids=str)
def test_what_shapes_do_not_show_is_tried_out(tiny, model, paths):
    assert trim_paths(prepare(config(), tiny, model).recipe).exact == paths


def test_residuals_that_merge_the_batch_with_later_axes(tiny):
    setting = prepare(config(), tiny, Mixing())
    assert trim_paths(setting.recipe).exact[0] == "reuse"
    state, batch = setting.init_state(), Batch(tiny.train.images[:8] / 255.0, tiny.train.labels[:8])
    hyper = setting.hyper._replace(keep=jnp.int32(3))
    after = [
        make_step(setting.recipe, Trim(path, 4))(state, batch, hyper, jax.random.key(0))[0].params
        for path in ("plain", "reuse")
    ]
    for a, b in zip(*map(jax.tree.leaves, after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_residuals_without_a_plain_batch_axis_are_refused():
    with pytest.raises(ValueError, match="one axis of the batch"):
        take_samples([jnp.zeros((8, 8))], [jnp.zeros((3, 3))], jnp.arange(3), 8)
    with pytest.raises(ValueError, match="as many residuals"):
        take_samples([jnp.zeros(8)], [], jnp.arange(3), 8)
    cut = take_samples([jnp.arange(16.0), jnp.ones(2)], [jnp.zeros(6), jnp.zeros(2)], jnp.array([7, 0, 2]), 8)
    assert cut[0].tolist() == [14, 15, 0, 1, 4, 5]


def test_gathering_is_refused_where_it_would_change_the_result(tiny):
    settings = config(model_options={"widths": [8], "norm": "batch"}, trimming=Trimming())
    with pytest.raises(ValueError, match="trim_path='gather' would change the result"):
        hj.run(settings, dataset=tiny, progress=False, performance=hj.Performance(trim_path="gather"))
    result = hj.run(settings, dataset=tiny, progress=False)
    assert result.drop_counts.sum() > 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Trimming(start=1.5), "start=1.5 in"),
        (lambda: Trimming(end=0.0), "end=0.0 in"),
        (lambda: Trimming(start=0.5, end=0.8), "end=0.8 to be at most start=0.5"),
        (lambda: Trimming(schedule="liner"), "did you mean 'linear'"),
        (lambda: Trimming(keep="easiest"), "Allowed: hardest, random"),
        (lambda: config(batch_size=1, trimming=Trimming()), "batch_size=1 to be at least 2"),
        (lambda: config(trimming=0.2), "trimming=0.2 to be Trimming"),
        (lambda: trimmed_mean(jnp.ones(4), 0), "keep_count=0 in 1..4"),
        (lambda: trimmed_mean(jnp.ones(4), 5), "keep_count=5 in 1..4"),
        (lambda: trimmed_mean(jnp.ones((4, 2)), 1), r"losses of shape \(B,\)"),
        (lambda: hj.Performance(trim_path="fast"), "Allowed: auto, plain, gather, reuse"),
    ],
)
def test_bad_input_is_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
