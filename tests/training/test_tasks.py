"""Tasks other than classification: a segmentation and a regression, replayed, trimmed and measured."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tasks
from platforms import near

import hardjax as hj
from hardjax.cli import main
from hardjax.models.apply import init_variables, make_apply
from hardjax.study.arms import make_arms
from hardjax.study.compare import compare
from hardjax.study.measure import measure_run
from hardjax.study.tables import difference_table, replay_table

SEGMENTATION, REGRESSION = tasks.segmentation(), tasks.regression()
_IMAGES, _SIGNS = np.asarray(REGRESSION.train.images), np.where(np.arange(72) % 2, 1.0, -1.0)
MARKED = hj.data.Dataset.from_arrays(_IMAGES, _SIGNS, _IMAGES, _SIGNS)


def far_off(outputs, targets):
    """Absolute errors beyond a tenth of the image."""
    return jax.nn.relu(jnp.abs(outputs - targets) - 0.1).sum(-1)


def exit_code(words):
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    return ended.value.code


def inputs(dataset, split):
    images = np.asarray(getattr(dataset, split).images) / np.float32(255)
    return (images - dataset.mean) / dataset.std


@pytest.mark.ci
def test_a_segmentation_is_replayed_and_measured():
    config = hj.TrainConfig(
        epochs=6,
        batch_size=12,
        learning_rate=0.2,
        selection=hj.selection.HardBatches(0.5),
        measure=hj.fisher.FisherMeasure(every=9),
    )
    result = hj.run(config, dataset=SEGMENTATION, model=tasks.Pixels(), progress=False)
    variables, apply = result.state.variables, make_apply(tasks.Pixels())
    for split, name in (("train", "full_train"), ("test", "test")):
        masks = np.asarray(getattr(SEGMENTATION, split).labels)
        logits = np.asarray(apply(variables, inputs(SEGMENTATION, split), False)[0], np.float64)
        chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        loss = -np.log(np.take_along_axis(chances, masks[..., None], -1)).mean()
        np.testing.assert_allclose(result.history[f"{name}_loss"][-1], loss, **near(rtol=1e-5))
        right = 100 * (logits.argmax(-1) == masks).mean()
        np.testing.assert_allclose(result.history[f"{name}_top1"][-1], right, **near(rtol=1e-5))
    assert result.history["test_top1"][-1] > 90 > 100 * (1 - masks.mean())
    assert len(result.history["C_K"]) and np.isfinite(result.history["C_K"]).all()
    assert result.replay_counts.max() > result.replay_counts.min()


@pytest.mark.ci
def test_the_table_holds_the_losses_of_the_pass_that_trained():
    config = hj.TrainConfig(
        epochs=1, batch_size=12, optimizer="sgd", learning_rate=1e-20, selection=hj.selection.HardBatches(0.5)
    )
    result = hj.run(config, dataset=SEGMENTATION, model=tasks.Pixels(), progress=False)
    # At this rate nothing has moved: losses under batch statistics, a batch at a time.
    variables, apply = result.state.variables, make_apply(tasks.Pixels())
    for batch, entry in zip(np.asarray(result.state.partition), np.asarray(result.state.table), strict=True):
        logits = apply(variables, inputs(SEGMENTATION, "train")[batch], True)[0]
        pixels = optax.softmax_cross_entropy_with_integer_labels(logits, SEGMENTATION.train.labels[batch])
        np.testing.assert_allclose(entry, pixels.mean(), **near(rtol=1e-5))


@pytest.mark.ci
@pytest.mark.parametrize("loss", ["squared_error", far_off])
@pytest.mark.parametrize("path", ["plain", "gather", "reuse"])
def test_a_trimmed_step_of_a_regression_equals_a_loop_over_the_kept_samples(loss, path):
    config = hj.TrainConfig(
        loss=loss,
        epochs=2,
        batch_size=72,
        optimizer="sgd",
        learning_rate=0.3,
        trimming=hj.trimming.Trimming(end=0.25),
    )
    performance = hj.Performance(trim_path=path)
    result = hj.run(config, dataset=REGRESSION, model=tasks.Values(), performance=performance, progress=False)
    apply, images = make_apply(tasks.Values()), jnp.asarray(inputs(REGRESSION, "train"))
    init_key, _ = jax.random.split(jax.random.key(0))
    params = init_variables(tasks.Values(), init_key, (8, 8, 1))["params"]

    def loss_of(params, i):
        outputs, target = apply({"params": params, "batch_stats": {}}, images[i][None], True)[0][0], labels[i]
        return jnp.square(outputs - target).mean() if loss == "squared_error" else far_off(outputs, target)

    labels = REGRESSION.train.labels
    for kept in (72, 18):
        order = sorted(range(72), key=lambda i: -float(loss_of(params, i)))[:kept]
        grads = [jax.grad(loss_of)(params, i) for i in order]
        mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *grads)
        params = jax.tree.map(lambda leaf, grad: leaf - 0.3 * grad, params, mean)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **near(rtol=2e-4, atol=1e-5)), result.state.params, params
    )


def test_a_regression_has_no_accuracy_and_is_compared_by_its_loss(tmp_path, capsys):
    config = hj.TrainConfig(
        loss="squared_error",
        epochs=2,
        batch_size=12,
        learning_rate=0.05,
        validation=0.25,
        model_options={"widths": [8]},
    )
    result = hj.run(config, dataset=REGRESSION, output=tmp_path / "run", progress=True)
    shown = capsys.readouterr().err
    assert "test loss" in shown and "accuracy" not in shown and "nan" not in shown
    assert np.isnan(result.history["test_top1"]).all() and np.isfinite(result.history["test_loss"]).all()
    outputs = make_apply(hj.models.create("mlp", 2, widths=[8]))(
        result.state.variables, inputs(REGRESSION.with_validation(0.25), "test"), False
    )[0]
    expected = np.square(outputs - REGRESSION.test.labels).mean()
    np.testing.assert_allclose(result.summary["final_test_loss"], expected, **near(rtol=1e-5))
    assert exit_code(f"show {tmp_path / 'run'}") == 0
    assert f"loss {expected:.4g} test" in capsys.readouterr().out

    found = compare(config, make_arms([0.5], ["random"]), 2, dataset=REGRESSION)
    assert found.rows[0]["test_loss"] == np.mean([run.summary["final_test_loss"] for run in found.results[0]])
    text = json.dumps([replay_table(found.rows), difference_table(found.rows)])
    assert "test loss" in text and "nan" not in text and "top-1" not in text


@pytest.mark.ci
def test_a_task_with_a_loss_of_its_own_resumes_everywhere(tmp_path):
    config = hj.TrainConfig(
        loss=far_off,
        epochs=2,
        batch_size=24,
        learning_rate=0.1,
        selection=hj.selection.HardSamples(0.5),
        measure=hj.fisher.FisherMeasure(every=2),
    )
    hj.testing.assert_resumes_everywhere(config, dataset=REGRESSION, model=tasks.Values())


@pytest.mark.ci
def test_another_loss_of_the_same_name_is_not_gone_on_with(tmp_path):
    def make(factor):
        def loss(outputs, targets):
            return factor * jnp.square(outputs - targets).sum(-1)

        return loss

    config = hj.TrainConfig(loss=make(1.0), epochs=1, batch_size=24, learning_rate=0.01)
    hj.run(config, dataset=REGRESSION, model=tasks.Values(), output=tmp_path, progress=False)
    with pytest.raises(ValueError, match="network"):
        changed = hj.TrainConfig(loss=make(2.0), epochs=1, batch_size=24, learning_rate=0.01)
        hj.run(changed, dataset=REGRESSION, model=tasks.Values(), output=tmp_path, resume=True, progress=False)


@pytest.mark.ci
def test_a_wrapped_loss_is_measured_and_compared_as_itself_or_not_at_all(tmp_path):
    def scaled(outputs, targets, factor):
        return factor * jnp.square(outputs - targets).sum(-1)

    losses = [functools.partial(scaled, factor=factor) for factor in (1.0, 2.0)]
    settings = dict(epochs=1, batch_size=24, learning_rate=0.01, model_options={"widths": [4]})
    first, second = (hj.TrainConfig(loss=loss, **settings) for loss in losses)
    hj.run(first, dataset=REGRESSION, output=tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=r"as package\.module:Name"):
        measure_run(tmp_path / "run", 1, dataset=REGRESSION)
    with pytest.raises(ValueError, match="trained another network or loss"):
        measure_run(tmp_path / "run", 1, dataset=REGRESSION, loss=losses[1])
    assert measure_run(tmp_path / "run", 1, dataset=REGRESSION, loss=losses[0]).final["eigenvalues"].shape == (1, 24)
    arms = make_arms([0.5], [])
    compare(first, arms, 1, dataset=REGRESSION, output=tmp_path / "arms")
    compare(first, arms, 1, dataset=REGRESSION, output=tmp_path / "arms", resume=True)
    with pytest.raises(ValueError, match="network is"):
        compare(second, arms, 1, dataset=REGRESSION, output=tmp_path / "arms", resume=True)


@pytest.mark.parametrize(
    "dataset, settings, words",
    [
        (REGRESSION, {}, "Expected integer classes as labels with loss=softmax_cross_entropy"),
        (SEGMENTATION, {"loss": "squared_error"}, "Expected floats shaped like the model's outputs"),
        (SEGMENTATION, {}, r"Expected logits of shape \(12, 8, 8, 2\) from the model; it gives \(12, 2\)"),
        (SEGMENTATION, {"augmentation": "standard"}, r"labels of \(8, 8\) a sample would not move with their image"),
        (REGRESSION, {"loss": lambda o, t: jnp.square(o - t - o.mean(0)).sum(-1)}, "a loss of its own"),
        (
            REGRESSION,
            {"loss": "hinge_loss"},
            r"labels -1 and 1 with loss=hinge_loss, got values from 0\.\d+",
        ),
        (
            MARKED,
            {"loss": "sigmoid_binary_cross_entropy"},
            r"labels in 0\.\.1 with loss=sigm.* from -1 to 1",
        ),
        (REGRESSION, {"loss": lambda o, t: jnp.square(o - t)}, r"to give \(12,\) floats, one a sample"),
    ],
)
def test_what_does_not_fit_together_is_one_line(dataset, settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        hj.run(hj.TrainConfig(batch_size=12, **settings), dataset=dataset, progress=False)
    assert "\n" not in str(caught.value)


def test_labels_of_the_test_split_are_looked_at_too():
    images = np.arange(8 * 4, dtype=np.uint8).reshape(8, 2, 2, 1)
    signs = np.resize(np.float32([-1, 1]), (8, 1))
    wrong = hj.data.Dataset.from_arrays(images, signs, images, (signs + 1) / 2, name="signs")
    config = hj.TrainConfig(batch_size=4, epochs=1, loss="hinge_loss", model_options={"widths": [2]})
    with pytest.raises(ValueError, match="Expected labels -1 and 1 with loss=hinge_loss, got"):
        hj.run(config, dataset=wrong, progress=False)


@pytest.mark.ci
def test_a_loss_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import jax, optax\n\ndef smooth(outputs, labels):\n"
        "    targets = optax.losses.smooth_labels(jax.nn.one_hot(labels, outputs.shape[-1]), 0.1)\n"
        "    return optax.losses.softmax_cross_entropy(outputs, targets)\n"
    )
    words = "--epochs 1 --batch-size 64 --model-option widths=[8] --measure-every 9 --quiet"
    for loss in ("multiclass_hinge_loss", "./mine.py:smooth"):
        assert exit_code(f"train {words} --loss {loss} --output out --overwrite") == 0
        assert json.loads((tmp_path / "out/config.json").read_text())["loss"] == loss
        assert exit_code("measure out --batches 1 --overwrite") == 0
    assert exit_code(f"train {words} --loss ./mine.py:smoth --output out --overwrite") == 2
    assert "did you mean 'smooth'?" in capsys.readouterr().err
