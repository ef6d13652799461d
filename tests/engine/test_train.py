"""The engine against slow, obvious forms of itself."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import simulate_rounds

import hardjax as hj
from hardjax.choose.selection import AllBatches, HardBatches, HardSamples, RandomBatches
from hardjax.engine.plan import dispatches
from hardjax.engine.rounds import RoundSpec, make_rounds
from hardjax.engine.step import make_partition
from hardjax.training import checkpoint
from hardjax.training.setting import prepare


def config(selection=None, **changes) -> hj.TrainConfig:
    settings = dict(model="mlp", model_options={"widths": [8]}, epochs=4, batch_size=8, learning_rate=0.1)
    return hj.TrainConfig(**{**settings, **changes}, selection=selection or AllBatches())


def drive(setting, state=None, calls=None):
    """Every dispatch of a run: (final state, [(slots, losses) of each round])."""
    cfg, recipe = setting.config, setting.recipe
    state = setting.init_state() if state is None else state
    rounds = []
    if calls is None:
        calls = dispatches(recipe.num_batches, cfg.selection.round_steps(recipe.num_batches), cfg.epochs)
    for call in calls:
        chosen = cfg.selection.first_round() if call.first else cfg.selection
        state, info = setting.programs.rounds(
            RoundSpec(chosen, call.steps, call.max_rounds),
            True,
            state,
            setting.splits["train"],
            setting.hyper,
            call.rounds,
        )
        rounds += [(info.slots[i].tolist(), info.loss[i].tolist()) for i in range(call.rounds)]
    return state, rounds


@pytest.mark.parametrize("delta", [1.0, 0.8, 0.5, 0.35, 0.2, 0.01])
def test_rounds_equal_algorithm_2_driven_by_the_same_losses(tiny, delta):
    setting = prepare(config(HardBatches(delta), epochs=5), tiny)
    state, rounds = drive(setting)
    visited = [slot for slots, _ in rounds for slot in slots]
    losses = [loss for _, values in rounds for loss in values]

    def recorded(step: int, batch: int) -> float:
        assert visited[step] == batch
        return losses[step]

    expected = simulate_rounds(recorded, setting.recipe.num_batches, delta, 5)
    assert [slots for slots, _ in rounds] == expected
    assert len(visited) == 5 * setting.recipe.num_batches == int(state.step)
    assert len(rounds) == int(state.round)
    # The table holds each batch's last loss.
    assert state.table.tolist() == [losses[len(visited) - 1 - visited[::-1].index(slot)] for slot in range(9)]


def test_the_loss_in_the_table_is_that_of_the_very_forward_pass_that_trained(tiny):
    setting = prepare(config(HardBatches(0.5)), tiny)
    before = setting.init_state()
    partition, variables = np.asarray(before.partition), jax.tree.map(np.asarray, before.variables)
    _, info = setting.programs.rounds(
        RoundSpec(AllBatches(fixed=True), 9), False, before, setting.splits["train"], setting.hyper, 1
    )
    images = np.asarray(tiny.train.images)[partition[0]] / 255
    logits = setting.recipe.apply(variables, ((images - tiny.mean) / tiny.std).astype(np.float32), True)[0]
    logits = np.asarray(logits, np.float64)
    labels = np.asarray(tiny.train.labels)[partition[0]]
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(8), labels]
    assert info.loss[0, 0] == pytest.approx(losses.mean(), rel=1e-5)


def test_partition_covers_every_sample_and_wraps_to_fill_the_last_batch():
    partition = make_partition(jax.random.key(3), 20, 8)
    flat = np.asarray(partition).ravel()
    assert partition.shape == (3, 8) and partition.dtype == jnp.int32
    assert sorted(flat[:20]) == list(range(20)) and flat[20:].tolist() == flat[:4].tolist()


@pytest.mark.parametrize("selection, fresh", [(AllBatches(), True), (AllBatches(fixed=True), False)])
def test_partition_is_redrawn_only_where_it_should_be(tiny, selection, fresh):
    setting = prepare(config(selection), tiny)
    start = np.asarray(setting.init_state().partition)
    state, _ = drive(setting)
    assert (start != np.asarray(state.partition)).any() == fresh
    assert set(np.asarray(state.partition).ravel()) == set(range(70))


@pytest.mark.parametrize("selection", [AllBatches(), HardBatches(0.3), RandomBatches(0.3), HardSamples(0.3)], ids=str)
def test_state_keeps_shapes_and_dtypes_and_a_seed_decides_everything(tiny, selection):
    setting = prepare(config(selection, seed=7), tiny)
    start = setting.init_state()
    first, rounds = drive(setting, start)
    again, rounds_again = drive(setting)
    chex.assert_trees_all_equal_shapes_and_dtypes(setting.init_state(), first)
    assert rounds == rounds_again
    chex.assert_trees_all_equal(jax.tree.map(jax.random.key_data, first.key), jax.random.key_data(again.key))
    chex.assert_trees_all_equal(first.params, again.params)
    other, _ = drive(prepare(config(selection, seed=8), tiny))
    assert any(
        (a != b).any() for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(other.params), strict=True)
    )


@pytest.mark.parametrize("selection", [HardBatches(0.35), HardSamples(0.35), AllBatches()], ids=str)
def test_a_restored_state_goes_on_as_if_nothing_had_happened(tiny, tmp_path, selection):
    cfg = config(selection, optimizer="adam", learning_rate=0.01, augmentation="standard")
    setting = prepare(cfg, tiny)
    whole, rounds = drive(setting)
    calls = list(dispatches(9, selection.round_steps(9), 4))
    half, head = drive(setting, calls=calls[:2])
    checkpoint.save(tmp_path, half)
    restored = checkpoint.restore(tmp_path, like=setting.init_state())
    resumed, tail = drive(setting, restored, calls[2:])
    assert head + tail == rounds
    chex.assert_trees_all_equal(whole.params, resumed.params)
    chex.assert_trees_all_equal(whole.opt_state, resumed.opt_state)


def test_short_rounds_in_one_dispatch_equal_one_dispatch_each(tiny):
    setting = prepare(config(HardBatches(0.2), epochs=6), tiny)
    together, rounds = drive(setting, calls=dispatches(9, 2, 6, steps_per_dispatch=64))
    singly, rounds_singly = drive(setting, calls=dispatches(9, 2, 6, steps_per_dispatch=1))
    assert rounds == rounds_singly
    chex.assert_trees_all_equal(together.params, singly.params)


@pytest.mark.parametrize("selection, steps", [(AllBatches(), 9), (HardBatches(0.3), 3), (HardSamples(0.3), 3)], ids=str)
def test_no_callbacks_in_a_round(tiny, selection, steps):
    setting = prepare(config(selection, augmentation="standard"), tiny)
    rounds = make_rounds(setting.recipe, RoundSpec(selection, steps, 2))
    args = (setting.init_state(), setting.splits["train"], setting.hyper, jnp.int32(2))
    assert not _callbacks(jax.make_jaxpr(rounds)(*args).jaxpr)

    def noisy(*args):
        def body(i, carry):
            jax.debug.print("{}", i)
            return carry

        return jax.lax.fori_loop(0, 3, body, rounds(*args))

    assert _callbacks(jax.make_jaxpr(noisy)(*args).jaxpr)  # negative control: inside a loop


def _callbacks(jaxpr) -> list[str]:
    found = []
    for equation in jaxpr.eqns:
        if "callback" in equation.primitive.name or "print" in equation.primitive.name:
            found.append(equation.primitive.name)
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += _callbacks(inner)
    return found
