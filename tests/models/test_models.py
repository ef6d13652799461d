"""What every network promises: shapes, gradients, statistics, options, sizes, initial weights."""

import json
import math

import chex
import flax.linen as nn
import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from platforms import near

from hardjax import models
from hardjax.models.apply import init_variables, make_apply, samples_are_independent
from hardjax.models.layers import BatchNorm, Layers
from hardjax.models.resnet import Residual, ResNet
from hardjax.models.zoo import ZOO, TorchvisionResNet

# bfloat16 keeps 8 bits: the logits of the deepest networks differ by up to a tenth of their largest. By a fifth where
# the last maps are one pixel, and batch norm divides by the deviation of 8 values.
BFLOAT16 = {"resnet34": 0.2, "densenet121": 0.2}

# In the fast tier one network of each kind of layer: dense, residual, densely connected.
TIERS = dict.fromkeys(zoo.LARGE, pytest.mark.slow)
TIERS |= dict.fromkeys(
    ("alexnet_reduced", "cbrcb_resnet8", "densenet", "densenet8", "inverted", "resnet8"), pytest.mark.ci
)


def _images(batch, channels):
    return jnp.asarray(goldens.images(batch, channels, 32))


def _train(module, variables, images):
    """(logits, new statistics, gradients of the mean loss)"""
    apply, labels = make_apply(module), jnp.arange(len(images)) % 10

    @jax.jit
    def forward(params, statistics):
        def loss(params):
            logits, new = apply({"params": params, "batch_stats": statistics}, images, True)
            return -jax.nn.log_softmax(logits)[jnp.arange(len(images)), labels].mean(), (logits, new)

        gradients, (logits, new) = jax.grad(loss, has_aux=True)(params)
        return logits, new, gradients

    return forward(variables["params"], variables["batch_stats"])


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=TIERS[name]) if name in TIERS else name for name in [*ZOO, *zoo.SMALL_VERSIONS]],
)
def test_contract(name):
    make, images = zoo.maker(name), _images(8, zoo.channels(name))
    module = make(norm="batch")
    variables = _init(module, images.shape[1:])
    logits, statistics, gradients = _train(module, variables, images)
    assert logits.shape == (8, 10) and logits.dtype == jnp.float32
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))
    moved = jax.tree.map(lambda old, new: bool((old != new).any()), variables["batch_stats"], statistics)
    assert all(jax.tree.leaves(moved)) and jax.tree.structure(moved) == jax.tree.structure(variables["batch_stats"])
    evaluated = module.apply(
        {"params": variables["params"], "batch_stats": statistics}, images, mutable=["batch_stats"]
    )
    chex.assert_trees_all_equal(evaluated[1].get("batch_stats", statistics), statistics)

    of_whole = make(norm="batch", norm_batch_size=8)
    found = jax.jit(make_apply(of_whole), static_argnums=2)(variables, images, True)
    # One part is the whole batch, behind a reshape: equal to rounding.
    for left, right in zip(*map(jax.tree.leaves, (found, (logits, statistics))), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-3 * float(jnp.abs(right).max()))

    short = make(norm="batch", dtype="bfloat16")
    shapes = _shapes(short, images.shape[1:])
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    rounded, rounded_statistics = jax.jit(make_apply(short), static_argnums=2)(variables, images, True)
    if name.startswith("efficientnet"):
        # Batch statistics of 8 pixels, through 32 and 40 blocks: images changed by 1e-6 move the logits by 7e-5.
        rounded, logits = (
            jax.jit(make_apply(m), static_argnums=2)(variables, images, False)[0] for m in (short, module)
        )
    assert rounded.dtype == jnp.float32 and (rounded != logits).any()
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded_statistics)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(rounded, logits, rtol=0, atol=BFLOAT16.get(name, 0.1) * float(jnp.abs(logits).max()))


def _init(module, image_shape):
    return jax.jit(lambda key: init_variables(module, key, image_shape))(jax.random.key(0))


def _shapes(module, image_shape):
    return jax.eval_shape(lambda key: init_variables(module, key, image_shape), jax.random.key(0))


@pytest.mark.parametrize("name", ZOO)
def test_options_are_plain_json(name):
    given = {"norm": "batch", "norm_batch_size": 4, "dtype": "bfloat16", "init": "torch", "dropout": 0.1}
    given |= {"norm_momentum": 0.99, "drop_path": 0.1, "stem": "cifar", "widths": [7, 8], "norm_dense": True}
    given = {option: value for option, value in given.items() if option in models.options(name)}
    assert set(given) == set(models.options(name))
    assert models.create(name, **json.loads(json.dumps(given))) == models.create(name, **given)
    assert hash(models.create(name, **given)) != hash(models.create(name))


@pytest.mark.parametrize(
    "name, channels, classes, parameters",
    [
        ("mlp", 1, 10, 768_010),
        ("resnet8", 3, 10, 75_290),
        ("resnet20", 3, 10, 269_722),
        ("resnet32", 3, 10, 464_154),
        ("resnet8", 3, 100, 81_140),
        ("resnet20", 3, 100, 275_572),
        ("resnet32", 3, 100, 470_004),
        ("alexnet_reduced", 3, 10, 358_106),
        ("cbrcb_resnet8", 1, 10, 75_130),
        ("cbrcb_resnet110", 3, 10, 1_728_090),
        ("cbrcb_resnet110", 3, 100, 1_733_940),
        ("densenet8", 1, 10, 9_866),
        ("densenet110", 3, 10, 1_724_890),
        ("densenet110", 3, 100, 1_778_260),
        ("resnet18", 3, 10, 11_181_642),
        ("resnet34", 3, 10, 21_289_802),
        ("resnet34", 3, 100, 21_335_972),
        ("resnet50", 3, 10, 23_528_522),
        ("densenet121", 3, 10, 6_964_106),
        ("densenet121", 3, 100, 7_056_356),
        ("mobilenetv3_small_100", 3, 10, 1_528_106),
        ("efficientnet_b4", 3, 10, 17_566_546),
        ("efficientnetv2_s", 3, 10, 20_190_298),
    ],
)
def test_parameter_counts_equal_those_of_the_reference(name, channels, classes, parameters):
    assert models.size_of(models.create(name, classes), (32, 32, channels)).parameters == parameters


@pytest.mark.parametrize(
    "name, options, parameters",
    [
        ("alexnet_reduced", {"norm": "batch"}, 358_394),
        ("alexnet_reduced", {"norm": "batch", "norm_dense": True}, 358_906),
        ("resnet20", {"norm": "none"}, 269_034),
        ("cbrcb_resnet8", {}, 75_418),
        ("densenet8", {}, 10_010),
    ],
)
def test_parameter_counts_of_variants(name, options, parameters):
    assert models.size_of(models.create(name, **options), (32, 32, 3)).parameters == parameters


def test_parameter_count_of_the_perceptron_with_batch_norm():
    assert models.size_of(models.create("mlp", norm="batch"), (32, 32, 1)).parameters == 770_010


@pytest.mark.parametrize(
    "name, parameters, operations",
    [
        ("mobilenetv3_small_100", 1.52, 0.03),
        ("efficientnet_b4", 17.56, 0.98),
        ("resnet18", 11.18, 1.19),
        ("efficientnetv2_s", 20.19, 1.86),
        ("resnet50", 23.52, 2.69),
    ],
)
def test_sizes_equal_the_published_ones(name, parameters, operations):
    """P1, table 1, truncated there to two decimals."""
    size = models.size_of(models.create(name), (128, 128, 3))
    norm = 8 * size.normalised if name.startswith("resnet") else 0
    assert math.floor(size.parameters / 1e4) / 100 == parameters
    assert math.floor((2 * size.multiply_adds + norm) / 1e7) / 100 == operations
    assert ZOO[name].published == f"{parameters:.2f}M, {operations:.2f}G"


def test_stems():
    for name in ("resnet18", "densenet121"):
        whole, reduced = (models.size_of(models.create(name, stem=stem), (32, 32, 3)) for stem in ("cifar", "imagenet"))
        assert reduced.parameters - whole.parameters == 64 * 3 * (49 - 9)
        assert whole.multiply_adds > 10 * reduced.multiply_adds


def test_batch_norm_over_parts_equals_a_loop_over_the_parts():
    module, parts = zoo.SMALL_VERSIONS["resnet"](), 3
    images = _images(12, 3)
    variables = _init(module, images.shape[1:])
    logits, statistics, gradients = _train(zoo.SMALL_VERSIONS["resnet"](norm_batch_size=4), variables, images)
    # the labels of _train are those of the position in the batch
    labels = jnp.arange(12) % 10

    @jax.jit
    def one_part(params, images, labels):
        def loss(params):
            apply = make_apply(module)
            values, new = apply({"params": params, "batch_stats": variables["batch_stats"]}, images, True)
            return -jax.nn.log_softmax(values)[jnp.arange(4), labels].mean(), (values, new)

        return jax.grad(loss, has_aux=True)(params)

    cuts = [slice(4 * part, 4 * part + 4) for part in range(parts)]
    each = [one_part(variables["params"], images[cut], labels[cut]) for cut in cuts]
    np.testing.assert_allclose(logits, jnp.concatenate([aux[0] for _, aux in each]), **near(atol=1e-5))
    mean = [jax.tree.map(lambda *leaves: sum(leaves) / parts, *(pick(one) for one in each)) for pick in _PICK]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **near(atol=1e-5)), [statistics, gradients], mean)
    with pytest.raises(ValueError, match="norm_batch_size=5 to divide the batch of 12 samples"):
        _train(zoo.SMALL_VERSIONS["resnet"](norm_batch_size=5), variables, images)


_PICK = (lambda one: one[1][1], lambda one: one[0])


def test_running_variance_is_unbiased_and_normalisation_biased():
    x = np.random.default_rng(0).normal(2, 3, (4, 3, 2, 5)).astype(np.float32)
    module = BatchNorm(train=True)
    variables = module.init(jax.random.key(0), x)
    y, new = module.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.9 + 0.1 * x.var((0, 1, 2), ddof=1), **near(rtol=1e-5))
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.1 * x.mean((0, 1, 2)), **near(rtol=1e-5))
    np.testing.assert_allclose(y, (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5), **near(atol=1e-5))
    far = BatchNorm(train=True).apply(variables, x + 1000, mutable=["batch_stats"])[0]
    np.testing.assert_allclose(far, y, **near(atol=1e-3))  # float32 keeps seven digits of 1000, and no more may be lost
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module.apply(variables, x[:1, :1, :1], mutable=["batch_stats"])


def test_the_momentum_of_running_statistics():
    """New = momentum * old + (1 - momentum) * batch, in every normalisation; the default is 0.9, bit for bit."""
    x = _images(8, 3)
    variables = _init(zoo.Tiny(norm="batch"), x.shape[1:])
    default, *others = (
        make_apply(zoo.Tiny(norm="batch", norm_momentum=momentum))(variables, x, True)
        for momentum in (None, 0.9, 0, 0.99)
    )
    chex.assert_trees_all_equal(default, others[0])
    of_batch, slow = others[1][1], others[2][1]
    expected = jax.tree.map(lambda old, new: 0.99 * old + 0.01 * new, variables["batch_stats"], of_batch)
    chex.assert_trees_all_close(slow, expected, rtol=1e-5, atol=1e-7)
    moved = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, variables["batch_stats"], of_batch)
    chex.assert_trees_all_close(default[1], moved, rtol=1e-5, atol=1e-7)
    for found in others:
        chex.assert_trees_all_equal(found[0], default[0])


# What each network draws: kind of its convolutions' and dense layers' kernels, whether biases are zero.
PAPER_INIT = {
    "mlp": (None, "torch", False),
    "alexnet_reduced": ("he_fan_in", "he_fan_in", True),
    "resnet8": ("he_fan_in", "he_fan_in", True),
    "cbrcb_resnet8": ("he_fan_out", "torch", False),
    "densenet8": ("he_fan_out", "torch", False),
    "resnet": ("he_fan_out", "torch", False),
    "densenet": ("he_fan_in", "torch", True),
    "inverted": ("he_per_group", "uniform_fan_out", True),
}
SCHEMES = {"he_fan_in": ("he_fan_in", "he_fan_in", True), "he_fan_out": ("he_fan_out", "he_fan_out", True)}
SCHEMES |= {"torch": ("torch", "torch", False)}


@pytest.mark.parametrize(
    "name, init, conv, dense, zero_bias",
    [(name, "paper", *kinds) for name, kinds in PAPER_INIT.items()]
    + [("cbrcb_resnet8", init, *kinds) for init, kinds in SCHEMES.items()],
)
def test_initial_weights_have_their_moments(name, init, conv, dense, zero_bias):
    module = zoo.maker(name)(**({} if init == "paper" else {"init": init}))
    params = _init(module, (32, 32, zoo.channels(name)))["params"]
    of_norms = {path[:-1] for path, _ in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "scale"}
    kernels = biases = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        leaf, label = np.asarray(leaf, np.float64), jax.tree_util.keystr(path)
        if leaf.ndim > 1 and leaf.size > 500:
            kind = conv if leaf.ndim == 4 else dense
            fan_in, fan_out = math.prod(leaf.shape[:-1]), math.prod(leaf.shape[:-2]) * leaf.shape[-1]
            groups = leaf.shape[-1] if leaf.ndim == 4 and leaf.shape[2] == 1 and leaf.shape[0] > 1 else 1
            variance = {
                "he_fan_in": 2 / fan_in,
                "he_fan_out": 2 / fan_out,
                "he_per_group": 2 * groups / fan_out,
                "torch": 1 / (3 * fan_in),
                "uniform_fan_out": 1 / (3 * fan_out),
            }[kind]
            error = 6 / math.sqrt(leaf.size)
            np.testing.assert_allclose(leaf.std(), math.sqrt(variance), rtol=error, err_msg=label)
            np.testing.assert_allclose(leaf.mean() / math.sqrt(variance), 0, atol=error, err_msg=label)
            fourth = 1.8 if kind in ("torch", "uniform_fan_out") else 3.0  # uniform or normal
            np.testing.assert_allclose((leaf**4).mean() / variance**2, fourth, rtol=4 * error, err_msg=label)
            kernels += 1
        elif path[-1].key == "bias" and path[:-1] not in of_norms:
            assert (leaf == 0).all() == zero_bias, label
            biases += 1
    assert kernels >= 2 and biases >= 1


def test_last_scales_of_branches_start_at_zero_in_timm_resnets_alone():
    def scales(module):
        params = _init(module, (32, 32, 3))["params"]
        return params["layer1.0"]["bn2"]["scale"], params["layer1.0"]["bn1"]["scale"]

    settings = {"stages": (1, 1), "bottleneck": False}
    for module, expected in (
        (ResNet(**settings), 0),
        (TorchvisionResNet(**settings), 1),
        (ResNet(init_scheme="he_fan_out", **settings), 1),
    ):
        last, first = scales(module)
        assert (last == expected).all() and (first == 1).all()
    assert isinstance(models.create("resnet34"), TorchvisionResNet)


@pytest.mark.parametrize(
    "name, like",
    [
        ("resnet20", "resnet8"),
        ("resnet32", "resnet8"),
        ("cbrcb_resnet110", "cbrcb_resnet8"),
        ("densenet110", "densenet8"),
        ("resnet18", "resnet"),
        ("resnet50", "resnet"),
        ("densenet121", "densenet"),
        ("efficientnet_b4", "inverted"),
        ("efficientnetv2_s", "inverted"),
        ("mobilenetv3_small_100", "inverted"),
    ],
)
def test_large_networks_draw_as_the_small_ones_of_their_family(name, like):
    assert models.create(name).paper_init == zoo.maker(like)().paper_init


def test_from_torch_lists_every_fault_in_one_error():
    layers = goldens.read("more_layers")["cbrcb_resnet8"]
    state = goldens.state_dict(layers)
    del state["blocks.1.conv2.weight"], state["bn0.running_var"], state["bn0.num_batches_tracked"]
    state["conv9.weight"] = np.zeros(3)
    state["fc.weight"] = np.zeros((1000, 64))
    with pytest.raises(ValueError) as error:
        models.from_torch("cbrcb_resnet8", state)
    text = str(error.value)
    assert "missing: bn0.running_var, blocks.1.conv2.weight;" in text
    assert "unexpected: conv9.weight;" in text
    assert "wrong shape: fc.weight (1000, 64) instead of (10, 64)." in text
    assert "\n" not in text and "num_batches_tracked" not in text


def test_from_torch_keeps_dtypes_and_draws_a_new_head():
    state = goldens.state_dict(goldens.read("more_layers")["cbrcb_resnet8"])
    state = {name: value.astype(np.float16) for name, value in state.items()}
    variables = models.from_torch("cbrcb_resnet8", state)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float16")}
    other = models.from_torch("cbrcb_resnet8", state, 7, new_head=jax.random.key(0))
    assert other["params"]["fc"]["kernel"].shape == (64, 7) and other["params"]["fc"]["kernel"].any()
    chex.assert_trees_all_equal(other["params"]["conv0"], variables["params"]["conv0"])


@pytest.mark.parametrize("golden", ["resnet8_he", "cbrcb_resnet8_1ch", "efficientnet_b4", "mobilenetv3_small_100"])
def test_from_torch_takes_tensors_in_any_order(golden):
    file = "layers" if golden in ZOO else "more_layers"
    state = goldens.state_dict(goldens.read(file)[golden])
    name = goldens.HERE.get(golden, (golden, {}))[0]
    chex.assert_trees_all_equal(
        *(models.from_torch(name, dict(sorted(state.items(), reverse=r))) for r in (False, True))
    )


def test_from_torch_reads_the_size_of_the_images_from_the_weights():
    for name, shape in (("alexnet_reduced", (28, 28, 1)), ("alexnet_reduced", (64, 64, 3)), ("mlp", (28, 28, 1))):
        module = models.create(name)
        params = _init(module, shape)["params"]
        state = {
            f"{layer}.{'weight' if kind == 'kernel' else kind}": np.asarray(leaf).transpose(
                {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
            )
            for layer, leaves in params.items()
            for kind, leaf in leaves.items()
        }
        chex.assert_trees_all_equal(models.from_torch(name, state)["params"], params)


def test_dense_layers_take_images_channel_by_channel():
    """As PyTorch flattens (C, H, W)."""
    rng = np.random.default_rng(0)
    sizes = {"fc1": (5, 12), "fc2": (4, 5)}
    state = {f"{name}.weight": rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    state |= {f"{name}.bias": rng.normal(size=size[0]).astype(np.float32) for name, size in sizes.items()}
    images = rng.normal(size=(2, 3, 2, 2)).astype(np.float32)
    variables = models.from_torch("mlp", state, 4, widths=[5])
    found = models.create("mlp", 4, widths=[5]).apply(variables, images.transpose(0, 2, 3, 1))
    hidden = np.maximum(images.reshape(2, 12) @ state["fc1.weight"].T + state["fc1.bias"], 0)
    np.testing.assert_allclose(found, hidden @ state["fc2.weight"].T + state["fc2.bias"], atol=1e-5)


def test_from_torch_names_a_tensor_that_numpy_cannot_read():
    class Bfloat16:
        def __array__(self, *args, **kwargs):
            raise TypeError("Got unsupported ScalarType BFloat16")

    state = goldens.state_dict(goldens.read("more_layers")["mlp"]) | {"fc2.bias": Bfloat16()}
    with pytest.raises(ValueError, match=r"Expected fc2.bias to be an array .*, got Bfloat16: Got unsupported"):
        models.from_torch("mlp", state)


def test_images_too_small_are_refused_with_the_smallest_size_that_works():
    with pytest.raises(ValueError, match=r"8x8 are too small for ReducedAlexNet: at least 15x15"):
        _shapes(models.create("alexnet_reduced"), (8, 8, 1))
    _shapes(models.create("alexnet_reduced"), (15, 15, 1))
    with pytest.raises(ValueError, match=r"multiples of 4"):
        _shapes(models.create("cbrcb_resnet8"), (30, 30, 1))
    with pytest.raises(ValueError, match=r"4x4 are too small for DenseNet: at least 5x5"):
        _shapes(zoo.SMALL_VERSIONS["densenet"](stem="imagenet"), (4, 4, 3))
    with pytest.raises(ValueError, match=r"Expected images \(B, H, W, C\)"):
        models.create("resnet8").init(jax.random.key(0), jnp.zeros((2, 64)))


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"drop_path": 0.9}])
def test_dropout_and_stochastic_depth_draw_in_training_alone(options):
    make, images = zoo.SMALL_VERSIONS["inverted"], _images(4, 3)
    variables = _init(make(), images.shape[1:])
    apply, plain = (jax.jit(make_apply(module), static_argnums=2) for module in (make(**options), make()))
    one, two, again = (apply(variables, images, True, jax.random.key(seed))[0] for seed in (1, 2, 1))
    assert (one != two).any() and (one == again).all()
    chex.assert_trees_all_equal(apply(variables, images, False)[0], plain(variables, images, False)[0])


@pytest.mark.parametrize("name", ["resnet8", "cbrcb_resnet8", "inverted"])
def test_stochastic_depth_in_bfloat16(name):
    module = zoo.maker(name)(dtype="bfloat16", drop_path=0.5)
    images = jax.ShapeDtypeStruct((2, 32, 32, zoo.channels(name)), jnp.float32)

    def forward(key, images):
        variables = init_variables(module, key, images.shape[1:])
        return make_apply(module)(variables, images, True, key)[0]

    assert jax.eval_shape(forward, jax.random.key(0), images).dtype == jnp.float32


def test_stochastic_depth_drops_whole_branches_and_scales_the_rest():
    layers = models.layers.Layers(True, "none", None, 0.0, None, models.initial.SCHEMES["he_fan_in"])
    x = jax.random.normal(jax.random.key(0), (64, 4, 4, 3))

    def branch(rate):
        module = Residual(layers, [(3, 3, 1), (3, 3, 1)], "subsample", relu=False, drop_path=rate)
        variables = module.init({"params": jax.random.key(1), "dropout": jax.random.key(2)}, x)
        return module.apply(variables, x, rngs={"dropout": jax.random.key(3)}) - x

    whole, thinned = branch(0.0), branch(0.75)
    dropped = np.asarray((thinned == 0).all((1, 2, 3)))
    assert 0.6 < dropped.mean() < 0.9
    np.testing.assert_allclose(thinned[~dropped], 4 * whole[~dropped], atol=1e-4)


def test_group_norm_is_that_of_its_groups():
    x = np.random.default_rng(0).normal(2, 3, (2, 3, 4, 16)).astype(np.float32)
    layers = Layers(True, "group", None, 0.0, None, models.initial.SCHEMES["he_fan_in"])

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layers.normalise(x, "norm")

    params = {"norm": {"scale": np.linspace(1, 2, 16), "bias": np.linspace(-1, 1, 16)}}
    groups = x.reshape(2, 12, 2, 8)
    mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    expected = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * params["norm"]["scale"]
    np.testing.assert_allclose(Normed().apply({"params": params}, x), expected + params["norm"]["bias"], atol=1e-5)


def test_group_norm_keeps_samples_independent():
    for name in ("resnet8", "densenet8", "mlp"):
        module = models.create(name, norm="group")
        shape = (32, 32, zoo.channels(name))
        assert samples_are_independent(make_apply(module), _shapes(module, shape), shape)


def test_bad_options_are_one_clear_line():
    for name, options, message in (
        ("resnet21", {}, "did you mean 'resnet"),
        ("resnet8", {"norms": "batch"}, "did you mean 'norm'"),
        ("resnet8", {"norm": "layer"}, "Unknown norm 'layer'"),
        ("resnet8", {"norm": "none", "norm_batch_size": 4}, "Expected norm='none' to be 'batch'"),
        ("resnet8", {"norm_batch_size": 0}, "norm_batch_size=0"),
        ("resnet8", {"norm": "group", "norm_momentum": 0.9}, "Expected norm='group' to be 'batch' with norm_momentum"),
        ("mlp", {"norm_momentum": 0.9}, "Expected norm='none' to be 'batch' with norm_momentum=0.9"),
        ("resnet8", {"norm_momentum": 1}, r"norm_momentum=1 in \[0, 1\)"),
        ("resnet8", {"norm_momentum": "0.9"}, "norm_momentum='0.9' in"),
        ("resnet18", {"stem": "cifar10"}, "did you mean 'cifar'"),
        ("resnet8", {"stem": "cifar"}, "option of resnet8 'stem'"),
        ("resnet8", {"dtype": "float64"}, "Unknown dtype"),
        ("resnet8", {"init": "xavier"}, "Unknown init 'xavier'"),
        ("resnet8", {"drop_path": 1.0}, "drop_path=1.0"),
        ("alexnet_reduced", {"norm_dense": True}, "norm_dense=True"),
        ("alexnet_reduced", {"norm_dense": "no"}, "norm_dense='no' to be True or False"),
        ("mlp", {"widths": 5}, "widths=5 to be a sequence"),
        ("mlp", {"widths": [8, 2.5]}, r"widths\[1\]=2.5 to be a whole number"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            models.create(name, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="did you mean 'resnet"):
        models.options("resnet21")
    assert models.create("mlp", np.int64(3), dropout=np.float32(0.5)).num_classes == 3
