"""`hardjax train`."""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from hardjax._validate import local_folder
from hardjax.cli import output, prepare
from hardjax.cli.options import Settings, with_axes
from hardjax.cli.parsing import parse, told


@dataclass(frozen=True)
class Train(Settings):
    """Train one network and write to a folder: configuration, history, summary, checkpoint, pictures."""

    output: Annotated[str, told("folder for what is written")] = "runs/train"


def run(arguments: list[str]) -> int:
    """Train as the arguments say; returns the exit code."""
    options = parse(with_axes(Train), "train", arguments)
    prepare.use_compilation_cache()
    from hardjax.engine.plan import ladder_table, stage_table
    from hardjax.training import run

    config, where = options.config(), (options.output, options.overwrite, options.resume)
    run.check_output(*where)
    setting = prepare.setting(options, config)
    if config.batch_plan is not None and config.batch_plan.controller is not None:
        output.table(f"sizes of {config.batch_plan.title}", ladder_table(setting.plan))
    elif len(setting.plan.stages) > 1:
        assert config.batch_plan is not None
        rows = stage_table(setting.plan, setting.recipe.num_samples)
        output.table(f"stages of {config.batch_plan.text}", rows)
    result = run.train(setting, *where, progress=not options.quiet)
    folder, summary = local_folder(output=options.output), result.summary
    if summary["end"] != "interrupted":
        _draw(setting, result, folder)
    shown = {name: found for name, found in summary.items() if not isinstance(found, dict)}
    shown |= setting.config.columns(result.history)
    output.table(setting.config.title, [{"what": name, "value": output.value(found)} for name, found in shown.items()])
    print(f"written to {folder}")
    if summary["end"] != "interrupted":
        return 0
    print("hardjax: interrupted and saved; the same command with --resume goes on from there.", file=sys.stderr)
    return 128 + signal.Signals[summary["signal"]]


def _draw(setting: Any, result: Any, folder: Path) -> None:
    """measures.png where spectra were measured; hardest.png where rounds or samples were chosen by their losses."""
    from hardjax.choose.selection import HardBatches, HardSamples

    config = setting.config

    def spectra() -> Any:
        from hardjax.plots.fisher import measures

        return measures({f"{config.model}, {config.batches}": result.measurements})

    def samples() -> Any:
        from hardjax.plots.samples import hardest
        from hardjax.study.hardest import hardest_samples

        return hardest(setting.dataset, *hardest_samples(setting, result))

    if config.measure is not None:
        output.picture(folder / "measures.png", spectra)
    if isinstance(config.selection, HardBatches | HardSamples) or config.trimming is not None:
        output.picture(folder / "hardest.png", samples)
