"""The three Gram matrices of the published definition, against the torch reference in float64."""

import json
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared import shared

from hardjax import fisher

# Both sides are float64 with sums in different orders; entries of the reference agree with themselves to about 1e-14.
RELATIVE = 1e-9
SECTIONS = {
    "contribution": ("train", "contributions"),
    "coupled": ("train", "coupled_jacobian"),
    "frozen": ("eval", "per_sample_grads"),
}


class Unit(nn.Module):
    channels: int
    stride: int
    train: bool

    @nn.compact
    def __call__(self, x):
        def norm(name):
            return nn.BatchNorm(use_running_average=not self.train, momentum=0.9, epsilon=1e-5, name=name)

        y = nn.Conv(self.channels, (3, 3), self.stride, padding=1, use_bias=False, name="conv1")(x)
        y = nn.relu(norm("bn1")(y))
        y = norm("bn2")(nn.Conv(self.channels, (3, 3), padding=1, use_bias=False, name="conv2")(y))
        if self.stride == 2:
            x = nn.avg_pool(x, (2, 2), (2, 2))
        return y + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.channels - x.shape[-1])))


class Cbrcb8(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        def norm(name):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)

        x = norm("bn0")(nn.Conv(16, (3, 3), padding=1, use_bias=False, name="conv0")(x))
        for index, channels in enumerate((16, 32, 64)):
            x = Unit(channels, 1 if index == 0 else 2, train, name=f"blocks.{index}")(x)
        return nn.Dense(10, name="fc")(nn.relu(norm("bn_last")(x)).mean((1, 2)))


def _filled(name, shape, gain):
    flat = np.arange(int(np.prod(shape)), dtype=np.float64) * 12.9898
    v = np.sin(flat + float(zlib.crc32(name.encode()) % 1000)) * 43758.5453
    t = (2.0 * (v - np.floor(v)) - 1.0).reshape(shape)
    if name == "input":
        value = t
    elif name.endswith("running_mean"):
        value = 0.1 * t
    elif name.endswith("running_var"):
        value = 1.0 + 0.2 * t
    elif len(shape) >= 2:
        value = gain * np.sqrt(3.0 / np.prod(shape[1:])) * t
    else:
        value = 1.0 + 0.1 * t if name.endswith("weight") else 0.1 * t
    return value.astype(np.float32).astype(np.float64)


def _flax_place(name, value):
    """torch name -> collection, Flax path, value in Flax layout."""
    *path, leaf = name.replace("blocks.", "blocks_").split(".")
    path = tuple(part.replace("blocks_", "blocks.") for part in path)
    if leaf in ("running_mean", "running_var"):
        return "batch_stats", (*path, leaf.removeprefix("running_")), value
    if leaf == "bias":
        return "params", (*path, "bias"), value
    if value.ndim == 4:
        return "params", (*path, "kernel"), value.transpose(2, 3, 1, 0)
    return "params", (*path, "kernel" if value.ndim == 2 else "scale"), value.T


@pytest.fixture(scope="module")
def golden():
    return json.loads(shared("goldens/dynamics.json").read_text())


@pytest.fixture(scope="module")
def setting(golden):
    """(variables, images, labels) in NumPy float64."""
    meta = golden["_meta"]
    variables = {"params": {}, "batch_stats": {}}

    def place(name, shape):
        collection, path, value = _flax_place(name, _filled(name, shape, meta["gain"]))
        node = variables[collection]
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value

    for name, shape in meta["param_shapes"].items():
        place(name, shape)
        if "bn" in name and name.endswith(".weight"):
            for statistic in ("running_mean", "running_var"):
                place(name.replace("weight", statistic), shape)
    images = _filled("input", (meta["batch"], 3, 32, 32), 1.0).transpose(0, 2, 3, 1)
    return variables, images, np.array(meta["labels"])


def _torch_name(path):
    return path.replace("/kernel", ".weight").replace("/scale", ".weight").replace("/bias", ".bias").replace("/", ".")


@pytest.mark.parametrize(
    "rows, method",
    [
        ("contribution", "layers"),
        ("frozen", "layers"),
        ("coupled", "vmap"),
        pytest.param("contribution", "vmap", marks=pytest.mark.slow),
        pytest.param("frozen", "vmap", marks=pytest.mark.slow),
    ],
)
def test_gram_equals_the_torch_reference(golden, setting, rows, method):
    mode, section = SECTIONS[rows]
    expected = golden[mode][section]
    with jax.enable_x64(True):
        grams = fisher.gram(Cbrcb8(), *setting, rows=rows, method=method, by_parameter=True)
        gram = np.asarray(sum(grams.values()))
        values = np.asarray(fisher.eigenvalues(gram, np.float64))
    scale = np.abs(expected["gram"]).max()
    np.testing.assert_allclose(gram, expected["gram"], rtol=RELATIVE, atol=RELATIVE * scale)
    np.testing.assert_allclose(values, expected["eigenvalues_ascending"], rtol=RELATIVE)
    np.testing.assert_allclose(np.trace(gram), expected["trace"], rtol=RELATIVE)
    assert len(grams) == len(golden["_meta"]["param_names"])
    for path, matrix in grams.items() if "per_param_frob2" in expected else ():
        name, size = _torch_name(path), np.trace(matrix)
        np.testing.assert_allclose(size, expected["per_param_frob2"][name], rtol=RELATIVE)
        np.testing.assert_allclose(
            matrix[0], expected["per_param_gram_row0"][name], rtol=RELATIVE, atol=RELATIVE * size
        )
