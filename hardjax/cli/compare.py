"""`hardjax compare`."""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

from hardjax._validate import Refusal
from hardjax.cli import prepare, show
from hardjax.cli.options import Settings, parse, told, with_axes

_DELTAS, _CONTROLS = (1.0, 0.8, 0.5, 0.2), ("random", "fixed")


@dataclass(frozen=True)
class Compare(Settings):
    """Ways of choosing against ordinary training and its controls, over seeds: a table and a picture.

    By default hard mini-batch replay (--deltas, --controls); with --methods, mini-batch trimming. The folder gets
    summary.json, history.jsonl (a line a run) and comparison.png.
    """

    deltas: told(tuple[float, ...], "shares of the mini-batches; the baseline (1.0) always runs") = _DELTAS
    controls: told(tuple[str, ...], "random replay of the same share | baseline on the fixed batches") = _CONTROLS
    methods: told(tuple[str, ...], "instead of deltas: standard | trimmed | random-trimmed") = ()
    seeds: told(int, "runs of each arm") = 3
    output: told(str, "folder for what is written") = "runs/compare"


def run(arguments: list[str]) -> int:
    """Compare as the arguments say; returns the exit code."""
    # Which arm selects what is the comparison's business.
    options = parse(with_axes(Compare, leave_out=("selection",)), "compare", arguments)
    if options.methods and (options.deltas, options.controls) != (_DELTAS, _CONTROLS):
        raise Refusal(f"Give --methods {' '.join(options.methods)} or --deltas and --controls, not both.")
    return compare(options)


def _check_arms(config: Any, arms: Any, seeds: int) -> None:
    """What the configuration of any arm and seed refuses, before the first of them is trained."""
    for arm in arms:
        dataclasses.replace(config, **arm.settings, seed=config.seed + seeds - 1)


def compare(options: Any) -> int:
    """`hardjax compare`."""
    prepare.use_compilation_cache()
    from hardjax.choose.trimming import Trimming
    from hardjax.plots import arms as plots
    from hardjax.study.compare import check_comparable, compare, make_arms, make_methods
    from hardjax.training import files

    config = options.config()
    if options.methods:
        arms = make_methods(options.methods, config.trimming or Trimming())
    else:
        arms = make_arms(options.deltas, options.controls)
    check_comparable(config, options.seeds)
    _check_arms(config, arms, options.seeds)
    files.check_folder(options.output, options.overwrite)
    setting = prepare.setting(options, config)
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
        {"rows": result.rows, "threshold": result.threshold, "interrupted": result.interrupted} | files.environment(),
    )
    picture = plots.trimming if options.methods else plots.comparison
    columns = _trimming_columns if options.methods else _paper_columns
    show.table(
        f"{setting.config.title}, batch {config.batch_size}, {config.epochs} epochs, {options.seeds} seeds",
        [columns(row) | _measured_columns(row, config) for row in result.rows],
    )
    print(_trimming_legend(result.rows) if options.methods else _replay_legend(result))
    drawn = show.picture(folder / "comparison.png", lambda: picture(result))
    print(f"written to {folder}: summary.json, history.jsonl{', comparison.png' if drawn else ''}")
    if result.interrupted:
        print(f"interrupted: {len(result.arms)} of {len(arms)} arms are complete and shown", file=sys.stderr)
    return 130 if result.interrupted else 0


def _replay_legend(result: Any) -> str:
    diverged = sum(row["diverged"] for row in result.rows)
    who = "every run reached" if not diverged else f"every run but the {diverged} that diverged reached"
    return (
        "e: epoch in which the loss of the whole training split settles at its own final level; "
        f"e (common): first epoch at {result.threshold:.3g} nats, which {who}.\n"
        "change: 100 (e1 - e) / e as in the paper, positive is sooner than ordinary training."
    )


def _trimming_legend(rows: list[dict[str, Any]]) -> str:
    errors = {row["selection"]: f"{row['test_error']:.2f}" for row in rows}
    named = [name for name in ("standard", "trimmed", "random-trimmed") if name in errors]
    words = {"standard": "disabled", "trimmed": "enabled", "random-trimmed": "kept at random"}
    return (
        f"test error (%), mean over {rows[0]['seeds']} seeds, trimming {' / '.join(words[name] for name in named)}: "
        f"{' / '.join(errors[name] for name in named)}; ± is a 95 % confidence interval."
    )


def _paper_columns(row: dict[str, Any]) -> dict[str, str]:
    return {
        "selection": row["selection"],
        "delta": f"{row['delta']:g}",
        "train top-1 (%)": f"{row['train_top1']:.2f}",
        "test top-1 (%)": f"{row['test_top1']:.2f} ± {row['test_top1_ci95']:.2f}",
        "e": f"{row['convergence_epoch']:.1f}",
        "change of e (%)": f"{row['convergence_change_percent']:+.1f}",
        "e (common)": f"{row['common_threshold_epoch']:.1f}",
        "change (%)": f"{row['common_threshold_change_percent']:+.1f}",
        "ms/step": f"{1000 * row['seconds_per_step']:.3g}",
    }


def _trimming_columns(row: dict[str, Any]) -> dict[str, str]:
    return {
        "method": row["selection"],
        "kept, first to last epoch": f"{row['keep_first']:g} to {row['keep_last']:g}",
        "train top-1 (%)": f"{row['train_top1']:.2f}",
        "test error (%)": f"{row['test_error']:.2f} ± {row['test_top1_ci95']:.2f}",
        "e (common)": f"{row['common_threshold_epoch']:.1f}",
        "ms/step": f"{1000 * row['seconds_per_step']:.3g}",
        "time of standard": f"{row['time_ratio']:.2f}",
    }


def _measured_columns(row: dict[str, Any], config: Any) -> dict[str, str]:
    return {} if config.measure is None else {name: f"{row[name]:.4g}" for name in ("C_K", "L_K")}
