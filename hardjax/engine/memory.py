"""What a run needs of its device's memory, and what the device has: too much is refused before the first step.

`Need` and `refusal` are pure; `available` looks at the device, and `check` refuses.
"""

import dataclasses
import gc
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hardjax._validate import OutOfMemory
from hardjax.data import Dataset
from hardjax.engine.optimizers import Hyper, make_optimizer
from hardjax.engine.recipe import splits_on_device
from hardjax.engine.state import Recipe

_SMALLER_NETWORK = "take a smaller network"
_SMALLER_BATCH = 'take a smaller batch_size, a smaller network or, of the zoo, model_options {"dtype": "bfloat16"}'
# Kind of program -> what it does, and what to change where it is the program that does not fit.
_TRAINING = "training", _SMALLER_BATCH
_WORDS = {
    "init": ("drawing the first state", _SMALLER_NETWORK),
    "restage": ("drawing batches of another size", _SMALLER_NETWORK),
    "plan": ("planning a round", _SMALLER_NETWORK),
    "segment": _TRAINING,
    "rounds": _TRAINING,
    "look": ("measuring spectra", "measure smaller batches"),
    "evaluate": ("evaluation", "take a smaller Performance.eval_batch_size"),
    "evaluate part": ("evaluation", "take a smaller Performance.eval_batch_size"),
    "statistics": ("estimating batch statistics", "take a smaller batch_size or Performance.eval_batch_size"),
    "predict": ("prediction", "predict fewer images at a time"),
}
# XLA's convolutions on a CPU copy what they pad, in memory of their own that no program names: 0.3 to 0.4 of the
# temporaries where nothing else is kept (ResNet-8, scripts/bench_memory.py); steps of training take no more than they
# say.
_UNNAMED = {"look": 0.3, "evaluate": 0.3, "evaluate part": 0.3, "statistics": 0.3, "predict": 0.3}


class Temporary(NamedTuple):
    """What one program takes while it runs, beside the arrays it is given.

    Attributes:
        name: what it does.
        size: bytes.
        advice: what to change where it does not fit.
    """

    name: str
    size: int
    advice: str


@dataclass(frozen=True)
class Need:
    """Bytes that a run needs on its device, by what.

    Attributes:
        data: images and labels of all splits.
        state: parameters, statistics, optimiser, table, partition, counts.
        copies: of the state, while a checkpoint is written and the device is the host itself.
        programs: of which one runs at a time.
    """

    data: int = 0
    state: int = 0
    copies: int = 0
    programs: tuple[Temporary, ...] = ()

    @property
    def standing(self) -> int:
        """What is there whichever program runs."""
        return self.data + self.state + self.copies

    @property
    def largest(self) -> Temporary | None:
        return max(self.programs, key=lambda program: program.size, default=None)

    @property
    def total(self) -> int:
        return self.standing + (self.largest.size if self.largest else 0)

    def adding(self, programs: Iterable[Temporary]) -> "Need":
        return dataclasses.replace(self, programs=(*self.programs, *programs))


def refusal(need: Need, room: int, device: str) -> str | None:
    """One line where more is needed than there is room for: how much, for what, and what to change; else None."""
    if need.total <= room:
        return None
    parts = {"data": need.data, "state": need.state, "a copy of the state for checkpoints": need.copies}
    if need.largest is not None:
        parts[need.largest.name] = need.largest.size
    listed = ", ".join(f"{name} {shown(size)}" for name, size in parts.items() if size)
    return (
        f"Expected a run that fits the memory: it needs {shown(need.total)} ({listed}), and {device} has"
        f" {shown(room)} for it; {'; '.join(_changes(need, room))}."
    )


def _changes(need: Need, room: int) -> list[str]:
    """What to change, the most effective first, each once."""
    if need.standing <= room:
        # Each of these alone is too much: changing the largest would bring the next one to light.
        over = [program for program in need.programs if need.standing + program.size > room]
        changes = [program.advice for program in sorted(over, key=lambda program: -program.size)]
    else:
        of_state = need.state + need.copies
        parts = {"train on fewer or smaller images": need.data, _SMALLER_NETWORK: of_state}
        # A quarter of it, or it would hardly help.
        heavy = [words for words, size in parts.items() if 4 * size >= need.standing]
        changes = sorted(heavy, key=lambda words: -parts[words])
    return list(dict.fromkeys(changes))


def shown(size: float) -> str:
    """Bytes in MiB or GiB, three digits."""
    number, unit = (size / 2**30, "GiB") if size >= 2**30 else (size / 2**20, "MiB")
    # By what it rounds to: 9.996 is 10.0.
    decimals = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:.{decimals}f} {unit}"


def scaled(program: Temporary, fixed: int, ratio: float, name: str) -> Temporary:
    """An estimate of the same program at another batch size: gradients stay, what a batch keeps grows with it.

    Args:
        fixed: bytes that do not depend on the batch size, such as those of one gradient.
        ratio: of the batch sizes.
    """
    fixed = min(fixed, program.size)
    return Temporary(name, fixed + math.ceil((program.size - fixed) * ratio), program.advice)


def temporary(kind: str, compiled: Any, advice: str | None = None) -> Temporary | None:
    """What a compiled program takes while it runs; None where the back end does not say.

    Args:
        kind: as in `Programs`.
        compiled: of `jax.jit(...).lower(...).compile()`.
        advice: what to change where it does not fit; None: what is usual for its kind.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    # Results that take the place of donated arguments need no room of their own.
    results = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
    unnamed = _UNNAMED.get(kind, 0) if jax.default_backend() == "cpu" else 0
    size = math.ceil((1 + unnamed) * stats.temp_size_in_bytes) + results + stats.generated_code_size_in_bytes
    name, usual = _WORDS[kind]
    return Temporary(name, size, advice or usual)


def size_of(tree: Any, where: Callable[[Any], bool] = lambda leaf: True) -> int:
    """Bytes of the arrays, or shapes with dtypes, of a tree; of those leaves alone that `where` takes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if where(leaf))


def held(*trees: Any) -> int:
    """Bytes of what is on the device already: of arrays, not of shapes; each once, however often it is named."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(trees)}
    return size_of(list(leaves.values()), lambda leaf: isinstance(leaf, jax.Array))


def check(need: Need, *there: Any) -> None:
    """Look whether the device that arrays go to has room.

    Args:
        there: trees with what of the need is on the device already.

    Raises:
        OutOfMemory: it has not.
    """
    (device,) = jnp.zeros(()).devices()
    line = _refused(need, held(there), device)
    if line is not None:
        # Neither what a dispatch in flight takes (what comes out of it is among `there`), nor the states of earlier
        # runs that hang in reference cycles, are a reason to refuse.
        jax.block_until_ready(there)
        gc.collect()
        line = _refused(need, held(there), device)
    if line is not None:
        raise OutOfMemory(line)


def _refused(need: Need, holding: int, device: jax.Device) -> str | None:
    free = available(device)
    name = "this machine" if device.platform == "cpu" else f"the {device.device_kind}"
    return None if free is None else refusal(need, free + holding, name)


def check_network(recipe: Recipe, variables: Any, dataset: Dataset, hyper: Hyper) -> None:
    """Look whether parameters, statistics and what the optimiser keeps have room beside the data; from shapes alone, so
    that nothing of their size has been made.

    Args:
        variables: shapes of {"params", "batch_stats"}.

    Raises:
        OutOfMemory: they have not.
    """
    optimizer = make_optimizer(recipe.optimizer, hyper, jnp.float32(0))
    state = (variables, jax.eval_shape(optimizer.init, variables["params"]))
    splits = splits_on_device(dataset)
    check(Need(data=size_of(splits), state=size_of(state)), splits)


def available(device: jax.Device) -> int | None:
    """Bytes that the device has left; None where that cannot be told."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return max(0, stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return _of_host() if device.platform == "cpu" else None


def _of_host(root: Path = Path("/")) -> int | None:
    """The machine's memory that is left, or what a container may still take, whichever is smaller."""
    known = [size for size in (_of_machine(root), *_of_groups(root)) if size is not None]
    return max(0, min(known)) if known else None


def _of_machine(root: Path) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 2**10
    # All of it, where what is left of it is not told (macOS): then the impossible alone is refused.
    for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        try:
            return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            continue
    return None


def _of_groups(root: Path) -> Iterable[int]:
    """What each control group above this process may still take, of version 1 and 2."""
    mounted = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, usage, cache = mounted, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, cache = mounted / "memory", "total_"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container the path is the host's, which is not there; the container's own group is then mounted on top.
        group = top / path.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            most, used = _number(folder / limit), _number(folder / usage)
            if most is not None and used is not None:
                stat = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat"))
                # The kernel drops pages of files before it refuses memory.
                yield most - used + sum(int(stat.get(f"{cache}{kind}_file", 0)) for kind in ("active", "inactive"))


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no file, or a word such as max."""
    text = "".join(_lines(path))
    return int(text) if text.isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
