"""The fast Gram matrices against the definitions, and everything that must not pass in silence."""

import collections
import doctest
import importlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hardjax import fisher
from hardjax.choose import losses
from hardjax.fisher import by_uses, check, executables, layouts, rules
from hardjax.fisher.unchecked import make_unchecked
from hardjax.models.apply import init_variables, make_apply

LOSS = losses.resolve(losses.CROSS_ENTROPY)

# float64 sums of up to a few thousand terms, in different orders.
RELATIVE = 1e-9
gram_module = importlib.import_module("hardjax.fisher.gram")


class Mixed(nn.Module):
    """Every kind of layer, batch statistics, and a convolution and a dense layer that are called twice."""

    @nn.compact
    def __call__(self, x, train):
        def norm():
            return nn.BatchNorm(use_running_average=not train)

        x = nn.relu(norm()(nn.Conv(4, (3, 3), 2, padding=1)(x)))
        twice = nn.Conv(4, (3, 3), feature_group_count=2, name="twice")
        x = nn.GroupNorm(2)(twice(nn.relu(twice(x))))
        x = nn.relu(norm()(nn.Conv(4, (3, 3), feature_group_count=4, kernel_dilation=2, use_bias=False)(x)))
        x = nn.LayerNorm()(x.reshape(len(x), -1, 4))
        again = nn.Dense(4, name="again")
        x = norm()(again(nn.tanh(again(x))).mean(1))
        return nn.Dense(3)(nn.relu(x))


class Small(nn.Module):
    """A convolution, batch statistics and a dense layer called twice: quick to compile."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(3, (3, 3))(x)))
        twice = nn.Dense(3, name="twice")
        return nn.Dense(3)(nn.tanh(twice(nn.tanh(twice(x.mean((1, 2)))))))


class Plain(nn.Module):
    """No coupling of samples, and no `train` argument."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3)(nn.LayerNorm()(x.mean((1, 2))))


def _setting(model, batch=6, seed=0, dtype=np.float64, classes=3):
    """Variables with every entry random (scales and statistics too), images and labels, in NumPy."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(batch, 6, 6, 2)).astype(dtype)
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), images.shape[1:]))

    def fill(path, leaf):
        value = rng.normal(size=leaf.shape) * 0.5
        return (1 + value**2 if "var" in str(path[-1]) else value).astype(dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes), images, np.arange(batch) % classes


def _rules(model, rows="contribution", *, method="layers", chunk=None, by_parameter=False):
    """`make_gram` without the check of a network that no test has seen: these are the tests."""
    return make_unchecked(model, LOSS, rows, method, chunk, by_parameter)


def _close(actual, expected, relative=RELATIVE):
    np.testing.assert_allclose(actual, expected, rtol=relative, atol=relative * np.abs(expected).max())


def _double(fn, *args, **options):
    """`fn` compiled as one program in float64, NumPy out."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(lambda *args: fn(*args, **options))(*args))


@pytest.mark.parametrize("rows", ["contribution", "frozen"])
def test_layers_equal_the_definition(rows):
    setting = _setting(Mixed())
    slow = _double(_rules(Mixed(), rows, method="vmap", by_parameter=True), *setting)
    fast = _double(_rules(Mixed(), rows, by_parameter=True), *setting)
    assert fast.keys() == slow.keys()
    for name, gram in slow.items():
        _close(fast[name], gram)


@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_layers_add_up_in_one_sink(chunk):
    setting = _setting(Small())
    _close(
        _double(_rules(Small(), chunk=chunk), *setting),
        _double(_rules(Small(), method="vmap"), *setting),
    )


def test_coupled_rows_are_the_jacobian_of_the_losses():
    variables, images, labels = setting = _setting(Small())

    def losses(params):
        logits = make_apply(Small())({**variables, "params": params}, images, True)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    jacobian = _double(jax.jacrev(losses), variables["params"])
    flat = np.concatenate([leaf.reshape(6, -1) for leaf in jax.tree.leaves(jacobian)], 1)
    for chunk in (None, 4):
        _close(_double(_rules(Small(), "coupled", chunk=chunk), *setting), flat @ flat.T)


@pytest.mark.parametrize("rows, train", [("contribution", True), ("coupled", True), ("frozen", False)])
def test_rows_add_up_to_the_gradient(rows, train):
    variables, images, labels = setting = _setting(Small())

    def summed(params):
        logits = make_apply(Small())({**variables, "params": params}, images, train)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    if rows != "coupled":
        fisher.coverage(Small(), *setting, rows)
    jacobian = _double(lambda *setting: fisher.jacobian(Small(), *setting, rows), *setting)
    grads = _double(jax.grad(summed), variables["params"])
    # One scale for all: the bias of a convolution under batch norm has rows that are rounding alone.
    scale = max(np.abs(row).max() for row in jacobian.values())
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        row = jacobian["/".join(key.key for key in path)]
        np.testing.assert_allclose(row.sum(0), grad, rtol=RELATIVE, atol=RELATIVE * scale)


def test_the_definitions_differ_under_batch_norm_and_agree_without():
    apart = [np.trace(_double(_rules(Small(), rows), *_setting(Small()))) for rows in fisher.ROWS]
    same = [_double(_rules(Plain(), rows), *_setting(Plain())) for rows in fisher.ROWS]
    assert min(abs(apart[i] / apart[j] - 1) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3
    _close(same[1], same[0])
    _close(same[2], same[0])


def test_a_scale_of_zero_still_has_its_row():
    variables, images, labels = _setting(Small())
    variables["params"]["BatchNorm_0"]["scale"][:] = 0
    fast, slow = (
        _double(_rules(Small(), method=method, by_parameter=True), variables, images, labels)
        for method in ("layers", "vmap")
    )
    _close(fast["BatchNorm_0/scale"], slow["BatchNorm_0/scale"])
    assert np.trace(fast["BatchNorm_0/scale"]) > 0


@pytest.mark.parametrize("axis", [1, (1, 3)])
def test_batch_norm_over_other_axes(axis):
    class Other(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train, axis=axis)(x)
            return nn.Dense(3)(jnp.tanh(x).reshape(len(x), -1))

    setting = _setting(Other())
    _close(*(_double(_rules(Other(), method=method), *setting) for method in ("layers", "vmap")))


def test_inside_jit_scan_and_vmap():
    variables, images, labels = setting = _setting(Small(), dtype=np.float32)
    alone = fisher.gram(Small(), *setting)
    fn = fisher.make_gram(make_apply(Small()))  # `gram` has compared the rows

    def body(variables, batch):
        gram = fn(variables, *batch)
        return jax.tree.map(lambda leaf: leaf * 1.0, variables), gram

    batches = (np.stack([images, images[::-1]]), np.stack([labels, labels[::-1]]))
    after, grams = jax.jit(lambda *args: jax.lax.scan(body, *args))(variables, batches)
    jax.tree.map(np.testing.assert_array_equal, after, variables)
    _close(grams[0], alone, 1e-4)
    _close(grams[1], alone[::-1, ::-1], 1e-4)
    population = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), variables)
    _close(jax.jit(jax.vmap(fn, (0, None, None)))(population, images, labels)[1], alone, 1e-4)


def test_checkpointed_layers():
    class Checkpointed(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.remat(nn.Conv)(4, (3, 3), name="conv")(x))
            return nn.Dense(3)(x.mean((1, 2)))

    setting = _setting(Checkpointed())
    _close(*(_double(_rules(Checkpointed(), method=method), *setting) for method in ("layers", "vmap")))


def test_rank_promotion_and_dropout():
    setting = _setting(Dropped())
    with jax.numpy_rank_promotion("raise"):
        grams = [fisher.gram(Dropped(), *setting, key=jax.random.key(seed)) for seed in (1, 1, 2)]
        fisher.gram(Small(), *_setting(Small()))
    np.testing.assert_array_equal(grams[0], grams[1])
    assert not np.allclose(grams[0], grams[2])


def test_mixed_precision_accumulates_in_float32():
    class Half(nn.Module):
        dtype: jnp.dtype

        @nn.compact
        def __call__(self, x, train):
            x = nn.Conv(8, (3, 3), dtype=self.dtype)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(x))
            return nn.Dense(3, dtype=self.dtype)(x.mean((1, 2)))

    setting = _setting(Half(jnp.float32), dtype=np.float32)
    half, full = (fisher.gram(Half(dtype), *setting) for dtype in (jnp.bfloat16, jnp.float32))
    assert half.dtype == jnp.float32
    _close(half, full, 0.05)  # eight bits of mantissa through four layers
    assert max(fisher.coverage(Half(jnp.bfloat16), *setting, tolerance=0.05).values()) > 0


@pytest.mark.parametrize("rows", ["contribution", "frozen"])
def test_coverage_passes(rows):
    errors = fisher.coverage(Small(), *_setting(Small(), dtype=np.float32), rows)
    assert len(errors) == 8
    assert max(errors.values()) < 1e-5


def _broken(method):
    """A rule whose rows, or products of rows, are a little off for one sample."""

    def fn(self, ins, cotangents, *chunk):
        found = method(self, ins, cotangents, *chunk)
        rows = found if isinstance(found, list) else [found]
        rows = [row * jnp.where(jnp.arange(len(row)) == 1, 1.1, 1).reshape(-1, *[1] * (row.ndim - 1)) for row in rows]
        return rows if isinstance(found, list) else rows[0]

    return fn


class Various(nn.Module):
    """A use for every rule."""

    @nn.compact
    def __call__(self, x, train):
        normal, ones = nn.initializers.normal(1), nn.initializers.ones
        table, gain = self.param("table", normal, (7, 4)), self.param("gain", ones, (4,))
        tokens = jnp.take(table, jnp.abs(x[:, :3, 0, 0] * 3).astype(int) % 7, axis=0)
        place = jnp.broadcast_to(self.param("place", normal, (3, 4)), tokens.shape)
        kept = jnp.einsum("btc,c->bt", jnp.tanh(tokens + jnp.sin(place)), gain)
        kept = kept + jnp.tile(self.param("line", normal, (1, 3)), (len(x), 1))
        x = nn.relu(nn.Conv(3, (3, 3), use_bias=False)(x)).mean((1, 2))
        x = nn.Dense(3, use_bias=False)(jnp.concatenate([x, kept], 1))
        return x * self.param("scale", ones, (3,))


BREAKABLE = ["Product", "Convolution", "Broadcast", "Elementwise", "Lookup", "Whole"]


def test_a_network_with_a_use_for_every_rule():
    variables, images, labels = _setting(Various(), dtype=np.float32)
    problem = by_uses.problem(make_apply(Various()), LOSS, variables, images, labels, None, True)
    assert {type(use.rule).__name__ for use in problem.uses} == set(BREAKABLE)
    assert max(fisher.coverage(Various(), variables, images, labels).values()) < 1e-5


@pytest.mark.parametrize("method", ["rows", "gram"])
@pytest.mark.parametrize("name", BREAKABLE)
def test_a_rule_that_is_wrong_is_noticed(monkeypatch, name, method):
    setting, rule = _setting(Various(), dtype=np.float32), getattr(rules, name)
    monkeypatch.setattr(rule, method, _broken(getattr(rule, method)))
    with pytest.raises(ValueError, match="rows are not those of the gradient of Various"):
        fisher.coverage(Various(), *setting)


@pytest.mark.parametrize("method", ["rows", "gram"])
@pytest.mark.parametrize("name", ["Product", "Convolution", "Elementwise"])
def test_a_rule_that_is_wrong_is_noticed_under_batch_norm(monkeypatch, name, method):
    setting, rule = _setting(Small(), dtype=np.float32), getattr(rules, name)
    monkeypatch.setattr(rule, method, _broken(getattr(rule, method)))
    with pytest.raises(ValueError, match="rows are not those of the gradient of Small"):
        fisher.coverage(Small(), *setting)


@pytest.mark.parametrize("model", [Various(), Small()], ids=lambda model: type(model).__name__)
def test_a_use_left_out_is_noticed(monkeypatch, model):
    setting, original = _setting(model, dtype=np.float32), by_uses._tapped

    def without(problem, use, emit, found, *rest):
        name = "kernel" if use.params[0].startswith("Conv_0") else ""
        return found if name else original(problem, use, emit, found, *rest)

    monkeypatch.setattr(by_uses, "_tapped", without)
    # What was compared is known by the network, and not by rules, which nobody changes but this test.
    monkeypatch.setattr(check, "_CHECKED", collections.OrderedDict())
    with pytest.raises(ValueError, match="Conv_0"):
        fisher.gram(model, *setting, chunk=5)


@pytest.mark.parametrize("wrong", ["reversed", "next axis"])
def test_a_batch_sought_in_the_wrong_place_is_noticed(monkeypatch, wrong):
    """The analysis itself broken, on which rows and copies both rest: what they add up to, or the order, is off."""
    original = layouts.front

    def front(value, layout):
        found = original(value, layout)
        return found[::-1] if wrong == "reversed" else jnp.roll(found, 1, 0)

    for module in ("convolutions", "lookup", "products", "spread", "whole"):
        monkeypatch.setattr(f"hardjax.fisher.rules.{module}.front", front)
    for model in (Plain(), Small()):
        with pytest.raises(ValueError, match="rows are not those of the gradient"):
            fisher.coverage(model, *_setting(model, dtype=np.float32))


@nn.jit
class Inside(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x)


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(nn.relu(Inside(name="inside")(x.reshape(len(x), -1))))


class Mapped(nn.Module):
    """A dense layer mapped over the second axis, its parameters shared."""

    @nn.compact
    def __call__(self, x, train):
        mapped = nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False}, in_axes=1, out_axes=1)
        return nn.Dense(3)(jnp.tanh(mapped(4, name="inside")(x.reshape(len(x), 6, -1))).mean(1))


class Looped(nn.Module):
    """A dense layer applied three times by nn.scan, its parameters shared."""

    @nn.compact
    def __call__(self, x, train):
        loop = nn.scan(
            lambda module, carry, _: (jnp.tanh(module(carry)), None),
            variable_broadcast="params",
            split_rngs={"params": False},
            length=3,
        )
        return nn.Dense(3)(loop(nn.Dense(4, name="inside"), x.reshape(len(x), -1)[:, :4], None)[0])


class Coupled(nn.Module):
    """Samples coupled by no layer that is known."""

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(len(x), -1)
        return nn.Dense(3)(x - x.mean(0, keepdims=True))


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(8)(x.reshape(len(x), -1))))
        return nn.Dense(3)(x)


def test_samples_coupled_by_no_layer_that_is_known_are_right():
    """The mean over the batch is taken away: of the first layer's rows, and not of the gradient's definition."""
    variables, images, labels = _setting(Coupled())
    flat = images.reshape(6, -1)
    centred = flat - flat.mean(0)

    def logits(params):
        return centred @ params["kernel"] + params["bias"]

    with jax.enable_x64(True):
        d = np.asarray(jax.nn.softmax(logits(variables["params"]["Dense_0"]))) - np.eye(3)[labels]
    expected = (centred @ centred.T + 1) * (d @ d.T)
    for method in fisher.METHODS:
        _close(_double(_rules(Coupled(), method=method), variables, images, labels), expected)
    assert max(fisher.coverage(Coupled(), *_setting(Coupled(), dtype=np.float32)).values()) < 1e-5


def test_the_definition_draws_the_masks_of_the_whole_batch():
    setting, key = _setting(Dropped(), dtype=np.float32), jax.random.key(1)
    _close(*(fisher.gram(Dropped(), *setting, method=method, key=key) for method in fisher.METHODS), 1e-5)


def test_plan_names_every_layer():
    layers = {layer.name: layer for layer in fisher.plan(Mixed(), *_setting(Mixed())[:2])}
    assert list(layers)[:3] == ["Conv_0", "BatchNorm_0", "twice"]
    assert layers["twice"].calls == 2 and layers["twice"].form == "rows"
    assert layers["Conv_0"].row_bytes == 6 * 72 * 4
    assert layers["Dense_0"].form == "pairs"


class Scaled(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(x.reshape(len(x), -1)) * self.param("gain", nn.initializers.ones, (3,))


class Doubled(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return 2 * nn.Dense.__call__(self, x.reshape(len(x), -1))


class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.SpectralNorm(nn.Dense(3))(x.reshape(len(x), -1), update_stats=train)


class Folded(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(x.reshape(-1, 2)).reshape(len(x), -1, 3).mean(1)


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        twice = nn.scan(
            lambda module, carry, _: (module(carry), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        return twice(nn.Dense(3), x.reshape(len(x), -1)[:, :3], None)[0]


@pytest.mark.parametrize(
    "model",
    [Scaled(), Doubled(3), Spectral(), Folded(), Stacked(), Jitted(), Mapped(), Looped()],
    ids=lambda value: type(value).__name__,
)
def test_what_no_list_of_layers_covers(model):
    variables, images, labels = setting = _setting(model)

    def loss(params, i):
        logits = make_apply(model)({**variables, "params": params}, images, True)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)[i]

    rows = _double(lambda params: jax.lax.map(lambda i: jax.grad(loss)(params, i), jnp.arange(6)), variables["params"])
    flat = np.concatenate([leaf.reshape(6, -1) for leaf in jax.tree.leaves(rows)], 1)
    for chunk in (None, 2):
        _close(_double(_rules(model, chunk=chunk), *setting), flat @ flat.T)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": "frosen"}, "Unknown rows 'frosen'; did you mean 'frozen'?"),
        ({"method": "loop"}, "Unknown method 'loop'"),
        ({"chunk": 0}, "Expected chunk=0 to be a whole number of at least 1."),
        ({"method": "vmap", "chunk": 2}, 'Expected chunk=None with method="vmap"'),
        ({"labels": np.array([0, 1, 2, 3, 0, 1])}, "Expected labels in 0..2, got 0..3."),
        ({"labels": np.array([0, 1, 2, -1, 0, 1])}, "Expected labels in 0..2, got -1..2."),
        (
            {"labels": np.zeros(6)},
            "Expected integer classes as labels with loss=softmax_cross_entropy_with_integer_labels, got float32",
        ),
        ({"labels": np.zeros(5, int)}, "Expected images (B, ...) and labels (B, ...), got (6, 6, 6, 2) and (5,)."),
        ({"images": np.zeros((1, 6, 6, 2)), "labels": np.zeros(1, int)}, "Expected at least 2 images, got 1"),
    ],
)
def test_bad_input_is_one_line(change, message):
    names = ("variables", "images", "labels")
    settings = dict(zip(names, _setting(Plain(), dtype=np.float32), strict=True)) | change
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        fisher.gram(Plain(), **settings)
    assert "\n" not in str(caught.value)


def test_labels_out_of_range_and_diverged_losses_are_nan_in_compiled_code():
    variables, images, labels = _setting(Plain(), dtype=np.float32)
    fn = jax.jit(_rules(Plain()))
    assert np.isnan(fn(variables, images, labels + 1)).any()
    assert np.isnan(fisher.eigenvalues(fn(variables, images * np.inf, labels))).all()


def test_out_of_memory_says_what_to_set(monkeypatch):
    def exhausted(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    monkeypatch.setattr(executables, "compiled", lambda *args: exhausted)
    with pytest.raises(MemoryError, match=r"B=6 images \(largest layer Conv_0: 0 MiB of rows\): set chunk=1 "):
        fisher.gram(Plain(), *_setting(Plain(), dtype=np.float32))
    with pytest.raises(MemoryError, match='take method="layers" or a smaller batch'):
        fisher.gram(Plain(), *_setting(Plain(), dtype=np.float32), method="vmap")
    with pytest.raises(MemoryError, match="chunk=1 is the least; measure a smaller batch than 6"):
        fisher.gram(Plain(), *_setting(Plain(), dtype=np.float32), chunk=1)


def test_the_documented_example_runs():
    results = doctest.testmod(gram_module)
    assert results.attempted > 0 and results.failed == 0
