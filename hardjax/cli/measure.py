"""`hardjax measure`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from hardjax._axis import dash
from hardjax._validate import Refusal
from hardjax.cli import output, prepare
from hardjax.cli.parsing import Folder, Runs, optional, parse

_BATCHES = 8  # of a final state's partition


@dataclass(frozen=True)
class Measure:
    """Read the spectra that runs recorded, with any tolerance, measure their final states, and draw both.

    Or make beacons of runs (--write-beacons), and draw the plane between beacons (--beacons).
    """

    runs: Runs  # folders of `hardjax train`
    batches: Annotated[
        int | None, optional("INT", "mini-batches of the final state to measure; 0: none (default: 8)")
    ] = None
    rows: Annotated[str | None, optional("STR", "contribution | coupled | frozen (default: that of the run)")] = None
    tolerance: float = 1e-6  # an eigenvalue is non-zero above this share of the largest
    float64: bool = False  # measure the final states in float64
    data_dir: Folder = None  # folder of prepared TFDS data (default: that of the run)
    gram_chunk: Annotated[int | None, optional("SAMPLES")] = None  # bounds the memory
    write_beacons: Annotated[str | None, optional("FILE", "of these finished runs of one batch size each")] = None
    beacons: Annotated[str | None, optional("FILE", "draw their plane, and in it the runs under a batch plan")] = None
    early: tuple[int, ...] = ()  # epochs at which beacons are ranked by what is known then
    error: str = "test"  # the map's: test | train
    reading: str = "measurement"  # what counts alike in C_K and L_K: measurement | epoch
    linear_axes: bool = False  # of the plane, instead of logarithmic ones
    output: str = "runs/measure"  # folder for measure.json and measures.png, or plane.png
    overwrite: bool = False  # let the folder hold another result of hardjax already


def run(arguments: list[str]) -> int:
    """Measure as the arguments say; returns the exit code."""
    options = parse(Measure, "measure", arguments)
    prepare.use_compilation_cache()
    _check(options)
    if _on_plane(options):
        from hardjax.cli import beacons

        if options.write_beacons is not None:
            beacons.write(options.runs, options.write_beacons, options.overwrite)
        else:
            beacons.draw(options)
        return 0
    _measure(options, _BATCHES if options.batches is None else options.batches)
    return 0


def _measure(options: Measure, batches: int) -> None:
    from hardjax.plots.fisher import measures
    from hardjax.study.measure import measure_run
    from hardjax.training import files

    settings = (batches, options.rows, options.tolerance, options.data_dir, options.gram_chunk)
    found = {folder: measure_run(folder, *settings, float64=options.float64) for folder in options.runs}
    if not batches and not any(report.recorded for report in found.values()):
        raise Refusal(f"Expected --batches above 0: {', '.join(options.runs)} recorded no spectra while training.")
    with files.claim_folder(options.output, options.overwrite) as folder:
        files.write_json(
            folder / "measure.json",
            {
                "options": vars(options) | {"batches": batches},
                "runs": {name: report.to_dict() for name, report in found.items()},
            },
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
    if batches:
        measured = max(len(report.final["c"]) for report in found.values())  # a partition may hold fewer than asked for
        output.table(
            f"final state, {'float64' if options.float64 else 'float32'},"
            f" mean over {measured} mini-batches (noise scale: mean covariance over mean signal)",
            [{"run": name} | report.final_row() for name, report in found.items()],
        )
    print(f"written to {folder}: measure.json{', measures.png' if drawn else ''}")


def _on_plane(options: Measure) -> bool:
    return options.write_beacons is not None or options.beacons is not None


def _check(options: Measure) -> None:
    """Every refusal that needs no data comes before the first run is measured."""
    from hardjax import _validate
    from hardjax.config import Performance
    from hardjax.fisher.observe import FisherMeasure
    from hardjax.training import files

    if not options.runs and options.beacons is None:
        raise Refusal("Name at least one folder that `hardjax train --output` wrote.")
    _check_beacons(options)
    if options.batches is not None:
        _validate.at_least(0, batches=options.batches)
    if options.batches == 0 or _on_plane(options):
        left_out = "--batches 0" if options.batches == 0 else "--beacons"
        left_out = left_out if options.write_beacons is None else "--write-beacons"
        for name in ("batches", "rows", "float64", "data_dir", "gram_chunk"):
            if getattr(options, name):
                raise Refusal(f"{dash(name)} goes with final states, which {left_out} leaves out.")
    FisherMeasure(rows=options.rows or "contribution", tolerance=options.tolerance)
    Performance(gram_chunk=options.gram_chunk)
    if options.data_dir is not None:
        _validate.local_folder(data_dir=options.data_dir)
    for folder in options.runs:
        files.read_config(folder)
    if options.write_beacons is not None:
        return
    folder = files.check_folder(options.output, options.overwrite)
    # --overwrite would delete the very run that is to be measured.
    if folder.resolve() in [_validate.local_folder(run=run).resolve() for run in options.runs]:
        raise Refusal(f"Expected output={options.output!r} to be another folder than the runs measured.")


def _check_beacons(options: Measure) -> None:
    """Beacons are written or read, and nothing is asked of the plane where there is none."""
    from hardjax import _validate
    from hardjax.study.beacons import ERRORS, READINGS, TOLERANCES

    _validate.one_of(ERRORS, error=options.error)
    _validate.one_of(READINGS, reading=options.reading)
    if None not in (options.write_beacons, options.beacons):
        raise Refusal("Give --write-beacons or --beacons, not both.")
    if options.beacons is None:
        for name in ("early", "linear_axes", "error", "reading"):
            if getattr(options, name) != getattr(Measure, name):
                raise Refusal(f"{dash(name)} goes with --beacons.")
    if options.write_beacons is not None:
        for name in ("tolerance", "output"):
            if getattr(options, name) != getattr(Measure, name):
                raise Refusal(
                    f"{dash(name)} goes with what is drawn; --write-beacons writes its file, at every tolerance."
                )
    if options.beacons is not None and options.tolerance not in TOLERANCES:
        held = ", ".join(f"{tolerance:g}" for tolerance in TOLERANCES)
        raise Refusal(f"Expected tolerance={options.tolerance:g} to be one that beacons hold: {held}.")
