"""`hardjax measure`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from hardjax._axis import dash
from hardjax._validate import Refusal
from hardjax.cli import output, prepare
from hardjax.cli.parsing import Folder, Runs, optional, parse


@dataclass(frozen=True)
class Measure:
    """Read the spectra that runs recorded, with any tolerance, measure their final states, and draw both."""

    runs: Runs  # folders of `hardjax train`
    batches: int = 8  # mini-batches of the final state's partition to measure; 0 for none (needs no data)
    rows: Annotated[str | None, optional("STR", "contribution | coupled | frozen (default: that of the run)")] = None
    tolerance: float = 1e-6  # an eigenvalue is non-zero above this share of the largest
    float64: bool = False  # measure the final states in float64
    data_dir: Folder = None  # folder of prepared TFDS data (default: that of the run)
    gram_chunk: Annotated[int | None, optional("SAMPLES")] = None  # bounds the memory
    output: str = "runs/measure"  # folder for measure.json and measures.png
    overwrite: bool = False  # let the folder hold another result of hardjax already


def run(arguments: list[str]) -> int:
    """Measure as the arguments say; returns the exit code."""
    options = parse(Measure, "measure", arguments)
    prepare.use_compilation_cache()
    from hardjax.plots.fisher import measures
    from hardjax.study.measure import measure_run
    from hardjax.training import files

    _check(options)
    settings = (options.batches, options.rows, options.tolerance, options.data_dir, options.gram_chunk)
    found = {folder: measure_run(folder, *settings, float64=options.float64) for folder in options.runs}
    with files.claim_folder(options.output, options.overwrite) as folder:
        files.write_json(
            folder / "measure.json",
            {"options": vars(options), "runs": {name: report.to_dict() for name, report in found.items()}},
        )
    drawn = False
    recorded = {name: report.recorded for name, report in found.items() if report.recorded}
    if recorded:
        shown = {Path(name).name: run for name, run in recorded.items()}
        # Short names, unless two folders share one: `a/run` and `b/run` would be one curve.
        drawn = output.picture(
            folder / "measures.png", lambda: measures(shown if len(shown) == len(recorded) else recorded)
        )
        output.table(
            f"while training, tolerance {options.tolerance:g}",
            [{"run": name} | found[name].training_row() for name in recorded],
        )
    if options.batches:
        measured = max(len(report.final["c"]) for report in found.values())  # a partition may hold fewer than asked for
        output.table(
            f"final state, {'float64' if options.float64 else 'float32'},"
            f" mean over {measured} mini-batches (noise scale: mean covariance over mean signal)",
            [{"run": name} | report.final_row() for name, report in found.items()],
        )
    print(f"written to {folder}: measure.json{', measures.png' if drawn else ''}")
    return 0


def _check(options: Measure) -> None:
    """Every refusal that needs no data comes before the first run is measured."""
    from hardjax import _validate
    from hardjax.config import Performance
    from hardjax.fisher.observe import FisherMeasure
    from hardjax.training import files

    if not options.runs:
        raise Refusal("Name at least one folder that `hardjax train --output` wrote.")
    _validate.at_least(0, batches=options.batches)
    if not options.batches:
        for name in ("rows", "float64", "data_dir", "gram_chunk"):
            if getattr(options, name):
                raise Refusal(f"{dash(name)} goes with final states, which --batches 0 leaves out.")
    FisherMeasure(rows=options.rows or "contribution", tolerance=options.tolerance)
    Performance(gram_chunk=options.gram_chunk)
    if options.data_dir is not None:
        _validate.local_folder(data_dir=options.data_dir)
    for folder in options.runs:
        files.read_config(folder)
    folder = files.check_folder(options.output, options.overwrite)
    # --overwrite would delete the very run that is to be measured.
    if folder.resolve() in [_validate.local_folder(run=run).resolve() for run in options.runs]:
        raise Refusal(f"Expected output={options.output!r} to be another folder than the runs measured.")
