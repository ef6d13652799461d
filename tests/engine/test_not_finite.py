"""Steps whose loss or gradient is not finite: recorded, reported, or skipped, against loops that leave them out."""

import dataclasses

import chex
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
from hardjax.choose.trimming import Trim, Trimming
from hardjax.config import ON_NAN
from hardjax.engine.plan import dispatches, step_inputs
from hardjax.engine.programs import lowerable
from hardjax.engine.rounds import RoundSpec, make_rounds, make_segment
from hardjax.engine.state import DROPOUT, Batch, StepInputs, draw, replace
from hardjax.engine.step import make_step
from hardjax.training.setting import prepare

POISONED = 40  # the sample


def config(on_nan, **changes) -> hj.TrainConfig:
    settings = dict(model="mlp", model_options={"widths": [8]}, epochs=2, batch_size=8, learning_rate=0.1)
    return hj.TrainConfig(**{**settings, **changes}, on_nan=on_nan)


def poison(setting, value=3e38):
    """The training split with one image so large that the first layer overflows; and the one batch that holds it."""
    train = setting.splits["train"]
    images = (train.images / 255.0).astype(jnp.float32).at[POISONED].set(value)
    held = (np.asarray(setting.init_state().partition) == POISONED).any(1)
    assert held.sum() == 1
    return train._replace(images=images), int(held.argmax())


def epoch(setting, train, trim=None, keep=8, state=None):
    """Every batch of the partition once, as one compiled round: (state, info)."""
    steps = setting.sizes.num_batches
    inputs = StepInputs(jnp.full(steps, 0.1), jnp.full(steps, keep))
    run = jax.jit(make_rounds(setting.recipe, RoundSpec(AllBatches(fixed=True), steps, trim=trim)))
    return run(setting.init_state() if state is None else state, train, setting.hyper, inputs)


def step_by_step(setting, train, trim=None, keep=8):
    """The same in a loop of single steps of a program that never looks: (state, bad (steps,)); what went bad is left
    out."""
    step = jax.jit(make_step(dataclasses.replace(setting.recipe, on_nan="record"), trim))
    state, bad = setting.init_state(), []
    for i, indices in enumerate(np.asarray(state.partition)):
        images = (train.images[indices] - train.mean) / train.std
        inputs = StepInputs(jnp.float32(0.1), jnp.int32(keep))
        key = draw(state.key, DROPOUT, state.step)
        after, _ = step(state, Batch(images, train.labels[indices]), setting.hyper, inputs, key)
        bad.append(not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params)))
        state = replace(state if bad[-1] else after, step=jnp.int32(i + 1))
    return state, bad


@pytest.mark.ci
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_skipping_equals_a_loop_by_hand_that_leaves_the_bad_steps_out(tiny, optimizer):
    setting = prepare(config("skip-step", optimizer=optimizer), tiny)
    train, where = poison(setting)
    start = setting.init_state()
    state, info = epoch(setting, train)
    assert np.flatnonzero(info.bad).tolist() == [where] == np.flatnonzero(~np.isfinite(info.loss)).tolist()

    def loss_of(params, images, labels):
        x = images.reshape(len(images), -1)
        first, last = params["fc1"], params["fc2"]
        logits = jax.nn.relu(x @ first["kernel"] + first["bias"]) @ last["kernel"] + last["bias"]
        return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean()

    params, tree_map = start.params, jax.tree.map
    first = second = tree_map(jnp.zeros_like, params)
    count = 0
    for indices in np.asarray(start.partition):
        if POISONED in indices:
            continue
        grads = jax.grad(loss_of)(params, (train.images[indices] - train.mean) / train.std, train.labels[indices])
        count += 1
        if optimizer == "momentum":
            first = tree_map(lambda m, g: 0.9 * m + g, first, grads)
            params = tree_map(lambda p, m: p - 0.1 * m, params, first)
        else:
            first = tree_map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
            second = tree_map(lambda v, g: 0.999 * v + 0.001 * g**2, second, grads)
            params = tree_map(
                lambda p, m, v, t=count: p - 0.1 * (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8),
                params,
                first,
                second,
            )
    chex.assert_trees_all_close(state.params, params, **near(rtol=1e-4, atol=2e-6))
    kept = dict(trace=first) if optimizer == "momentum" else dict(mu=first, nu=second)
    for name, expected in kept.items():
        chex.assert_trees_all_close(
            optax.tree_utils.tree_get(state.opt_state, name), expected, **near(rtol=1e-4, atol=2e-6)
        )
    if optimizer == "adam":
        assert optax.tree_utils.tree_get(state.opt_state, "count") == count == 8


def test_the_three_ways(tiny):
    """Recorded, one bad step spoils all that follow; stopping changes no number and says which; skipping goes on."""
    ended = {}
    for on_nan in ON_NAN:
        setting = prepare(config(on_nan), tiny)
        train, where = poison(setting)
        ended[on_nan] = epoch(setting, train)
        assert 0 < where < 8
    (recorded, silent), (stopped, told), (skipped, info) = (ended[on_nan] for on_nan in ON_NAN)
    assert silent.bad is None and info.bad.shape == info.loss.shape == (9,) and info.bad.dtype == bool
    assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(recorded.params))
    np.testing.assert_array_equal(told.bad, np.arange(9) >= where)
    np.testing.assert_array_equal(info.bad, np.arange(9) == where)
    chex.assert_trees_all_equal(recorded.params, stopped.params)
    np.testing.assert_array_equal(silent.loss, told.loss)
    np.testing.assert_array_equal(silent.loss[:where], info.loss[:where])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((skipped.params, skipped.opt_state)))
    # The step counts: in the budget, among the visits, and in what is drawn from its number.
    for name in ("step", "round", "cursor", "visits", "seen", "drops"):
        np.testing.assert_array_equal(getattr(skipped, name), getattr(recorded, name))
    # The table is the strategy's business: no finite loss, no entry.
    np.testing.assert_array_equal(np.isneginf(skipped.table), np.arange(9) == where)


class Rooted(nn.Module):
    """Its loss at black images is finite, its derivative is not: sqrt has none at 0."""

    @nn.compact
    def __call__(self, images):
        x = nn.Dense(4, use_bias=False)(images.reshape(len(images), -1))
        return nn.Dense(3)(jnp.sqrt(jnp.abs(x)))


def test_a_gradient_that_is_not_finite_under_a_loss_that_is(tiny):
    setting = prepare(config("skip-step", augmentation=hj.Augmentation(normalize=False)), tiny, Rooted())
    train, where = poison(setting, 0.0)
    state, info = epoch(setting, train)
    assert np.isfinite(info.loss).all()
    np.testing.assert_array_equal(info.bad, np.arange(9) == where)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    # Its loss is finite and enters the table.
    assert state.table[where] == info.loss[where] > 0


class Certain(nn.Module):
    """Far too sure of itself for white images: an infinite loss, of which no gradient is taken."""

    @nn.compact
    def __call__(self, images):
        logits = nn.Dense(3)(images.reshape(len(images), -1))
        certain = jnp.array([-3e38, -3e38, 3e38])
        return jnp.where(images[:, :1, 0, 0] == 1, certain, logits)


@pytest.mark.ci
def test_a_loss_that_is_not_finite_over_gradients_that_are(tiny):
    settings = config("skip-step", augmentation=hj.Augmentation(normalize=False))
    setting = prepare(settings, tiny, Certain())
    train, where = poison(setting, 1.0)
    state, info = epoch(setting, train)
    assert tiny.train.labels[POISONED] != 2 and np.isinf(info.loss[where])
    np.testing.assert_array_equal(info.bad, np.arange(9) == where)
    # The others of that batch would have moved it.
    recorded, _ = epoch(prepare(dataclasses.replace(settings, on_nan="record"), tiny, Certain()), train)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(recorded.params))
    assert np.abs(recorded.params["Dense_0"]["bias"] - state.params["Dense_0"]["bias"]).max() > 0


NETWORKS = {
    "batch norm": (lambda: zoo.Tiny(3), {}, ["plain"]),
    "convolution": (lambda: zoo.Tiny(3, norm="none"), {}, ["plain", "gather", "reuse"]),
    "dropout": (lambda: None, {"widths": [8], "dropout": 0.5}, ["plain"]),
}


@pytest.mark.ci
@pytest.mark.parametrize("keep", ["hardest", "random"])
@pytest.mark.parametrize(
    "network, path", [(name, path) for name, (_, _, paths) in NETWORKS.items() for path in [None, *paths]]
)
@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
def test_skipping_equals_single_steps_that_leave_the_bad_ones_out(tiny, network, path, keep, optimizer):
    """Parameters, optimiser and batch statistics, whichever way the step is trimmed."""
    make, options, _ = NETWORKS[network]
    trim = None if path is None else Trim(path, 8 if path == "plain" else 5, keep)
    setting = prepare(config("skip-step", model_options=options, optimizer=optimizer), tiny, make())
    train, where = poison(setting)
    count = 8 if trim is None else 3
    expected, bad = step_by_step(setting, train, trim, count)
    state, info = epoch(setting, train, trim, count)
    np.testing.assert_array_equal(info.bad, bad)
    # Dropped at random, the sample may do no harm; the hardest are the ones that are not finite.
    assert set(np.flatnonzero(bad)) == {where} or (trim and keep == "random" and not any(bad))
    for name in ("params", "opt_state", "batch_stats"):
        chex.assert_trees_all_close(getattr(state, name), getattr(expected, name), **near(rtol=1e-3, atol=1e-5))
    assert int(state.step) == 9 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.batch_stats))


@pytest.mark.ci
@pytest.mark.parametrize("path", ["masked", "gather", "reuse"])
def test_a_step_is_as_good_as_the_samples_that_it_trains(tiny, path):
    setting = prepare(config("skip-step"), tiny)
    train, where = poison(setting)
    state, indices = setting.init_state(), np.asarray(setting.init_state().partition)[where]
    step = jax.jit(make_step(setting.recipe, Trim(path, 8 if path == "masked" else 6, "random")))
    batch = Batch((train.images[indices] - train.mean) / train.std, train.labels[indices])
    met = set()
    for seed in range(12):
        inputs = StepInputs(jnp.float32(0.1), jnp.int32(4))
        after, info = step(state, batch, setting.hyper, inputs, jax.random.key(seed))
        held = bool(info.kept[int(np.flatnonzero(indices == POISONED)[0])])
        assert bool(info.bad) == held and not np.isfinite(info.losses).all()
        moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (after.params, state.params)), strict=True)]
        assert np.isfinite(moved).all() and (max(moved) == 0) == held
        met.add(held)
    assert met == {True, False}


@pytest.mark.ci
@pytest.mark.parametrize("selection", [HardBatches(0.4), RandomBatches(0.4), HardSamples(0.4)], ids=str)
@pytest.mark.parametrize("bound", [1, 4])
def test_a_run_that_skips_steps_is_the_same_however_it_is_cut(tiny, selection, bound):
    """Replay, trimming and a bad step in the middle: equal bits, and the full budget."""

    def drive(bound):
        setting = prepare(config("skip-step", selection=selection, trimming=Trimming(0.5, 0.5)), tiny, zoo.Tiny(3))
        train, _ = poison(setting)
        plan, state, bad = dataclasses.replace(setting.plan, bound=bound), setting.init_state(), []
        for call in dispatches(plan):
            if call.kind == "plan":
                state = setting.programs.plan(call.spec, True, state)
                continue
            run = setting.programs.rounds if call.kind == "rounds" else setting.programs.segment
            state, info = run(call.spec, True, state, train, setting.hyper, step_inputs(plan, call))
            assert info.bad.shape == info.loss.shape
            bad += np.ravel(info.bad).tolist()
        return state, bad

    (whole, bad), (cut, bad_cut) = drive(1000), drive(bound)
    assert bad == bad_cut and len(bad) == 18 and 1 <= sum(bad) < 18
    chex.assert_trees_all_equal(_arrays(whole), _arrays(cut))
    assert int(whole.step) == 18 and (np.isfinite(whole.table) | np.isneginf(whole.table)).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((whole.variables, whole.opt_state)))


@pytest.mark.ci
@pytest.mark.parametrize("trimming", [None, Trimming(0.5, 0.5)], ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_where_no_step_is_bad_all_three_train_alike(tiny, network, trimming):
    make, options, _ = NETWORKS[network]
    trim = None if trimming is None else Trim("plain", 8)
    ended = []
    for on_nan in ON_NAN:
        setting = prepare(config(on_nan, model_options=options), tiny, make())
        ended.append(epoch(setting, setting.splits["train"], trim, 4 if trim else 8))
    (recorded, before), *others = ended
    for state, info in others:
        assert not info.bad.any()
        np.testing.assert_allclose(info.loss, before.loss, **near(rtol=1e-6))
        for name in ("params", "opt_state", "batch_stats"):
            chex.assert_trees_all_close(getattr(state, name), getattr(recorded, name), **near(rtol=1e-6, atol=1e-6))


@pytest.mark.ci
def test_a_program_that_records_looks_at_nothing(tiny):
    """Beside the table, which tests the loss that it takes, and the softmax, which tests its largest logits."""
    found = {}
    for on_nan in ON_NAN:
        setting = prepare(config(on_nan, model_options={"widths": [5]}), tiny)
        segment = make_segment(setting.recipe, RoundSpec(AllBatches(), 4))
        args = (setting.init_state(), setting.splits["train"], setting.hyper, StepInputs(jnp.ones(4), jnp.full(4, 8)))
        traced, shapes = jax.make_jaxpr(segment, return_shape=True)(*args)
        shapes = shapes[1]
        tests = [eqn.invars[0].aval.shape for eqn in _equations(traced.jaxpr) if eqn.primitive.name == "is_finite"]
        selects = sum(eqn.primitive.name == "select_n" for eqn in _equations(traced.jaxpr))
        found[on_nan] = sorted(tests), selects, shapes.bad is not None
    leaves = [leaf.shape for leaf in jax.tree.leaves(setting.init_state().params)]
    # Of the table the four losses of the segment, at its end.
    assert found["record"][0] == [(4,), (8,)] and not found["record"][2]
    # The mean loss, and each gradient once.
    assert found["stop"] == (sorted([(), (4,), (8,), *leaves]), found["record"][1], True)
    # One choice for each array that a bad step must leave alone: parameters and momentum.
    assert found["skip-step"] == (found["stop"][0], found["record"][1] + 2 * len(leaves), True)


def test_recording_is_what_a_configuration_says_unless_told_otherwise(tiny):
    assert hj.TrainConfig().on_nan == "record"
    # Each way has programs of its own; the same ones for the same way.
    recipes = [prepare(config(on_nan), tiny).recipe for on_nan in (*ON_NAN, "record")]
    assert recipes[0] == recipes[3] and len(set(recipes)) == 3
    for on_nan in ON_NAN:
        assert hj.TrainConfig.from_dict(config(on_nan).to_dict()) == config(on_nan)
    programs = lowerable(config("skip-step", selection=HardBatches(0.35)), tiny, bound=4)
    infos = [jax.eval_shape(make, *args)[1] for name, (make, args) in programs.items() if name.startswith("segment")]
    assert infos and all(info.bad.shape == info.loss.shape for info in infos)


def _arrays(state):
    return replace(state, key=jax.random.key_data(state.key))


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)
