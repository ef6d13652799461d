"""Small networks of pure functions, built from pieces of public networks: tokens (B, T, C) in, tokens out.

A piece sees other samples only through `mean`, the mean over the batch, and its place in the batch through `mean.own`:
so the very code also runs one sample at a time, each with parameters of its own, under a named axis. That is the
definition of contribution rows.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

TOKENS = CHANNELS = SAMPLES = 4  # no length tells the axes apart
NUMBERS = ("NWC", "WIO", "NWC")


class Together:
    """The whole batch in one program."""

    key = jax.random.key(5)

    def __call__(self, x):
        return x.mean(0, keepdims=True)

    def in_pairs(self, fn, x):
        """`fn` of neighbours two by two and of what takes the mean over tokens of a pair."""
        return fn(x.reshape(-1, 2, *x.shape[1:]), lambda v: v.mean((1, 2), keepdims=True)).reshape(x.shape)

    def own(self, draw, x):
        """What is drawn for each sample."""
        return draw(len(x))


class Alone(Together):
    """One sample in each of many programs, `samples` their axis."""

    def __call__(self, x):
        return lax.pmean(x.mean(0, keepdims=True), "samples")

    def in_pairs(self, fn, x):
        def mean(v):
            pairs = lax.all_gather(v.mean((0, 1)), "samples").reshape(-1, 2, CHANNELS).mean(1)
            return pairs[lax.axis_index("samples") // 2]

        return fn(x, mean)

    def own(self, draw, x):
        return draw(SAMPLES)[lax.axis_index("samples")][None]


def _dense(p, x, mean):
    return jnp.tanh(x @ p["w"] + p["b"])


def _time_major(p, x, mean):
    return _dense(p, x.swapaxes(0, 1), mean).swapaxes(0, 1)


def _merged(p, x, mean):
    """Dense layers on (B * T, C), and on (T * B, C)."""
    x = (x.reshape(-1, CHANNELS) @ p["w"]).reshape(x.shape).swapaxes(0, 1)
    return jnp.tanh((x.reshape(-1, CHANNELS) * p["b"]) @ p["w2"]).reshape(x.shape).swapaxes(0, 1)


def _attention(p, x, mean):
    q, k, v = jnp.einsum("btc,kchd->kbthd", x, p["qkv"])
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    return x + jnp.einsum("bhts,bshd,hdc->btc", weights, v, p["out"])


def _places(p, x, mean):
    """A class token, positions; the token is added to the others at the end."""
    x = jnp.concatenate([jnp.broadcast_to(p["token"], (len(x), 1, CHANNELS)), x], 1) + p["places"]
    x = jnp.tanh(x + jnp.einsum("btc,ts->bsc", x, p["mix"]))
    return x[:, 1:] + x[:, :1]


def _mixer(p, x, mean):
    return x + jnp.tanh(x.swapaxes(1, 2) @ p["w"]).swapaxes(1, 2)


def _layer_norm(p, x, mean):
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-3) * p["b"] + p["b2"]


def _batch_norm(p, x, mean):
    centre = mean(x.mean(1, keepdims=True))
    variance = mean(jnp.square(x - centre).mean(1, keepdims=True))
    return (x - centre) * (lax.rsqrt(variance + 1e-3) * p["b"]) + p["b2"]


def _ghost_batch_norm(p, x, mean):
    """Statistics of sub-batches of two."""

    def normed(x, mean):
        centre = mean(x)
        return (x - centre) * (lax.rsqrt(mean(jnp.square(x - centre)) + 1e-3) * p["b"]) + p["b2"]

    return mean.in_pairs(normed, x)


def _virtual_batch_norm(p, x, mean):
    """Statistics of a batch that never changes, as large as this one, passed through the same layer."""
    reference = jnp.cos(jnp.arange(SAMPLES * TOKENS * CHANNELS)).reshape(SAMPLES, TOKENS, CHANNELS) @ p["w"]
    centre = reference.mean((0, 1))
    return (x @ p["w"] - centre) * lax.rsqrt(reference.var((0, 1)) + 1e-3) * p["b"] + p["b2"]


def _dropout(p, x, mean):
    keep = mean.own(lambda n: jax.random.bernoulli(mean.key, 0.5, (n, TOKENS, CHANNELS)), x)
    return jnp.tanh(jnp.where(keep, x * 2, 0) @ p["w"])


def _stochastic_depth(p, x, mean):
    """The branch is left out in some samples, another one in all or none."""
    keep = mean.own(lambda n: jax.random.bernoulli(mean.key, 0.6, (n, 1, 1)), x)
    x = x + keep * _dense(p, x, mean) / 0.6
    return x + jax.random.bernoulli(jax.random.fold_in(mean.key, 1), 0.9) * jnp.tanh(x @ p["w2"])


def _tied(p, x, mean):
    return jnp.tanh(x @ p["w"]) @ p["w"].T


def _weight_norm(p, x, mean):
    return x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0) * p["b"])


def _spectral_norm(p, x, mean):
    u = jnp.ones(CHANNELS)
    for _ in range(2):
        v = p["w"].T @ u
        v = lax.stop_gradient(v / jnp.linalg.norm(v))
        u = lax.stop_gradient(p["w"] @ v / jnp.linalg.norm(p["w"] @ v))
    return jnp.tanh(x @ (p["w"] / (u @ p["w"] @ v)))


def _standardised(p, x, mean):
    kernel = p["kernel"] - p["kernel"].mean((0, 1))
    return _convolved(x, kernel / (kernel.std((0, 1)) + 1e-3), padding="SAME")


def _strided(p, x, mean):
    return jnp.repeat(_convolved(x, p["kernel"], 2, padding="SAME"), 2, 1)


def _grouped(p, x, mean):
    return _convolved(x, p["kernel"][:, :2], padding="SAME", feature_group_count=2)


def _depthwise(p, x, mean):
    return _convolved(x, p["kernel"][:, :1], padding="SAME", feature_group_count=4)


def _dilated(p, x, mean):
    return _convolved(x, p["kernel"], padding="SAME", rhs_dilation=(2,))


def _transposed(p, x, mean):
    return lax.conv_transpose(x, p["kernel"], (2,), "SAME", dimension_numbers=NUMBERS, transpose_kernel=True)[:, ::2]


def _local(p, x, mean):
    return lax.conv_general_dilated_local(x, p["local"], (1,), "SAME", (3,), dimension_numbers=NUMBERS)


def _channels_first(p, x, mean):
    numbers = ("NCW", "OIW", "NCW")
    return lax.conv_general_dilated(x, p["kernel"].transpose(2, 1, 0), (1,), "SAME", dimension_numbers=numbers)


def _squeeze_excite(p, x, mean):
    return x * jax.nn.sigmoid(x.mean(1) @ p["w"])[:, None]


def _layer_scale(p, x, mean):
    return x + p["b"] * jax.nn.gelu(x @ p["w"])


def _prelu(p, x, mean):
    return jnp.where(x > 0, x, p["b"][0] * x)


def _table(p, x, mean):
    """Embeddings of tokens made from the input."""
    tokens = jnp.abs(lax.stop_gradient(x)[..., 0] * 10).astype(int) % 7
    return jnp.take(p["table"], tokens, axis=0) + jnp.tanh(x)


def _lstm(p, x, mean):
    def cell(carry, x):
        c, h = carry
        i, f, g, o = jnp.split(x @ p["cell"] + h @ p["again"], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    start = jnp.zeros((len(x), CHANNELS), x.dtype)
    return lax.scan(cell, (start, start), x.swapaxes(0, 1))[1].swapaxes(0, 1)


def _scanned_layers(p, x, mean):
    return lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["stack"])[0]


def _remat(p, x, mean):
    return jax.checkpoint(lambda p, x: _tied(p, _dense(p, x, mean), mean))(p, x)


def _remat_of_batch_norm(p, x, mean):
    return jax.checkpoint(lambda p, x: _dense(p, _batch_norm(p, x, mean), mean))(p, x)


def _called(p, x, mean):
    return jax.jit(lambda p, x: _dense(p, x, mean))(p, x)


def _frozen(p, x, mean):
    return lax.stop_gradient(_dense(p, x, mean)) + _prelu(p, x, mean)


def _own_derivative(p, x, mean):
    """Straight through a rounding: the derivative is not that of what is computed."""

    @jax.custom_vjp
    def rounded(w, x):
        return x @ jnp.round(w, 1)

    rounded.defvjp(lambda w, x: (rounded(w, x), (w, x)), lambda r, d: (jnp.einsum("btc,btd->cd", r[1], d), d @ r[0].T))
    return rounded(p["w"], x)


def _branch(p, x, mean):
    return lax.cond(p["b"].sum() > 100, lambda w, x: x, lambda w, x: jnp.tanh(x @ w), p["w"], x)


def _mapped(p, x, mean):
    """One sample at a time, in a loop over the batch."""
    return lax.map(lambda x: jnp.tanh(x @ p["w"]), x)


def _convolved(x, kernel, stride=1, **more):
    return lax.conv_general_dilated(x, kernel, (stride,), dimension_numbers=NUMBERS, **more)


PIECES = {name[1:]: fn for name, fn in globals().items() if name[0] == "_" and callable(fn) and name[1] != "_"}
del PIECES["convolved"]
COUPLED = {"batch_norm", "remat_of_batch_norm", "ghost_batch_norm"}
SHAPES = {
    "w": (4, 4), "w2": (4, 4), "b": (4,), "b2": (4,), "qkv": (3, 4, 2, 2), "out": (2, 2, 4), "token": (1, 1, 4),
    "places": (1, 5, 4), "mix": (5, 5), "kernel": (3, 4, 4), "local": (4, 12, 4), "table": (7, 4), "cell": (4, 16),
    "again": (4, 16), "stack": (3, 4, 4),
}  # fmt: skip


def make(names, seed=0, samples=SAMPLES):
    """(apply, {"params"}, images (samples, T, C), labels) in NumPy float64."""
    rng = np.random.default_rng(seed)

    def params():
        return {
            name: rng.normal(size=shape) / np.sqrt(shape[0] if len(shape) > 1 else 1) for name, shape in SHAPES.items()
        }

    made = [{"w": rng.normal(size=(4, 4)), "b": rng.normal(size=4)}, *(params() for _ in names)]
    made.append({"w": rng.normal(size=(4, 3)), "b": rng.normal(size=3)})

    def network(params, images, mean):
        x = _dense(params[0], images, mean)
        for name, own in zip(names, params[1:-1], strict=True):
            x = PIECES[name](own, x, mean)
        return x.mean(1) @ params[-1]["w"] + params[-1]["b"]

    images, labels = rng.normal(size=(samples, TOKENS, CHANNELS)), np.arange(samples) % 3
    return network, {"params": made}, images, labels


def apply_of(network):
    def apply(variables, images, train, key):
        return network(variables["params"], images, Together()), {}

    return apply


def defined(network, variables, images, labels):
    """Rows of all parameters: each sample alone, with parameters of its own, under a named axis."""
    copies = jax.tree.map(lambda p: jnp.broadcast_to(p, (len(images), *p.shape)), variables["params"])

    def summed(copies):
        def loss(params, image, label):
            logits = network(params, image[None], Alone())
            return -jax.nn.log_softmax(logits)[0, label]

        return jax.vmap(loss, axis_name="samples")(copies, images, labels).sum()

    return jax.grad(summed)(copies)


def defined_alone(network, variables, images, labels):
    """One `jax.grad` a sample, where samples are independent."""

    def loss(params, i):
        return -jax.nn.log_softmax(network(params, images, Together()))[i, jnp.asarray(labels)[i]]

    return lax.map(lambda i: jax.grad(loss)(variables["params"], i), jnp.arange(len(images)))
