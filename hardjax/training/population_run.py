"""A population trained to its end: a run's result, and a run's files, for each of its members."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hardjax._validate import Refusal
from hardjax.engine.population import stack
from hardjax.training import checkpoint, files
from hardjax.training import resume as resuming
from hardjax.training.loop import Loop
from hardjax.training.population import Population
from hardjax.training.population_loop import Member, PopulationLoop
from hardjax.training.progress import ProgressBar, Silent
from hardjax.training.resume import Start
from hardjax.training.run import RunResult, begin, check_output, explained_memory, is_told, result_of, write
from hardjax.training.saver import PopulationSaver, check_space
from hardjax.training.setting import Setting
from hardjax.training.signals import Asked, interruptible


def train_population(
    population: Population,
    folders: Sequence[str | os.PathLike] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
    keep: bool = True,
) -> list[RunResult]:
    """`train` of all members at once.

    Each member's folder holds what that of a run alone holds. Going on begins at the last save that all members have
    which have not ended; under "map" to the same bits as if nothing had been interrupted.

    Args:
        folders: of the members, in their order; None writes nothing.
        overwrite, resume, progress, keep: as in `train`.

    Raises:
        ValueError: a folder holds another run, or cannot be written.
        OutOfMemory: (a ValueError and a MemoryError) of the device.
    """
    plain = [one.config.to_dict() for one in population.members]
    for folder in folders or ():
        check_output(folder, overwrite, resume)
    with ExitStack() as held:
        claimed, saver = _claimed(held, population, folders, overwrite)
        starts = _starts(claimed, population) if resume else [None] * len(plain)
        bar = ProgressBar(population.config.epochs, f"{len(plain)} members", population.plan.steps)
        bar = held.enter_context(bar if progress else Silent())
        asked = held.enter_context(interruptible())
        with explained_memory(population):
            for folder, config, start in zip(claimed, plain, starts, strict=True):
                if folder is not None and (start is None or start.end is None):
                    begin(folder, config, resume, start)
            members = [
                Member(one, folder, start)
                for one, folder, start in zip(population.members, claimed, starts, strict=True)
            ]
            ended = {index for index, one in enumerate(members) if one.end is not None}
            if len(ended) < len(members):
                loop = PopulationLoop(population, bar, members, saver, _together(population, starts))
                end = loop.go(asked)
                if saver is not None and (keep or end == "interrupted") and loop.live:
                    saver.finish(loop.state, loop.facts(None if end == "interrupted" else end))
                loop.conclude(end)
        results = [_result(population, one, asked) for one in members]
        for index, (folder, result) in enumerate(zip(claimed, results, strict=True)):
            interrupted = result.summary["end"] == "interrupted"
            # Of one that had ended before, where its last files are not there.
            if folder is not None and (keep or interrupted) and not (index in ended and is_told(folder, result)):
                write(folder, result)
    return results


def seconds_a_step(setting: Setting) -> float:
    """Wall time of a step, of a population's of all members; timed over its first dispatch, compilation aside."""
    # The first time is the device's and the allocator's as well.
    return min(_timed(setting) for _ in range(2))


def _timed(setting: Setting) -> float:
    loop: Loop
    if isinstance(setting, Population):
        loop = _UntestedPopulation(setting, Silent(), [Member(one, None, None) for one in setting.members])
    else:
        loop = _UntestedRun(setting, Silent(), 0.0)
    loop.go(Asked(time.monotonic()))
    return loop.seconds / max(1, loop.position.backprops)


class _UntestedRun(Loop):
    def _test(self) -> None:
        self._drain()


class _UntestedPopulation(PopulationLoop):
    def _test(self) -> None:
        self._drain()


def _claimed(
    held: ExitStack, population: Population, folders: Sequence[str | os.PathLike] | None, overwrite: bool
) -> tuple[list[Path | None], PopulationSaver | None]:
    """The folders, held, and what saves into them."""
    if folders is None:
        return [None] * len(population.members), None
    performance = population.performance
    limit = None if performance.checkpoint_gigabytes is None else 1e9 * performance.checkpoint_gigabytes
    check_space(limit, population.members[0].state_shapes(), len(population.members))
    claimed = [held.enter_context(files.claim_folder(folder, overwrite, keep=True)) for folder in folders]
    for folder in claimed:
        checkpoint.clean(folder)
    return list(claimed), held.enter_context(PopulationSaver(claimed, performance.save_every, limit))


def _starts(folders: Sequence[Path | None], population: Population) -> list[Start | None]:
    """Where each member goes on: all that have not ended after the same back-propagations, or at the beginning."""
    found = [None if folder is None else resuming.find(folder, one) for folder, one in _pairs(folders, population)]
    under_way = [index for index, start in enumerate(found) if start is None or start.end is None]
    steps = [{one.step for one in checkpoint.kept(folders[index] or "")} for index in under_way]
    # What `find` passed over is damaged.
    newest = min((0 if (start := found[index]) is None else start.position.backprops for index in under_way), default=0)
    for common in sorted(set.intersection(*steps) if steps else (), reverse=True):
        if common <= newest and _go_on_from(common, found, under_way, folders, population):
            return found
    for index in under_way:
        found[index] = None
    return found


def _go_on_from(
    common: int,
    found: list[Start | None],
    under_way: Sequence[int],
    folders: Sequence[Path | None],
    population: Population,
) -> bool:
    """Let these members go on from there; False where the checkpoint of one is damaged."""
    for index in under_way:
        folder, start = folders[index], found[index]
        assert folder is not None
        if start is None or start.position.backprops != common:
            try:
                found[index] = resuming.find(folder, population.members[index], common)
            except Refusal:
                return False
    return True


def _pairs(folders: Sequence[Path | None], population: Population) -> Iterator[tuple[Path | None, Any]]:
    return zip(folders, population.members, strict=True)


def _together(population: Population, starts: Sequence[Start | None]) -> Start | None:
    """The stacked state of members that go on; in the places of the others lies a copy of one of them."""
    going = next((start for start in starts if start is not None and start.end is None), None)
    if going is None:
        return None
    states = [going.state if start is None or start.end is not None else start.state for start in starts]
    states += [going.state] * (population.places - len(states))
    return Start(stack(states), going.position, {}, 0.0, 0.0, 0.0, 0.0, going.resumed_at, None)


def _result(population: Population, one: Member, asked: Asked) -> RunResult:
    assert one.end is not None
    result = result_of(one.setting, one, one.end, asked.signal if one.end == "interrupted" else None)
    result.summary["population"] = {"mode": population.mode, "members": population.places}
    return result
