"""The zoo against the reference implementations in PyTorch: logits, block outputs and running statistics."""

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from platforms import near

from hardjax import models

LARGE = [
    "mobilenetv3_small_100",
    "efficientnet_b4",
    "efficientnetv2_s",
    "resnet18",
    "resnet50",
    "resnet34",
    "densenet121",
    "cbrcb_resnet110",
    "densenet110",
]
SMALL = [
    "resnet20_he",
    "alexnet_reduced",
    "alexnet_reduced_bnconv",
    "alexnet_reduced_bnall",
    "resnet8_he",
    "resnet32_he",
    "resnet20_he_nonorm",
    "densenet8",
    "densenet8_1ch",
    "cbrcb_resnet8",
    "cbrcb_resnet8_1ch",
    "mlp",
    "mlp_bn",
]
# One of each family in the fast tier; the others differ from it in depth or in an option.
FIRST = {"mlp_bn", "resnet8_he", "cbrcb_resnet8", "densenet8", "alexnet_reduced"}


def _read(golden):
    """(the network, its state dict, image channels, cases)"""
    prefix = "" if golden in [*LARGE, "resnet20_he"] else "more_"
    layers, outputs = goldens.read(f"{prefix}layers")[golden], goldens.read(f"{prefix}logits")[golden]
    name, options = goldens.HERE.get(golden, (golden, {}))
    channels = outputs.get("in_ch", 3)
    state_dict = goldens.state_dict(layers)
    if channels == 1:  # in any order
        state_dict = dict(sorted(state_dict.items()))
    variables = models.from_torch(name, state_dict, **options)
    return models.create(name, **options), variables, channels, outputs["cases"]


def _run(module, variables, images, train):
    """(logits, new statistics, outputs of the submodules by torch name)"""

    @jax.jit
    def forward(variables, images):
        collections = ["batch_stats", "intermediates"]
        logits, new = module.apply(
            variables,
            images,
            train=train,
            mutable=collections,
            capture_intermediates=lambda _, name: name == "__call__",
        )
        return logits, new.get("batch_stats", {}), new["intermediates"]

    logits, statistics, outputs = forward(variables, images)
    flat = jax.tree_util.tree_leaves_with_path(outputs)
    return np.asarray(logits), statistics, {".".join(e.key for e in path[:-2]): np.asarray(y) for path, y in flat}


@pytest.mark.parametrize(
    "golden, some",
    [pytest.param(golden, ["eval_b2_32"], marks=pytest.mark.ci) for golden in LARGE]
    + [pytest.param(golden, None, marks=pytest.mark.slow) for golden in LARGE]
    + [pytest.param(golden, None, marks=() if golden in FIRST else pytest.mark.ci) for golden in SMALL],
)
def test_logits_in_float32_are_those_of_the_reference(golden, some):
    module, variables, channels, cases = _read(golden)
    for name, case in cases.items():
        if not case["f32_reliable"] or (some and name not in some):
            continue
        mode, batch, side = name.split("_")
        images = goldens.images(int(batch[1:]), channels, int(side))
        logits, _, _ = _run(module, variables, images, mode == "train")
        assert logits.dtype == np.float32
        tolerance = near(atol=case["suggested_atol_f32"])
        np.testing.assert_allclose(logits, case["logits"], rtol=0, **tolerance, err_msg=name)


@pytest.mark.parametrize(
    "golden",
    [pytest.param(golden, marks=pytest.mark.slow) for golden in LARGE]
    + [pytest.param(golden, marks=() if golden in FIRST else pytest.mark.ci) for golden in SMALL],
)
def test_everything_in_float64_is_that_of_the_reference(golden):
    module, variables, channels, cases = _read(golden)
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables)
        for name, case in cases.items():
            mode, batch, side = name.split("_")
            images = goldens.images(int(batch[1:]), channels, int(side)).astype(np.float64)
            logits, statistics, outputs = _run(module, variables, jnp.asarray(images), mode == "train")
            checked = 0
            for probe, shape, mean, std, first in case["probes_f64"]:
                # timm counts the activation to the batch norm before it; pools, stages and heads are no modules here.
                if probe not in outputs or probe.split(".")[-1].startswith(("bn", "norm")):
                    continue
                y = outputs[probe]
                y = y.transpose(0, 3, 1, 2) if y.ndim == 4 else y
                assert list(y.shape[: len(shape)]) == shape, probe
                found = [y.mean(), y.std(), *y.ravel()[: len(first)]]
                np.testing.assert_allclose(found, [mean, std, *first], rtol=1e-7, atol=1e-7, err_msg=f"{name} {probe}")
                checked += 1
            assert checked >= 2, f"{name}: probes {[probe[0] for probe in case['probes_f64']]}"
            np.testing.assert_allclose(
                logits, case["logits_f64"], rtol=0, atol=case["suggested_atol_f64"], err_msg=name
            )
            for tensor, (total, first) in case.get("running_after_f64", {}).items():
                *path, kind = tensor.split(".")
                value = _statistics(statistics, ".".join(path))[kind.removeprefix("running_")]
                np.testing.assert_allclose([value.sum(), *value[:3]], [total, *first], rtol=1e-9, err_msg=tensor)


def _statistics(tree, name):
    """The statistics of the batch norm of that torch name."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {path[-1].key: leaf for path, leaf in flat if ".".join(e.key for e in path[:-1]) == name}
