"""What spectra of per-sample gradients cost: a Gram matrix over a gradient, training with measures over without.

    python scripts/bench_fisher.py [--models resnet20 cbrcb_resnet110] [--batches 32 128] [--repeats 5] [--builtin]

All times are medians within this one process, forms taken in turn, each of several steps: a compiled scan, as in
training, or that many calls in a row.
`gram/grad` is one Gram matrix of contribution rows (layers) over one gradient of the mean loss, `vmap/layers` the
definition (a gradient with respect to one copy of the parameters a sample) over it, with the same convolution;
--builtin adds the definition with XLA's own convolution. `memory` is the temporaries of the Gram program over those
of a training step. `every` is seconds per step of training that measures, over training that does not.

--models takes networks of the zoo and of bench_networks.py; the rows of the latter are checked first, as those of
people's own are.

--rivals compares with PyTorch's libraries where they are installed, on networks that they accept. TorchJD's engine
gives the Gram matrix; for BackPACK (which takes chains of layers alone) and Opacus it is formed from the per-sample
gradients that they give.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench_networks import NETWORKS, create
from jax import lax

import hardjax as hj
from hardjax.models import layers
from hardjax.models.apply import init_variables, make_apply

SHAPE = (32, 32, 3)
RIVALS = ("alexnet_reduced", "plain", "mlp", "vit_small")
STEPS = 4


def medians(
    forms: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each form, taken in turn after a warm-up of each."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for repeat in range(repeats + 1):
        for name, form in forms.items():
            time.sleep(0.3)  # another form's idle threads may spin for a while
            form()  # wakes this one's threads, fills the caches
            started = clock()
            form()
            if repeat:
                times[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def programs(name: str, batch: int, wanted: list[str], **options: Any) -> dict[str, tuple[Callable[[], Any], float]]:
    """form -> (runs it STEPS times, MiB of temporaries); each is the body of a scan."""
    module = create(name, **options)
    apply, optimizer = make_apply(module), optax.sgd(0.01, 0.9)
    variables = jax.jit(partial(init_variables, module, image_shape=SHAPE))(jax.random.key(0))
    images = jnp.asarray(np.random.default_rng(0).random((STEPS, batch, *SHAPE), np.float32))
    labels = jnp.arange(batch) % 10
    if name in NETWORKS:
        hj.fisher.coverage(module, variables, images[0], labels)

    def loss(params, images):
        logits, _ = apply({**variables, "params": params}, images, True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(carry, images):
        params, momentum = carry
        updates, momentum = optimizer.update(jax.grad(loss)(params, images), momentum)
        return (optax.apply_updates(params, updates), momentum), None

    def gram(method):
        fn = hj.fisher.make_gram(module, method=method)
        return lambda params, images: (params, fn({**variables, "params": params}, images, labels))

    def total(gradients):
        """A number that every gradient is needed for."""
        return sum(leaf.sum() for leaf in jax.tree.leaves(gradients))

    bodies = {
        "grad": lambda params, images: (params, total(jax.grad(loss)(params, images))),
        "layers": gram("layers"),
        "vmap": gram("vmap"),
        "step": step,
    }
    start = {"step": (variables["params"], optimizer.init(variables["params"]))}
    found = {}
    for form in wanted:
        carry = start.get(form, variables["params"])
        scan = jax.jit(partial(lax.scan, bodies[form])).lower(carry, images).compile()
        memory = scan.memory_analysis()
        found[form] = (
            lambda scan=scan, carry=carry: jax.block_until_ready(scan(carry, images)),
            float("nan") if memory is None else memory.temp_size_in_bytes / 2**20,
        )
    return found


def single(
    name: str, batch: int, repeats: int, vmap: bool, clock: Callable[[], float], **options: Any
) -> dict[str, float]:
    """One Gram matrix next to one gradient."""
    found = programs(name, batch, ["grad", "layers", "step", *(["vmap"] if vmap else [])], **options)
    times = medians({form: run for form, (run, _) in found.items()}, repeats, clock)
    row = {"grad_ms": 1e3 / STEPS * times["grad"], "gram/grad": times["layers"] / times["grad"]}
    if vmap:
        row["vmap/layers"] = times["vmap"] / times["layers"]
    return row | {"memory_mib": found["layers"][1], "memory": found["layers"][1] / found["step"][1]}


def in_training(name: str, batch: int, steps: int, repeats: int) -> dict[str, float]:
    """Seconds per step with measures over those without, of whole runs."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch * steps, *SHAPE), np.uint8)
    data = hj.data.Dataset.from_arrays(
        images, rng.integers(0, 10, len(images)), images[:64], np.arange(64) % 10, num_classes=10, name="random"
    )
    times: dict[int, list[float]] = {0: [], 50: [], 16: []}
    for repeat in range(repeats + 1):
        for every in times:
            config = hj.TrainConfig(
                model=name,
                epochs=1,
                batch_size=batch,
                learning_rate=0.01,
                evaluate_train=False,
                seed=repeat,
                measure=hj.fisher.FisherMeasure(every=every) if every else None,
            )
            summary = hj.run(config, dataset=data, progress=False).summary
            if repeat:
                times[every].append(summary["seconds_per_step"])
    plain = statistics.median(times[0])
    return {"step_ms": 1e3 * plain} | {
        f"every {every}": statistics.median(times[every]) / plain for every in times if every
    }


def torch_forms(name: str, batch: int) -> dict[str, Callable[[], Any]]:
    """Gram matrices of one of `RIVALS` by the libraries that are installed and take it, STEPS of each."""
    try:
        import torch
        import torch_networks
        from torch import nn
    except ImportError:
        print("PyTorch is not installed: no comparison with its libraries.")
        return {}
    images, labels = torch.rand(batch, 3, 32, 32), torch.arange(batch) % 10

    def network() -> Any:
        torch.manual_seed(0)
        return {
            "mlp": lambda: torch_networks.perceptron(3072),
            "alexnet_reduced": torch_networks.reduced_alexnet,
            "plain": torch_networks.plain,
            "vit_small": torch_networks.ViT,
        }[name]()

    def product(rows: Any) -> Any:
        return sum(flat @ flat.T for flat in (row.detach().reshape(batch, -1) for row in rows))

    forms = {}
    try:
        from torchjd.autogram import Engine

        jd = network()
        engine = Engine(jd, batch_dim=0)
        criterion = nn.CrossEntropyLoss(reduction="none")
        forms["TorchJD"] = lambda: engine.compute_gramian(criterion(jd(images), labels))
    except ImportError:
        print("TorchJD is not installed.")
    try:
        import backpack
        from backpack.extensions import BatchGrad

        extended = backpack.extend(network())
        summed = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))

        def by_backpack() -> Any:
            extended.zero_grad()
            with backpack.backpack(BatchGrad()):
                summed(extended(images), labels).backward()
            return product([parameter.grad_batch for parameter in extended.parameters()])

        if name != "vit_small":
            forms["BackPACK"] = by_backpack
    except ImportError:
        print("BackPACK is not installed.")
    try:
        from opacus.grad_sample import GradSampleModule

        sampled = GradSampleModule(network(), loss_reduction="sum")
        total = nn.CrossEntropyLoss(reduction="sum")

        def by_opacus() -> Any:
            sampled.zero_grad()
            for parameter in sampled.parameters():
                parameter.grad_sample = None
            total(sampled(images), labels).backward()
            return product([parameter.grad_sample for parameter in sampled.parameters()])

        forms["Opacus"] = by_opacus
    except ImportError:
        print("Opacus is not installed.")
    return {name: lambda form=form: [form() for _ in range(STEPS)] for name, form in forms.items()}


def show(title: str, row: Mapping[str, float]) -> None:
    print(f"{title}: " + ", ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["resnet20", "cbrcb_resnet110"])
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="steps of each training run; 0 leaves this part out")
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=RIVALS, help="networks to race PyTorch's on")
    parser.add_argument("--processor", action="store_true", help="time of the processor, for a machine that others use")
    parser.add_argument("--no-vmap", action="store_true", help="leave the definition out (slow)")
    parser.add_argument("--builtin", action="store_true", help="the definition also with XLA's own convolution")
    options = parser.parse_args()
    if options.builtin and not options.models:
        parser.error("--builtin needs one of --models")
    clock = time.process_time if options.processor else time.perf_counter
    print(hj.results.environment())
    for name in options.models:
        for batch in options.batches:
            show(f"{name}, B={batch}", single(name, batch, options.repeats, not options.no_vmap, clock))
    if options.builtin:
        own = layers.convolve
        layers.convolve = lax.conv_general_dilated
        batch = min(options.batches)
        slow = programs(options.models[0], batch, ["vmap"])["vmap"][0]
        layers.convolve = own
        fast = programs(options.models[0], batch, ["layers"])["layers"][0]
        times = medians({"slow": slow, "fast": fast}, 1)
        show(f"{options.models[0]}, B={batch}, built-in", {"vmap/layers": times["slow"] / times["fast"]})
    for name, batch in itertools.product(options.rivals, options.batches):
        forms = torch_forms(name, batch)
        if forms:
            times = medians(forms | {"ours": programs(name, batch, ["layers"])["layers"][0]}, options.repeats, clock)
            ours = times.pop("ours")
            row = {"ours_ms": 1e3 / STEPS * ours} | {f"{form}/ours": t / ours for form, t in times.items()}
            show(f"{name}, B={batch}", row)
    for name in [name for name in options.models if name not in NETWORKS] if options.steps else []:
        for batch in options.batches:
            show(f"training {name}, B={batch}", in_training(name, batch, options.steps, options.repeats))


if __name__ == "__main__":
    main()
