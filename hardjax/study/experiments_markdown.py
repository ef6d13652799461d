"""Published experiments as Markdown: `hardjax table show --markdown`, and RESULTS.md."""

from collections.abc import Mapping, Sequence

from hardjax.study.experiments import SMOKE
from hardjax.study.experiments_report import Line, Report, told

_NAMED = 4  # sources that are named one by one


def markdown(lines: Sequence[Line]) -> str:
    """A table of Markdown; empty for no lines."""
    if not lines:
        return ""
    names = list(lines[0])
    rows = [names, ["---"] * len(names), *([line[name] for name in names] for line in lines)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") or " " for cell in row) + " |" for row in rows) + "\n"


def results(reports: Sequence[Report], papers: Mapping[str, str]) -> str:
    """The text of RESULTS.md.

    Args:
        reports: of all experiments, in order.
        papers: beginning of a name -> heading.
    """
    out = [
        "# Results",
        "",
        "Written by `hardjax table show all --markdown` from the rows in `results/` alone; verdicts by the rule of",
        "[README](README.md). ±: half a 95 % interval of Student's t over seeds; sd: deviation between runs; of what",
        "is published, the spread printed there. Equal time: at the last test point within the training time of the",
        "fastest arm. What was not run is listed at the end of each paper's part, with the time that it would take one",
        "worker of the device that most rows are of: by rows of the same network, else by its operations.",
        "",
    ]
    for prefix, heading in {**papers, "": "Others"}.items():
        those = [one for one in reports if _prefix(one, papers) == prefix]
        if not those:
            continue
        out += [f"## {heading}", ""]
        for one in those:
            out += _section(one) if _says_something(one) else []
        if left := [one for one in those if not _says_something(one)]:
            out += ["Not run so far, or not enough of it to say anything:", "", *map(_left, left), ""]
    return "\n".join(out)


def _prefix(one: Report, papers: Mapping[str, str]) -> str:
    return next((prefix for prefix in papers if one.found.experiment.name.startswith(prefix)), "")


def _says_something(one: Report) -> bool:
    """It has rows, and where they are those of others a verdict or something printed to set them beside."""
    beside = one.found.experiment.published or any(line.found.pairs for line in one.judged)
    return bool(one.found.rows and (beside or not one.found.experiment.reads))


def _left(said: Report) -> str:
    """A line on an experiment that nobody ran, with what it would cost."""
    one = said.found.experiment
    sizes = ", ".join(
        f"{scale} {size.count} runs, {told(said.prices[scale])}" for scale, size in one.scales.items() if scale != SMOKE
    )
    how = sizes or (f"reads {', '.join(one.reads)}" if len(one.reads) < _NAMED else f"reads {len(one.reads)} others")
    return f"- `{one.name}`: {one.title} ({how if one.computed is None else 'computed'})"


def _section(one: Report) -> list[str]:
    experiment = one.found.experiment
    title = experiment.title[0].upper() + experiment.title[1:]
    out = [f"### {experiment.name}: {title}", "", f"{experiment.source}.", ""]
    if experiment.published or not experiment.reads:
        out += [markdown(one.arms)]
    if any(line.found.pairs for line in one.judged):
        kept = [text for line, text in zip(one.judged, one.verdicts, strict=True) if line.found.pairs]
        out += [markdown(kept)]
    return [*out, *(f"- {note}" for note in one.notes), ""]
