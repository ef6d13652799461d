"""What a GPU would launch, seen on a machine without one: every kind of program compiled for an H100 and counted.

    pip install "jax==0.12.0" "flax>=0.12.8" "optax>=0.2.8" scikit-learn tyro rich scipy
    pip install --no-deps jax-cuda12-pjrt==0.12.0 jax-cuda12-plugin==0.12.0 nvidia-cuda-nvcc-cu12
    pip install --no-deps -e .
    python scripts/gpu_programs.py [--models resnet20 mlp] [--programs round] [--batch 128] [--check]

In an environment of its own (Python 3.12 or later, 1.3 GB): no CUDA library, no driver and no GPU is needed, for the
compiler alone is used. Nothing runs and nothing is timed. What a compiler with a GPU at hand would try out and choose
by time (which cuDNN algorithm, which tiles of a matrix product and whether it is split and padded) stays at its
default; the counts of such launches may differ a little on a real one.

A launch is an operation of the optimised, scheduled program that becomes a kernel, a library call (which may launch
more than one kernel) or a copy. `a step` counts those inside the loop over steps, by what they serve: read from the
named scopes of the outermost results of a kernel, so that a kernel that also recomputes something counts for what it
hands on. `network` is what else the network does (activations, shortcuts, pools). `outside` counts those of a call that
are not repeated with every step. XLA may put runs of them into CUDA graphs, which makes each cheaper and none fewer.

`gpu_programs.json` keeps the counts by jax version; `--check` compares with them instead of writing (exit status 1 if
there are more launches, more transfers between device and host, or more loops of unknown length, whose predicate the
host reads at every turn; a round may have none of the last two).
"""

import argparse
import collections
import functools
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

# Before JAX looks for devices: a GPU that happens to be here has no part in it.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # it warns of every choice that it cannot time

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import hardjax as hj
from hardjax.choose.selection import HardBatches
from hardjax.choose.trimming import Trimming
from hardjax.engine.devices import BATCH
from hardjax.engine.programs import lowerable
from hardjax.engine.state import StepInputs
from hardjax.fisher.observe import FisherMeasure
from hardjax.fisher.rules import rule
from hardjax.models.zoo import ZOO

FILE = Path(__file__).with_suffix(".json")
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# Named scope -> column; where scopes lie in each other the first one listed counts.
SCOPES = {
    "measure": "measure",
    "optimiser": "optimiser",
    "data": "data",
    "trimming": "selection",
    "selection": "selection",
    "counts": "selection",
    "loss": "loss",
    "normalisation": "normalisation",
    "convolution": "convolution",
    "dense": "dense",
    "gradient": "network",
}
COLUMNS = [*dict.fromkeys(SCOPES.values()), "other"]
# These become nothing on a device.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"}
_FREE |= {"add-dependency", "replica-id", "domain"}
_TRANSFERS = {"infeed", "outfeed", "send", "recv"}


class Instruction(NamedTuple):
    """One line of a program's text: what it is called, what it does, the rest of the line."""

    name: str
    opcode: str
    rest: str
    root: bool

    def called(self, role: str) -> str | None:
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.rest)
        return found and found.group(1)

    @property
    def scope(self) -> str:
        """The path of named scopes that it was written in."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return found.group(1) if found else ""


@dataclass
class Found:
    """What a call of a program launches.

    Attributes:
        steps: back-propagations, or batches, of a call.
        step: launches a step, by column.
        kinds: the same by kind.
        outside: launches of a call that are not repeated with every step.
        loops: known lengths, the outermost first.
        unknown: loops of unknown length.
        transfers: of data or predicates between device and host.
    """

    steps: int
    step: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    outside: int = 0
    loops: list[int] = field(default_factory=list)
    unknown: int = 0
    transfers: int = 0
    temporary_mib: float = 0.0

    @property
    def launches(self) -> int:
        return sum(self.step.values())


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """({computation: instructions}, the entry's name) of a compiled program's text."""
    computations: dict[str, list[Instruction]] = {}
    entry, inside = "", None
    for line in text.splitlines():
        if not line.startswith(" "):
            head = re.match(r"(ENTRY )?%([\w.\-]+) \(", line)
            inside = computations.setdefault(head.group(2), []) if head else None
            entry = head.group(2) if head and head.group(1) else entry
        elif inside is not None and (match := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)):
            opcode, rest = _after_type(line[match.end() :])
            inside.append(Instruction(match.group(2), opcode, rest, bool(match.group(1))))
    return computations, entry


def _after_type(text: str) -> tuple[str, str]:
    """(opcode, what follows it) behind the type of the result, which may be a tuple of types."""
    depths = itertools.accumulate((letter in "([{") - (letter in ")]}") for letter in text)
    end = next(place for place, depth in enumerate(depths) if depth == 0 and text[place] == " ")
    opcode, rest = text[end + 1 :].split("(", 1)
    return opcode, rest


def count(text: str, steps: int) -> Found:
    """The launches of a compiled program's text.

    Args:
        steps: repetitions of what counts as one step; launches repeated less often are `outside`.
    """
    computations, entry = parse(text)
    found = Found(steps)
    step, kinds = collections.Counter(), collections.Counter()

    def walk(name: str, times: int) -> None:
        for one in computations[name]:
            if one.opcode in _FREE or one.opcode.endswith("-done"):
                continue
            if one.opcode == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', one.rest)
                body, condition = one.called("body"), one.called("condition")
                if trips:
                    found.loops.append(int(trips.group(1)))
                    walk(body, times * int(trips.group(1)))
                else:
                    found.unknown += 1
                    walk(condition, times)
                    walk(body, times)
                continue
            if one.opcode == "call":
                walk(one.called("to_apply"), times)
                continue
            if one.opcode == "conditional":
                # The host reads which branch; the longest one counts.
                found.transfers += 1
                listed = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
                branches = re.findall(r"[\w.\-]+", listed.group(1)) if listed else []
                branches += filter(None, (one.called(f"{which}_computation") for which in ("true", "false")))
                walk(max(branches, key=lambda branch: len(computations[branch])), times)
                continue
            target = re.search(r'custom_call_target="([^"]*)"', one.rest)
            if one.opcode.removesuffix("-start") in _TRANSFERS or (target and re.search("callback|[Hh]ost", target[1])):
                found.transfers += 1
            if times < steps:
                found.outside += times
                continue
            step[_serves(one, computations, computations[name])] += times // steps
            kinds[_kind(one, target and target.group(1))] += times // steps

    walk(entry, 1)
    found.step = {column: step[column] for column in COLUMNS if step[column]}
    found.kinds = dict(sorted(kinds.items()))
    return found


def _kind(one: Instruction, target: str | None) -> str:
    if target is not None:
        for library in ("cudnn", "cublas", "cusolver", "cufft"):
            if library in target.lower():
                return library
        return "sort" if "cub" in target.lower() or "sort" in target.lower() else target
    if one.opcode == "fusion" and re.search("gemm|dot", one.name):
        return "product"
    return "copy" if one.opcode.startswith("copy") else one.opcode.removesuffix("-start")


def _serves(one: Instruction, computations: dict[str, list[Instruction]], around: list[Instruction]) -> str:
    """The column of a launch: that of most of its results, else of most of what it computes, else of the first that
    reads it; of a copy that leaves a loop's body, that of what is copied."""
    inner = computations.get(one.called("calls") or "", [])
    roots = [each for each in inner if each.root]
    if roots and roots[0].opcode == "tuple":
        names = set(re.findall(r"%([\w.\-]+)", roots[0].rest))
        roots = [each for each in inner if each.name in names]
    for group in (roots, [one], inner):
        columns = collections.Counter(filter(None, map(_column, group)))
        if columns:
            return columns.most_common(1)[0][0]
    reader = next((each for each in around if re.search(rf"%{re.escape(one.name)}\b(?![.\-])", each.rest)), None)
    if reader is not None and not reader.root:
        return _serves(reader, computations, around)
    return _made_by(one, around) if one.opcode == "copy" else "other"


def _made_by(one: Instruction, around: list[Instruction]) -> str:
    made = {each.name: each for each in around}
    while (read := re.match(r"%([\w.\-]+)", one.rest)) and read.group(1) in made:
        one = made[read.group(1)]
        if column := _column(one):
            return column
    return "other"


def _column(one: Instruction) -> str | None:
    # jvp(loss), transpose(jvp(loss)) and vmap(loss) are the scope and what is derived from it.
    within = set(re.split(r"[/()]+", one.scope))
    return next((column for scope, column in SCOPES.items() if scope in within), None)


# --------------------------------------------------------------------------------------------------------------- cases

# Name -> (network, options, image shape): those of which every program is looked at, and those of which few are.
CIFAR = (32, 32, 3)
WHOLE = {name: (name, {}, ZOO[name].image_shape) for name in ("resnet20", "mlp")}
# Without batch statistics trimmed steps have ways of their own.
UNNORMALISED = {"resnet20 norm=none": ("resnet20", {"norm": "none"}, CIFAR)}
OTHERS = {name: (name, {}, entry.image_shape) for name, entry in ZOO.items() if name not in WHOLE}
MODELS = {**WHOLE, **UNNORMALISED, **OTHERS}
BATCHES = (128, 16)
EVALUATED = 500  # samples at a time


class Program(NamedTuple):
    """A function with its arguments' shapes; steps of a call; whether the first argument is donated."""

    fn: Callable
    args: tuple
    steps: int
    donate: bool


@functools.cache
def random_images(shape: tuple[int, int, int], num_samples: int, classes: int) -> hj.data.Dataset:
    rng = np.random.default_rng(0)

    def split(samples: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.integers(0, 256, (samples, *shape), np.uint8), np.arange(samples) % classes

    return hj.data.Dataset.from_arrays(
        *split(num_samples), *split(num_samples // 5), num_classes=classes, name="random", flip=shape == CIFAR
    )


def of_run(model: str, batch: int, named: str, *, batches: int | None = None, bound=10**6, path="auto", **changes):
    """The longest program of a run whose name matches `named`, a pattern: shorter ones train what is left over."""
    name, options, shape = MODELS[model]
    classes = ZOO[name].num_classes
    # 50,000 as CIFAR has; large images are fewer, which changes no step.
    samples = batch * batches if batches else 50_000 if shape[0] <= 32 else 20 * batch
    config = hj.TrainConfig(
        model=name,
        model_options=options,
        batch_size=batch,
        epochs=3,
        learning_rate=0.1,
        weight_decay=1e-4,
        augmentation="standard",
        **changes,
    )
    programs = lowerable(
        config,
        random_images(shape, samples, classes),
        bound=bound,
        eval_batch_size=EVALUATED,
        trim_path=path,
        trim_programs=1,
    )
    matching = [found for key, found in programs.items() if re.fullmatch(named, key)]
    fn, args = max(matching, key=lambda found: _steps(found[1]))
    return Program(fn, args, _steps(args), donate=isinstance(args[-1], StepInputs))


def _steps(args: tuple) -> int:
    """Steps of a call of training, batches of one of evaluation."""
    if isinstance(args[-1], StepInputs):
        return args[-1].keep.shape[0]
    evaluated = len(args) == 2 and isinstance(args[0], dict)
    return -(-args[1].labels.shape[0] // EVALUATED) if evaluated else 1


def trimmed(model: str, batch: int, path: str) -> Program:
    keep = "random" if path == "masked" else "hardest"
    wanted = "plain" if path == "masked" else path
    trimming = Trimming(start=0.5, end=0.2, keep=keep)
    return of_run(model, batch, rf"rounds \d+x\d+ {path} \d+", path=wanted, trimming=trimming)


def measured(model: str, batch: int, named: str, rows: str = "contribution") -> Program:
    return of_run(model, batch, named, measure=FisherMeasure(every=50, rows=rows))


def population(model: str, batch: int, members: int) -> Program:
    """The plain round over members that share the data."""
    fn, (state, data, hyper, inputs), steps, donate = of_run(model, batch, r"rounds \d+x\d+")
    many = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((members, *leaf.shape), leaf.dtype), (state, hyper, inputs))
    return Program(jax.vmap(fn, (0, None, 0, 0)), (many[0], data, *many[1:]), steps, donate)


# Name -> (model, batch) -> Program.
PROGRAMS: dict[str, Callable[[str, int], Program]] = {
    "init": lambda model, batch: of_run(model, batch, "init"),
    "round": lambda model, batch: of_run(model, batch, r"rounds \d+x\d+"),
    "replay": lambda model, batch: of_run(model, batch, r"rounds \d+x\d+", selection=HardBatches(0.2)),
    "short rounds": lambda model, batch: of_run(
        model, batch, r"rounds \d+x2", batches=10, bound=64, selection=HardBatches(0.2)
    ),
    "trimmed plain": lambda model, batch: trimmed(model, batch, "plain"),
    "trimmed masked": lambda model, batch: trimmed(model, batch, "masked"),
    "trimmed gather": lambda model, batch: trimmed(model, batch, "gather"),
    "trimmed reuse": lambda model, batch: trimmed(model, batch, "reuse"),
    "observed segment": lambda model, batch: measured(model, batch, r"segment \d+"),
    "look contribution": lambda model, batch: measured(model, batch, "look"),
    "look frozen": lambda model, batch: measured(model, batch, "look", "frozen"),
    "look coupled": lambda model, batch: measured(model, batch, "look", "coupled"),
    "evaluate": lambda model, batch: of_run(model, batch, "evaluate"),
    "predict": lambda model, batch: of_run(model, batch, "predict"),
    "vmap 8": lambda model, batch: population(model, batch, 8),
    "vmap 32": lambda model, batch: population(model, batch, 32),
}


def cases() -> Iterator[tuple[str, int, str]]:
    """(model, batch, program) of everything that is looked at."""
    by_losses = [name for name in PROGRAMS if name.startswith("trimmed") and name != "trimmed plain"]
    for model in WHOLE:
        for batch in BATCHES:
            for program in PROGRAMS:
                # Batch statistics leave a trimmed step one way; a perceptron has none. Evaluation has its own batch.
                elsewhere = [*by_losses] if model == "resnet20" else []
                elsewhere += ["evaluate", "predict"] if batch != BATCHES[0] else []
                if program not in elsewhere:
                    yield model, batch, program
    for model in UNNORMALISED:
        for program in ("round", *by_losses):
            yield model, 128, program
    for model in OTHERS:
        yield model, 128, "round"


def make_mesh(count: int) -> Mesh:
    """So many H100s of one machine, none of which is here."""
    topology = topologies.get_topology_desc("h100", "cuda", target_config=TARGET, topology=f"1x1x{count}")
    return Mesh(np.array(topology.devices), (BATCH,), axis_types=(AxisType.Auto,))


def check_compiler() -> None:
    """End with status 3 (2 is a wrong option) where there is no compiler for CUDA."""
    try:
        _place()
    except Exception as error:
        print(f"No compiler for CUDA here ({str(error).splitlines()[0]}): see --help.", file=sys.stderr)
        sys.exit(3)


@functools.cache
def _place() -> NamedSharding:
    return NamedSharding(make_mesh(1), PartitionSpec())


def compile_for_h100(program: Program) -> Any:
    """The executable; it cannot be called."""
    args = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_place()), program.args)
    jitted = jax.jit(program.fn, donate_argnums=(0,) if program.donate else ())
    # Rules of per-sample rows have forms for a CPU, and ask while they are traced.
    with mock.patch.object(rule, "on_cpu", lambda: False):
        lowered = jitted.lower(*args)
    return lowered.compile()


def measure(model: str, batch: int, name: str) -> tuple[Found, float]:
    """(what a program launches, seconds to trace and compile it)."""
    program = PROGRAMS[name](model, batch)
    started = time.perf_counter()
    compiled = compile_for_h100(program)
    found = count(compiled.as_text(), program.steps)
    found.temporary_mib = round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1)
    return found, time.perf_counter() - started


def worse(key: str, found: Found, kept: dict[str, Any]) -> list[str]:
    """What is worse than what the file keeps of the program `key`."""
    numbers = {
        "launches a step": (found.launches, sum(kept["step"].values())),
        "launches outside the steps": (found.outside, kept["outside"]),
        "loops of unknown length": (found.unknown, kept["unknown"]),
        "transfers": (found.transfers, kept["transfers"]),
    }
    lines = [f"{now} {name}, {before} before" for name, (now, before) in numbers.items() if now > before]
    return lines + forbidden(key, found)


def forbidden(key: str, found: Found) -> list[str]:
    """What no program of training may have, whatever the file keeps."""
    if "look" in key or not (found.unknown or found.transfers):
        return []
    return [f"{found.unknown} loops of unknown length and {found.transfers} transfers"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS))
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--check", action="store_true", help="compare with the file, write nothing")
    options = parser.parse_args(arguments)
    check_compiler()
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    mine = kept.setdefault(jax.__version__, {})
    print("| network | batch | program | a step | " + " | ".join(COLUMNS) + " | kinds | outside | loops | MiB | s |")
    print("| --- " * (9 + len(COLUMNS)) + "|")
    failures = []
    for model, batch, name in cases():
        if model not in options.models or batch not in options.batch or name not in options.programs:
            continue
        found, seconds = measure(model, batch, name)
        key = f"{model}, {batch}, {name}"
        print(_row(model, batch, name, found, seconds), flush=True)
        if options.check:
            lines = worse(key, found, mine[key]) if key in mine else ["not in the file"]
            failures += [f"{key}: {line}" for line in lines]
        else:
            # After each: the whole list takes half an hour.
            mine[key] = {k: v for k, v in vars(found).items() if v is not None}
            kept[jax.__version__] = dict(sorted(mine.items()))
            FILE.write_text(_json(kept))
    for line in failures:
        print(line, file=sys.stderr)
    return 1 if failures else 0


def _row(model: str, batch: int, name: str, found: Found, seconds: float) -> str:
    kinds = ", ".join(f"{kind} {number}" for kind, number in found.kinds.items())
    loops = " ".join(map(str, found.loops)) + (f", {found.unknown} unknown" if found.unknown else "")
    loops += f", {found.transfers} transfers" if found.transfers else ""
    cells = [found.step.get(column, "") for column in COLUMNS]
    row = [
        model,
        batch,
        name,
        found.launches,
        *cells,
        kinds,
        found.outside,
        loops,
        found.temporary_mib,
        f"{seconds:.0f}",
    ]
    return "| " + " | ".join(map(str, row)) + " |"


def _json(kept: dict[str, Any]) -> str:
    """A line a program, so that a change reads well."""
    versions = []
    for version, programs in sorted(kept.items()):
        lines = (f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in programs.items())
        versions.append(f"  {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(versions) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
