"""Statements of the repository's own experiments against what was printed: a wrong sign would be a wrong verdict."""

import math
from pathlib import Path

import pytest

from hardjax.study import experiments, verdict
from hardjax.study.experiments_metrics import METRICS

FOLDER = Path(__file__).parents[2] / "experiments"
PRINTED_AS = {"epochs to a common level": "epochs to converge"}


@pytest.fixture(scope="module")
def ours():
    return experiments.load(FOLDER)


def _printed(ours, one):
    """(arm, metric) -> value, of the experiment or of those whose rows it reads."""
    several = len(one.reads) > 1
    sources = [ours[name] for name in one.reads] or [one]
    return {
        (f"{source.name}: {p.arm}" if several else p.arm, p.metric): p.value
        for source in sources
        for p in source.published
        if p.value is not None
    }


def _as_claimed(ours, name):
    """What a statement says -> printed difference, above 0 where it is as claimed."""
    one, found = ours[name], {}
    printed = _printed(ours, one)
    for claim in one.statements:
        metric = METRICS[claim.metric]
        higher = bool(metric.higher) if claim.higher is None else claim.higher
        sides = [
            [printed[arm, PRINTED_AS.get(claim.metric, claim.metric)] for arm in side]
            for side in (claim.arms, claim.against)
            if all((arm, PRINTED_AS.get(claim.metric, claim.metric)) in printed for arm in side)
        ]
        if len(sides) == 2:
            arm, against = (max(side) if metric.higher else min(side) for side in sides)
            found[claim.says] = verdict.difference({0: arm}, {0: against}, higher).middle
    return found


def _wrong(found):
    return {says for says, difference in found.items() if difference < 0}


def test_what_may_be_missed_is_run_often_enough_for_an_interval(ours):
    claims = [(one.name, claim) for one in ours.values() for claim in one.statements if METRICS[claim.metric].may_miss]
    assert len(claims) > 100
    for name, claim in claims:
        assert not math.isnan(verdict.median_interval(range(claim.runs))[0]), name


def test_claims_that_the_printed_tables_bear_out(ours):
    names = [*(f"p1-claim-{n}" for n in (1, 2, 3, 5, 12, 13, 15)), *(f"p3-claim-{n}" for n in (1, *range(2, 10)))]
    names += [name for name in ours if name.startswith("p3-grid")] + ["p2-claim-2"]
    for name in names:
        found = _as_claimed(ours, name)
        assert (found or not ours[name].statements) and not _wrong(found), name


def test_claims_that_the_printed_tables_contradict_as_the_errata_say(ours):
    # HE8: not at 0.8 (MobileNetV3-S has less) and 0.2 (EfficientNetV2-S).
    assert _wrong(_as_claimed(ours, "p1-claim-11")) == {
        "EfficientNet-B4 is below MobileNetV3-S at delta 0.8",
        "EfficientNet-B4 is below MobileNetV3-S at delta 0.2",
        "EfficientNet-B4 is below EfficientNetV2-S at delta 0.8",
        "EfficientNet-B4 is below EfficientNetV2-S at delta 0.2",
    }
    # HE6: eight gains and seven losses; HE10; T2; FE10, of which 34 pairs are of the plans that were run alike.
    assert len(_wrong(_as_claimed(ours, "p1-table-6"))) == 7
    assert _wrong(_as_claimed(ours, "p1-claim-16")) == {"MobileNetV3-S on STL-10 is soonest at delta 0.5"}
    assert _wrong(_as_claimed(ours, "p2-claim-1")) == {"DenseNet-121 on CIFAR-10: trimming tests better"}
    pairs = [d for name in ours if name.startswith("p3-dynamic") for d in _as_claimed(ours, name).values()]
    signs = [sum(d > 0 for d in pairs), sum(math.isclose(d, 0, abs_tol=1e-9) for d in pairs)]
    assert (len(pairs), signs) == (36, [19, 2])
