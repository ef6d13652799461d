"""What a sweep would take, found by trying one cell of each shape for a moment."""

import time
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax

from hardjax.engine.memory import Need, size_of
from hardjax.engine.norm_statistics import RE_ESTIMATED
from hardjax.engine.population import member_of
from hardjax.study.cells import Cell
from hardjax.study.outcomes import reason_of
from hardjax.study.work import Trainer
from hardjax.training.feed import Feed, evaluated
from hardjax.training.loop import Loop
from hardjax.training.population import Population, wanted
from hardjax.training.population_loop import Member, PopulationLoop
from hardjax.training.progress import Silent
from hardjax.training.signals import Asked

_SECONDS = 2.0  # of training, besides compiling


class Estimate(NamedTuple):
    """Of one cell, on the processors that tried it; of a member of a population its share of the time.

    Attributes:
        members: of the program that would train it, this one among them; 1: alone.
        programs: compiled for it, those that it shares with cells of other shapes aside.
        compile_seconds: for them; next to nothing where the compilation cache holds them.
        bytes: most that its program needs at a time, the data included.
        steps: back-propagations.
        seconds_per_step: timed over a few of them.
        test_seconds: of all its test points.
    """

    members: int
    programs: int
    compile_seconds: float
    bytes: int
    steps: int
    seconds_per_step: float
    test_seconds: float

    @property
    def seconds(self) -> float:
        """Of training and testing, compiling aside."""
        return self.steps * self.seconds_per_step + self.test_seconds


def estimate(trainer: Trainer, cell: Cell, places: int = 1, seconds: float = _SECONDS) -> Estimate:
    """Compile a cell's programs, train it for about so many seconds, test it once, and forget it.

    Args:
        places: members of the programs of its shape, where a population is asked for.

    Raises:
        ValueError: what its run would refuse.
    """
    mode = wanted(trainer.performance, "workers")
    together = places > 1 and mode in ("vmap", "map")
    setting = trainer.population([cell.config] * places, mode, places) if together else trainer.setting(cell.config)
    programs = setting.programs
    before, compiled = sum(programs.traces.values()), programs.compile_seconds
    if isinstance(setting, Population):
        members = [Member(one, None, None) for one in setting.members]
        loop: Loop = PopulationLoop(setting, Silent(), members)
    else:
        need = setting.compile(True)
        loop = Loop(setting, Silent(), compiled)
    loop.go(Asked(time.monotonic() + seconds))
    if isinstance(setting, Population):
        need = Need(size_of(setting.splits), size_of(loop.state)).adding(programs.temporaries())
    sizes = {name: split.labels.shape[0] for name, split in setting.splits.items()}
    samples = sum(count for name, count in sizes.items() if name != "train" or cell.config.evaluate_train)
    if cell.config.norm_statistics == RE_ESTIMATED:  # a pass of its own
        samples += sizes["train"]
    steps, each = loop.position.backprops, places if together else 1
    variables = member_of(loop.state, 0).variables if together else loop.state.variables
    alone = trainer.setting(cell.config) if together else setting
    return Estimate(
        members=each,
        programs=sum(programs.traces.values()) - before,
        compile_seconds=programs.compile_seconds - compiled,
        bytes=need.total,
        steps=setting.plan.steps,
        seconds_per_step=loop.seconds / steps / each if steps else float("nan"),
        test_seconds=_tests(cell) * samples * _seconds_per_sample(alone, variables, sizes["test"]),
    )


def tried(trainer: Trainer, cell: Cell, places: int = 1) -> Estimate | str:
    """`estimate` of a cell, or why its row would say that it failed."""
    try:
        return estimate(trainer, cell, places)
    except (Exception, SystemExit) as error:
        return reason_of(error)


def _tests(cell: Cell) -> float:
    """Test points, of rounds that are as long as an epoch."""
    every = cell.config.test_every
    return cell.config.epochs / every if isinstance(every, int) else float(cell.config.epochs)


def _seconds_per_sample(setting: Any, variables: Any, samples: int) -> float:
    with Feed(setting) if setting.dataset.streamed else nullcontext() as feed:

        def evaluate() -> None:
            jax.block_until_ready(evaluated(setting, variables, "test", feed))

        evaluate()  # compiled, and its arrays where they should be
        began = time.perf_counter()
        evaluate()
        return (time.perf_counter() - began) / samples
