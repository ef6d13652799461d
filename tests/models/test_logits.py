"""Networks that return more than logits: the choice among their outputs, in every make, or one line."""

import collections
import re

import chex
import flax
import flax.linen as nn
import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hardjax as hj
from hardjax._validate import Refusal
from hardjax.models import Logits, Seeded, init_variables, make_apply, restore
from hardjax.models.apply import as_apply, is_ours

SHAPE = (6, 6, 1)
IMAGES = jax.random.normal(jax.random.key(0), (5, *SHAPE))
LABELS = jnp.arange(5) % 3
MAKES = ("linen", *foreign.MAKES)
Named = collections.namedtuple("Named", "seen scores")


@flax.struct.dataclass
class Output:
    seen: jax.Array
    scores: jax.Array


# What a network returns, and where its logits are in it.
FORMS = {
    "first of a tuple": (lambda logits, seen: (logits, seen), 0),
    "last of a list": (lambda logits, seen: [seen, {"more": seen}, logits], -1),
    "of a dict": (lambda logits, seen: {"features": seen, "logits": logits}, "logits"),
    "of a named tuple": (lambda logits, seen: Named(seen, logits), "scores"),
    "of a dataclass": (lambda logits, seen: Output(seen, logits), "scores"),
    "deep inside": (
        lambda logits, seen: {"heads": [{"main": logits}], "seen": seen},
        lambda out: out["heads"][0]["main"],
    ),
}


class Linen(nn.Module):
    inner: nn.Module
    form: str

    @nn.compact
    def __call__(self, x, train):
        return FORMS[self.form][0](self.inner(x, train), x)


class Nnx(nnx.Module):
    def __init__(self, inner, form):
        self.inner, self.form = inner, form

    def __call__(self, x):
        return FORMS[self.form][0](self.inner(x), x)


def _equinox(model, form):
    import equinox as eqx

    pack = FORMS[form][0]

    class Stateless(eqx.Module):
        inner: eqx.Module

        def __call__(self, x, key):
            return pack(self.inner(x, key=key), x)

    class Stateful(eqx.Module):
        inner: eqx.Module

        def __call__(self, x, state, key):
            logits, state = self.inner(x, state, key)
            return pack(logits, x), state

    return (Stateful(model[0]), model[1]) if isinstance(model, tuple) else Stateless(model)


def _haiku(transform, form):
    import haiku as hk

    pack = FORMS[form][0]

    def without_state(params, rng, x, **more):
        return pack(transform.apply(params, rng, x, **more), x)

    def with_state(params, state, rng, x, **more):
        logits, state = transform.apply(params, state, rng, x, **more)
        return pack(logits, x), state

    stateful = isinstance(transform, hk.TransformedWithState)
    return transform._replace(apply=with_state if stateful else without_state)


def _functions(pair, form):
    init, inner = pair

    def apply(variables, images, training, key=None):
        out = inner(variables, images, training, key)
        pack = FORMS[form][0]
        return (pack(out[0], images), out[1]) if isinstance(out, tuple) else pack(out, images)

    return init, apply


def _several(kind, form, norm, rate=0.0):
    """(the network of a make that returns several outputs, the same one that returns its logits alone)."""
    if kind in ("equinox", "haiku"):
        pytest.importorskip(kind)
    inner = foreign.make(kind, norm, rate)
    wrap = {"linen": Linen, "nnx": Nnx, "equinox": _equinox, "haiku": _haiku, "functions": _functions}[kind]
    return wrap(inner, form), inner


def _variables(kind, several, inner):
    """Of both networks, the same values."""
    outer = init_variables(several, jax.random.key(1), SHAPE)
    alone = init_variables(inner, jax.random.key(1), SHAPE)
    if kind in ("linen", "nnx", "equinox"):
        assert jax.tree.structure(outer) == jax.tree.structure(_nested(kind, alone))
        outer = _nested(kind, alone)
    return outer, alone


def _nested(kind, variables):
    # Equinox numbers its statistics.
    numbered = kind == "equinox"
    return {
        name: value if not value or (numbered and name == "batch_stats") else {"inner": value}
        for name, value in variables.items()
    }


def _ci(*values):
    return pytest.param(*values, marks=pytest.mark.ci)


CASES = [
    (kind, form, norm)
    for kind in MAKES
    for form in FORMS
    for norm in (True, False)
    if norm or form in ("of a dict", "first of a tuple")
]
QUICK = [("linen", "first of a tuple", True), ("nnx", "of a dict", True), ("functions", "of a dict", False)]


@pytest.mark.parametrize("kind, form, norm", [*QUICK, *(_ci(*case) for case in CASES if case not in QUICK)])
def test_the_chosen_output_is_what_the_network_gives_without_the_others(kind, form, norm):
    several, inner = _several(kind, form, norm)
    apply, bare = make_apply(Logits(several, FORMS[form][1])), make_apply(inner)
    outer, alone = _variables(kind, Logits(several, FORMS[form][1]), inner)
    assert apply.name == make_apply(several).name
    for train in (True, False):
        logits, stats = apply(outer, IMAGES, train, jax.random.key(2))
        expected, after = bare(alone, IMAGES, train, jax.random.key(2))
        chex.assert_trees_all_close(logits, expected, rtol=1e-6, atol=1e-6)
        chex.assert_trees_all_close(jax.tree.leaves(stats), jax.tree.leaves(after), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["first of a tuple", *map(_ci, ("last of a list", "of a dict", "of a named tuple"))])
@pytest.mark.parametrize(
    "kind, norm",
    [("linen", True), ("nnx", True), *(_ci(*c) for c in [*((k, True) for k in MAKES[2:]), ("functions", False)])],
)
def test_without_a_choice_one_line_says_how_to_choose(kind, form, norm):
    several, _ = _several(kind, form, norm)
    with pytest.raises(Refusal) as caught:
        init_variables(several, jax.random.key(0), SHAPE)
    said = str(caught.value)
    place = {"first of a tuple": 0, "last of a list": 2, "of a dict": "logits", "of a named tuple": 1}[form]
    assert said.startswith("Expected logits ")
    assert said.endswith(f": say which they are, hj.models.Logits(model, take={place!r}).")
    assert "\n" not in said and len(said) < 300


class Inception(nn.Module):
    """A second head that only training has."""

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(len(x), -1)
        logits = nn.Dense(3, name="head")(x)
        return {"logits": logits, "helper": nn.Dense(3, name="helper")(x)} if train else logits


@pytest.mark.parametrize("take", ["logits", _ci(lambda out: out["logits"] if isinstance(out, dict) else out)])
def test_heads_that_only_training_has(take):
    with pytest.raises(Refusal, match=re.escape("take='logits' or 'helper').")):
        init_variables(Inception(), jax.random.key(0), SHAPE)
    apply = make_apply(Logits(Inception(), take))
    variables = apply.init(jax.random.key(0), SHAPE)
    assert sorted(variables["params"]) == ["head", "helper"]
    chex.assert_trees_all_equal(apply(variables, IMAGES, True)[0], apply(variables, IMAGES, False)[0])


WRONG = {
    "no such place": (
        ("linen", "first of a tuple"),
        2,
        "Linen to return something at take=2, got tuple of (2, 3), (2, 6,",
    ),
    "no such name": (
        ("nnx", "of a dict"),
        "logit",
        "at take='logit', got dict of features (2, 6, 6, 1), logits (2, 3).",
    ),
    "no such attribute": (
        ("nnx", "of a named tuple"),
        "logits",
        "at take='logits', got Named of (2, 6, 6, 1), (2, 3).",
    ),
    "a name in a tuple": (("nnx", "first of a tuple"), "logits", "Nnx to return something at take='logits', got tuple"),
    "a place in a dict": (("nnx", "of a dict"), 1, "Nnx to return something at take=1, got dict of"),
    "one sample": (("nnx", "of a dict"), lambda out: out["logits"][0], "from Nnx at take=<lambda>, got (3,)."),
    "a fault": (("linen", "of a dict"), lambda out: out["x"], "Linen gives no logits by take: 'x'"),
    "nothing": (("linen", "of a dict"), lambda out: None, "from Linen at take=<lambda>, got NoneType."),
}


@pytest.mark.parametrize("what", [*list(WRONG)[:2], *map(_ci, list(WRONG)[2:])])
def test_a_choice_that_gives_no_logits_is_refused_in_one_line(what):
    (kind, form), take, line = WRONG[what]
    with pytest.raises(Refusal, match=re.escape(line)) as caught:
        init_variables(Logits(_several(kind, form, norm=False)[0], take), jax.random.key(0), SHAPE)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_what_is_no_choice_is_refused_in_one_line():
    for make, line in (
        (lambda: Logits(foreign.Linen(), True), "Expected take=True to be a place, a name, or a function"),
        (lambda: Logits(foreign.Linen(), None), "Expected take=None to be a place"),
        (lambda: make_apply(Logits(foreign.Linen, 0)), "got the class Linen: call it, Linen(...)."),
        (
            lambda: make_apply(Logits(Logits(foreign.Linen(), 0), 0)),
            "Expected one hj.models.Logits around Linen, got two",
        ),
        (lambda: as_apply(Logits(lambda variables, images: images, 0)), "got the function <lambda>: hk.transform it"),
    ):
        with pytest.raises(Refusal, match=re.escape(line)) as caught:
            make()
        assert "\n" not in str(caught.value)


def test_a_network_of_the_zoo_with_a_choice_is_ones_own():
    model = hj.models.create("mlp", widths=(4,), num_classes=3)
    variables = init_variables(model, jax.random.key(0), SHAPE)
    doubled = make_apply(Logits(model, lambda logits: 2 * logits))
    assert is_ours(model) and is_ours(make_apply(model)) and not is_ours(doubled)
    chex.assert_trees_all_close(doubled(variables, IMAGES, True)[0], 2 * make_apply(model)(variables, IMAGES, True)[0])


@pytest.mark.ci
def test_a_network_that_holds_its_weights_is_given_back_as_it_was():
    model = _several("nnx", "of a dict", norm=True)[0]
    chosen = Logits(model, "logits")
    variables = init_variables(chosen, jax.random.key(0), SHAPE)
    again = restore(chosen, variables)
    assert type(again) is Nnx and set(again(IMAGES)) == {"features", "logits"}
    # In either order, and by the seed.
    for seeded in (
        Logits(Seeded(lambda key: Nnx(foreign.Nnx(rngs=nnx.Rngs(key)), "of a dict")), "logits"),
        Seeded(lambda key: Logits(Nnx(foreign.Nnx(rngs=nnx.Rngs(key)), "of a dict"), "logits")),
    ):
        apply = make_apply(seeded)
        one, two = (apply.init(jax.random.key(k), SHAPE) for k in (1, 2))
        assert abs(one["params"]["inner"]["conv"]["kernel"] - two["params"]["inner"]["conv"]["kernel"]).max() > 0.01
        assert apply(one, IMAGES, True)[0].shape == (5, 3) and apply.name == "Nnx" and not apply.starts_alike


@pytest.mark.ci
@pytest.mark.parametrize("kind", MAKES)
def test_runs_and_rows_are_those_of_the_logits_alone(kind, tiny):
    several, inner = _several(kind, "of a dict", norm=True)
    outer, alone = _variables(kind, Logits(several, "logits"), inner)
    chosen = dict(selection=hj.selection.HardBatches(0.5), trimming=hj.trimming.Trimming(end=0.5))
    config = hj.TrainConfig(epochs=2, batch_size=16, learning_rate=0.1, **chosen)
    found = hj.run(config, dataset=tiny, model=Logits(several, "logits"), variables=outer, progress=False)
    expected = hj.run(config, dataset=tiny, model=inner, variables=alone, progress=False)
    np.testing.assert_array_equal(found.replay_counts, expected.replay_counts)
    np.testing.assert_allclose(found.history["test_loss"], expected.history["test_loss"], rtol=1e-5)
    grams = [hj.fisher.gram(m, v, IMAGES, LABELS) for m, v in ((Logits(several, "logits"), outer), (inner, alone))]
    chex.assert_trees_all_close(*grams, rtol=1e-4, atol=1e-4)
