"""Training-step time, compile time and memory of each network, and the ratio to PyTorch where it is installed.

    python scripts/bench_models.py [--models resnet18 ...] [--batches 8 32] [--repeats 5] [--processor] [--csv FILE]

A step is forward, backward and SGD with momentum, several in one compiled scan as in training, at the paper's image
size. PyTorch (timm's networks, or scripts/torch_networks.py, channels-last, the same cores) takes turns with it in this
one process; `ratio` is its median step time over ours, so above 1 is faster than PyTorch. `memory` is
the peak that the compiled program states: arguments, results and temporaries. On a machine that others use, take one
thread each (`OMP_NUM_THREADS=1`, `XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"`) and
`--processor`.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from hardjax import models
from hardjax.models.apply import init_variables, make_apply
from hardjax.models.zoo import ZOO

STEPS = 3


def jax_steps(name: str, batch: int) -> tuple[Callable[[], None], float, float]:
    """(run STEPS steps, seconds to trace and compile, MiB at the peak)"""
    shape = ZOO[name].image_shape
    module = models.create(name)
    apply, optimizer = make_apply(module), optax.sgd(0.01, 0.9)
    variables = jax.jit(partial(init_variables, module, image_shape=shape))(jax.random.key(0))
    images = jnp.asarray(np.random.default_rng(0).random((STEPS, batch, *shape), np.float32))
    labels = jnp.arange(batch) % 10

    def step(carry, images):
        params, batch_stats, momentum = carry

        def loss(params):
            logits, new = apply({"params": params, "batch_stats": batch_stats}, images, True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

        (value, batch_stats), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, momentum = optimizer.update(gradients, momentum)
        return (optax.apply_updates(params, updates), batch_stats, momentum), value

    carry = (variables["params"], variables["batch_stats"], optimizer.init(variables["params"]))
    started = time.perf_counter()
    compiled = jax.jit(lambda carry, images: lax.scan(step, carry, images)).lower(carry, images).compile()
    seconds = time.perf_counter() - started
    # Not peak_memory_in_bytes, which on CPU leaves most temporaries out.
    memory, parts = compiled.memory_analysis(), ("argument", "output", "temp")
    peak = float("nan") if memory is None else sum(getattr(memory, f"{part}_size_in_bytes") for part in parts) / 2**20
    return lambda: jax.block_until_ready(compiled(carry, images)), seconds, peak


def torch_steps(name: str, batch: int) -> Callable[[], None] | None:
    """Run STEPS steps of PyTorch's network of that name; None without PyTorch or such a network."""
    try:
        import torch
        from torch_networks import create
    except ImportError:
        return None
    module = create(name)
    if module is None:
        print(f"{name}: neither in scripts/torch_networks.py nor in timm as installed, so no ratio")
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = module.to(device).train()
    height, width, channels = ZOO[name].image_shape
    optimizer = torch.optim.SGD(module.parameters(), 0.01, 0.9)
    images = torch.rand(STEPS, batch, channels, height, width, device=device)
    images = [image.contiguous(memory_format=torch.channels_last) for image in images]
    labels = (torch.arange(batch) % 10).to(device)

    def run() -> None:
        for image in images:
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(module(image), labels).backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def bench(name: str, batch: int, repeats: int, clock: Callable[[], float]) -> dict[str, object]:
    run, compile_seconds, memory = jax_steps(name, batch)
    forms = {"ours": run, "torch": torch_steps(name, batch)}
    forms = {form: steps for form, steps in forms.items() if steps is not None}
    times: dict[str, list[float]] = {form: [] for form in forms}
    for steps in forms.values():
        steps()
    for _ in range(repeats):
        for form, steps in forms.items():
            time.sleep(0.3)  # the other form's idle threads may spin for a while
            steps()  # wakes this one's threads, fills the caches
            started = clock()
            steps()
            times[form].append((clock() - started) / STEPS)
    medians = {form: statistics.median(values) for form, values in times.items()}
    return {
        "model": name,
        "image": "x".join(map(str, ZOO[name].image_shape)),
        "batch": batch,
        "step_ms": round(1000 * medians["ours"], 1),
        "torch_ms": round(1000 * medians["torch"], 1) if "torch" in medians else None,
        "ratio": round(medians["torch"] / medians["ours"], 2) if "torch" in medians else None,
        "compile_s": round(compile_seconds, 1),
        "memory_mib": round(memory),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=models.names(), choices=models.names())
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processor", action="store_true", help="time of the processor, for a machine that others use")
    parser.add_argument("--csv", help="also write the rows here")
    options = parser.parse_args()
    try:
        import torch

        print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    except ImportError:
        print("PyTorch is not installed: no ratios.")
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")
    clock = time.process_time if options.processor else time.perf_counter
    rows = []
    for name in options.models:
        for batch in options.batches:
            rows.append(bench(name, batch, options.repeats, clock))
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items() if value is not None), flush=True)
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
