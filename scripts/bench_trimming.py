"""What a trimmed step costs, as a share of the untrimmed one, and the memory that it needs.

    python scripts/bench_trimming.py [--models mlp resnet8 ...] [--repeats 7]

Every form runs its steps in one compiled scan over the same random images; forms are taken in turn and ratios are of
medians within this one process. `forward` is the share f of a forward pass alone, `update` that of the optimiser alone,
which no trimming saves; the forms that skip the backward pass of dropped samples (`gather`, `reuse`) should stay near
min(1, f + p); `plain` is the gradient of the trimmed mean of the whole batch; `auto` is what a run of 150 epochs takes
at that share, room for other shares of its program included. PyTorch, where it is installed, runs the same network with
`topk` on the losses of the whole batch.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import bench_networks
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import hardjax as hj
from hardjax.choose.selection import AllBatches
from hardjax.choose.trimming import Trim, Trimming
from hardjax.engine.optimizers import make_optimizer
from hardjax.engine.rounds import RoundSpec, make_rounds
from hardjax.engine.state import StepInputs
from hardjax.engine.trials import trim_paths
from hardjax.training.setting import Setting, prepare

SHARES = (1.0, 0.8, 0.5, 0.35, 0.2)
MODELS = {
    "mlp": ("mlp", {}, (32, 32, 1)),
    "resnet8": ("resnet8", {"norm": "none"}, (32, 32, 3)),
    "resnet8-bn": ("resnet8", {}, (32, 32, 3)),
    "alexnet": ("alexnet_reduced", {}, (32, 32, 3)),
    # P2's own example of a network without batch norm; of `bench_networks`.
    "transformer": ("vit_small", {}, (32, 32, 3)),
}


def make_setting(name: str, batch_size: int, steps: int) -> Setting:
    model, options, shape = MODELS[name]
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (batch_size * steps, *shape), np.uint8), np.arange(batch_size * steps) % 10
    dataset = hj.data.Dataset.from_arrays(images, labels, images[:64], labels[:64], num_classes=10, name="random")
    # 150 epochs as published: how many counts share a program of `auto` follows from them.
    config = hj.TrainConfig(
        model=model, model_options=options, batch_size=batch_size, learning_rate=0.001, epochs=150, trimming=Trimming()
    )
    own = bench_networks.NETWORKS.get(model)
    return prepare(config, dataset, None if own is None else own())


def make_forward(setting: Setting, steps: int) -> Callable:
    """The scoring passes of a round alone."""
    apply = setting.recipe.apply

    def forward(state, data, hyper, inputs):
        def one(total, slot):
            indices = state.partition[slot]
            images = (data.images[indices] / 255.0 - data.mean) / data.std
            # The sum so far goes in, so that no pass can be left out or moved.
            logits = apply(state.variables, images + 0 * total, True, jax.random.key(0))[0]
            return total + logits.sum(), None

        return lax.scan(one, jnp.float32(0), jnp.arange(steps))[0]

    return forward


def make_update(setting: Setting) -> Callable:
    """The updates of a round alone, from a gradient that is at hand."""

    def update(state, data, hyper, inputs):
        def one(carry, rate):
            params, opt_state = carry
            optimizer = make_optimizer(setting.recipe.optimizer, hyper, rate)
            updates, opt_state = optimizer.update(jax.tree.map(jnp.cos, params), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return lax.scan(one, (state.params, state.opt_state), inputs.learning_rate)[0]

    return update


def programs(setting: Setting, steps: int) -> dict[str, tuple]:
    """Form -> (compiled program, its arguments)."""
    size, trims = setting.sizes.batch_size, setting.plan.stages[0].trims

    def trained(trim: Trim | None) -> Callable:
        return make_rounds(setting.recipe, RoundSpec(AllBatches(fixed=True), steps, trim=trim))

    wanted = {
        "untrimmed": (trained(None), size),
        "forward": (make_forward(setting, steps), size),
        "update": (make_update(setting), size),
    }
    for share in SHARES:
        keep = max(1, round(share * size))
        for path in trim_paths(setting.recipe).exact:
            if path == "plain":
                wanted[f"plain {share:g}"] = (trained(trims.plain), keep)
            elif keep < size:
                wanted[f"{path} {share:g}"] = (trained(Trim(path, keep)), keep)
        if keep < size:
            wanted[f"auto {share:g}"] = (trained(trims.trim(keep)), keep)
    compiled = {}
    for form, (fn, keep) in wanted.items():
        inputs = StepInputs(jnp.full(steps, 0.001, jnp.float32), jnp.full(steps, keep, jnp.int32))
        args = (setting.init_state(), setting.splits["train"], setting.hyper, inputs)
        compiled[form] = (jax.jit(fn).lower(*args).compile(), args)
    return compiled


def measure(setting: Setting, steps: int, repeats: int) -> None:
    compiled = programs(setting, steps)
    times: dict[str, list[float]] = {form: [] for form in compiled}
    for repeat in range(repeats + 1):
        for form, (program, args) in compiled.items():
            started = time.perf_counter()
            jax.block_until_ready(program(*args))
            if repeat:
                times[form].append((time.perf_counter() - started) / steps)
    medians = {form: statistics.median(values) for form, values in times.items()}
    whole, memory = medians["untrimmed"], compiled["untrimmed"][0].memory_analysis().temp_size_in_bytes
    f, update = medians["forward"] / whole, medians["update"] / whole
    print(
        f"  untrimmed step {1e3 * whole:.2f} ms; forward f = {f:.2f}; update {update:.2f};"
        f" temporary memory {memory / 2**20:.1f} MiB"
    )
    print("  form           time / untrimmed   allowed 1.1 min(1, f + p)   memory / untrimmed")
    for form, (program, _) in compiled.items():
        if " " not in form:
            continue
        share = float(form.split()[1])
        allowed = f"{1.1 * min(1, f + share):.2f}" if not form.startswith("plain") else "-"
        room = program.memory_analysis().temp_size_in_bytes / memory
        print(f"  {form:<14} {medians[form] / whole:>16.2f} {allowed:>27} {room:>20.2f}")


def measure_torch(name: str, batch_size: int, steps: int, repeats: int) -> None:
    """The same shares through `topk` on one big backward pass."""
    try:
        import torch
        import torch_networks
        from torch import nn
    except ImportError:
        print("  PyTorch is not installed: left out")
        return
    model = {
        "mlp": torch_networks.perceptron,
        "alexnet": torch_networks.reduced_alexnet,
        "resnet8": lambda: torch_networks.he_resnet(1, norm=False),
        "resnet8-bn": lambda: torch_networks.he_resnet(1),
        "transformer": torch_networks.ViT,
    }[name]().to(memory_format=torch.channels_last)
    height, width, channels = MODELS[name][2]
    images = torch.randn(batch_size, channels, height, width).to(memory_format=torch.channels_last)
    labels = torch.arange(batch_size) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)

    def step(keep: int) -> None:
        losses = nn.functional.cross_entropy(model(images), labels, reduction="none")
        loss = losses.mean() if keep == batch_size else losses.topk(keep).values.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    counts = {share: max(1, round(share * batch_size)) for share in SHARES}
    times: dict[float, list[float]] = {share: [] for share in SHARES}
    for repeat in range(repeats + 1):
        for share, keep in counts.items():
            started = time.perf_counter()
            for _ in range(steps):
                step(keep)
            if repeat:
                times[share].append((time.perf_counter() - started) / steps)
    medians = {share: statistics.median(values) for share, values in times.items()}
    ratios = ", ".join(f"{share:g}: {medians[share] / medians[1.0]:.2f}" for share in SHARES)
    print(f"  PyTorch {torch.__version__}: untrimmed step {1e3 * medians[1.0]:.2f} ms; topk over untrimmed {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="steps in one scan")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print(hj.results.environment())
    for name in options.models:
        print(f"{name}, batch {options.batch_size}")
        measure(make_setting(name, options.batch_size, options.steps), options.steps, options.repeats)
        measure_torch(name, options.batch_size, options.steps, options.repeats)


if __name__ == "__main__":
    main()
