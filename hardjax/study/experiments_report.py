"""What the rows of a published experiment say: ours beside theirs, and verdicts; plain tables, made from rows alone."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hardjax.study import statistics, verdict
from hardjax.study.experiments import Published, Statement
from hardjax.study.experiments_metrics import METRICS, Row, trained_alike, value, value_within
from hardjax.study.experiments_prices import Price, Prices, left, nothing_of
from hardjax.study.experiments_rows import Found
from hardjax.study.outcomes import was_lost
from hardjax.study.verdict import Difference, Values

_ORDERED = 10  # arms from which on their order says something

Line = dict[str, str]
Read = Mapping[str, Mapping[int, float]]  # arm -> seed -> metric


@dataclass(frozen=True)
class Judged:
    """A statement and what the rows say of it.

    Attributes:
        found: the difference at equal back-propagations, which the verdict is of.
        verdict: one of `verdict.VERDICTS`.
        in_time: the difference at equal time, with its verdict; None where the metric has none.
        seconds: the time that was given; NaN where none is known.
        own_test: p value of the paper's own test.
        against: arms that it was set against: of those that the statement names, the ones with rows (if any has one).
        so_far: not all of its pairs are there, or those that lack of what it is judged together with may yet change it.
    """

    statement: Statement
    found: Difference
    verdict: str
    in_time: tuple[Difference, str] | None
    seconds: float
    own_test: float
    against: tuple[str, ...] = ()
    so_far: bool = False


@dataclass(frozen=True)
class Report:
    """An experiment as tables.

    Attributes:
        arms: ours beside what was printed, a line an arm.
        judged: statements whose arms this scale has.
        verdicts: the same as lines.
        notes: what a reader has to know besides.
        prices: scale -> price of its runs, of one of which nothing was run.
    """

    found: Found
    arms: list[Line]
    judged: tuple[Judged, ...]
    verdicts: list[Line]
    notes: list[str] = field(default_factory=list)
    prices: Mapping[str, Price] = field(default_factory=dict)


def report(found: Found, prices: Prices | None = None) -> Report:
    """Tables of what there is.

    Args:
        prices: of what is left; None: by the rows of this experiment alone.
    """
    judged, prices = judge(found), Prices(found.rows) if prices is None else prices
    verdicts = [_verdict_line(one) for one in judged]
    # Nothing of it was run at any scale: `Results.shown` would have taken that one.
    unrun = {} if found.rows else {scale: prices.of(nothing_of(found, scale)) for scale in found.experiment.scales}
    return Report(found, _arms(found), judged, verdicts, _notes(found, prices), unrun)


def judge(found: Found) -> tuple[Judged, ...]:
    """The statements that this scale has arms for, those of equal back-propagations and those of equal time each judged
    together, family by family."""
    known = [one for one in found.experiment.statements if _groups(found, one) is not None]
    pairs = [_compared(found, one, None) for one in known]
    limits = [_time_limit(found, one) for one in known]
    early = [
        _compared(found, one, limit) if METRICS[one.metric].early and math.isfinite(limit) else None
        for one, limit in zip(known, limits, strict=True)
    ]
    found_pairs = [(one, pair) for one, (pair, _) in zip(known, pairs, strict=True)]
    verdicts, at_worst = _verdicts(found_pairs), _verdicts([(one, _at_worst(one, pair)) for one, pair in found_pairs])
    second = iter(_verdicts([(one, pair[0]) for one, pair in zip(known, early, strict=True) if pair is not None]))
    return tuple(
        Judged(
            one,
            pair,
            said,
            None if then is None else (then[0], next(second)),
            limit,
            test,
            _met(found, one.against),
            pair.pairs < one.runs or said != worst,
        )
        for one, (pair, test), said, worst, then, limit in zip(
            known, pairs, verdicts, at_worst, early, limits, strict=True
        )
    )


def _at_worst(one: Statement, pair: Difference) -> Difference:
    """What is not there yet shows no difference: of all that may come, that leaves the others the least."""
    return pair if pair.pairs >= one.runs else dataclasses.replace(pair, p_value=1.0)


def _verdicts(pairs: Sequence[tuple[Statement, Difference]]) -> list[str]:
    """One for each, those of a family judged together."""
    said: dict[int, str] = {}
    for family in dict.fromkeys(one.family for one, _ in pairs):
        places = [place for place, (one, _) in enumerate(pairs) if one.family == family]
        judged = verdict.judge([pairs[place][1] for place in places], [pairs[place][0].smallest for place in places])
        said |= dict(zip(places, judged, strict=True))
    return [said[place] for place in range(len(pairs))]


def _met(found: Found, side: Sequence[str]) -> tuple[str, ...]:
    return tuple(arm for arm in side if found.arms.get(arm)) or tuple(arm for arm in side if arm in found.arms)


def _groups(found: Found, one: Statement) -> tuple[list[str], list[str]] | None:
    """Arms of both sides that the scale has; None where one side has none."""
    arms, against = ([arm for arm in side if arm in found.arms] for side in (one.arms, one.against))
    return (arms, against) if arms and (against or not one.against) else None


def _compared(found: Found, one: Statement, seconds: float | None) -> tuple[Difference, float]:
    """(difference that a statement is about, p value of two samples), within a training time or at the end."""
    groups = _groups(found, one)
    assert groups is not None
    metric = METRICS[one.metric]
    rows = [row for arm in (*groups[0], *groups[1]) for row in found.arms[arm].values()]
    if metric.timed and rows and not trained_alike(rows):
        return verdict.difference({}, {}, True), math.nan
    higher = one.higher if one.higher is not None else bool(metric.higher)
    read = _values(found, one.metric, [*groups[0], *groups[1]], seconds)
    # The best of a side is the best by the metric itself; where neither way is better, the one that is claimed.
    best = metric.higher if metric.higher is not None else higher
    first, second = (_side({arm: read[arm] for arm in side}, best, one.of_several, metric.may_miss) for side in groups)
    if not groups[1]:
        second = {seed: 0.0 for seed in first}
    pair = verdict.difference(first, second, higher, metric.may_miss)
    # Of runs that missed their target it would say what the others alone do.
    return pair, verdict.two_samples(first, second) if groups[1] and not metric.may_miss else math.nan


def _side(arms: Read, higher: bool, of_several: str, may_miss: bool) -> Values:
    """Of several arms, those without a run are no choice; a mean is one of all of them."""
    if of_several == "mean":
        return verdict.mean_of(arms)
    arms = {arm: values for arm, values in arms.items() if values}
    return verdict.best_by_others(arms, higher, may_miss) if arms else {}


def _values(
    found: Found, metric: str, arms: Sequence[str], seconds: float | None = None
) -> dict[str, dict[int, float]]:
    rows = {arm: found.arms[arm] for arm in arms}
    if seconds is not None:
        return {
            arm: {seed: value_within(metric, row, seconds) for seed, row in those.items()}
            for arm, those in rows.items()
        }
    return {
        arm: {
            seed: value(metric, row, [other[seed] for other in rows.values() if seed in other])
            for seed, row in those.items()
        }
        for arm, those in rows.items()
    }


def _time_limit(found: Found, one: Statement) -> float:
    """Median training seconds of the fastest arm; NaN where an arm has none, or where they cannot be compared.

    Runs that diverged, and were not trained to the end for that, set no limit.
    """
    known = {arm: list(found.arms.get(arm, {}).values()) for arm in (*one.arms, *one.against)}
    if not trained_alike(row for rows in known.values() for row in rows):
        return math.nan
    whole = [[row for row in rows if not was_lost(row)] for rows in known.values()]
    seconds = [_seconds(rows) for rows in whole if rows]
    return min(seconds) if seconds and not any(map(math.isnan, seconds)) else math.nan


def _seconds(rows: Any) -> float:
    known = [row["train_seconds"] for row in rows if row.get("train_seconds") is not None]
    return float(np.median(known)) if known else math.nan


def _arms(found: Found) -> list[Line]:
    """A line for each arm that was printed or run."""
    printed = {(one.arm, one.metric): one for one in found.printed}
    several = {metric for _, metric in printed}
    names = dict.fromkeys([*found.arms, *(arm for arm, _ in printed)])
    lines = []
    for arm in names:
        rows = found.arms.get(arm, {})
        if not rows and not any((arm, metric) in printed for metric in several):
            continue
        line: Line = {"arm": arm}
        for metric in found.experiment.metrics:
            if metric in several:
                line[f"published {metric}"] = _printed(printed.get((arm, metric)), METRICS[metric].form)
            line[metric] = _ours(metric, rows)
        lines.append(line | {"runs": str(len(rows))})
    return lines


def _printed(one: Published | None, form: str) -> str:
    if one is None:
        return "-"
    if one.value is None:
        return ""
    return f"{one.value:{form}}" if one.spread is None else f"{one.value:{form}} ± {one.spread:{form}}"


def _ours(metric: str, rows: Mapping[int, Row]) -> str:
    """Mean with its 95 % interval and the deviation between runs; a median where a target may be missed. Of times that
    cannot be compared there is neither."""
    if METRICS[metric].timed and rows and not trained_alike(rows.values()):
        return "-"
    found_values = [value(metric, row) for row in rows.values()]
    values = [one for one in found_values if not math.isnan(one)]
    form = METRICS[metric].form
    if not values:
        return "-"
    if METRICS[metric].may_miss:
        middle, missed = verdict.median(values), sum(map(math.isinf, values))
        return ("missed" if math.isinf(middle) else f"{middle:{form}}") + (f" ({missed} missed)" if missed else "")
    own = statistics.interval(values)
    text = f"{own.mean:{form}}"
    if not own.determined:
        return text
    return f"{text} ± {own.half_width:{form}} (sd {np.std(values, ddof=1):{form}})"


def _verdict_line(one: Judged) -> Line:
    form = METRICS[one.statement.metric].form.replace(",", "")
    line = {
        "claim": one.statement.says + " (stated after its rows)" * one.statement.late,
        "against": _named(one.against, one.statement.of_several),
        "metric": one.statement.metric,
        "difference as claimed": difference(one.found, form),
        "pairs": f"{one.found.pairs} of {one.statement.runs}",
        "smallest of interest": f"{one.statement.smallest:g}",
        "verdict": _said(one.found, one.verdict, one.so_far),
        "at equal time": "-",
        "p of two samples": "-" if math.isnan(one.own_test) else f"{one.own_test:.3g}",
    }
    if one.in_time is not None and one.in_time[0].pairs:
        pairs = one.in_time[0].pairs
        fewer = f" ({pairs} pairs)" if pairs < one.found.pairs else ""
        said = _said(*one.in_time, one.so_far or pairs < one.statement.runs)
        line["at equal time"] = f"{difference(one.in_time[0], form)}: {said}{fewer}"
    return line


def _said(found: Difference, said: str, so_far: bool) -> str:
    """A verdict with what a reader may wonder at: an interval beside 0, and no verdict."""
    if said != verdict.TOO_FEW:
        return said + ", so far" * so_far
    if not found.pairs:
        return "no pair"
    beside = found.pairs >= verdict.LEAST_PAIRS and found.determined and not found.low <= 0 <= found.high
    return f"{said} (Holm's correction)" if beside else said


def _named(arms: Sequence[str], of_several: str) -> str:
    if len(arms) < 2:
        return arms[0] if arms else "0"
    return f"the {of_several} of {len(arms)}"


def difference(found: Difference, form: str) -> str:
    """ "+1.20 ± 0.30", a median with both ends, "-" without a pair."""
    if not found.pairs:
        return "-"
    if found.by_sign:
        ends = f" ({_end(found.low, form)} to {_end(found.high, form)})" if found.determined else ""
        return f"median {_end(found.middle, form)}{ends}"
    text = f"{found.middle:+{form}}"
    return f"{text} ± {(found.high - found.low) / 2:{form}}" if found.determined else text


def _end(value: float, form: str) -> str:
    return f"{'+' if value > 0 else '-'}missed" if math.isinf(value) else f"{value:+{form}}"


def told(price: Price) -> str:
    """A price for people: "unmeasured" where no row tells."""
    seconds = price.seconds
    if math.isnan(seconds):
        return "unmeasured"
    if seconds < 5400:
        text = f"about {math.ceil(seconds / 60)} minutes" if seconds else "nothing"
    else:
        hours = float(f"{seconds / 3600:.3g}")
        text = f"about {hours:,.0f} hours" if hours >= 100 else f"about {hours:g} hours"
    return f"{text} by operations" if price.by_operations else text


def _notes(found: Found, prices: Prices) -> list[str]:
    experiment, notes = found.experiment, []
    if experiment.computed is None:
        runs = "not printed" if experiment.paper_runs is None else str(experiment.paper_runs)
        notes.append(f"runs of the paper: {runs}; ours: {len(found.rows)} of {found.wanted} at the {found.scale} scale")
    size = experiment.scales.get(found.scale)
    if size is not None and size.departs:
        notes.append(f"the {found.scale} scale departs from the paper: {size.departs}")
    if found.rows:
        devices = sorted({str(row.get("device")) for row in found.rows if row.get("device")})
        notes += [f"run on {'; '.join(devices)}"] if devices else []
        diverged = sum(row["status"] == "diverged" for row in found.rows)
        if not trained_alike(found.rows):
            notes.append("rows of several devices, or of populations and alone: their times are not compared")
        notes += [f"{diverged} runs diverged, and count with what they predict"] if diverged else []
    if count := sum(count for _, count in left(found)):
        notes.append(f"left: {count} runs, {told(prices.of(found))} of one worker")
    if found.others:
        notes.append(f"{found.others} rows are of configurations that this scale does not ask for")
    notes += _beside_printed(found)
    notes += [f"printed: {text}" for text in experiment.printed]
    return notes + [f"erratum {text}" for text in experiment.errata]


def _beside_printed(found: Found) -> list[str]:
    """A line for each metric that enough arms have in print and in rows: do ours order them as the paper's do?"""
    notes: list[str] = []
    if found.experiment.reads:  # those that it reads say so themselves
        return notes
    for metric in found.experiment.metrics:
        read = METRICS[metric]
        printed = {one.arm: one.value for one in found.printed if one.metric == metric and one.value is not None}
        if read.timed or read.may_miss:
            continue
        means = {arm: _mean(metric, found.arms[arm].values()) for arm in printed if found.arms.get(arm)}
        arms = [arm for arm, mean in means.items() if math.isfinite(mean)]
        ours, theirs = (np.array([values[arm] for arm in arms]) for values in (means, printed))
        if len(arms) < _ORDERED or not np.ptp(ours) or not np.ptp(theirs):  # no order, where all are alike
            continue
        difference, form = float(np.median(ours - theirs)), read.form
        notes.append(
            f"{metric} of {len(arms)} arms beside what is printed: rank correlation"
            f" {float(statistics.spearman(ours, theirs)):.2f}, median difference {difference:+{form}}"
        )
    return notes


def _mean(metric: str, rows: Iterable[Row]) -> float:
    values = [one for row in rows if math.isfinite(one := value(metric, row))]
    return float(np.mean(values)) if values else math.nan


def counts(judged: Sequence[Judged]) -> dict[str, int]:
    """Verdict -> how many statements that have a pair at all have it."""
    said = [one.verdict for one in judged if one.found.pairs]
    return {name: said.count(name) for name in verdict.VERDICTS if name in said}
