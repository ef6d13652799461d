"""Networks of any make: trained, trimmed, measured and resumed as the same network is elsewhere, or refused."""

import collections
import functools
import re

import chex
import foreign
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from platforms import near

import hardjax as hj
from hardjax._validate import Refusal
from hardjax.data.augment import preprocess, resolve
from hardjax.fisher import check
from hardjax.models import Logits, Seeded, init_variables, make_apply, restore
from hardjax.models.apply import OTHERS, samples_are_independent
from hardjax.study.arms import make_arms
from hardjax.study.compare import compare

SHAPE = (6, 6, 1)
IMAGES = jax.random.normal(jax.random.key(0), (5, *SHAPE))
LABELS = jnp.arange(5) % 3
RUN = dict(epochs=3, batch_size=16, learning_rate=0.1, momentum=0.9)
CHOSEN = dict(selection=hj.selection.HardBatches(0.5), trimming=hj.trimming.Trimming(end=0.5))


def _ci(*values):
    return pytest.param(*values, marks=pytest.mark.ci)


def _made(kind, norm=True, rate=0.0):
    if kind in ("equinox", "haiku"):
        pytest.importorskip(kind)
    return foreign.make(kind, norm, rate)


def _apart(one, other):
    return max(abs(a - b).max() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def _as_linen(kind, params):
    """Parameters of `foreign.Linen` with the values of another make's."""
    if kind == "functions":
        params = {**params, "dense": params["dense"][0], "head": params["dense"][1]}
    names = {"w": "kernel", "weight": "kernel", "b": "bias", "offset": "bias"}
    found = {layer: {names.get(n, n): leaf for n, leaf in leaves.items()} for layer, leaves in params.items()}
    if "norm" in found:
        found["norm"] = {{"kernel": "scale"}.get(n, n): leaf.reshape(4) for n, leaf in found["norm"].items()}
    if kind == "equinox":
        turned = {"conv": (2, 3, 1, 0), "dense": (1, 0), "head": (1, 0)}
        for layer, turn in turned.items():
            found[layer] = {"kernel": found[layer]["kernel"].transpose(turn), "bias": found[layer]["bias"].reshape(-1)}
    return found


@pytest.mark.ci
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kind", foreign.MAKES)
def test_a_run_with_replay_and_trimming_is_that_of_the_same_linen_network(kind, norm, tiny):
    model, config = _made(kind, norm), hj.TrainConfig(**RUN, **CHOSEN)
    start = init_variables(model, jax.random.key(3), SHAPE)
    linen = foreign.Linen(norm)
    same = init_variables(linen, jax.random.key(0), SHAPE) | {"params": _as_linen(kind, start["params"])}
    found = hj.run(config, dataset=tiny, model=model, variables=start, progress=False)
    expected = hj.run(config, dataset=tiny, model=linen, variables=same, progress=False)
    assert (found.replay_counts == expected.replay_counts).all()
    params, wanted = _as_linen(kind, found.state.variables["params"]), expected.state.variables["params"]
    assert (
        max(jnp.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (wanted, same["params"])), strict=True)) > 0.01
    )
    chex.assert_trees_all_close(params, wanted, **near(rtol=1e-3, atol=1e-4))


def _step_of_nnx(model):
    module = nnx.clone(model)
    module.train()
    optimizer = nnx.Optimizer(module, optax.sgd(0.1, 0.9), wrt=nnx.Param)

    def step(images, labels):
        def loss(module):
            return optax.softmax_cross_entropy_with_integer_labels(module(images), labels).mean()

        optimizer.update(module, nnx.grad(loss)(module))
        return module

    return step


def _step_of_equinox(model):
    import equinox as eqx

    # A copy: Equinox lets a state be used once.
    held = [model[0], jax.tree.map(lambda leaf: leaf, model[1])]
    optimizer = optax.sgd(0.1, 0.9)
    held.append(optimizer.init(eqx.filter(held[0], eqx.is_inexact_array)))

    def step(images, labels):
        module, state, moments = held

        def loss(module):
            mapped = jax.vmap(lambda x: module(x, state, None), out_axes=(0, None), axis_name="batch")
            logits, after = mapped(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), after

        gradient, state = eqx.filter_grad(loss, has_aux=True)(module)
        updates, moments = optimizer.update(gradient, moments)
        held[:] = eqx.apply_updates(module, updates), state, moments
        return tuple(held[:2])

    return step


def _step_of_functions(init, apply):
    """Of a pair, and of Haiku's."""
    optimizer = optax.sgd(0.1, 0.9)
    held = [*init, optimizer.init(init[0])]

    def step(images, labels):
        params, stats, moments = held

        def loss(params):
            logits, after = apply(params, stats, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), after

        gradient, stats = jax.grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradient, moments)
        held[:] = optax.apply_updates(params, updates), stats, moments
        return {"params": held[0], "batch_stats": held[1]}

    return step


@pytest.mark.parametrize("kind", ["equinox", _ci("nnx"), _ci("haiku"), _ci("functions")])
def test_a_run_equals_a_loop_written_in_the_framework(kind, tiny):
    """Batches of the whole split, so that their order plays no part."""
    model, variables = _made(kind), None
    config = hj.TrainConfig(epochs=4, batch_size=70, learning_rate=0.1, momentum=0.9)
    if kind == "nnx":
        step = _step_of_nnx(model)
    elif kind == "equinox":
        step = _step_of_equinox(model)
    elif kind == "haiku":
        start = model.init(jax.random.key(3), IMAGES, is_training=True)
        step = _step_of_functions(start, lambda params, state, x: model.apply(params, state, None, x, is_training=True))
        variables = dict(zip(("params", "batch_stats"), start, strict=True))
    else:
        variables = model[0](jax.random.key(3), IMAGES)
        start = variables["params"], variables["batch_stats"]
        step = _step_of_functions(start, lambda p, s, x: model[1]({"params": p, "batch_stats": s}, x, training=True))
    train, augmentation = tiny.train, resolve(config.augmentation, tiny)
    images = preprocess(jnp.asarray(train.images), tiny.mean, tiny.std, augmentation)
    for _ in range(config.epochs):
        expected = step(images, jnp.asarray(train.labels))
    found = hj.run(config, dataset=tiny, model=model, variables=variables, progress=False).state.variables
    if kind == "nnx":
        expected, found = (nnx.state(m, nnx.Any(nnx.Param, nnx.BatchStat)) for m in (expected, restore(model, found)))
    elif kind == "equinox":
        found = restore(model, found)
    arrays = ([leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)] for tree in (found, expected))
    found, expected = map(list, arrays)
    assert len(found) >= 8
    chex.assert_trees_all_close(found, expected, **near(rtol=1e-4, atol=1e-5))


@pytest.mark.parametrize("kind", ["nnx", _ci("equinox"), _ci("haiku"), _ci("functions")])
def test_statistics_and_dropout_move_in_training_and_stand_still_in_testing(kind):
    apply = make_apply(_made(kind, rate=0.5))
    variables = apply.init(jax.random.key(1), SHAPE)
    assert set(variables) == {"params", "batch_stats"}
    logits, after = apply(variables, IMAGES, True, jax.random.key(2))
    again, other = (apply(variables, IMAGES, True, jax.random.key(k))[0] for k in (2, 3))
    tested, kept = apply(variables, IMAGES, False)
    chex.assert_trees_all_equal(kept, variables["batch_stats"])
    chex.assert_trees_all_equal(logits, again)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, variables["batch_stats"])
    assert _apart(after, kept) > 1e-3
    assert abs(logits - other).max() > 1e-3 and abs(logits - tested).max() > 1e-3
    chex.assert_trees_all_equal(tested, apply(variables, IMAGES, False, jax.random.key(3))[0])
    with pytest.raises(Refusal, match="draws random numbers in training: pass key="):
        apply(variables, IMAGES, True)
    # Half of 64 hidden units are dropped, in every sample others.
    alone = make_apply(_made(kind, norm=False, rate=0.5))
    assert not samples_are_independent(alone, alone.init(jax.random.key(1), SHAPE), SHAPE)
    same = jnp.broadcast_to(IMAGES[:1], IMAGES.shape)
    drawn = alone(alone.init(jax.random.key(1), SHAPE), same, True, jax.random.key(2))[0]
    assert jnp.ptp(drawn, axis=0).min() > 1e-3


def _rows(norm, variables, images):
    """By the definition: each sample with parameters of its own, under a named axis; (5, numbers of them)."""
    linen = foreign.Linen(norm, axis="samples" if norm else None)
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(images)), variables["params"])
    stats = {"norm": {"mean": jnp.zeros(4), "var": jnp.ones(4)}} if norm else {}

    def summed(copies):
        def loss(params, image, label):
            given = {"params": params, "batch_stats": stats}
            logits = linen.apply(given, image[None], train=True, mutable=["batch_stats"])[0][0]
            return -jax.nn.log_softmax(logits)[label]

        return jax.vmap(loss, axis_name="samples")(copies, images, LABELS).sum()

    return np.concatenate(
        [np.reshape(leaf, (len(images), -1)) for leaf in jax.tree.leaves(jax.grad(summed)(copies))], 1
    )


@pytest.mark.ci
@pytest.mark.parametrize("method", hj.fisher.METHODS)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kind", foreign.MAKES)
def test_gram_equals_the_definition_in_float64(kind, norm, method):
    model = _made(kind, norm)
    start = init_variables(model, jax.random.key(3), SHAPE)
    assert samples_are_independent(make_apply(model), start, SHAPE) != norm
    hj.fisher.coverage(model, start, IMAGES, LABELS, method=method)
    with jax.enable_x64(True):
        double = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(leaf, jnp.float64))
        variables, images = double(start), double(IMAGES)
        found = hj.fisher.gram(model, variables, images, LABELS, method=method)
        flat = _rows(norm, {"params": _as_linen(kind, variables["params"])}, images)
        np.testing.assert_allclose(found, flat @ flat.T, rtol=1e-9, atol=1e-9 * np.abs(found).max())


@pytest.mark.ci
@pytest.mark.parametrize("kind", foreign.MAKES)
def test_rows_under_dropout_are_those_of_the_masks_of_its_key(kind):
    model, key = _made(kind, norm=False, rate=0.5), jax.random.key(4)
    apply = make_apply(model)
    start = apply.init(jax.random.key(3), SHAPE)
    hj.fisher.coverage(model, start, IMAGES, LABELS, key=key)
    with jax.enable_x64(True):
        variables, images = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (start, IMAGES))

        def loss(params, i):
            logits = apply({**variables, "params": params}, images, True, key)[0]
            return -jax.nn.log_softmax(logits)[i, LABELS[i]]

        rows = jax.lax.map(lambda i: jax.grad(loss)(variables["params"], i), jnp.arange(5))
        flat = np.concatenate([np.reshape(leaf, (5, -1)) for leaf in jax.tree.leaves(rows)], 1)
        for method in hj.fisher.METHODS:
            found = hj.fisher.gram(model, variables, images, LABELS, method=method, key=key)
            np.testing.assert_allclose(found, flat @ flat.T, rtol=1e-9, atol=1e-9 * np.abs(found).max())


@pytest.mark.parametrize("kind, name", [("functions", "network"), _ci("nnx", "Nnx"), _ci("haiku", "network")])
def test_a_refusal_of_rows_calls_a_network_by_its_name(kind, name, monkeypatch):
    monkeypatch.setattr(check, "_CHECKED", collections.OrderedDict())
    model = _made(kind, norm=False)
    variables = init_variables(model, jax.random.key(3), SHAPE)
    with pytest.raises(Refusal, match=f"the rows of {name} have not been compared"):
        jax.jit(hj.fisher.make_gram(model))(variables, IMAGES, LABELS)


@pytest.mark.ci
@pytest.mark.parametrize("kind", foreign.MAKES)
def test_a_run_resumes_everywhere(kind, tiny):
    config = hj.TrainConfig(**(RUN | {"epochs": 2}), **CHOSEN)
    assert hj.testing.assert_resumes_everywhere(config, tiny, model=_made(kind, rate=0.3)) >= 1


@pytest.mark.ci
def test_an_instance_starts_from_its_weights_and_a_seeded_one_from_the_seed():
    held = foreign.make("nnx")
    seeded = Seeded(lambda key: foreign.Nnx(rngs=nnx.Rngs(key)))
    kernels = [
        np.asarray(init_variables(model, jax.random.key(k), SHAPE)["params"]["conv"]["kernel"])
        for model in (held, seeded)
        for k in (1, 1, 2)
    ]
    for kernel in kernels[:3]:
        np.testing.assert_array_equal(kernel, held.conv.kernel[...])
    np.testing.assert_array_equal(kernels[3], kernels[4])
    assert abs(kernels[3] - kernels[5]).max() > 0.01
    drawn = foreign.Nnx(rngs=nnx.Rngs(jax.random.key(2))).conv.kernel[...]
    np.testing.assert_allclose(kernels[5], drawn, rtol=1e-6)


def _seeds(model, tiny, seeds):
    config, arms = hj.TrainConfig(epochs=1, batch_size=35), make_arms((0.5,), ())
    return compare(config, arms, seeds, dataset=tiny, model=model, progress=False)


@pytest.mark.parametrize("kind", ["nnx", _ci("equinox")])
def test_several_seeds_of_a_network_that_starts_alike_with_each_are_no_comparison(kind, tiny):
    for model in (_made(kind), make_apply(_made(kind)), Logits(_made(kind), 0)):
        with pytest.raises(
            Refusal, match=r" holds its weights, from which all 3 seeds .* hj\.models\.Seeded\("
        ) as caught:
            _seeds(model, tiny, 3)
        assert "\n" not in str(caught.value)


@pytest.mark.ci
def test_seeds_of_a_seeded_network_or_of_one_that_starts_alike_on_purpose_are_compared(tiny):
    held = foreign.make("nnx", norm=False)
    alike = Seeded(lambda key: held)
    for model, differs in ((Seeded(lambda key: foreign.Nnx(False, rngs=nnx.Rngs(key))), True), (alike, False)):
        starts = [init_variables(model, jax.random.key(k), SHAPE)["params"]["conv"]["kernel"] for k in (0, 1)]
        assert (abs(starts[0] - starts[1]).max() > 0.01) == differs
        assert len(_seeds(model, tiny, 2).results[0]) == 2
    assert len(_seeds(held, tiny, 1).results[0]) == 1


@pytest.mark.ci
def test_a_module_that_trains_on_later_changes_no_network_made_of_it():
    held = foreign.make("nnx")
    apply, before = make_apply(held), np.asarray(held.conv.kernel[...])
    held.conv.kernel[...] = held.conv.kernel[...] + 1
    held.eval()
    np.testing.assert_array_equal(apply.init(jax.random.key(0), SHAPE)["params"]["conv"]["kernel"], before)


@pytest.mark.ci
def test_a_seeded_equinox_network():
    pytest.importorskip("equinox")
    apply = make_apply(Seeded(lambda key: foreign.equinox(key=key), "Net"))
    assert apply.name == "Net"
    one, two = (apply.init(jax.random.key(k), SHAPE) for k in (1, 2))
    assert abs(one["params"]["conv"]["weight"] - two["params"]["conv"]["weight"]).max() > 0.01
    module, state = restore(apply, two)
    np.testing.assert_array_equal(module.conv.weight, two["params"]["conv"]["weight"])
    assert apply(two, IMAGES, True)[0].shape == (5, 3) and state is not None


class Shift(nnx.Variable):
    pass


class Furnished(nnx.Module):
    """Constants of three kinds, a mode by argument, a layer that reduces over a named axis."""

    def __init__(self, rngs):
        self.head = nnx.Linear(36, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, axis_name="batch", rngs=rngs)
        self.shift, self.scale, self.count = Shift(jnp.ones(3)), jnp.full(3, 2.0), Shift(jnp.int32(7))
        self.helper = nnx.Linear(36, 3, rngs=rngs)

    def __call__(self, x, is_training):
        x = x.reshape(len(x), -1)
        self.sow(nnx.Intermediate, "seen", x)
        logits = self.norm(self.head(x)) * self.scale + self.shift[...]
        return logits + self.helper(x) if is_training else logits


class Counting(Furnished):
    def __call__(self, x, is_training):
        self.count[...] += 1
        return super().__call__(x, is_training)


class Drawing(Furnished):
    """Draws in evaluation as well."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.own = rngs.fork()

    def __call__(self, x, is_training):
        logits = super().__call__(x, is_training)
        return logits + jax.random.normal(self.own.noise(), logits.shape)


class Fixed(Furnished):
    """Frozen by hand, whatever the mode."""

    def __call__(self, x, is_training):
        return self.norm(self.head(x.reshape(len(x), -1)), use_running_average=True)


@pytest.mark.ci
def test_constants_arguments_and_axes_of_nnx():
    model = Furnished(nnx.Rngs(0))
    variables, apply = init_variables(model, jax.random.key(0), SHAPE), make_apply(model)
    others = variables["batch_stats"][OTHERS]
    assert {name: sorted(leaves) for name, leaves in others.items()} == {
        "Shift": ["count", "shift"],
        "constants": ["scale"],
    }
    assert sorted(variables["params"]) == ["head", "helper", "norm"]
    logits, after = apply(variables, IMAGES, True)
    chex.assert_trees_all_equal(after[OTHERS], others)
    assert abs(after["norm"]["mean"]).max() > 1e-4
    flat = IMAGES.reshape(5, -1)
    x = flat @ variables["params"]["head"]["kernel"]
    expected = 2 * (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5) + 1 + flat @ variables["params"]["helper"]["kernel"]
    chex.assert_trees_all_close(logits, expected, **near(rtol=1e-4, atol=1e-4))


def _bare(x):
    return x


def _pair(init=None, apply=None):
    return init or (lambda key, images: {"params": jnp.zeros((36, 3))}), apply or (
        lambda variables, images: images.reshape(len(images), -1) @ variables["params"]
    )


NO_NETWORK = {
    "a class": (Furnished, "got the class Furnished: call it, Furnished(...)."),
    "a Linen class": (foreign.Linen, "got the class Linen: call it, Linen(...)."),
    "a partial": (functools.partial(foreign.Linen, norm=False), "got a partial of Linen: call it."),
    "a function": (_bare, "got the function _bare: hk.transform it, or give the pair (init, apply)."),
    "a number": (3, "got 3."),
    "a name": ("mlp", "got 'mlp'."),
    "three functions": ((_bare, _bare, _bare), "got (<function _bare"),
    "a pair of no functions": ((1, 2), "got (1, 2)."),
    "streams": (nnx.Rngs(0), "got Rngs("),
    "a seeded function": (Seeded(lambda key: 3, "Three"), "Expected Three to make a network ("),
    "a seeded Linen module": (Seeded(lambda key: foreign.Linen()), "Linen draws its weights by the seed as it is"),
    "a seeded fault": (Seeded(lambda key: foreign.Nnx(rngs=3), "Net"), "Net cannot be made: "),
}


@pytest.mark.parametrize("what", NO_NETWORK)
def test_what_is_no_network_is_refused_in_one_line(what):
    model, line = NO_NETWORK[what]
    with pytest.raises(Refusal, match=re.escape(line)) as caught:
        make_apply(model)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


NOT_UNDERSTOOD = {
    "a collection that changes": (lambda: Counting(nnx.Rngs(0)), "changes its collection 'Shift' in training"),
    "random numbers in evaluation": (lambda: Drawing(nnx.Rngs(0)), "draws random numbers or moves its statistics in"),
    "frozen statistics": (lambda: Fixed(nnx.Rngs(0)), "has batch statistics and a training pass leaves them as they"),
    "init of parameters alone": (
        lambda: _pair(lambda key, images: [jnp.zeros(3)]),
        """to give {"params": ..., "batch_stats": ...}, got 'list'.""",
    ),
    "other collections": (
        lambda: _pair(lambda key, images: {"params": 0.0, "state": 0.0}),
        "got ['params', 'state']",
    ),
    "extras for statistics": (
        lambda: _pair(apply=lambda variables, images: (jnp.zeros((len(images), 3)), images)),
        "got 2 outputs: say which they are, hj.models.Logits(model, take=0).",
    ),
    "statistics of another shape": (
        lambda: _pair(
            lambda key, images: {"params": {}, "batch_stats": {"mean": jnp.zeros(3)}},
            lambda variables, images, train: (
                jnp.zeros((len(images), 3)),
                {"mean": images.mean(0)} if train else variables["batch_stats"],
            ),
        ),
        "gives other batch statistics than it takes",
    ),
    "an argument that nothing gives": (
        lambda: _pair(apply=lambda variables, images, temperature: images),
        "missing 1 required positional argument: 'temperature'",
    ),
    "no logits": (
        lambda: _pair(apply=lambda variables, images: {"logits": images}),
        "got dict of logits (2, 6, 6, 1): say which they are",
    ),
    "a whole number for a parameter": (
        lambda: _pair(
            lambda key, images: {"params": {"w": jnp.zeros(3), "n": [jnp.int32(3)]}}, lambda v, images: images
        ),
        "Expected floating-point parameters from <lambda>, got int32 at n/0.",
    ),
    "extras beside statistics": (
        lambda: (foreign.functions()[0], lambda v, x, training: (*foreign.functions()[1](v, x, training), x)),
        "got 3 outputs: under hj.models.Logits give (outputs, new batch_stats).",
    ),
}


class Halved(nnx.Module):
    def __init__(self, rngs):
        half = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs)
        self.norm, self.head = nnx.BatchNorm(36, **half), nnx.Linear(36, 3, **half)

    def __call__(self, x):
        return self.head(self.norm(x.reshape(len(x), -1)))


@pytest.mark.ci
def test_parameters_that_a_network_stores_in_half_precision_are_trained_in_float32(tiny):
    pair = _pair(
        lambda key, images: {"params": jnp.full((36, 3), 0.01, jnp.bfloat16)},
        lambda variables, images: images.reshape(len(images), -1).astype(jnp.bfloat16) @ variables["params"],
    )
    for model in (Halved(nnx.Rngs(0)), pair):
        result = hj.run(hj.TrainConfig(**RUN), dataset=tiny, model=model, progress=False)
        assert {leaf.dtype for leaf in jax.tree.leaves(result.state.variables)} == {jnp.dtype("float32")}
        assert result.summary["final_test_top1"] > 50


@pytest.mark.ci
@pytest.mark.parametrize("what", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_refused_in_one_line(what, tiny):
    make, line = NOT_UNDERSTOOD[what]
    with pytest.raises(Refusal, match=re.escape(line)) as caught:
        hj.run(hj.TrainConfig(**RUN), dataset=tiny, model=make(), progress=False)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", ["nnx", *map(_ci, ("linen", "equinox", "haiku", "functions"))])
def test_variables_that_are_none_of_the_networks_are_refused_in_one_line(kind):
    apply = make_apply(_made(kind))
    variables = apply.init(jax.random.key(0), SHAPE)
    given = 'Expected variables {"params": ..., "batch_stats": ...}, got '
    for wrong, line in (
        ([1], f"{given}list."),
        (variables["params"], f"{given}['conv', 'dense', "),
        ({"batch_stats": variables["batch_stats"]}, given),
        (
            {"params": {"other": jnp.zeros(3)}},
            {"nnx": "Expected params/conv/bias among the variables"}.get(kind, " "),
        ),
        ({"params": variables["params"]}, "Expected batch_stats/" if kind in ("nnx", "equinox") else " "),
    ):
        for call in (lambda v=wrong: apply(v, IMAGES, False), lambda v=wrong: hj.fisher.gram(apply, v, IMAGES, LABELS)):
            with pytest.raises(Refusal, match=re.escape(line)) as caught:
                call()
            assert "\n" not in str(caught.value)


@pytest.mark.ci
def test_of_equinox_what_is_refused():
    eqx = pytest.importorskip("equinox")
    module, state = foreign.equinox()
    used = foreign.equinox()
    jax.vmap(lambda x: used[0](x, used[1], None), axis_name="batch", out_axes=(0, None))(IMAGES)

    class Plain(eqx.Module):
        head: eqx.nn.Linear

        def __call__(self, x):
            return self.head(x)

    for model, line in (
        (module, "Stateful has state of its own: pass the pair that eqx.nn.make_with_state gives."),
        ((module, 3), "Stateful( conv="),
        (used, "Stateful cannot be read: Attempted to use old state."),
        (Plain(eqx.nn.Linear(36, 3, key=jax.random.key(0))), "Plain cannot be called with one image (H, W, C): "),
        (type(module), "got the class Stateful: call it, Stateful(...)."),
    ):
        with pytest.raises(Refusal, match=re.escape(line)) as caught:
            init_variables(model, jax.random.key(0), SHAPE)
        assert "\n" not in str(caught.value)
    assert make_apply((module, state)).name == "Stateful"


@pytest.mark.ci
def test_of_haiku_what_is_refused():
    hk = pytest.importorskip("haiku")

    def always(x):
        return hk.dropout(hk.next_rng_key(), 0.5, hk.Linear(3)(x.reshape(len(x), -1)))

    def frozen(x):
        return hk.Linear(3)(hk.BatchNorm(True, True, 0.9)(x, is_training=True).reshape(len(x), -1))

    several = hk.multi_transform(lambda: (lambda x: x, (lambda x: x, lambda x: x)))
    for model, line in (
        (several, "Expected a Haiku transform of one function, got one of several"),
        (hk.transform, "got the function transform: hk.transform it"),
        (hk.transform(always), "always draws random numbers or moves its statistics in evaluation"),
        (hk.transform_with_state(frozen), "frozen draws random numbers or moves its statistics in evaluation"),
        (hk.transform(frozen), "frozen cannot be called: "),
    ):
        with pytest.raises(Refusal, match=re.escape(line)) as caught:
            init_variables(model, jax.random.key(0), SHAPE)
        assert "\n" not in str(caught.value)


@pytest.mark.ci
def test_haiku_without_keys_without_a_mode_and_over_a_named_axis():
    hk = pytest.importorskip("haiku")

    def network(x, is_training):
        x = hk.BatchNorm(True, True, 0.9, cross_replica_axis="devices")(x, is_training)
        return hk.Linear(3)(x.reshape(len(x), -1))

    apply = make_apply(hk.without_apply_rng(hk.transform_with_state(network)))
    variables = apply.init(jax.random.key(0), SHAPE)
    assert apply(variables, IMAGES, True)[0].shape == (5, 3)
    plain = make_apply(hk.without_apply_rng(hk.transform(lambda x: hk.Linear(3)(x.reshape(len(x), -1)))))
    assert plain(plain.init(jax.random.key(0), SHAPE), IMAGES, False)[0].shape == (5, 3)
    with pytest.raises(Refusal, match="Expected a network that holds its weights"):
        restore(plain, variables)
