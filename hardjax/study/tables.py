"""Rows of a comparison as text: columns for people, and the legend that says how to read them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

# Quantity of `evidence.make_rows` -> heading and number format of its difference.
_DIFFERENCES = {
    "common_threshold_epochs_sooner": ("epochs sooner (common)", "+.2f"),
    "convergence_epochs_sooner": ("epochs sooner (own level)", "+.2f"),
    "test_top1": ("test top-1 (points)", "+.2f"),
    "test_loss": ("test loss", "+.3g"),
    "time_ratio": ("time of a step (ratio)", ".3f"),
    "C_K": ("C_K", "+.3g"),
    "L_K": ("L_K", "+.3g"),
}


def replay_table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """P1's Tables 3 to 5: a line an arm."""
    return _aligned([_replay_columns(row) for row in rows])


def trimming_table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """P2's Table 1: a line a method."""
    return _aligned([_trimming_columns(row) for row in rows])


def difference_table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """A line for each arm and what it is set against; empty where there is one arm."""
    # A column of its own only where it says something: where no run was left out all pairs are the seeds.
    uneven = any(_pairs(those) != str(row["seeds"]) for row in rows for those in row["differences"].values())
    return _aligned(
        [
            {"arm": row["label"], "against": label}
            | ({"pairs": _pairs(those)} if uneven else {})
            | {
                heading: difference(those[name], form, mark=True)
                for name, (heading, form) in _DIFFERENCES.items()
                if name in those
            }
            for row in rows
            for label, those in row["differences"].items()
        ]
    )


def difference(found: Row | None, form: str, mark: bool = False) -> str:
    """A difference with its interval: "+1.95 ± 0.86", a ratio with both ends, "-" for none.

    Equal differences have no interval ("+1.00, all 3 alike"), and neither has a single one, which shows as it is.

    Args:
        found: `Interval.to_dict` with `holds_corrected`.
        form: of the numbers, as in `format`.
        mark: append * where it differs, ** where it does so among all differences of the table.
    """
    if found is None or not found["count"]:
        return "-"
    text = format(found["mean"], form)
    if not math.isfinite(found["low"]):
        return f"{text}, all {found['count']} alike" if found["count"] > 1 else text
    if found["neutral"] == 1:
        plain = form.lstrip("+")
        text += f" ({found['low']:{plain}} to {found['high']:{plain}})"
    else:
        text += f" ± {(found['high'] - found['low']) / 2:{form.lstrip('+')}}"
    if mark and found["differs"]:
        text += " **" if found["holds_corrected"] else " *"
    return text


def with_half_width(mean: float, half_width: float, form: str) -> str:
    """ "97.50 ± 0.69"; the mean alone where no interval is determined."""
    return f"{mean:{form}} ± {half_width:{form}}" if math.isfinite(half_width) else f"{mean:{form}}"


def replay_legend(rows: Sequence[Row], thresholds: Sequence[float], left_out: Sequence[str]) -> str:
    """What the columns of `replay_table` and `difference_table` mean."""
    return "\n".join(
        [
            "e: epoch in which the loss of the whole training split settles at its own final level; "
            f"e (common): first epoch at the loss that every arm reached with that seed ({_levels(thresholds)}).",
            "change: 100 (e1 - e) / e as in the paper, positive is sooner than ordinary training.",
            *_common_legend(rows, left_out),
        ]
    )


def trimming_legend(rows: Sequence[Row], thresholds: Sequence[float], left_out: Sequence[str]) -> str:
    """What the columns of `trimming_table` and `difference_table` mean, with P2's form of the result."""
    errors = {row["selection"]: f"{row['test_error']:.2f}" for row in rows}
    words = {"standard": "disabled", "trimmed": "enabled", "random-trimmed": "kept at random"}
    named = [name for name in words if name in errors]
    return "\n".join(
        [
            f"test error (%), mean over {rows[0]['seeds']} seeds, trimming "
            f"{' / '.join(words[name] for name in named)}: {' / '.join(errors[name] for name in named)}.",
            f"e (common): first epoch at the loss that every arm reached with that seed ({_levels(thresholds)}).",
            *_common_legend(rows, left_out),
        ]
    )


def _aligned(lines: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The same columns in every line, "-" where one has none: spectra may be lacking for an arm that diverged."""
    headings = list(dict.fromkeys(heading for line in lines for heading in line))
    return [{heading: line.get(heading, "-") for heading in headings} for line in lines]


def _replay_columns(row: Row) -> dict[str, str]:
    first = _from_first(row)
    return {
        "selection": row["selection"],
        "delta": f"{row['delta']:g}",
        **_scores(row, "test top-1 (%)", "test_top1"),
        "e": _epoch(row, "convergence"),
        "change of e (%)": difference(first.get("convergence_change_percent"), "+.1f"),
        "e (common)": _epoch(row, "common_threshold"),
        "change (%)": difference(first.get("common_threshold_change_percent"), "+.1f"),
        "ms/step": f"{1000 * row['seconds_per_step']:.3g}",
    } | _axes(row)


def _scores(row: Row, heading: str, field: str) -> dict[str, str]:
    """Accuracies, or the loss where nothing is predicted that is right or wrong."""
    if not math.isfinite(row[field]) and math.isfinite(row["test_loss"]):
        return {"test loss": with_half_width(row["test_loss"], row["test_loss_ci95"], ".4g")}
    return {
        "train top-1 (%)": f"{row['train_top1']:.2f}",
        heading: with_half_width(row[field], row["test_top1_ci95"], ".2f"),
    }


def _trimming_columns(row: Row) -> dict[str, str]:
    return {
        "method": row["selection"],
        "kept, first to last epoch": f"{row['keep_first']:g} to {row['keep_last']:g}",
        **_scores(row, "test error (%)", "test_error"),
        "e (common)": _epoch(row, "common_threshold"),
        "ms/step": f"{1000 * row['seconds_per_step']:.3g}",
        "time of standard": difference(_from_first(row).get("time_ratio"), ".2f"),
    } | _axes(row)


def _common_legend(rows: Sequence[Row], left_out: Sequence[str]) -> list[str]:
    seeds, lines = rows[0]["seeds"], []
    differences = [those for row in rows for those in row["differences"].values()]
    shown = [one for those in differences for one in those.values()]
    tests = sum(
        math.isfinite(those[name]["p_value"]) for those in differences for name in _DIFFERENCES if name in those
    )
    if tests:
        lines.append(
            f"±, (to): two-sided 95 % intervals of Student's t; differences are paired by seed ({seeds} seeds). "
            "Rule: arms differ (*) only where the interval excludes no difference."
        )
        lines.append(
            f"That is {tests} intervals, not corrected: were there no difference anywhere, about {tests / 20:.1f} of "
            "them would be marked * by chance; ** holds by Holm's correction over all of them."
        )
    elif seeds == 1 and shown:
        lines.append("One seed: no interval, and nothing is claimed about any difference.")
    if any(one["count"] > 1 and not math.isfinite(one["low"]) for one in shown):
        lines.append(
            "all alike: equal for every seed, on the grid of test points or test samples; no interval follows."
        )
    lines += [f"left out of epochs and spectra: {line}" for line in left_out]
    return lines


def _levels(thresholds: Sequence[float]) -> str:
    finite = [level for level in thresholds if math.isfinite(level)]
    if not finite:
        return "none: every run is left out"
    low, high = min(finite), max(finite)
    return f"{low:.3g} nats" if low == high else f"{low:.3g} to {high:.3g} nats"


def _from_first(row: Row) -> Mapping[str, Row]:
    """Differences from ordinary training, the first reference; empty for itself."""
    return next(iter(row["differences"].values()), {})


def _epoch(row: Row, name: str) -> str:
    mean, runs = row[f"{name}_epoch"], row[f"{name}_runs"]
    if not runs:
        return "-"
    return f"{mean:.1f}" + (f" ({runs} of {row['seeds']})" if runs < row["seeds"] else "")


def _pairs(those: Mapping[str, Row]) -> str:
    """How many pairs the differences of a line rest on: those of epochs may be fewer than those of accuracies."""
    counts = sorted({those[name]["count"] for name in _DIFFERENCES if name in those})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _axes(row: Row) -> dict[str, str]:
    """The columns of the axes that are on (`Axis.columns`)."""
    cells = row.get("columns", {}).items()
    return {
        name: value if isinstance(value, str) else f"{value:.4g}"
        for name, value in cells
        if isinstance(value, str) or math.isfinite(value)
    }
