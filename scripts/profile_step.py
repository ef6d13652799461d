"""What a training step on CPU spends its time on, beside PyTorch's, by what the operations serve.

    python scripts/profile_step.py [--models resnet20 mlp] [--batches 32 128] [--steps 6]

Each for itself on one thread, so that no operation waits for another one. Ours is the compiled round, data and the loss
table included, read from XLA's own trace by named scopes; a fused operation counts for the scope that its result was
written in. PyTorch's (scripts/torch_networks.py, channels-last, batches made before) is read from its profiler by
operation. Shares are of the time of all operations of that side; times are of a machine that others may use, so compare
them within one run.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ["JAX_PLATFORMS"] = "cpu"

import argparse
import collections
import gzip
import json
import re
import tempfile
from pathlib import Path

import jax
import numpy as np

import hardjax as hj
from hardjax.engine.plan import dispatches, step_inputs
from hardjax.engine.rounds import make_rounds
from hardjax.models.zoo import ZOO
from hardjax.training.setting import prepare

SCOPES = ("optimiser", "data", "selection", "counts", "loss", "normalisation", "convolution", "dense", "gradient")
# The first that a PyTorch operation's name contains.
OPERATIONS = {
    "convolution": "convolution",
    "batch_norm": "normalisation",
    "mm": "dense",
    "softmax": "loss",
    "nll_loss": "loss",
    "_foreach": "optimiser",
    "Optimizer": "optimiser",
}
NAMES = {"gradient": "network", "counts": "selection"}


def ours(name: str, batch: int, steps: int) -> dict[str, float]:
    """Milliseconds a step by column, of one round of so many steps."""
    shape = ZOO[name].image_shape
    images = np.random.default_rng(0).integers(0, 256, (batch * steps, *shape), np.uint8)
    labels = np.arange(len(images)) % 10
    dataset = hj.data.Dataset.from_arrays(images, labels, images[:64], labels[:64], num_classes=10, name="random")
    config = hj.TrainConfig(
        model=name, batch_size=batch, learning_rate=0.01, weight_decay=1e-4, augmentation="standard"
    )
    setting = prepare(config, dataset, performance=hj.Performance(steps_per_dispatch=steps))
    dispatch = next(dispatches(setting.plan))
    args = (setting.init_state(), setting.splits["train"], setting.hyper, step_inputs(setting.plan, dispatch))
    compiled = jax.jit(make_rounds(setting.recipe, dispatch.spec)).lower(*args).compile()
    scopes = dict(re.findall(r"%?([\w.\-]+) = .*?op_name=\"([^\"]*)\"", compiled.as_text()))
    jax.block_until_ready(compiled(*args))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(compiled(*args))
        (file,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    found = collections.Counter()
    for event in alone(event for event in events if event.get("args", {}).get("hlo_op")):
        found[_column(scopes.get(event["name"], ""))] += event["own"] / 1e3 / dispatch.trained
    return dict(found)


def alone(events) -> list[dict]:
    """The events with `own`, what each took without those inside it (a loop's body)."""
    found, open_ones = [], []
    for event in sorted(events, key=lambda event: (event["tid"], event["ts"], -event["dur"])):
        while open_ones and (open_ones[-1]["tid"], event["ts"]) >= (event["tid"], open_ones[-1]["end"]):
            open_ones.pop()
        event = {**event, "own": event["dur"], "end": event["ts"] + event["dur"]}
        if open_ones and open_ones[-1]["tid"] == event["tid"]:
            open_ones[-1]["own"] -= event["dur"]
        else:
            open_ones.clear()
        open_ones.append(event)
        found.append(event)
    return found


def _column(scope: str) -> str:
    within = set(re.split(r"[/()]+", scope))
    column = next((column for column in SCOPES if column in within), "other")
    return NAMES.get(column, column)


def torchs(name: str, batch: int, steps: int) -> dict[str, float]:
    """The same of PyTorch's network; nothing where it is not installed."""
    try:
        import torch
        from torch_networks import create
    except ImportError:
        return {}
    torch.set_num_threads(1)
    module = create(name).train()
    optimizer = torch.optim.SGD(module.parameters(), 0.01, 0.9, weight_decay=1e-4)
    height, width, channels = ZOO[name].image_shape
    images = torch.rand(batch, channels, height, width).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch) % 10

    def train(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(module(images), labels).backward()
            optimizer.step()

    train(2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(steps)
    found = collections.Counter()
    for event in profile.key_averages():
        column = next((column for part, column in OPERATIONS.items() if part in event.key), "network")
        found[column] += event.self_cpu_time_total / 1e3 / steps
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet20", "mlp"])
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    print(hj.results.environment())
    columns = ["convolution", "normalisation", "dense", "network", "loss", "optimiser", "data", "selection", "other"]
    print("| network | batch | whose | ms a step | " + " | ".join(columns) + " |")
    print("| --- " * (4 + len(columns)) + "|")
    for name in options.models:
        for batch in options.batches:
            for whose, measure in (("ours", ours), ("PyTorch", torchs)):
                if found := measure(name, batch, options.steps):
                    total = sum(found.values())
                    shares = [f"{found.get(column, 0) / total:.0%}" for column in columns]
                    print(f"| {name} | {batch} | {whose} | {total:.1f} | " + " | ".join(shares) + " |", flush=True)


if __name__ == "__main__":
    main()
