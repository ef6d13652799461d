"""The three Gram matrices of the published definition, against the torch reference in float64."""

import json

import goldens
import jax
import numpy as np
import pytest
from shared import shared

from hardjax import fisher, models

# Both sides are float64 with sums in different orders; entries of the reference agree with themselves to about 1e-14.
RELATIVE = 1e-9
SECTIONS = {
    "contribution": ("train", "contributions"),
    "coupled": ("train", "coupled_jacobian"),
    "frozen": ("eval", "per_sample_grads"),
}


@pytest.fixture(scope="module")
def golden():
    return json.loads(shared("goldens/dynamics.json").read_text())


@pytest.fixture(scope="module")
def setting(golden):
    """(variables, images, labels) in NumPy float64."""
    meta = golden["_meta"]
    shapes = {name: tuple(shape) for name, shape in meta["param_shapes"].items()}
    for name, shape in meta["param_shapes"].items():
        if "bn" in name and name.endswith(".weight"):
            shapes |= {name.replace("weight", kind): tuple(shape) for kind in ("running_mean", "running_var")}
    state_dict = {name: goldens.filled(name, shape, meta["gain"]) for name, shape in shapes.items()}
    variables = models.from_torch("cbrcb_resnet8", state_dict)
    images = goldens.images(meta["batch"], 3, 32)
    return *jax.tree.map(lambda leaf: leaf.astype(np.float64), (variables, images)), np.array(meta["labels"])


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
        grams = fisher.gram(models.create("cbrcb_resnet8"), *setting, rows=rows, method=method, by_parameter=True)
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
