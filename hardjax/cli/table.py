"""`hardjax table [show | run | copy | plot]`."""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from hardjax import _validate
from hardjax._validate import Refusal, local_folder, shown
from hardjax.cli import output
from hardjax.cli.parsing import Folder, Number, parse, told

ALL = "all"
RESULTS, WRITTEN = "results", Path("runs") / "tables"
PAPERS = {
    "p1-": "P1: hard mini-batch training",
    "p2-": "P2: mini-batch trimming",
    "p3-": "P3: Fisher characterisation and dynamic sampling",
    "p4-": "P4: small batches",
}
Names = Annotated[
    tyro.conf.Positional[tuple[str, ...]],
    tyro.conf.arg(metavar="NAME ...", help=f"such as p1-table-3, or {ALL}", help_behavior_hint=""),
]
Scale = Annotated[str | None, tyro.conf.arg(metavar="STR", help="paper | reduced | smoke", help_behavior_hint="")]


@dataclass(frozen=True)
class Place:
    experiments: Annotated[str, told("folder of the modules of experiments")] = "experiments"
    # Folder of their rows (default: results beside the modules; of smoke runs runs/tables/smoke).
    results: Folder = None


@dataclass(frozen=True)
class TableList(Place):
    """Every published table, figure and claim: how much of it has been run, where, and the price of the rest."""

    def __call__(self) -> int:
        from hardjax.cli import table_screen

        found = _read(self, None)
        table_screen.listing(found, _prices(self, found))
        return 0


@dataclass(frozen=True)
class TableShow(Place):
    """What was published, what was run, and the verdicts."""

    names: Names = ()
    scale: Scale = None
    markdown: Annotated[bool, told("as Markdown; of all, the text of RESULTS.md")] = False

    def __call__(self) -> int:
        from hardjax.cli import table_screen
        from hardjax.study.experiments_markdown import results
        from hardjax.study.experiments_report import report

        found = _read(self, self.scale)
        prices = _prices(self, found)
        reports = [
            report(rows, prices)
            for one in _named(found, self.names)
            for rows in (found.shown(one) if self.scale is None else [found.found(one, self.scale)])
        ]
        if self.markdown:
            print(results(reports, PAPERS), end="")
            return 0
        for one in reports:
            table_screen.show(one)
        return 0


@dataclass(frozen=True)
class TableRun(Place):
    """Train what has no row yet, and write a row for each run the moment it ends; the same command goes on."""

    names: Names = ()
    scale: Annotated[str, told("paper | reduced | smoke")] = "reduced"
    data_dir: Folder = None  # folder of prepared TFDS data
    workers: Annotated[str, told("processes, a core and a thread each; auto: one a core, on a GPU one in all")] = "auto"
    max_hours: Annotated[Number, told("end after that time, saved, with status 0")] = None
    dry_run: Annotated[bool, told("train nothing: try a cell of each shape, and say what the rest would take")] = False
    output: Annotated[str, told("folder of the sweep that trains them")] = str(WRITTEN)
    quiet: Annotated[bool, told("no progress")] = False

    def __call__(self) -> int:
        return _run(self)


@dataclass(frozen=True)
class TableCopy(Place):
    """Write the configurations of an experiment as a program to edit."""

    names: Names = ()
    scale: Annotated[str, told("paper | reduced | smoke")] = "reduced"
    output: Annotated[str | None, tyro.conf.arg(metavar="FILE", help="NAME.py if not given", help_behavior_hint="")] = (
        None
    )

    def __call__(self) -> int:
        from hardjax.study.experiments_copy import program
        from hardjax.training import lines

        (one,) = _single(_read(self, self.scale), self.names)
        path = Path(self.output or f"{one.name.replace('-', '_')}.py")
        if path.exists():
            raise Refusal(f"Expected output={str(path)!r} not to exist.")
        text = program(one, self.scale)
        with lines.refused(path, "to be writable"):
            path.write_text(text, encoding="utf-8")
        print(f"written to {path}: {one.scales[self.scale].count} runs of {len(one.scales[self.scale].arms)} arms")
        return 0


@dataclass(frozen=True)
class TablePlot(Place):
    """Draw an experiment in the layout of what was published, from its rows alone."""

    names: Names = ()
    scale: Scale = None
    output: Annotated[
        str | None, tyro.conf.arg(metavar="FILE", help="NAME.png beside the rows if not given", help_behavior_hint="")
    ] = None

    def __call__(self) -> int:
        from hardjax.plots.published import draw

        found = _read(self, self.scale)
        chosen, code = _named(found, self.names), 0
        if self.output is not None and len(chosen) > 1:
            raise Refusal(f"Expected output={self.output!r} with one experiment, got {len(chosen)}.")
        for one in chosen:
            rows = found.shown(one)[0] if self.scale is None else found.found(one, self.scale)
            if not rows.rows and len(chosen) > 1:
                print(f"{one.name}: no row to draw")
                continue
            if not rows.rows:
                raise Refusal(f"{one.name} has no row to draw; `hardjax table run {one.name}` makes them.")
            path = found.folder / f"{one.name}.png" if self.output is None else Path(self.output)
            path = path if path.suffix else path.with_suffix(".png")  # as it would be written
            drawn = output.picture(path, lambda rows=rows: draw(rows))
            print(f"written to {path}" if drawn else f"{one.name}: nothing drawn")
            code = code or int(not drawn)
        return code


@dataclass(frozen=True)
class Table:
    """Published tables, figures and claims: list them (without an action), show, run, copy or plot one.

    The list has two options of its own: `hardjax table [--experiments STR] [--results DIR]`."""

    action: tyro.conf.OmitSubcommandPrefixes[
        Annotated[TableShow, tyro.conf.subcommand("show", prefix_name=False)]
        | Annotated[TableRun, tyro.conf.subcommand("run", prefix_name=False)]
        | Annotated[TableCopy, tyro.conf.subcommand("copy", prefix_name=False)]
        | Annotated[TablePlot, tyro.conf.subcommand("plot", prefix_name=False)]
    ]


def run(arguments: list[str]) -> int:
    """List, show, run, copy or plot; returns the exit code."""
    if not arguments or (arguments[0].startswith("--") and arguments[0] != "--help"):
        return parse(TableList, "table", arguments)()
    return parse(Table, "table", arguments).action()


def _read(place: Place, scale: str | None) -> Any:
    from hardjax.study import experiments
    from hardjax.study.experiments_rows import Results

    if scale is not None:
        _validate.one_of(experiments.SCALES, scale=scale)
    folder = local_folder(experiments=place.experiments)
    smoke = WRITTEN / experiments.SMOKE
    own = smoke if scale == experiments.SMOKE else folder / RESULTS
    if place.results is not None:
        own = local_folder(results=place.results)
        # A folder that is not there would be one without a row; `run` makes it.
        if not isinstance(place, TableRun) and not own.is_dir():
            raise Refusal(f"Expected results={shown(place.results)} to be a folder of rows.")
    return Results(experiments.load(folder), own)


def _prices(place: Place, found: Any) -> Any:
    from hardjax.study.experiments_prices import prices_of

    return prices_of(found, local_folder(experiments=place.experiments))


def _named(found: Any, names: Sequence[str]) -> list[Any]:
    """The experiments of these names."""
    if not names:
        raise Refusal(f"Name at least one experiment, or {ALL}; `hardjax table` lists them.")
    if ALL in names:
        return list(found.experiments.values())
    for name in names:
        if name not in found.experiments:  # a hundred names are no help in a line
            near = _validate.closest(name, found.experiments)
            raise Refusal(f"Unknown experiment {shown(name)}{near} `hardjax table` lists them.")
    return [found.experiments[name] for name in dict.fromkeys(names)]


def _single(found: Any, names: Sequence[str]) -> list[Any]:
    chosen = _named(found, names)
    if len(chosen) != 1:
        raise Refusal(f"Name one experiment to copy, got {len(chosen)}.")
    return chosen


def _run(options: TableRun) -> int:
    from hardjax.cli import prepare

    found = _read(options, options.scale)
    names = dict.fromkeys(name for one in _named(found, options.names) for name in one.reads or (one.name,))
    chosen = [found.experiments[name] for name in names]
    if options.max_hours is not None:
        _validate.positive(max_hours=options.max_hours)
    prepare.use_compilation_cache()
    if options.dry_run:
        from hardjax.cli import table_screen

        table_screen.plan(options, found, chosen)
        return 0
    return _train(options, found, chosen)


def _train(options: TableRun, found: Any, chosen: Sequence[Any]) -> int:
    import time

    from hardjax.cli.sweep_screen import Screen
    from hardjax.study import experiments_rows
    from hardjax.study.experiments_run import run as train

    began, code = time.monotonic(), 0
    workers = int(options.workers) if options.workers.isdecimal() else options.workers
    for one in chosen:
        if one.computed is not None:
            print(f"{one.name}: {experiments_rows.compute(one, found.folder)} rows computed")
            continue
        if options.scale not in one.scales and len(chosen) > 1:
            print(f"{one.name}: no scale {options.scale!r}, it has {', '.join(one.scales)}")
            continue
        hours = None if options.max_hours is None else options.max_hours - (time.monotonic() - began) / 3600
        if hours is not None and hours <= 0:
            break
        with Screen(options.quiet) as screen:
            done = train(
                one,
                options.scale,
                results=found,
                folder=Path(options.output),
                data_dir=options.data_dir,
                workers=workers,
                max_hours=hours,
                on_progress=screen,
            )
        print(f"{one.name}: {done.written} rows written, {done.left} left")
        for line in done.failed:
            print(f"hardjax: failed: {line}", file=sys.stderr)
        code = code or int(bool(done.failed))
        if done.signal:
            return 128 + signal.Signals[done.signal]
    return code
