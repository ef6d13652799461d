import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from hardjax.choose import selection
from hardjax.choose.selection import AllBatches, HardBatches, HardSamples, RandomBatches

KEY = jax.random.key(0)
STRATEGIES = [AllBatches(), AllBatches(fixed=True), HardBatches(0.4), RandomBatches(0.4), HardSamples(0.4)]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_contract(strategy):
    table = strategy.init(10)
    slots = strategy.plan(table, KEY, 4)
    new = strategy.update(table, slots, jnp.arange(1.0, 5.0))

    assert slots.shape == (4,) and slots.dtype == jnp.int32
    assert len(set(slots.tolist())) == 4 and 0 <= min(slots.tolist()) <= max(slots.tolist()) < 10
    chex.assert_trees_all_equal_shapes_and_dtypes(table, new)
    assert isinstance(strategy, selection.Selection)
    assert selection.from_dict(selection.to_dict(strategy)) == strategy
    assert hash(strategy) == hash(selection.from_dict(selection.to_dict(strategy)))


def test_hard_batches_sorts_descending_and_ties_go_to_the_lower_slot():
    table = jnp.array([1.0, 3.0, 2.0, 3.0, 0.5, 2.0])
    assert HardBatches(0.5).plan(table, KEY, 5).tolist() == [1, 3, 2, 5, 0]


def test_a_batch_without_a_loss_yet_is_the_least_hard_of_all():
    """Losses of one's own may be negative."""
    strategy = HardBatches(0.5)
    table = strategy.init(4)
    assert np.isnan(selection.table_mean(table))
    table = strategy.update(table, jnp.arange(4), jnp.array([-3.0, jnp.nan, -1.0, -2.0]))
    assert strategy.plan(table, KEY, 4).tolist() == [2, 3, 0, 1]
    assert selection.table_mean(table) == -2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_never_enters_the_table(bad):
    table = jnp.array([1.0, 2.0, 3.0])
    new = selection.update_table(table, jnp.array([0, 2]), jnp.array([bad, 7.0]))
    assert new.tolist() == [1.0, 2.0, 7.0]


def test_hard_samples_takes_the_hardest_and_wraps_where_a_round_needs_more():
    table = jnp.arange(7.0)
    assert sorted(HardSamples(0.5).plan(table, KEY, 3).tolist()) == [4, 5, 6]
    wrapped = HardSamples(1.0).plan(table, KEY, 9).tolist()
    assert sorted(wrapped[:7]) == list(range(7)) and wrapped[7:] == wrapped[:2]


def test_random_batches_is_uniform_and_the_test_can_tell():
    draws = 3000
    keys = jax.random.split(KEY, draws)
    plan = jax.vmap(lambda key: RandomBatches(0.3).plan(jnp.zeros(10), key, 3))(keys)
    first = jax.vmap(lambda key: HardBatches(0.3).plan(jax.random.uniform(key, (10,)) + jnp.arange(10) / 20, key, 3))

    assert all(len(set(row)) == 3 for row in np.asarray(plan).tolist())
    assert _uniform_p(plan) > 0.001
    assert _uniform_p(plan[:, :1]) > 0.001
    assert _uniform_p(first(keys)) < 1e-9  # negative control: a slight preference for late slots


@pytest.mark.parametrize("delta", [0, -0.1, 1.01, float("nan"), "half", True])
@pytest.mark.parametrize("strategy", [HardBatches, RandomBatches, HardSamples])
def test_delta_outside_its_range(strategy, delta):
    with pytest.raises(ValueError, match=r"Expected delta=.* (in \(0, 1\]|to be a number)\."):
        strategy(delta)


def test_unknown_names_offer_the_closest():
    with pytest.raises(ValueError, match="Unknown selection 'hard-batch'; did you mean 'hard-batches'"):
        selection.from_dict({"name": "hard-batch"})
    with pytest.raises(ValueError, match="Unknown setting of selection 'hard-batches' 'share'"):
        selection.from_dict({"name": "hard-batches", "share": 0.2})


def _uniform_p(slots) -> float:
    return stats.chisquare(np.bincount(np.asarray(slots).ravel(), minlength=10)).pvalue
