"""What the commands do: load, train, write files, draw, print. `cli` turns arguments into these calls."""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hardjax import _validate
from hardjax._validate import Refusal


def train(options: Any, config: Any) -> int:
    """`hardjax train`."""
    _use_compilation_cache()
    from hardjax.training import files, loop

    files.check_folder(options.output, options.overwrite)
    setting = _prepare(options, config)
    result = loop.train(setting, options.output, options.overwrite, progress=not options.quiet)
    folder = Path(options.output)
    if config.measure is not None:
        named = {f"{config.model}, batch {config.batch_size}": result.measurements}

        def spectra() -> Any:
            from hardjax.plots.fisher import measures

            return measures(named)

        _picture(folder / "measures.png", spectra)
    if options.selection in ("hard-batches", "hard-samples") or config.trimming is not None:

        def samples() -> Any:
            from hardjax.plots.samples import hardest
            from hardjax.study.hardest import hardest_samples

            return hardest(setting.dataset, *hardest_samples(setting, result))

        _picture(folder / "hardest.png", samples)
    summary = result.summary
    print_table(
        setting.config.title,
        [{"what": name, "value": _show(value)} for name, value in summary.items() if not isinstance(value, dict)],
    )
    print(f"written to {folder}")
    return 130 if summary["interrupted"] else 0


def compare(options: Any) -> int:
    """`hardjax compare`."""
    _use_compilation_cache()
    from hardjax.choose.trimming import Trimming
    from hardjax.plots import arms as plots
    from hardjax.study import tables
    from hardjax.study.arms import make_arms, make_methods
    from hardjax.study.compare import check_comparable, compare
    from hardjax.training import files

    config = options.config()
    if options.methods:
        arms = make_methods(options.methods, config.trimming or Trimming())
    else:
        arms = make_arms(options.deltas, options.controls)
    check_comparable(config, options.seeds)
    files.check_folder(options.output, options.overwrite)
    setting = _prepare(options, config)
    folder = files.claim_folder(options.output, options.overwrite)
    plain = setting.config.to_dict() | {"arms": [arm.label for arm in arms], "seeds": options.seeds}
    files.write_json(folder / "config.json", plain)

    def log(arm: Any, result: Any) -> None:
        entry = {"selection": arm.name, "delta": arm.delta, "seed": result.config.seed}
        files.append_line(folder / "history.jsonl", entry | {"history": result.history, "summary": result.summary})
        print(
            f"{arm.label}, seed {result.config.seed}: test {result.summary['final_test_top1']:.2f} %", file=sys.stderr
        )

    result = compare(
        setting.config,
        arms,
        options.seeds,
        dataset=setting.whole,
        performance=setting.performance,
        progress=not options.quiet,
        on_result=log,
    )
    files.write_json(
        folder / "summary.json",
        {
            "rows": result.rows,
            "thresholds": result.thresholds,
            "left_out": result.left_out,
            "interrupted": result.interrupted,
        }
        | files.environment(),
    )
    table = tables.trimming_table if options.methods else tables.replay_table
    legend = tables.trimming_legend if options.methods else tables.replay_legend
    print_table(
        f"{setting.config.title}, batch {config.batch_size}, {config.epochs} epochs, {result.rows[0]['seeds']} seeds",
        table(result.rows),
    )
    if differences := tables.difference_table(result.rows):
        print_table("differences, paired by seed", differences)
    print(legend(result.rows, result.thresholds, result.left_out))
    picture = plots.trimming if options.methods else plots.comparison
    drawn = _picture(folder / "comparison.png", lambda: picture(result))
    print(f"written to {folder}: summary.json, history.jsonl{', comparison.png' if drawn else ''}")
    if result.interrupted:
        shown = f"{len(result.arms)} of {len(arms)} arms with {result.rows[0]['seeds']} of {options.seeds} seeds"
        print(f"interrupted: {shown} are complete and shown", file=sys.stderr)
    return 130 if result.interrupted else 0


def measure(options: Any) -> int:
    """`hardjax measure`."""
    _use_compilation_cache()
    from hardjax.plots.fisher import measures
    from hardjax.study.measure import measure_run
    from hardjax.training import files

    if not options.runs:
        raise Refusal("Name at least one folder that `hardjax train --output` wrote.")
    files.check_folder(options.output, options.overwrite)
    settings = (options.batches, options.rows, options.tolerance, options.data_dir, options.gram_chunk)
    found = {folder: measure_run(folder, *settings, float64=options.float64) for folder in options.runs}
    folder = files.claim_folder(options.output, options.overwrite)
    files.write_json(
        folder / "measure.json",
        {"options": vars(options), "runs": {name: report.to_dict() for name, report in found.items()}},
    )
    drawn = False
    recorded = {name: report.recorded for name, report in found.items() if report.recorded}
    if recorded:
        shown = {Path(name).name: run for name, run in recorded.items()}
        drawn = _picture(folder / "measures.png", lambda: measures(shown if len(shown) == len(recorded) else recorded))
        print_table(
            f"while training, tolerance {options.tolerance:g}",
            [{"run": name} | found[name].training_row() for name in recorded],
        )
    if options.batches:
        print_table(
            f"final state, {'float64' if options.float64 else 'float32'},"
            f" mean over {options.batches} mini-batches (noise scale: mean covariance over mean signal)",
            [{"run": name} | report.final_row() for name, report in found.items()],
        )
    print(f"written to {folder}: measure.json{', measures.png' if drawn else ''}")
    return 0


def models() -> int:
    """`hardjax models`."""
    from hardjax import models

    rows = [
        row | {"parameters": f"{row['parameters']:,}", "multiply_adds": f"{row['multiply_adds'] / 1e6:,.1f}M"}
        for row in models.table()
    ]
    print_table("networks", [{key.replace("_", "-"): value for key, value in row.items()} for row in rows])
    print(
        "published: parameters, floating-point operations (truncated; about twice the multiply-adds).\n"
        "options (--model-option NAME=VALUE, or hj.models.create): norm, norm_batch_size, dtype, init, dropout; "
        "drop_path, stem, widths, norm_dense where a network has them."
    )
    return 0


def _prepare(options: Any, config: Any) -> Any:
    """The setting of a run, with the frame and size that images are brought to; refuses before any file is touched."""
    from hardjax import data, models
    from hardjax.data.augment import named
    from hardjax.training.setting import prepare

    _validate.one_of(models.names(), model=config.model)
    dataset, shown = data.load(config.dataset, config.data_dir, progress=True), options.data
    augmentation = named(shown.augmentation, dataset.train.images.shape[1:], dataset.flip)
    augmentation = dataclasses.replace(augmentation, frame=shown.frame, place=shown.place, resize=shown.resize)
    config = dataclasses.replace(config, augmentation=augmentation)
    return prepare(config, dataset, performance=options.performance())


def _picture(path: Path, draw: Callable[[], Any]) -> bool:
    """Save what `draw` returns; the last thing a command does with its results, which are written by then.

    Whatever goes wrong while drawing (a font, a backend, a full disk) costs hours of training if it ends the command,
    and nothing if it is a line of warning: the numbers can be drawn again. So any exception is caught here, and only
    here.
    """
    try:
        draw().savefig(path, dpi=120)
    except Exception as error:
        reason = " ".join(str(error).split())
        print(f"hardjax: {path.name} could not be drawn ({type(error).__name__}: {reason})", file=sys.stderr)
        path.unlink(missing_ok=True)
        return False
    return True


def _use_compilation_cache() -> None:
    """Compiled programs outlive the process, in the user's cache folder."""
    import jax

    from hardjax.data.tfds import cache_folder

    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Rows with the same columns, numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in rows[0]:
        numeric = all(isinstance(row[name], int | float) or str(row[name])[:1] in "+-0123456789" for row in rows)
        table.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_show(value) for value in row.values()))
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
