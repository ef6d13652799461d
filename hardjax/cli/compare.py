"""`hardjax compare`."""

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from hardjax._validate import Refusal, local_folder
from hardjax.cli import output, prepare
from hardjax.cli.data import say
from hardjax.cli.options import Settings, with_axes
from hardjax.cli.parsing import parse, told
from hardjax.training.progress import score

_DELTAS, _CONTROLS = (1.0, 0.8, 0.5, 0.2), ("random", "fixed")


@dataclass(frozen=True)
class Compare(Settings):
    """Ways of choosing against ordinary training and its controls, over seeds: a table and a picture.

    By default hard mini-batch replay (--deltas, --controls); with --methods, mini-batch trimming. The folder gets
    summary.json, history.jsonl (a line a run) and comparison.png.
    """

    deltas: Annotated[tuple[float, ...], told("shares of the mini-batches; the baseline (1.0) always runs")] = _DELTAS
    controls: Annotated[tuple[str, ...], told("random replay of the same share | baseline on the fixed batches")] = (
        _CONTROLS
    )
    methods: Annotated[tuple[str, ...], told("instead of deltas: standard | trimmed | random-trimmed")] = ()
    seeds: Annotated[int, told("runs of each arm")] = 3
    output: Annotated[str, told("folder for what is written")] = "runs/compare"


def run(arguments: list[str]) -> int:
    """Compare as the arguments say; returns the exit code."""
    # Which arm selects what is the comparison's business.
    options = parse(with_axes(Compare, leave_out=("selection",)), "compare", arguments)
    if options.methods and (options.deltas, options.controls) != (_DELTAS, _CONTROLS):
        raise Refusal(f"Give --methods {' '.join(options.methods)} or --deltas and --controls, not both.")
    return compare(options)


def compare(options: Any) -> int:
    """`hardjax compare`."""
    prepare.use_compilation_cache()
    from hardjax.choose.trimming import Trimming
    from hardjax.plots import arms as plots  # now: an import that fails at the end would cost the table
    from hardjax.study import rows, tables
    from hardjax.study.arms import make_arms, make_methods
    from hardjax.study.compare import check_comparable, compare

    config = options.config()
    if options.methods:
        arms = make_methods(options.methods, config.trimming or Trimming())
        if config.trimming and (config.trimming.keep != Trimming().keep or len(arms) == 1):
            raise Refusal("--trim-end goes with --methods trimmed or random-trimmed, which say what is kept.")
    else:
        arms = make_arms(options.deltas, options.controls)
    check_comparable(config, options.seeds, arms)
    if config.epochs == 1 and (choosing := [arm.label for arm in arms if arm.delta < 1]):
        say(f"one epoch is the first round, which takes all batches: {', '.join(choosing)} will choose nothing.")
    where = {"output": options.output, "overwrite": options.overwrite, "resume": options.resume}
    rows.check(options.output, None, options.overwrite, options.resume)
    setting = prepare.setting(options, config)
    folder = local_folder(output=options.output)

    def log(arm: Any, result: Any) -> None:
        test = score(result.summary["final_test_top1"], result.summary["final_test_loss"])
        print(f"{arm.label}, seed {result.config.seed}: test {test}", file=sys.stderr)

    result = compare(
        config,
        arms,
        options.seeds,
        dataset=setting.whole,
        performance=setting.performance,
        progress=not options.quiet,
        on_result=log,
        **where,
    )
    if options.methods:
        forms = tables.trimming_table, tables.trimming_legend, plots.trimming
    else:
        forms = tables.replay_table, tables.replay_legend, plots.comparison
    drawn = _tell(result, result.config.title, folder / "comparison.png", *forms)
    print(f"written to {folder}: summary.json, history.jsonl{', comparison.png' if drawn else ''}")
    if result.interrupted:
        shown = f"{len(result.arms)} of {len(arms)} arms with {result.rows[0]['seeds']} of {options.seeds} seeds"
        print(f"interrupted: {shown} are complete and shown; --resume goes on from there", file=sys.stderr)
    return 128 + signal.Signals[result.signal] if result.signal else 0


def _tell(result: Any, title: str, path: Path, table: Callable, legend: Callable, picture: Callable) -> bool:
    """Print the tables with their legend and draw the picture; whether it could be drawn."""
    from hardjax.study import tables

    config, seeds = result.config, result.rows[0]["seeds"]
    output.table(f"{title}, {config.batches}, {config.epochs} epochs, {seeds} seeds", table(result.rows))
    if differences := tables.difference_table(result.rows):
        output.table("differences, paired by seed", differences)
    print(legend(result.rows, result.thresholds, result.left_out))
    return output.picture(path, lambda: picture(result))
