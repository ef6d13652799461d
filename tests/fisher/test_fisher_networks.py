"""Whole networks as people write them: their rows equal one gradient a sample, or the definition under batch norm."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hardjax import fisher
from hardjax._validate import Refusal
from hardjax.choose.losses import CROSS_ENTROPY, resolve
from hardjax.fisher.unchecked import make_unchecked
from hardjax.models.apply import init_variables

RELATIVE = 1e-9
# As many samples as tokens.
IMAGES, LABELS = np.random.default_rng(0).normal(size=(5, 6, 6, 1)), np.arange(5) % 3


class Mine(nn.Module):
    """`axis`: that batch norm reduces over as well, for the definition."""

    axis: str | None = None

    def norm(self, train, **more):
        return nn.BatchNorm(not train, axis_name=self.axis, **more)


class Vit(Mine):
    """Patches, a class token, positions, attention, layer scale: five tokens."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), strides=3)(x).reshape(len(x), 4, 4)
        x = jnp.concatenate([jnp.tile(self.param("token", nn.initializers.normal(), (1, 1, 4)), (len(x), 1, 1)), x], 1)
        x = x + self.param("places", nn.initializers.normal(), (1, 5, 4))
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        branch = nn.Dense(4)(nn.gelu(nn.Dense(6)(nn.LayerNorm()(x))))
        return nn.Dense(3)((x + self.param("scale", nn.initializers.ones, (4,)) * branch)[:, 0])


class Attentive(Mine):
    """Attention behind batch norm, as in the README."""

    @nn.compact
    def __call__(self, x, train):
        x = self.norm(train)(nn.Dense(4)(x[..., 0]))
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(x)
        return nn.Dense(3)(x.reshape(len(x), -1))


class Convolutional(Mine):
    """Convolutions of every kind."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(self.norm(train)(nn.ConvTranspose(4, (3, 3), (2, 2), transpose_kernel=False)(x)))
        x = nn.Conv(4, (3, 3), 2, padding="CIRCULAR", feature_group_count=2)(x)
        x = nn.tanh(self.norm(train, use_bias=False)(nn.Conv(4, (2, 2), kernel_dilation=2, feature_group_count=4)(x)))
        x = nn.tanh(nn.ConvLocal(2, (3, 3), 2)(x))
        return nn.Dense(3)(nn.Conv(3, (1, 1), use_bias=False)(x).reshape(len(x), -1))


class Standardised(nn.Conv):
    def param(self, name, *rest, **more):
        value = super().param(name, *rest, **more)
        return (value - value.mean((0, 1, 2))) / (value.std((0, 1, 2)) + 1e-5) if name == "kernel" else value


class Bit(Mine):
    """Standardised kernels beside batch norm, squeeze and excite, and a residual branch."""

    @nn.compact
    def __call__(self, x, train):
        x = Standardised(4, (3, 3))(x)
        y = nn.relu(self.norm(train)(x))
        x = x + Standardised(4, (3, 3))(y * nn.sigmoid(nn.Dense(4)(y.mean((1, 2))))[:, None, None])
        return nn.Dense(3)(x.mean((1, 2)))


class Wordy(Mine):
    """Tokens, an embedding that is the head as well, weight norm, a PReLU, an Einsum."""

    @nn.compact
    def __call__(self, x):
        table = nn.Embed(3, 4)
        x = table((jnp.abs(x[:, :5, 0, 0]) * 2).astype(int) % 3) + self.param(
            "places", nn.initializers.normal(), (5, 4)
        )
        x = nn.PReLU()(nn.WeightNorm(nn.Dense(4))(x))
        return table.attend(nn.Einsum((5, 4, 4), "btc,tcd->bd")(x))


class Recurrent(Mine):
    @nn.compact
    def __call__(self, x, train):
        x = nn.RNN(nn.LSTMCell(3, param_dtype=x.dtype))(x[:, :5, :, 0])
        return nn.Dense(3)(
            nn.RNN(nn.GRUCell(3, param_dtype=x.dtype), time_major=True)(self.norm(train)(x).swapaxes(0, 1))[-1]
        )


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(nn.Dense(4)(nn.LayerNorm()(x))), None


class Deep(Mine):
    """Layers in a loop, each computed again in the backward pass, behind a backbone that is frozen."""

    @nn.compact
    def __call__(self, x, train):
        x = jax.lax.stop_gradient(self.norm(train)(nn.Dense(4)(x.reshape(len(x), -1))))
        loop = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x = nn.remat(nn.BatchNorm)(not train, axis_name=self.axis)(loop()(nn.Dense(4)(x), None)[0])
        return nn.Dense(3)(x)


def _variables(model, dtype=np.float64):
    """With every entry moved, as NumPy arrays: nothing starts at zero or one."""
    rng, start = np.random.default_rng(1), init_variables(model, jax.random.key(0), IMAGES.shape[1:])
    return jax.tree.map(lambda leaf: np.asarray(leaf, dtype) + rng.random(leaf.shape).astype(dtype) / 4, start)


def _defined(model, variables, images):
    """{parameter: (5, size)}: each sample with parameters of its own, under a named axis."""
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(images)), variables["params"])

    def summed(copies):
        def loss(params, image, label):
            given = {**variables, "params": params}
            mode = {"train": True} if jax.tree.leaves(variables["batch_stats"]) else {}
            logits = model.apply(given, image[None], **mode, mutable=["batch_stats"])[0][0]
            return -jax.nn.log_softmax(logits)[label]

        return jax.vmap(loss, axis_name="samples")(copies, images, LABELS).sum()

    found = jax.tree_util.tree_leaves_with_path(jax.grad(summed)(copies))
    return {"/".join(key.key for key in path): leaf.reshape(len(images), -1) for path, leaf in found}


@pytest.mark.ci
@pytest.mark.parametrize("kind", [Vit, Attentive, Convolutional, Bit, Wordy, Recurrent, Deep])
def test_whole_networks_equal_the_definition(kind):
    variables = _variables(kind())

    def both(variables, images):
        found = make_unchecked(kind(), resolve(CROSS_ENTROPY), "contribution", "layers", None, True)(
            variables, images, LABELS
        )
        return found, _defined(kind("samples"), variables, images)

    with jax.enable_x64(True):
        found, expected = jax.tree.map(np.asarray, jax.jit(both)(variables, IMAGES))
    scale = max(np.abs(row).max() for row in expected.values())
    assert found.keys() == expected.keys()
    for name, row in expected.items():
        np.testing.assert_allclose(found[name], row @ row.T, rtol=RELATIVE, atol=RELATIVE * scale**2)


class Half(Mine):
    """Computes in bfloat16, and keeps its convolution so."""

    dtype: jnp.dtype = jnp.bfloat16

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), dtype=self.dtype, param_dtype=self.dtype)(x)
        x = nn.relu(self.norm(train, dtype=self.dtype)(x)).reshape(len(x), 6, -1)
        x = nn.MultiHeadDotProductAttention(2, dtype=self.dtype)(x)
        return nn.Dense(3, dtype=self.dtype)(x.mean(1))


@pytest.mark.ci
def test_rows_of_a_network_in_half_precision_are_those_of_float32_to_its_precision():
    variables = _variables(Half(), np.float32)
    stored = jax.tree.map(lambda leaf, as_made: leaf.astype(as_made.dtype), variables, _made(Half()))
    single = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), stored)
    found = fisher.gram(Half(), stored, jnp.float32(IMAGES), LABELS)
    rows = jax.jit(lambda v: _defined(Half("samples", jnp.float32), v, jnp.float32(IMAGES)))(single)
    expected = sum(row @ row.T for row in rows.values())
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.05 * float(jnp.trace(expected)))


def _made(model):
    return init_variables(model, jax.random.key(0), IMAGES.shape[1:])


class Normed(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x, _):
        return x + nn.BatchNorm(not self.train)(nn.Dense(4)(x)), None


class NormedLayers(nn.Module):
    """Batch norm inside a loop over layers."""

    @nn.compact
    def __call__(self, x, train):
        axes, streams = {"params": 0, "batch_stats": 0}, {"params": True}
        loop = nn.scan(Normed, variable_axes=axes, split_rngs=streams, length=2)
        return nn.Dense(3)(loop(train)(x.reshape(len(x), -1)[:, :4], None)[0])


@pytest.mark.ci
def test_batch_norm_in_a_loop_over_layers_is_refused_by_name():
    with pytest.raises(Refusal, match=re.escape("meets the batch in scan, which mixes its samples.")) as caught:
        fisher.gram(NormedLayers(), _made(NormedLayers()), jnp.float32(IMAGES), LABELS)
    assert str(caught.value).startswith('rows="coupled" takes any network: ') and "\n" not in str(caught.value)
