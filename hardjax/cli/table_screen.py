"""What `hardjax table` shows: the list of experiments, one of them, and what a run would take."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hardjax.cli import output
from hardjax.cli.options import Settings
from hardjax.cli.sweep_screen import plan_table
from hardjax.config import Performance
from hardjax.study.experiments import PAPER, REDUCED, Experiment, identity, with_data
from hardjax.study.experiments_prices import NOTHING, Prices, missing
from hardjax.study.experiments_report import Report, told
from hardjax.study.experiments_rows import Results


def listing(found: Results, prices: Prices) -> None:
    """A line an experiment: how much of it has been run, where, the price of the rest, what it shows."""
    lines = [("name", REDUCED, PAPER, "rest of reduced", "rest of paper", "where", "shows")]
    lines += [_line(found, one, prices) for one in found.experiments.values()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    for *cells, last in lines:
        print("  ".join([f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)] + [last]))
    print(
        "runs with a row, of how many; prices: of one worker, by rows of the same network at these or other batch"
        " sizes, else by its operations."
    )


def _line(found: Results, one: Experiment, prices: Prices) -> tuple[str, ...]:
    sizes = {scale: found.found(one, scale) for scale in (REDUCED, PAPER)}
    counts = [f"{len(rows.rows)}/{rows.wanted}" if rows.wanted else "-" for rows in sizes.values()]
    where = {
        str(row["device"]).partition(" x")[0].removeprefix("cpu: ")
        for rows in sizes.values()
        for row in rows.rows
        if row.get("device")
    }
    if one.computed is not None:
        counts, rest = ["-", "-"], ["-", "computed" if sizes[PAPER].rows else "not computed"]
    else:
        rest = [_rest(found, one, scale, prices) if rows.wanted else "-" for scale, rows in sizes.items()]
    reads = one.reads[0] if len(one.reads) == 1 else f"{len(one.reads)} others"
    return (
        one.name,
        *counts,
        *rest,
        ", ".join(sorted(where)) or "-",
        one.title + (f" (reads {reads})" if one.reads else ""),
    )


def _rest(found: Results, one: Experiment, scale: str, prices: Prices) -> str:
    """What is left of an experiment, or of those that it reads."""
    own = [found.experiments[name] for name in one.reads] or [one]
    price = sum((prices.of(found.found(source, scale)) for source in own), NOTHING)
    return told(price) if price.seconds else "-"


def show(one: Report) -> None:
    experiment = one.found.experiment
    print(f"{experiment.name}: {experiment.title} ({experiment.source})")
    command = f"hardjax table run {' '.join(experiment.reads or (experiment.name,))}"
    if experiment.computed is not None:
        print(f"compute it: {command}")
    elif not one.found.wanted:
        print(f"it has no {one.found.scale} scale")
    elif len(one.found.rows) >= one.found.wanted:
        print(f"nothing is left to run ({command} --scale {one.found.scale})")
    else:
        print(f"run it: {command} --scale {one.found.scale}")
    if one.arms:
        output.table(f"{experiment.name}, {one.found.scale}", one.arms)
    if one.verdicts:
        output.table("verdicts (experiments/README.md has the rule)", one.verdicts)
    for note in one.notes:
        print(f"- {note}")
    print()


def plan(options: Any, found: Results, chosen: Sequence[Experiment]) -> None:
    """What `--dry-run` prints: a row for each shape that is left."""
    left = {
        (identity(one.config.to_dict()), one.config.seed): with_data(one.config, options.data_dir)
        for experiment in chosen
        if options.scale in experiment.scales
        for one in missing(found.found(experiment, options.scale))
    }
    if not left:
        print("nothing is left")
        return
    workers = int(options.workers) if options.workers.isdecimal() else options.workers
    plan_table(tuple(left.values()), _Plan(Settings()), workers, Path(options.output))


@dataclass(frozen=True)
class _Plan:
    """What the plan of a sweep reads of its options."""

    settings: Settings
    overwrite: bool = False
    retry_failed: bool = True
    rates_from: str | None = None  # experiments name their rates

    def performance(self) -> Performance:
        return self.settings.performance()
