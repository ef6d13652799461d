"""`run_population`: configurations in, a result each out, trained by one program as far as they may share it."""

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hardjax._by_name import is_own
from hardjax._validate import Refusal
from hardjax.config import Performance, TrainConfig
from hardjax.data import Dataset, load
from hardjax.engine.population import split
from hardjax.engine.recipe import Functions, functions_named, functions_of
from hardjax.training import checkpoint, files
from hardjax.training.population import check_members, not_resident, prepare_population, wanted
from hardjax.training.population_run import seconds_a_step, train_population
from hardjax.training.run import RunResult
from hardjax.training.setting import must_stream
from hardjax.training.signals import interruptible

_TOGETHER = ("vmap", "map")


def run_population(
    configs: Iterable[TrainConfig],
    *,
    dataset: Dataset | None = None,
    model: Any = None,
    variables: Any = None,
    performance: Performance | None = None,
    output: str | os.PathLike | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> list[RunResult]:
    """Train runs that differ in seed, rates, weight decay, momentum, schedule or warm-up by one program.

    Each result is that of `run` with the same configuration: to the bit under `Performance(population="map")` on a CPU,
    to rounding under "vmap". A member whose parameters are no numbers any more is kept as it is from its next test
    point on (`summary["end"]` is "diverged", and its history ends there); it changes nothing for the others.

    Args:
        configs: of the members.
        dataset, model, variables: as in `run`, for all members.
        performance: `population` says how, `population_chunk` how many at once; the rest as in `run`. Later stages of a
            batch plan are compiled when they are needed.
        output: folder; `members/0000` and so on hold what that of a run does.
        overwrite, resume, progress: as in `run`. What "auto" chose is kept by what goes on.

    Returns:
        A result a member, in their order; of those that a signal left out none: fewer than asked for.

    Raises:
        ValueError: members differ in something else, which is named; a controller or `on_nan="stop"`; what `run`
            refuses.
    """
    configs = tuple(configs)
    check_members(configs)
    performance = Performance() if performance is None else performance
    mode = wanted(performance, "map")
    if mode == "workers":
        raise Refusal(
            "Expected population='vmap', 'map' or 'auto' in run_population, got 'workers': `hj.sweep` and `hardjax"
            " sweep` train a member a process."
        )
    if dataset is None and must_stream(configs[0], performance):
        raise not_resident(configs[0].dataset)  # before all of it is read into memory
    # Once: every chunk would load the data, and compile programs of its own for a network of one's own.
    dataset = load(configs[0].dataset, configs[0].data_dir) if dataset is None else dataset
    if model is not None:
        model = functions_of(model)
    elif is_own(configs[0].model):
        model = _named(configs[0], dataset)
    places, chunks = split(len(configs), performance.population_chunk)
    results: list[RunResult] = []
    with ExitStack() as held:
        folders = None if output is None else _folders(held, output, len(configs), overwrite, resume)
        asked = held.enter_context(interruptible())

        def population(mode: str, members: range) -> Any:
            own = [configs[index] for index in members]
            return prepare_population(own, dataset, model, performance, variables, mode=mode, places=places)

        if mode == "auto":
            kept = None if folders is None or not resume else mode_of(folders)
            mode = kept or fastest({mode: population(mode, chunks[0]) for mode in modes(len(configs))})
        for members in chunks:
            if asked:
                break
            own = None if folders is None else [folders[index] for index in members]
            results += train_population(population(mode, members), own, resume=resume, progress=progress)
    return results


def _named(config: TrainConfig, dataset: Dataset) -> Functions:
    outputs = dataset.with_validation(config.validation).num_outputs
    return functions_named(config.model, outputs, config.model_options)


def modes(count: int) -> tuple[str, ...]:
    """What may be fastest in one process."""
    return _TOGETHER if count > 1 else ("map",)


def fastest(populations: dict[str, Any]) -> str:
    """The mode that takes the least time a step, tried over a few steps where there are several."""
    if len(populations) == 1:
        return next(iter(populations))
    return min(populations, key=lambda mode: seconds_a_step(populations[mode]))


def mode_of(folders: Sequence[Path]) -> str | None:
    """How members were trained that folders hold a part of; None where they hold none."""
    for folder in folders:
        for one in checkpoint.kept(folder):
            return "map" if one.facts.get("rounds_like", {}).get("population") is None else "vmap"
    return None


def _folders(held: ExitStack, output: str | os.PathLike, count: int, overwrite: bool, resume: bool) -> list[Path]:
    """Of the members, in a folder that is held."""
    if overwrite and resume:
        raise Refusal("Give overwrite=True or resume=True, not both.")
    folder = files.check_folder(output, overwrite or resume)
    others = [name for name in files.FILES if name != files.MEMBERS and os.path.lexists(folder / name)]
    if resume and others:
        raise Refusal(f"{str(folder)!r} holds no population ({', '.join(others)}); name another folder.")
    folder = held.enter_context(files.claim_folder(output, overwrite, keep=resume))
    (folder / files.MEMBERS).mkdir(exist_ok=True)
    files.mark(folder / files.MEMBERS)
    return [folder / files.MEMBERS / f"{index:04}" for index in range(count)]
