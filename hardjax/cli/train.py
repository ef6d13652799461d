"""`hardjax train`."""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from hardjax._validate import Refusal, local_folder
from hardjax.cli import output, prepare
from hardjax.cli.data import say
from hardjax.cli.options import Settings, with_axes
from hardjax.cli.parsing import optional, parse, told, typed


@dataclass(frozen=True)
class Train(Settings):
    """Train one network and write to a folder: configuration, history, summary, checkpoint, pictures."""

    output: Annotated[str, told("folder for what is written")] = "runs/train"
    coordinator: Annotated[
        str | None, optional("ADDRESS:PORT", "where process 0 listens, of several that train this run together")
    ] = None
    processes: Annotated[int | None, optional("COUNT", "how many they are")] = None
    process_id: Annotated[int | None, optional("INT", "which one this is, from 0")] = None
    distributed: Annotated[bool, told("all three as Slurm, Open MPI or a TPU says")] = False
    lost_after: Annotated[int, told("seconds without a heartbeat of a process after which the others end")] = 30


def run(arguments: list[str]) -> int:
    """Train as the arguments say; returns the exit code."""
    options = parse(with_axes(Train), "train", arguments)
    prepare.use_compilation_cache()
    one_of_several = (options.coordinator, options.processes, options.process_id)
    if not options.distributed and one_of_several == (None, None, None):
        if "--lost-after" in typed(arguments):
            raise Refusal("--lost-after goes with several processes: --coordinator or --distributed.")
        return _train(options)
    if options.distributed and one_of_several != (None, None, None):
        raise Refusal("Give --distributed or --coordinator, --processes and --process-id, not both.")
    from hardjax.training import hosts

    hosts.join(*one_of_several, lost_after=options.lost_after)
    try:
        return _train(options)
    except BaseException as error:
        hosts.end(error)
        raise


def _train(options: Any) -> int:
    from hardjax.training import hosts, run

    config, where = options.config(), (options.output, options.overwrite, options.resume)
    with hosts.together("begin this run"):
        if hosts.leads():
            run.check_output(*where)
        setting = prepare.setting(options, config)
    if hosts.leads():
        _show_plan(setting)
    result = run.train(setting, *where, progress=not options.quiet)
    summary = result.summary
    interrupted = summary["end"] == "interrupted"
    if not interrupted:
        _draw(setting, result, local_folder(output=options.output))
    if hosts.leads():
        _show(setting, result, local_folder(output=options.output))
    return 128 + signal.Signals[summary["signal"]] if interrupted else 0


def _show_plan(setting: Any) -> None:
    """The stages of a batch plan, or the sizes that a controller may choose; whether a selection will choose."""
    from hardjax.choose.selection import to_dict
    from hardjax.engine.plan import ladder_table, never_chooses, stage_table

    config = setting.config
    if never_chooses(setting.plan):
        name = to_dict(config.selection)["name"]
        say(f"{name} chooses nothing here: no stage is longer than its first round, which takes all batches.")
    if config.batch_plan is not None and config.batch_plan.controller is not None:
        output.table(f"sizes of {config.batch_plan.title}", ladder_table(setting.plan))
    elif len(setting.plan.stages) > 1:
        assert config.batch_plan is not None
        rows = stage_table(setting.plan, setting.recipe.num_samples)
        output.table(f"stages of {config.batch_plan.text}", rows)


def _show(setting: Any, result: Any, folder: Path) -> None:
    """What a run came to."""
    summary = result.summary
    shown = {name: found for name, found in summary.items() if not isinstance(found, dict)}
    shown |= setting.config.columns(result.history)
    output.table(setting.config.title, [{"what": name, "value": output.value(found)} for name, found in shown.items()])
    print(f"written to {folder}")
    if summary["end"] == "interrupted":
        print("hardjax: interrupted and saved; the same command with --resume goes on from there.", file=sys.stderr)


def _draw(setting: Any, result: Any, folder: Path) -> None:
    """measures.png where spectra were measured; hardest.png where rounds or samples were chosen by their losses.

    Called in all processes of a job: the network predicts on all their devices. Process 0 alone draws.
    """
    from hardjax.choose.selection import HardBatches, HardSamples

    config = setting.config

    def spectra() -> Any:
        from hardjax.plots.fisher import measures

        return measures({f"{config.model}, {config.batches}": result.measurements})

    def samples() -> Any:
        from hardjax.plots.samples import hardest

        return hardest(setting.dataset, *hardest_samples(setting, result))

    from hardjax.study.hardest import hardest_samples
    from hardjax.training import hosts

    chosen = isinstance(config.selection, HardBatches | HardSamples) or config.trimming is not None
    if not hosts.leads():
        if chosen:
            hardest_samples(setting, result)
        return
    if config.measure is not None:
        output.picture(folder / "measures.png", spectra)
    if chosen:
        output.picture(folder / "hardest.png", samples)
