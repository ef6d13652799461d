"""The engine against slow, obvious forms of itself."""

import dataclasses
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from reference import simulate_rounds

import hardjax as hj
from hardjax.choose.selection import AllBatches, HardBatches, HardSamples, RandomBatches
from hardjax.choose.trimming import Trimming
from hardjax.engine import rounds
from hardjax.engine.plan import dispatches, step_inputs
from hardjax.engine.plan import programs as planned
from hardjax.engine.programs import lowerable
from hardjax.engine.rounds import RoundSpec, make_rounds
from hardjax.engine.state import StepInputs, make_partition
from hardjax.training import checkpoint
from hardjax.training.setting import prepare


def config(selection=None, **changes) -> hj.TrainConfig:
    settings = dict(model="mlp", model_options={"widths": [8]}, epochs=4, batch_size=8, learning_rate=0.1)
    return hj.TrainConfig(**{**settings, **changes}, selection=selection or AllBatches())


def drive(setting, state=None, calls=None):
    """Every dispatch of a run: (final state, [(slots, losses) of each round])."""
    programs, plan, train = setting.programs, setting.plan, setting.splits["train"]
    state = setting.init_state() if state is None else state
    rounds = []
    for call in dispatches(plan) if calls is None else calls:
        if call.kind == "plan":
            state = programs.plan(call.spec, True, state)
        elif call.kind == "look":
            programs.look(setting.observer, setting.sizes.unit, state, train)
        else:
            run = programs.rounds if call.kind == "rounds" else programs.segment
            state, info = run(call.spec, True, state, train, setting.hyper, step_inputs(plan, call))
            slots, losses = (np.asarray(x).reshape(call.spec.rounds, -1).tolist() for x in (info.slots, info.loss))
            if call.before.cursor:
                slots[0], losses[0] = rounds[-1][0] + slots[0], rounds.pop()[1] + losses[0]
            rounds += zip(slots, losses, strict=True)
    return state, rounds


def bounded(setting, bound):
    return dataclasses.replace(setting, plan=dataclasses.replace(setting.plan, bound=bound))


@pytest.mark.parametrize("delta", [1.0, 0.8, 0.5, 0.35, 0.2, 0.01])
def test_rounds_equal_algorithm_2_driven_by_the_same_losses(tiny, delta):
    setting = prepare(config(HardBatches(delta), epochs=5), tiny)
    state, rounds = drive(setting)
    visited = [slot for slots, _ in rounds for slot in slots]
    losses = [loss for _, values in rounds for loss in values]

    def recorded(step: int, batch: int) -> float:
        assert visited[step] == batch
        return losses[step]

    expected = simulate_rounds(recorded, setting.sizes.num_batches, delta, 5)
    assert [slots for slots, _ in rounds] == expected
    assert len(visited) == 5 * setting.sizes.num_batches == int(state.step)
    assert len(rounds) == int(state.round)
    # The table holds each batch's last loss.
    assert state.table.tolist() == [losses[len(visited) - 1 - visited[::-1].index(slot)] for slot in range(9)]


@dataclasses.dataclass(frozen=True)
class Twice(HardBatches):
    """Trains every batch twice in a row, and counts how often its loss was written."""

    def init(self, size):
        return jnp.zeros(size)

    def plan(self, table, key, size):
        return jnp.arange(size, dtype=jnp.int32) // 2

    def update(self, table, slots, losses):
        return table.at[slots].set(table[slots] + 1)


def test_a_strategy_of_ones_own_is_told_of_every_step(tiny):
    """What it makes of a loss may depend on what it made of the one before."""
    setting = prepare(config(Twice(1.0)), tiny)
    segment = rounds.make_rounds(setting.recipe, RoundSpec(Twice(1.0), 6))
    inputs = StepInputs(jnp.full(6, 0.1), jnp.full(6, 8))
    state, _ = jax.jit(segment)(setting.init_state(), setting.splits["train"], setting.hyper, inputs)
    assert state.table.tolist() == [2, 2, 2, 0, 0, 0, 0, 0, 0]


def test_the_loss_in_the_table_is_that_of_the_very_forward_pass_that_trained(tiny):
    setting = prepare(config(HardBatches(0.5)), tiny)
    before = setting.init_state()
    partition, variables = np.asarray(before.partition), jax.tree.map(np.asarray, before.variables)
    first = next(dispatches(setting.plan))
    _, info = setting.programs.rounds(
        first.spec, False, before, setting.splits["train"], setting.hyper, step_inputs(setting.plan, first)
    )
    images = np.asarray(tiny.train.images)[partition[0]] / 255
    logits = setting.recipe.apply(variables, ((images - tiny.mean) / tiny.std).astype(np.float32), True)[0]
    logits = np.asarray(logits, np.float64)
    labels = np.asarray(tiny.train.labels)[partition[0]]
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(8), labels]
    assert info.loss[0] == pytest.approx(losses.mean(), rel=1e-5)


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
    calls = list(dispatches(setting.plan))
    half, head = drive(setting, calls=calls[:2])
    checkpoint.save(tmp_path, half)
    restored = checkpoint.restore(tmp_path, like=setting.init_state())
    resumed, tail = drive(setting, restored, calls[2:])
    assert head + tail == rounds
    chex.assert_trees_all_equal(whole.params, resumed.params)
    chex.assert_trees_all_equal(whole.opt_state, resumed.opt_state)


CUT = [AllBatches(), HardBatches(0.35), HardSamples(0.35)]


@pytest.mark.parametrize("bound", [1, 4])
@pytest.mark.parametrize("selection", CUT, ids=str)
def test_a_run_cut_anywhere_equals_an_uncut_one(tiny, selection, bound):
    cfg = config(selection, augmentation="standard", schedule="cosine", trimming=Trimming(0.5, 0.5), epochs=2)
    setting = prepare(cfg, tiny, zoo.Tiny(3))
    whole, rounds = drive(bounded(setting, 1000))
    cut, rounds_cut = drive(bounded(setting, bound))
    assert rounds == rounds_cut
    chex.assert_trees_all_equal(_arrays(whole), _arrays(cut))


@pytest.mark.slow
@pytest.mark.parametrize("bound", [1, 3, 4])
def test_a_residual_network_cut_anywhere_equals_an_uncut_one(tiny, bound):
    cfg = config(HardBatches(0.35), model="resnet8", model_options={}, batch_size=7, epochs=2)
    setting = prepare(cfg, tiny)
    chex.assert_trees_all_equal(*(_arrays(drive(bounded(setting, b))[0]) for b in (1000, bound)))


def _arrays(state):
    return {**state.__dict__, "key": jax.random.key_data(state.key), "slots": None}


def test_short_rounds_in_one_dispatch_equal_one_dispatch_each(tiny):
    setting = prepare(config(HardBatches(0.2), epochs=6), tiny)
    assert max(call.spec.rounds for call in dispatches(setting.plan)) == 4
    together, rounds = drive(setting)
    singly, rounds_singly = drive(bounded(setting, 2))
    assert rounds == rounds_singly
    chex.assert_trees_all_equal(together.params, singly.params)


@pytest.mark.parametrize("selection", CUT, ids=str)
def test_visits_are_counted_sample_by_sample(tiny, selection):
    """By hand from the slots, the fillers of last batches among them."""
    cfg = config(selection, trimming=Trimming(0.5, 0.5), epochs=3)
    setting = prepare(cfg, tiny)
    state, rounds = drive(bounded(setting, 4))
    flat = np.concatenate([np.ravel(slots) for slots, _ in rounds]).astype(int)
    np.testing.assert_array_equal(state.visits, np.bincount(flat, minlength=len(state.table)))
    assert int(state.seen.sum()) == 27 * 8 and int((state.seen - state.drops).sum()) == 27 * 4
    if selection.unit == "sample":
        np.testing.assert_array_equal(state.seen, state.visits)
    elif not selection.redraws:
        expected = np.zeros(70, int)
        np.add.at(expected, np.asarray(state.partition), np.asarray(state.visits)[:, None])
        np.testing.assert_array_equal(state.seen, expected)
    assert (np.asarray(state.drops) <= np.asarray(state.seen)).all()


@pytest.mark.parametrize("selection, steps", [(AllBatches(), 9), (HardBatches(0.3), 3), (HardSamples(0.3), 3)], ids=str)
def test_no_callbacks_and_no_loop_of_unknown_length_in_a_round(tiny, selection, steps):
    setting = prepare(config(selection, augmentation="standard"), tiny)
    rounds = make_rounds(setting.recipe, RoundSpec(selection, steps, 2))
    inputs = StepInputs(jnp.ones(2 * steps), jnp.full(2 * steps, 8))
    args = (setting.init_state(), setting.splits["train"], setting.hyper, inputs)
    found = _primitives(jax.make_jaxpr(rounds)(*args).jaxpr)
    assert not [name for name in found if "callback" in name or "print" in name or name in ("while", "cond")]

    def noisy(*args):
        def body(i, carry):
            jax.debug.print("{}", i)
            return carry

        return jax.lax.fori_loop(0, args[0].step, body, rounds(*args))

    # Negative control: inside a loop.
    assert {"while"} < set(_primitives(jax.make_jaxpr(noisy)(*args).jaxpr)) - set(found)


def test_every_program_of_a_run_can_be_lowered(tiny):
    cfg = config(HardBatches(0.35), trimming=Trimming(), measure=hj.fisher.FisherMeasure(every=4), epochs=3)
    programs = lowerable(cfg, tiny, bound=4)
    setting = prepare(cfg, tiny, performance=hj.Performance(steps_per_dispatch=4))
    of_training = {name for name in programs if name.split()[0] in ("rounds", "plan", "segment")}
    assert len(of_training) == len(planned(setting.plan))
    assert {"init", "look", "evaluate", "predict"} == programs.keys() - of_training
    fn, args = programs["look"]
    assert jax.jit(fn).lower(*args).out_info[0][0].shape == (8,)
    fn, args = next(programs[name] for name in programs if name.startswith("segment"))
    state, info = jax.eval_shape(fn, *args)
    chex.assert_trees_all_equal_shapes_and_dtypes(state.params, args[0].params)
    assert info.loss.shape == args[-1].keep.shape


def _primitives(jaxpr) -> list[str]:
    found = []
    for equation in jaxpr.eqns:
        # A choice by platform is made when the program is lowered, and leaves no branch in it.
        if not equation.params.get("branches_platforms"):
            found.append(equation.primitive.name)
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += _primitives(inner)
    return found


@pytest.mark.ci
def test_moves_are_those_of_the_step_whatever_the_generator(tiny):
    """Generators other than threefry draw otherwise for many keys at once."""
    config = hj.TrainConfig(model="mlp", model_options={"widths": [4]}, augmentation="standard", batch_size=8)
    recipe = prepare(config, tiny).recipe
    for kind in ("threefry2x32", "rbg"):
        state = types.SimpleNamespace(key=jax.random.key(3, impl=kind), step=jnp.int32(5))
        together = rounds._draw_moves(recipe, state, jnp.zeros((4, 8), jnp.int32))
        for place in range(4):
            one = types.SimpleNamespace(key=state.key, step=state.step + place)
            alone = rounds._draw_moves(recipe, one, jnp.zeros((1, 8), jnp.int32))
            jax.tree.map(lambda a, b, place=place: np.testing.assert_array_equal(a[place], b[0]), together, alone)
