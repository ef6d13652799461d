"""`hardjax sweep`."""

import dataclasses
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from hardjax._axis import dash
from hardjax._validate import Refusal, local_folder, shown
from hardjax.cli import output, prepare
from hardjax.cli.data import say
from hardjax.cli.options import Settings, model_options, with_axes
from hardjax.cli.parsing import Folder, Number, optional, parse, told, typed
from hardjax.config import Performance, TrainConfig

_SHOWN = 5  # failed cells named on the screen
# Option of several values -> those that the grid would override in silence.
_OVERRIDDEN = {
    "batch_sizes": ("batch_size", "batch_plan", "batch_plans"),
    "base_learning_rates": ("base_learning_rate", "learning_rate", "learning_rates"),
    "learning_rates": ("learning_rate", "base_learning_rate"),
    "models": ("model",),
    "augmentations": ("augmentation",),
    "warmups": ("warmup",),
    "selections": ("selection", "delta", "fixed"),
    "batch_plans": ("batch_plan", "batch_size"),
    "model_options": (),
    "rates_from": ("base_learning_rate", "learning_rate", "base_learning_rates", "learning_rates"),
}


@dataclass(frozen=True)
class Sweep(Settings):
    """A grid of runs, by several processes at once: a row a cell in sweep.jsonl, and pictures drawn from it.

    The grid is every combination of the values given. The same command again goes on where it stopped; another grid
    adds its cells. Numbers may be powers, as 2^-8.
    """

    batch_sizes: Annotated[tuple[int, ...], told("sizes of mini-batches")] = ()
    base_learning_rates: Annotated[tuple[float, ...], told("rates per sample of the batch (P4's axis)")] = ()
    learning_rates: Annotated[tuple[float, ...], told("peak rates, in place of base rates")] = ()
    rates_from: Annotated[
        str | None, optional("DIR", "a finished sweep: the base rate of its best cell at the same batch size")
    ] = None
    seeds: Annotated[int, told("how many, from --seed on")] = 1
    models: Annotated[tuple[str, ...], told("networks")] = ()
    model_options: Annotated[
        tuple[str, ...], told("values of their options, one name several times: norm=batch norm=group")
    ] = ()
    augmentations: Annotated[tuple[str, ...], told("presets of --augmentation")] = ()
    warmups: Annotated[tuple[float, ...], told("shares of training with a rising rate")] = ()
    selections: Annotated[tuple[str, ...], told("strategies, as all-batches or hard-batches:0.5")] = ()
    batch_plans: Annotated[tuple[str, ...], told("batch sizes that change, in place of --batch-sizes")] = ()
    workers: Annotated[str, told("processes, a core and a thread each; auto: one a core, on a GPU one in all")] = "auto"
    launcher: Annotated[str, told("what workers are: processes of this machine (local) | tasks of Ray (ray)")] = "local"
    task_cpus: Annotated[float, told("processors that each task asks Ray for")] = 1.0
    task_gpus: Annotated[float, told("GPUs that each task asks Ray for")] = 0.0
    population: Annotated[
        str | None,
        optional("MODE", "cells that share a program: vmap (at once) | map | workers (one by one) | auto (by timing)"),
    ] = None
    population_chunk: Annotated[int | None, optional("CELLS", "most of them in one program; default: 32")] = None
    max_hours: Annotated[Number, told("end after that time, saved, with status 0; the same command goes on")] = None
    retry_failed: Annotated[bool, told("train cells again that failed")] = False
    dry_run: Annotated[bool, told("train nothing: cells, compilations, time and memory")] = False
    plot: Annotated[Folder, told("train nothing: draw the pictures of that sweep again")] = None
    output: Annotated[str, told("folder for what is written")] = "runs/sweep"
    resume: Annotated[bool, told("what a sweep does anyway")] = False

    def performance(self) -> Performance:
        own = {"population": self.population, "population_chunk": self.population_chunk}
        return dataclasses.replace(super().performance(), **own)


def run(arguments: list[str]) -> int:
    """Sweep as the arguments say; returns the exit code."""
    options = parse(with_axes(Sweep), "sweep", arguments)
    if options.plot is not None:
        if others := sorted(typed(arguments) - {"--plot", "--quiet"}):
            raise Refusal(f"Give --plot without {others[0]}: it trains nothing, and draws from the rows alone.")
        _pictures(local_folder(plot=options.plot))
        return 0
    prepare.use_compilation_cache()
    from hardjax.cli.sweep_screen import Screen, plan_table
    from hardjax.study import sweep as sweeping
    from hardjax.study.ledger import check

    workers = _workers(options.workers)
    folder = check(options.output, options.overwrite)
    _check_read(options, arguments)
    configs, left_out = _cells(options)
    if left_out and not options.quiet:
        cells = "1 cell is" if left_out == 1 else f"{left_out} cells are"
        say(f"{cells} left out: norm_batch_size does not divide the batch size")
    if options.dry_run:
        plan_table(configs, options, workers, folder)
        return 0
    with Screen(options.quiet) as screen:
        found = sweeping.sweep(
            configs,
            output=folder,
            performance=options.performance(),
            workers=workers,
            max_hours=options.max_hours,
            overwrite=options.overwrite,
            retry_failed=options.retry_failed,
            rates_from=options.rates_from,
            launcher=options.launcher,
            task_cpus=options.task_cpus,
            task_gpus=options.task_gpus,
            on_progress=screen,
        )
    return _tell(found, folder)


def _tell(found: Any, folder: Path) -> int:
    from hardjax.cli.sweep_screen import tell_rates

    tell_rates(row.get("rate_from") for row in found.rows)
    if found.rows:
        _pictures(folder)
    states = Counter(row["status"] for row in found.rows)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    print(f"{len(found.rows)} of {len(found.rows) + found.left} cells have a row{f' ({counts})' if counts else ''}")
    for row in found.failed[:_SHOWN]:
        print(f"hardjax: failed: {_name(row['config'])}: {row['reason']}", file=sys.stderr)
    if len(found.failed) > _SHOWN:
        print(f"hardjax: and {len(found.failed) - _SHOWN} more, see {folder / 'sweep.jsonl'}", file=sys.stderr)
    if found.left:
        cells = "1 cell is" if found.left == 1 else f"{found.left} cells are"
        print(f"hardjax: {cells} left; the same command goes on from there.", file=sys.stderr)
    if found.signal:
        return 128 + signal.Signals[found.signal]
    return 1 if found.failed else 0


def _pictures(folder: Path) -> None:
    """Draw the figures of a sweep into its folder, and print its best rates."""
    from hardjax.plots import sweep as plots
    from hardjax.study.grids import grids
    from hardjax.study.norm_grids import norm_grids
    from hardjax.study.sweep_rows import read_rows

    rows = read_rows(folder)
    found = grids(rows)
    pictures = dict.fromkeys(("performance", "best", "reliable", "curves"), found)
    if parted := norm_grids(rows):
        pictures["norm_batches"] = parted
    drawn = [
        name
        for name, given in pictures.items()
        if output.picture(folder / f"{name}.png", lambda name=name, given=given: getattr(plots, name)(given))
    ]
    for grid in found:
        if rows := _best_rows(grid):
            output.table(grid.label, rows)
    print(f"written to {folder}: sweep.jsonl{''.join(f', {name}.png' for name in drawn)}")


def _best_rows(grid: Any) -> list[dict[str, Any]]:
    from hardjax.study.grids import rate_text, reliable_rates

    rows = []
    for curve in grid.curves:
        if (point := curve.best(grid.chosen_by)) is None:
            continue
        values, rates = point.values(), [grid.shown_rate(curve, rate) for rate in reliable_rates(grid, curve)]
        by = "validation" if "validation" in grid.chosen_by else "test"
        rows.append(
            {
                "batch": curve.batches,
                f"best {'peak' if grid.by_peak_rates else 'base'} rate (by {by})": rate_text(
                    grid.shown_rate(curve, point.rate)
                ),
                "test top-1 (%)": f"{values.mean():.2f}",
                "seeds": len(values),
                "lowest to highest": f"{values.min():.2f} to {values.max():.2f}",
                "reliable rates": f"{rate_text(rates[0])} to {rate_text(rates[-1])} ({len(rates)})"
                if rates
                else "none",
                "tried": len(curve.points),
                "diverged": sum(one.diverged for one in curve.points),
                "failed": sum(one.failed for one in curve.points),
            }
        )
    return rows


def _name(config: Mapping[str, Any]) -> str:
    from hardjax.config import DEFAULT_LEARNING_RATE
    from hardjax.study.grids import rate_text

    plan, base, peak = (config[name] for name in ("batch_plan", "base_learning_rate", "learning_rate"))
    batches = config["batch_size"] if plan is None else plan["text"]
    given = DEFAULT_LEARNING_RATE if peak is None else peak
    rate = f"rate {rate_text(given)}" if base is None else f"base rate {rate_text(base)}"
    return f"{config['model']}, batch {batches}, {rate}, seed {config['seed']}"


def _workers(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise Refusal(f"Expected --workers {shown(text)} to be auto or a number.")
    return text if text == "auto" else int(text)


def _cells(options: Any) -> tuple[tuple[TrainConfig, ...], int]:
    """(configurations of the grid, how many are left out because their sub-batches do not fit)."""
    from hardjax.study.cells import grid

    base = options.config()
    axes: dict[str, Any] = {}
    for name, values in (
        ("model", options.models),
        ("model_options", _option_sets(options.model_options)),
        ("augmentation", _augmentations(base, options.augmentations)),
        ("schedule", [dataclasses.replace(base.schedule, warmup=share) for share in options.warmups]),
        ("selection", [_selection(text) for text in options.selections]),
        ("batch_plan", _plans(options.batch_plans)),
        ("batch_size", options.batch_sizes),
        ("learning_rate", options.learning_rates),
        ("base_learning_rate", options.base_learning_rates),
    ):
        if values:
            axes[name] = values
    if options.seeds < 1:
        raise Refusal(f"Expected --seeds {options.seeds} to be at least 1: it is how many, from --seed on.")
    cells = grid(base, **axes, seed=range(base.seed, base.seed + options.seeds))
    kept = tuple(config for config in cells if _fits(config))
    if not kept:
        raise Refusal("Expected a cell whose norm_batch_size divides its batch size, got none.")
    return kept, len(cells) - len(kept)


def _check_read(options: Any, arguments: list[str]) -> None:
    """Raises ValueError for an option that the grid would override, or that gives no value."""
    from hardjax.training.population import wanted

    flags = typed(arguments)
    for several, others in _OVERRIDDEN.items():
        if dash(several) not in flags:
            continue
        if not getattr(options, several):
            raise Refusal(f"Expected {dash(several)} with a value at least, got none.")
        for other in others:
            if dash(other) in flags:
                raise Refusal(f"Give {dash(other)} or {dash(several)}, not both.")
    for option in ("task_cpus", "task_gpus"):
        if dash(option) in flags and options.launcher != "ray":
            raise Refusal(f"{dash(option)} goes with --launcher ray, not with {options.launcher}.")
    if "--population-chunk" in flags and wanted(options.performance(), on_cpu="workers") == "workers":
        raise Refusal("--population-chunk goes with --population vmap, map or auto, not with workers: one by one.")
    varied = set(map(_option_name, options.model_options))
    if both := [name for name in map(_option_name, options.network.texts) if name in varied]:
        raise Refusal(f"Give {both[0]} in --model-option or in --model-options, not in both.")


def _option_name(text: str) -> str:
    return text.partition("=")[0]


def _fits(config: TrainConfig) -> bool:
    part = config.model_options.get("norm_batch_size")
    return not isinstance(part, int) or part < 1 or all(size % part == 0 for size in config.batch_sizes)


def _option_sets(texts: tuple[str, ...]) -> list[dict[str, Any]]:
    """Every combination of one value for each name; null leaves an option out."""
    sets: list[dict[str, Any]] = [{}]
    for name in dict.fromkeys(map(_option_name, texts)):
        values = [model_options([text])[name] for text in texts if _option_name(text) == name]
        sets = [one | {name: value} for one in sets for value in values]
    return sets if texts else []


def _augmentations(base: TrainConfig, names: tuple[str, ...]) -> list[Any]:
    from hardjax import _validate
    from hardjax.data.augment import PRESETS

    _validate.one_of(PRESETS, **{f"augmentation {place}": name for place, name in enumerate(names)})
    return [dataclasses.replace(base.augmentation, **PRESETS[name]) for name in names]  # type: ignore[type-var]


def _selection(text: str) -> Any:
    from hardjax.choose.selection import from_dict

    name, given, share = text.partition(":")
    try:
        return from_dict({"name": name} | ({"delta": float(share)} if given else {}))
    except Refusal:
        raise
    except ValueError:
        raise Refusal(f"Expected selection {shown(text)} as all-batches or hard-batches:0.5.") from None


def _plans(texts: tuple[str, ...]) -> list[Any]:
    from hardjax.choose.batch_plan import BatchPlan

    return [BatchPlan(text) for text in texts]
