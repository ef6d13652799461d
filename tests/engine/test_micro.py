"""Gradients of a batch accumulated over its parts, against those of the whole batch at once."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wide import wide

import hardjax as hj
from hardjax.choose.batch_plan import BatchPlan
from hardjax.choose.trimming import Trim
from hardjax.engine.state import Batch, StepInputs
from hardjax.engine.step import make_step
from hardjax.engine.trials import exact_in_parts
from hardjax.training.setting import prepare

PLAIN = {"widths": [8]}
PARTED = {"widths": [8], "norm": "batch", "norm_batch_size": 2}
CASES = {
    "all samples": (PLAIN, None),
    "statistics of sub-batches": (PARTED, None),
    "trimmed": (PLAIN, Trim("gather", 7)),
    "trimmed, with more room than is kept": (PLAIN, Trim("gather", 10)),
    "trimmed, one pass over all": (PARTED, Trim("plain", 16)),
    "trimmed at random": (PLAIN, Trim("masked", 16, "random")),
}


@pytest.mark.parametrize("name", CASES)
def test_parts_add_up_to_the_batch(tiny, name):
    options, trim = CASES[name]
    keep = np.int32(7 if trim else 16)
    with jax.enable_x64(True):
        config = hj.TrainConfig(batch_size=16, weight_decay=0.1, on_nan="stop")
        setting = prepare(config, tiny, wide("mlp", options))
        images = jax.random.normal(jax.random.key(1), (16, 6, 6, 1), jnp.float32)
        batch = Batch(images, jnp.arange(16, dtype=jnp.int32) % 3)
        given = setting.init_state(), batch, setting.hyper, StepInputs(jnp.float32(0.1), keep), jax.random.key(2)
        recipes = (dataclasses.replace(setting.recipe, micro_batch=size) for size in (None, 4))
        whole, parts = (jax.jit(make_step(recipe, trim))(*given) for recipe in recipes)
        chex.assert_trees_all_close(parts[0].params, whole[0].params, rtol=1e-12)
        chex.assert_trees_all_close(parts[0].batch_stats, whole[0].batch_stats, rtol=1e-12)
        chex.assert_trees_all_equal(parts[1].correct, whole[1].correct)
        chex.assert_trees_all_equal(parts[1].kept, whole[1].kept)
        np.testing.assert_allclose(parts[1].losses, whole[1].losses, rtol=1e-6)
        assert not parts[1].bad


def test_a_sample_dropped_at_random_may_overflow(tiny):
    setting = prepare(hj.TrainConfig(batch_size=8, model_options=PLAIN, on_nan="stop"), tiny)
    images = jnp.ones((8, 6, 6, 1)).at[2].set(jnp.inf)
    step = jax.jit(make_step(dataclasses.replace(setting.recipe, micro_batch=2), Trim("masked", 8, "random")))
    state, info = setting.init_state(), None
    for seed in range(20):
        given = Batch(images, jnp.zeros(8, jnp.int32)), setting.hyper, StepInputs(jnp.float32(0.1), jnp.int32(3))
        new, info = step(state, *given, jax.random.key(seed))
        if not info.kept[2]:
            break
    assert not info.kept[2] and not info.bad
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new.params))


def test_a_network_is_tried_out_before_it_is_cut(tiny):
    def exact(size, **options):
        return exact_in_parts(prepare(hj.TrainConfig(batch_size=16, model_options=options), tiny).recipe, size)

    assert exact(4, **PLAIN) and exact(4, **PARTED) and exact(2, **PARTED) and exact(4, widths=[8], norm="group")
    assert not exact(1, **PARTED)  # half a sub-batch
    assert not exact(4, widths=[8], norm="batch") and not exact(4, widths=[8], dropout=0.5)
    assert not exact(8, **{**PARTED, "norm_batch_size": 16})


@pytest.mark.parametrize(
    ("micro", "changes", "words"),
    [
        (
            4,
            {"model_options": {"widths": [8], "norm": "batch"}},
            "micro_batch=4 to leave the result as it is",
        ),
        (3, {}, "micro_batch=3 to divide the batch of 16 samples that it cuts"),
        (0, {}, "micro_batch=0 to be a whole number of at least 1"),
        (16, {"batch_size": None, "batch_plan": BatchPlan.stages([16, 24])}, "=16 to divide the batch of 24 samples"),
    ],
)
def test_parts_that_would_change_the_result_are_refused(tiny, micro, changes, words):
    settings = {"batch_size": 16, "model_options": PLAIN} | changes
    config = hj.TrainConfig(**{name: value for name, value in settings.items() if value is not None})
    with pytest.raises(ValueError, match=words):
        prepare(config, tiny, performance=hj.Performance(micro_batch=micro))


def test_residuals_of_the_whole_batch_and_parts_of_it_contradict_each_other():
    with pytest.raises(ValueError, match="another trim_path than 'reuse' with micro_batch=4: it keeps what a backward"):
        hj.Performance(trim_path="reuse", micro_batch=4)


def test_batches_no_larger_than_a_part_are_left_alone(tiny):
    """Also where cutting them would change the result."""
    config = hj.TrainConfig(batch_size=16, model_options={"widths": [8], "norm": "batch"})
    assert prepare(config, tiny, performance=hj.Performance(micro_batch=16)).recipe.micro_batch == 16


@pytest.mark.ci
def test_a_run_in_parts(tiny):
    """Replay of batches of two sizes, observed: what is selected, measured and reported stays as it was."""
    with jax.enable_x64(True):
        config = hj.TrainConfig(
            batch_plan=BatchPlan.stages([8, 16]),
            epochs=4,
            learning_rate=0.1,
            selection=hj.selection.HardBatches(0.5),
            measure=hj.fisher.FisherMeasure(every=5),
        )
        whole, parts = (
            hj.run(
                config,
                dataset=tiny,
                model=wide("mlp", PARTED),
                performance=hj.Performance(micro_batch=size),
                progress=False,
            )
            for size in (None, 4)
        )
    chex.assert_trees_all_close(parts.state.params, whole.state.params, rtol=1e-10)
    np.testing.assert_array_equal(parts.replays, whole.replays)
    values, expected = (run.measurements["eigenvalues"] for run in (parts, whole))
    np.testing.assert_allclose(values, expected, atol=1e-10 * np.nanmax(expected))


def test_parts_take_less_memory(tiny):
    """What a backward pass keeps is that of 4 samples instead of 64."""
    config = hj.TrainConfig(batch_size=64, model_options={"widths": [32] * 8})
    state = prepare(config, tiny).state_shapes()
    batch = Batch(jax.ShapeDtypeStruct((64, 6, 6, 1), "float32"), jax.ShapeDtypeStruct((64,), "int32"))
    scalars = StepInputs(jax.ShapeDtypeStruct((), "float32"), jax.ShapeDtypeStruct((), "int32"))
    key, taken = jax.eval_shape(lambda: jax.random.key(0)), []
    for size in (None, 4):
        setting = prepare(config, tiny, performance=hj.Performance(micro_batch=size))
        step = jax.jit(make_step(setting.recipe)).lower(state, batch, setting.hyper, scalars, key)
        taken.append(step.compile().memory_analysis().temp_size_in_bytes)
    whole, parts = taken
    of_layers = 8 * 64 * 32 * 4
    assert parts < whole - of_layers / 2, taken
