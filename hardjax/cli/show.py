"""`hardjax show`."""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from hardjax._validate import Refusal
from hardjax.cli import folders, output
from hardjax.cli.curves import curve
from hardjax.cli.encoding import writable
from hardjax.cli.folders import Entry, Found, number, numbers
from hardjax.cli.parsing import Runs, parse, told
from hardjax.training.progress import score

_TOLERANCE = 0.05  # of `convergence.own_level_epoch`
_MOST_TOLD = 4  # settings in which runs differ
_IN_COLUMNS = (
    "model",
    "dataset",
    "model_options",
    "selection.name",
    "selection.delta",
    "epochs",
)  # of the table anyway
_NO_SETTING = "data_dir"  # where the same data lies
_LOSSES = {"full_train_loss": "loss of the training split", "train_loss": "loss in training"}


@dataclass(frozen=True)
class Show:
    """Status, curves and verdict of runs and comparisons, finished or running, from their files."""

    runs: Runs  # folders of `hardjax train` and `compare`, or a folder of such
    curves: Annotated[int, told("most runs to draw curves of")] = 6


def run(arguments: list[str]) -> int:
    """Show as the arguments say; returns the exit code."""
    from hardjax import _validate

    options = parse(Show, "show", arguments)
    if not options.runs:
        raise Refusal("Name at least one folder that `hardjax train --output` or `hardjax compare --output` wrote.")
    _validate.at_least(0, curves=options.curves)
    found, shown, refused = [], [], []
    for given in options.runs:
        try:
            for one in map(folders.read, folders.find(given)):
                shown.append(_described(one))
                found.append(one)
        except Refusal as refusal:
            refused.append(f"hardjax: {' '.join(str(refusal).split())}")
    # All of them, and nothing else: whoever named a wrong folder wants to know which before looking at the others.
    if refused:
        print("\n".join(refused), file=sys.stderr)
        return 2
    rows = [row for row, _, _ in shown]
    if not any(row["best by validation (%)"] for row in rows):
        rows = [{name: cell for name, cell in row.items() if name != "best by validation (%)"} for row in rows]
    output.table("runs", [{name: cell or "-" for name, cell in row.items()} for row in rows])
    for place, ((row, drawn, verdict), differs) in enumerate(zip(shown, _differing(found), strict=True)):
        print(f"\n{row['folder']}{f' ({differs})' if differs else ''}: {verdict}")
        if place < options.curves:
            print("".join(f"  {line}\n" for line in drawn), end="")
    if len(shown) > options.curves:
        print(f"\ncurves of the first {options.curves} of {len(shown)}; --curves draws more")
    return 0


def _described(found: Found) -> tuple[dict[str, str], list[str], str]:
    """A row of the table, lines of curves, and the verdict."""
    try:
        if found.is_comparison:
            return _comparison_row(found), _arm_curves(found), _comparison_verdict(found)
        return _run_row(found), _run_curves(found), _run_verdict(found)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # JSON, but not what a run writes: a field of another type or none at all.
        reason = f"{type(error).__name__}: {error}"
        raise Refusal(f"Damaged files in {found.name!r}, not as `hardjax train` writes them ({reason}).") from None


def _run_row(found: Found) -> dict[str, str]:
    config, last = found.config, found.history[-1] if found.history else {}
    selection = config["selection"]
    what = f"{_title(config)}, {_arm(selection['name'], selection.get('delta', 1.0))}"
    name = _loss_field(found.history)
    return {
        "folder": found.name,
        "what": what + (", trimmed" if config.get("trimming") else ""),
        "status": found.status,
        "epoch": f"{number(last.get('epoch', 0)):.4g}/{config['epochs']}",
        "back-propagations": f"{number(last.get('backprops', 0)):,.0f}",
        "time": _clock(number(last.get("seconds", 0))),
        "train loss": _shown(number(last.get(name)), ".4g"),
        "test top-1 (%)": _shown(number(last.get("test_top1")), ".2f"),
        "best by validation (%)": _best(found.history),
    }


def _differing(found: Sequence[Found]) -> list[str]:
    """Of each run the settings, not told by other columns, that another run has otherwise; of comparisons nothing."""
    flat = [{} if one.is_comparison else dict(_settings(one.config)) for one in found]
    names = dict.fromkeys(name for one in flat for name in one)
    differ = [name for name in names if len({json.dumps(one.get(name)) for one in flat if one}) > 1]
    told = []
    for one in flat:
        # What a run has not (the end of a trimming, say, beside a trimming that is null) is no difference of its own.
        cells = [f"{name} {_plain(one[name])}" for name in differ if name in one]
        told.append(", ".join(cells[:_MOST_TOLD] + ["..."] * (len(cells) > _MOST_TOLD)))
    return told


def _settings(config: Entry, above: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of the settings and of those within them, but for what the table tells anyway."""
    for name, value in config.items():
        if above + name in (*_IN_COLUMNS, _NO_SETTING):
            continue
        if isinstance(value, dict):
            yield from _settings(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _comparison_row(found: Found) -> dict[str, str]:
    arms, seeds, summaries = found.config["arms"], found.config["seeds"], [run["summary"] for run in found.history]
    return {
        "folder": found.name,
        "what": f"{_title(found.config)}, {len(arms)} arms by {seeds} seeds",
        "status": found.status,
        "epoch": f"{len(found.history)}/{len(arms) * seeds} runs",
        "back-propagations": f"{math.fsum(number(summary['backprops']) for summary in summaries):,.0f}",
        "time": _clock(math.fsum(number(summary.get("train_seconds", 0)) for summary in summaries)),
        "train loss": "",
        "test top-1 (%)": "",
        "best by validation (%)": "",
    }


def _run_curves(found: Found) -> list[str]:
    name = _loss_field(found.history)
    # By the logarithm: the second half of a falling loss would lie in the lowest block.
    return _aligned(
        [
            (f"{_LOSSES[name]} (log)", numbers(found.history, name), True),
            ("test top-1 (%)", numbers(found.history, "test_top1"), False)
            if _counts(found.history)
            else ("test loss (log)", numbers(found.history, "test_loss"), True),
        ],
        numbers(found.history, "epoch"),
    )


def _arm_curves(found: Found) -> list[str]:
    """The mean curve of each arm over its runs so far, as far as all of them go."""
    runs: dict[str, list[Entry]] = {}
    for entry in found.history:
        runs.setdefault(_arm(entry["selection"], entry["delta"]), []).append(entry["history"])
    rows, epochs = [], []
    for arm, histories in runs.items():
        columns = [[number(value) for value in history["full_train_loss"]] for history in histories]
        rows.append((arm, _means(columns), True))
        epochs = max(epochs, [number(value) for value in histories[0]["epoch"]], key=len)
    lines = _aligned(rows, epochs)
    return [f"{_LOSSES['full_train_loss']} (log), mean over the runs of an arm:", *lines] if lines else []


def _means(columns: Sequence[Sequence[float]]) -> list[float]:
    return [
        math.fsum(row) / len(row) if all(map(math.isfinite, row)) else math.nan for row in zip(*columns, strict=False)
    ]


def _aligned(rows: Sequence[tuple[str, Sequence[float], bool]], epochs: Sequence[float]) -> list[str]:
    """A curve a line, its ends beside it."""
    lines = []
    for label, values, log in rows:
        finite = [(value, epoch) for value, epoch in zip(values, epochs, strict=False) if math.isfinite(value)]
        if finite:
            low, at_low = min(finite, key=lambda point: point[0])  # the first of equal ones
            high, at_high = max(finite, key=lambda point: point[0])
            ends = f"min {low:.4g} (epoch {at_low:.4g})  max {high:.4g} (epoch {at_high:.4g})  last {values[-1]:.4g}"
            lines.append((label, curve(values, log=log), ends))
    wide = [max((len(line[column]) for line in lines), default=0) for column in (0, 1)]
    return [writable(f"{label:<{wide[0]}}  {drawn:<{wide[1]}}  {ends}", sys.stdout) for label, drawn, ends in lines]


def _run_verdict(found: Found) -> str:
    epochs, status = found.config["epochs"], found.status
    if not found.history:
        return f"{status}: not tested yet" if status == "running" else f"{status}: never tested"
    last = found.history[-1]
    at = number(last.get("epoch"))
    end = (found.summary or {}).get("end", "budget spent")
    if status == "diverged":
        bad = [entry["epoch"] for entry in found.history if not math.isfinite(number(entry.get("test_loss")))]
        where = f"diverged in epoch {bad[0]:.4g}" if bad else f"diverged by epoch {at:.4g}"
        return where if end == "budget spent" else f"{where}: {end}"
    test = f"{score(number(last.get('test_top1')), number(last.get('test_loss')))} test"
    again = len((found.summary or {}).get("resumed_at") or ())
    resumed = f"; resumed {again} {'time' if again == 1 else 'times'}" if again else ""
    if status == "finished":
        ended = "" if end == "budget spent" else f"; {end}"
        return f"finished: {test} after {at:.4g} epochs{_settled(found.history)}{ended}{resumed}"
    verdict = f"{status}: epoch {at:.4g} of {epochs}, {test}"
    seconds = number(last.get("seconds"))
    if status == "running" and at > 0 and math.isfinite(seconds):
        verdict += f", about {_clock(seconds / at * (epochs - at))} of training left"
    return verdict + resumed


def _settled(history: Sequence[Entry]) -> str:
    """When the loss of the training split settled, where it was evaluated often enough to tell."""
    if _loss_field(history) != "full_train_loss" or len(history) < 3:
        return ""
    import numpy as np

    from hardjax.study.convergence import own_level_epoch

    epochs, losses = (np.array(numbers(history, name)) for name in ("epoch", "full_train_loss"))
    settled = own_level_epoch(epochs, losses, _TOLERANCE)
    if settled == epochs[-1] and losses[-1] < losses[-2]:
        return "; training loss still falling at the end"
    if math.isnan(settled) or settled == epochs[-1]:
        return "; training loss did not settle"
    return f"; training loss settled in epoch {settled:.4g} (within {100 * _TOLERANCE:g} % of its fall)"


def _comparison_verdict(found: Found) -> str:
    done, runs = len(found.history), len(found.config["arms"]) * found.config["seeds"]
    if found.summary is None or found.status == "running":
        if not done:
            return f"{found.status}: none of {runs} runs done"
        last = found.history[-1]
        test = score(*(number(last["summary"].get(f"final_test_{name}")) for name in ("top1", "loss")))
        arm = _arm(last["selection"], last["delta"])
        return f"{found.status}: {done} of {runs} runs done, the last one {arm}, seed {last['seed']}, {test} test"
    from hardjax.study.tables import difference_table

    rows = [row | {"differences": _finite(row["differences"])} for row in found.summary["rows"]]
    told = []
    for line in difference_table(rows):
        cells = [f"{name} {cell}" for name, cell in line.items() if cell.endswith("*")]
        told += [f"\n  {line['arm']} against {line['against']}: {', '.join(cells)}"] if cells else []
    head = f"{found.status}: {done} of {runs} runs"
    if not told:
        return f"{head}; no interval excludes 'no difference'"
    return f"{head}; intervals that exclude 'no difference' (** also when all are judged together):{''.join(told)}"


def _finite(content: Any) -> Any:
    """Null back to NaN in every number of the differences."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    return math.nan if content is None else content


def _title(config: Entry) -> str:
    options = "".join(f" {name}={value}" for name, value in config.get("model_options", {}).items())
    return f"{config['model']}{options} on {config['dataset']}"


def _arm(name: str, delta: float) -> str:
    return name if delta == 1 else f"{name} {delta:g}"


def _loss_field(history: Sequence[Entry]) -> str:
    """The loss of the training split where it was evaluated, else the mean of what was trained."""
    whole = any(math.isfinite(value) for value in numbers(history, "full_train_loss"))
    return "full_train_loss" if whole else "train_loss"


def _counts(history: Sequence[Entry]) -> bool:
    """Whether predictions are right or wrong in this run."""
    return any(math.isfinite(value) for value in numbers(history, "test_top1")) or not history


def _best(history: Sequence[Entry]) -> str:
    """Test accuracy at the first test point of the highest validation accuracy; empty without them."""
    scores = [(number(entry.get("validation_top1")), entry) for entry in history]
    scores = [(score, entry) for score, entry in scores if math.isfinite(score)]
    if not scores:
        return ""
    _, best = max(scores, key=lambda pair: pair[0])
    return f"{_shown(number(best.get('test_top1')), '.2f')} (epoch {number(best.get('epoch')):.4g})"


def _shown(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
