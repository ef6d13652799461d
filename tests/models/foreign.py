"""One network in every make, for the tests of the adapters: convolution, batch norm, dropout, two dense layers.

Each takes `norm` (batch norm or none) and `rate` (of dropout), and images (H, W, C) = (6, 6, 1) of three classes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

MAKES = ("nnx", "equinox", "haiku", "functions")
_CONV = ("NHWC", "HWIO", "NHWC")


class Linen(nn.Module):
    norm: bool = True
    rate: float = 0.0
    axis: str | None = None  # that its statistics are reduced over

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), padding="VALID", name="conv")(x)
        if self.norm:
            x = nn.BatchNorm(not train, momentum=0.9, axis_name=self.axis, name="norm")(x)
        x = nn.Dropout(self.rate, deterministic=not train)(nn.relu(x).reshape(len(x), -1))
        return nn.Dense(3, name="head")(nn.tanh(nn.Dense(8, name="dense")(x)))


class Nnx(nnx.Module):
    def __init__(self, norm=True, rate=0.0, *, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), padding="VALID", rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs) if norm else None
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.dense, self.head = nnx.Linear(64, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.conv(x)
        x = x if self.norm is None else self.norm(x)
        return self.head(nnx.tanh(self.dense(self.dropout(nnx.relu(x).reshape(len(x), -1)))))


def equinox(norm=True, rate=0.0, *, key=None):
    """A module, or the pair of module and state where it has batch norm."""
    import equinox as eqx

    class Equinox(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.BatchNorm | None
        dropout: eqx.nn.Dropout
        dense: eqx.nn.Linear
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.conv = eqx.nn.Conv2d(1, 4, 3, key=keys[0])
            self.norm = eqx.nn.BatchNorm(4, "batch", momentum=0.9, mode="batch") if norm else None
            self.dropout = eqx.nn.Dropout(rate)
            self.dense, self.head = eqx.nn.Linear(64, 8, key=keys[1]), eqx.nn.Linear(8, 3, key=keys[2])

        def _after(self, x, key):
            x = self.dropout(jax.nn.relu(x).transpose(1, 2, 0).ravel(), key=key)
            return self.head(jnp.tanh(self.dense(x)))

    class Stateful(Equinox):
        def __call__(self, x, state, key):
            x, state = self.norm(self.conv(x.transpose(2, 0, 1)), state)
            return self._after(x, key), state

    class Stateless(Equinox):
        def __call__(self, x, *, key):
            return self._after(self.conv(x.transpose(2, 0, 1)), key)

    key = jax.random.key(1) if key is None else key
    return eqx.nn.make_with_state(Stateful)(key) if norm else Stateless(key)


def haiku(norm=True, rate=0.0):
    import haiku as hk

    def network(x, is_training):
        x = hk.Conv2D(4, 3, padding="VALID", name="conv")(x)
        if norm:
            x = hk.BatchNorm(True, True, 0.9, name="norm")(x, is_training)
        x = jax.nn.relu(x).reshape(len(x), -1)
        if is_training and rate:
            x = hk.dropout(hk.next_rng_key(), rate, x)
        return hk.Linear(3, name="head")(jnp.tanh(hk.Linear(8, name="dense")(x)))

    return hk.transform_with_state(network) if norm else hk.transform(network)


def functions(norm=True, rate=0.0):
    """(init, apply); dense layers in a list, as such networks often have them."""

    def init(key, images):
        keys = jax.random.split(key, 3)
        shapes = [(3, 3, 1, 4), (64, 8), (8, 3)]
        drawn = [jax.nn.initializers.lecun_normal()(k, s) for k, s in zip(keys, shapes, strict=True)]
        dense = [{"w": w, "b": jnp.zeros(w.shape[1])} for w in drawn[1:]]
        params = {"conv": {"w": drawn[0], "b": jnp.zeros(4)}, "dense": dense}
        if not norm:
            return {"params": params}
        params["norm"] = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
        return {"params": params, "batch_stats": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}

    def network(variables, images, training, key=None):
        params, stats = variables["params"], variables.get("batch_stats")
        x = jax.lax.conv_general_dilated(images, params["conv"]["w"], (1, 1), "VALID", dimension_numbers=_CONV)
        x = x + params["conv"]["b"]
        if norm:
            used = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))} if training else stats
            x = (x - used["mean"]) * jax.lax.rsqrt(used["var"] + 1e-5)
            x = x * params["norm"]["scale"] + params["norm"]["bias"]
            stats = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, stats, used) if training else stats
        x = jax.nn.relu(x).reshape(len(x), -1)
        if training and rate:
            x = jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)
        first, last = params["dense"]
        logits = jnp.tanh(x @ first["w"] + first["b"]) @ last["w"] + last["b"]
        return (logits, stats) if norm else logits

    return init, network


def make(kind, norm=True, rate=0.0):
    """The network of a kind; of NNX and Equinox with weights of its own."""
    if kind == "linen":
        return Linen(norm, rate)
    if kind == "nnx":
        return Nnx(norm, rate, rngs=nnx.Rngs(1))
    return {"equinox": equinox, "haiku": haiku, "functions": functions}[kind](norm, rate)
