"""Trimming (P2) against sorted NumPy losses, and the programs that a run's shares are dealt to."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hardjax as hj
from hardjax.choose.trimming import Trim, Trimming, kept_mask, make_plan, mean_of_first, take_samples, trimmed_mean


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


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("compiled", [True, False])
def test_nan_is_the_largest_loss_whatever_its_sign(sign, compiled):
    """What `inf - inf` gives on x86 has its sign bit set, and `lax.top_k` would sort it last."""
    nan = jnp.copysign(jnp.float32(jnp.nan), sign)
    assert bool(jnp.signbit(nan)) == (sign < 0)
    losses = jnp.stack([jnp.float32(1), nan, jnp.float32(3), jnp.float32(2)])
    mean = jax.jit(trimmed_mean, static_argnums=1) if compiled else trimmed_mean
    assert np.isnan(mean(losses, 2))
    trim = Trim("plain", 4)
    assert trim.choose(losses, None).tolist() == [1, 2, 3, 0]
    assert trimmed_mean(jnp.array([1.0, 4.0, 2.0]), 2) == 3.0


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


def test_random_keeps_are_uniform_and_hardest_are_not():
    losses = jnp.arange(10.0)
    keys = jax.random.split(jax.random.key(0), 2000)

    def counts(trim):
        return np.asarray(jax.vmap(lambda key: kept_mask(trim.choose(losses, key), 3, 10))(keys)).sum(0)

    # 2000 draws of 3 in 10: 600 expected, standard deviation 20.5.
    assert np.abs(counts(Trim("plain", 10, "random")) - 600).max() < 5 * 20.5
    assert counts(Trim("plain", 10, "hardest")).tolist() == [0] * 7 + [2000] * 3


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


def test_residuals_without_a_plain_batch_axis_are_refused():
    with pytest.raises(ValueError, match="one axis of the batch"):
        take_samples([jnp.zeros((8, 8))], [jnp.zeros((3, 3))], jnp.arange(3), 8)
    with pytest.raises(ValueError, match="as many residuals"):
        take_samples([jnp.zeros(8)], [], jnp.arange(3), 8)
    cut = take_samples([jnp.arange(16.0), jnp.ones(2)], [jnp.zeros(6), jnp.zeros(2)], jnp.array([7, 0, 2]), 8)
    assert cut[0].tolist() == [14, 15, 0, 1, 4, 5]


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
