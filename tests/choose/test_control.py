"""A controller's decisions from facts worked out by hand, its text, and the plan of what it did."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest

from hardjax.choose import control
from hardjax.choose.batch_plan import BatchPlan, Span, replayed
from hardjax.choose.control import Decision, Measured, Seen, decide, read, see
from hardjax.choose.controller import Controller

NAN = math.nan
BOUNDS = dict(start=32, least=16, most=64)


def facts(**changes) -> Seen:
    """Of size 32 after two epochs, nothing measured."""
    plain = Seen(2, 32, 1.0, *[NAN] * 6, 0.0, 0.0, 0)
    return plain._replace(**changes)


# Two measurements at N = 10 steps an epoch, one at N = 5; each stands for 5 steps.
RUN = [
    Measured(2.0, 0.1, 5, 0.5, 8.0, 0.5),
    Measured(4.0, 0.3, 5, 0.5, 4.0, -0.5),
    Measured(9.0, 0.2, 5, 1.0, 6.0, 1.0),
]


def test_the_two_readings_by_hand():
    assert read(RUN, "measurements") == (pytest.approx(5.0), pytest.approx(5 * 0.6))
    # c by epochs: (2 * 0.5 + 4 * 0.5 + 9 * 1) / 2; l: mean 0.2 in the first epoch, 0.2 in the second, ten steps each.
    assert read(RUN, "epochs") == (pytest.approx(6.0), pytest.approx(10 * 0.2 + 10 * 0.2))
    for reading in ("measurements", "epochs"):
        assert read(RUN[:2], reading) == (pytest.approx(3.0), pytest.approx(2.0)), "one size: the readings are equal"
        assert all(map(math.isnan, read([], reading)))
    lost = [Measured(NAN, NAN, 5, 0.5, NAN, NAN), *RUN]
    assert read(lost, "measurements") == read(RUN, "measurements")
    assert all(map(math.isnan, read(lost[:1], "measurements")))  # nothing finite is nothing measured


def test_what_a_controller_sees():
    seen = see(Controller(**BOUNDS), RUN, [1], 2, 16, 0.5)
    assert seen[:3] == (2, 16, 0.5) and seen[3:5] == read(RUN, "measurements")
    # c of the last two and of the first; l * 5 steps of these over the epochs that they stand for.
    assert seen[5:9] == pytest.approx((6.5, (0.3 + 0.2) * 5 / 1.5, 2.0, 0.1 * 5 / 0.5))
    assert seen[9:] == (10.0, 0.5, 2), "of the last two alone, each part by itself"
    by_epoch = see(Controller(**BOUNDS, rule="growth", reading="epochs"), RUN, [], 2, 16, 1.0)
    assert by_epoch.condition == by_epoch.interval_condition == pytest.approx(6.0)
    assert by_epoch.interval_energy == pytest.approx(4.0 / 2) and all(map(math.isnan, by_epoch[7:9]))
    # After three decisions: of the last measurement and of the one before it, in steps of the first one's epochs.
    by_epoch = see(Controller(**BOUNDS, rule="growth", reading="epochs"), RUN, [0, 1, 2], 2, 16, 1.0)
    assert by_epoch[5:9] == pytest.approx((9.0, 10 * 0.2, 4.0, 10 * 0.3))


@pytest.mark.parametrize(
    "found, settings, action, words",
    [
        (dict(covariance=128.0, signal=2.0, batches=3), {}, "double", "a batch of 64 "),
        (dict(covariance=126.0, signal=2.0, batches=3), {}, "keep", "a batch of 63 "),
        (dict(covariance=34.0, signal=2.0, batches=3), {}, "keep", "a batch of 17 "),
        (dict(covariance=32.0, signal=2.0, batches=3), {}, "halve", "a batch of 16 "),
        (dict(covariance=128.0, signal=2.0, batches=3), dict(share=0.25), "halve", "a batch of 16 "),
        (dict(covariance=1.0, signal=-2.0, batches=3), {}, "double", "a batch of inf "),
        (dict(), {}, "keep", "no noise scale was measured"),
        (dict(size=64, covariance=999.0, signal=1.0, batches=3), {}, "keep", "64 is the most"),
        (dict(size=16, covariance=1.0, signal=1.0, batches=3), {}, "keep", "16 is the least"),
    ],
)
def test_by_the_noise_scale(found, settings, action, words):
    decision = decide(Controller(**BOUNDS, **settings), facts(**found))
    assert decision.action == action and words in decision.reason
    size = found.get("size", 32)
    assert decision.size == {"double": 2 * size, "halve": size // 2, "keep": size}[action]
    assert decision.rate_factor == 1.0


# At epoch 2 of a target from (4, 10) to (8, 30) after four epochs: C_K 6, L_K 20; 10 % off is near enough.
TARGET = dict(rule="trajectory", target=((0.0, 4.0, 10.0), (4.0, 8.0, 30.0)))


@pytest.mark.parametrize(
    "condition, energy, action",
    [
        (6.0, 20.0, "keep"),
        (6.5, 21.9, "keep"),
        (6.0, 22.1, "double"),
        (5.0, 22.1, "double"),
        (6.0, 17.9, "halve"),
        (6.7, 17.9, "halve"),
        (6.7, 20.0, "halve"),
        (5.3, 20.0, "double"),
        (6.7, 22.1, "lower-rate"),
        (5.3, 17.9, "keep"),
        (NAN, NAN, "keep"),
    ],
)
def test_by_a_trajectory(condition, energy, action):
    """P3, section 4.1: C_K grows with m, L_K falls with it, both grow with the rate."""
    decision = decide(Controller(**BOUNDS, **TARGET), facts(condition=condition, energy=energy))
    assert decision.action == action and "of 6" in decision.reason and "of 20" in decision.reason
    assert decision.rate_factor == (0.5 if action == "lower-rate" else 1.0)
    assert decision.size == {"double": 64, "halve": 16}.get(action, 32)


def test_at_the_bounds_of_a_trajectory():
    controller = Controller(**BOUNDS, **TARGET, rate_factor=0.25, lowest_rate=0.05)
    high, low = dict(condition=6.0, energy=30.0), dict(condition=6.0, energy=10.0)
    lowered = decide(controller, facts(size=64, **high))
    assert lowered[:3] == ("lower-rate", 64, 0.25) and "64 is the most" in lowered.reason
    assert decide(controller, facts(size=64, rate=0.2, **high))[:3] == ("lower-rate", 64, 0.25)
    kept = decide(controller, facts(size=64, rate=0.19, **high))
    assert kept[:3] == ("keep", 64, 1.0) and "as low as it may be" in kept.reason
    assert decide(controller, facts(size=16, **low))[:3] == ("keep", 16, 1.0)


@pytest.mark.parametrize(
    "grown, action",
    [((1.9, 1.1), "keep"), ((2.1, 1.1), "halve"), ((1.9, 1.3), "double"), ((2.1, 1.3), "lower-rate")],
)
def test_by_growth(grown, action):
    controller = Controller(**BOUNDS, rule="growth", condition_growth=2.0, energy_growth=1.2)
    before = dict(interval_condition_before=3.0, interval_energy_before=10.0)
    seen = facts(interval_condition=3.0 * grown[0], interval_energy=10.0 * grown[1], **before)
    decision = decide(controller, seen)
    assert decision.action == action
    assert f"c grew {grown[0]:.4g} times of 2, L_K an epoch grew {grown[1]:.4g} times of 1.2" in decision.reason
    assert decide(controller, seen._replace(interval_condition_before=NAN, interval_energy_before=NAN)).action == "keep"


@pytest.mark.parametrize("reading", ["measurements", "epochs"])
def test_where_nothing_changes_nothing_has_grown(reading):
    """c 3 and l 0.1 all along; intervals of three and two measurements, each of 0.4 of the 10 steps of an epoch."""
    run = [Measured(3.0, 0.1, 4, 0.4, 1.0, 1.0)] * 10
    controller = Controller(**BOUNDS, rule="growth", reading=reading)
    for decided, count in (([], 3), ([3], 5), ([3, 5], 8), ([3, 5, 8], 10)):
        seen = see(controller, run[:count], decided, len(decided) + 1, 32, 1.0)
        assert decide(controller, seen).action == "keep"
        assert seen[5:7] == pytest.approx((3.0, 1.0)), "ten steps of 0.1 an epoch"
    # From the sixth measurement on twice the energy, which asks for a larger batch.
    run = run[:5] + [one._replace(energy=0.2) for one in run[5:]]
    assert decide(controller, see(controller, run[:8], [3, 5], 3, 32, 1.0)).action == "double"
    assert decide(controller, see(controller, run, [3, 5, 8], 4, 32, 1.0)).action == "keep"


def test_the_text_of_a_controller():
    text = "controlled:start=32,least=16,most=64,every=2,rule=trajectory,reading=epochs,target=0:4:10;4.5:8:3e-07"
    plan = BatchPlan(text)
    assert plan.text == text and BatchPlan.parse(text.replace("reading", " reading")) == plan
    assert plan.controller == Controller(
        **BOUNDS, every=2, rule="trajectory", reading="epochs", target=((0, 4, 10), (4.5, 8, 3e-7))
    )
    columns = ([0, 4.5], np.array([4, 8]), [10.0, 3e-7])
    assert BatchPlan.controlled(32, 16, 64, trajectory=columns, every=2, reading="epochs") == plan
    assert plan.sizes == (32, 16, 64) and plan.spans(10) == (Span(Fraction(10), 32),) and plan.every == 2
    assert plan.title.endswith("target") and BatchPlan("controlled:least=16,start=16,most=16,every=1").every == 1
    # What holds its default is not written: one word for one thing.
    assert BatchPlan("controlled:most=64,least=16,start=32,rule=noise-scale,share=1.0") == BatchPlan.controlled(
        32, 16, 64
    )
    assert BatchPlan("controlled:start=8,least=8,most=8,rule=growth,lowest-rate=0.3").controller.lowest_rate == 0.3
    assert BatchPlan("32-64").controller is None


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Controller(8, 16, 64), "Expected start=8 between least=16 and most=64"),
        (lambda: Controller(128, 16, 64), "Expected start=128 between"),
        (lambda: Controller(32, 0, 64), "Expected least=0 to be at least 1"),
        (lambda: Controller(48, 16, 96), "to be powers of two apart"),
        (lambda: Controller(32, 32, 32, every=0), "every=0 to be a whole number of at least 1"),
        (lambda: Controller(32, 32, 32, rule="noise"), "did you mean 'noise-scale'"),
        (lambda: Controller(**BOUNDS, rule="growth", reading="epoch"), "did you mean 'epochs'"),
        (lambda: Controller(**BOUNDS, rule="trajectory"), "Expected a target with rule 'trajectory'"),
        (lambda: Controller(**BOUNDS, target=((1, 2, 3),)), "Expected a target with rule 'trajectory'"),
        (lambda: Controller(**BOUNDS, rule="trajectory", target=((1, 2),)), "of points \\(epoch, C_K, L_K\\)"),
        (lambda: Controller(**BOUNDS, rule="trajectory", target=((1, 2, 3), (1, 2, 3))), "rising epochs"),
        (lambda: Controller(**BOUNDS, rule="trajectory", target=((1, -2, 3),)), "finite numbers of at least 0"),
        (lambda: Controller(**BOUNDS, tolerance=0.2), "tolerance with rule trajectory, not with noise-scale"),
        (lambda: Controller(**BOUNDS, reading="epochs"), "reading with rule trajectory or growth"),
        (
            lambda: Controller(**BOUNDS, rate_factor=0.3),
            "rate_factor with rule trajectory or growth, not with noise-sc",
        ),
        (
            lambda: Controller(**BOUNDS, lowest_rate=0.3),
            "lowest_rate with rule trajectory or growth, not with noise-sc",
        ),
        (lambda: Controller(**BOUNDS, rate_factor=1.0), "rate_factor=1.0 between 0 and 1"),
        (lambda: Controller(**BOUNDS, lowest_rate=0.0), "lowest_rate=0.0"),
        (lambda: BatchPlan.controlled(32, 16, 64, trajectory=([1], [2, 3], [4])), r"as many of each, got \[1, 2, 1\]"),
        (lambda: BatchPlan.controlled(32, 16, 64, evry=1), "did you mean 'every'"),
        (lambda: BatchPlan("controlled:start=32,least=16"), "with most"),
        (lambda: BatchPlan("controlled:start=32,start=16"), "Expected start once"),
        (lambda: BatchPlan("controlled:start=x,least=1,most=2"), "start='x' of a controlled batch_plan to be a number"),
        (lambda: BatchPlan("controlled:start"), "'start' of batch_plan='controlled:start' as name=value"),
        (lambda: BatchPlan("controlled:strat=1"), "did you mean 'start'"),
        (lambda: BatchPlan("32@1.5-64"), "rates above 0 and up to 1 after '@', got 1.5"),
        (lambda: BatchPlan("1/0*32-1/2*64"), "with shares that are numbers"),
        (lambda: BatchPlan("32-64;every=2-MS"), "such as"),
        (lambda: replayed([]), "a log of decisions with a line at least"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def lines(*decisions, epochs=10, every=2):
    """A log: after `every` epochs each (size before, size and rate factor after)."""
    rate, found = 1.0, []
    for number, (before, action, size, factor) in enumerate(decisions, 1):
        seen = facts(epoch=number * every, size=before, rate=rate)
        controller = Controller(before, before, before, every=every)
        line = control.entry(controller, seen, Decision(action, size, factor, "why"), 7 * number, epochs)
        found.append(json.loads(json.dumps(line).replace("NaN", "null")))
        rate *= factor
    return found


def test_the_plan_of_a_log_by_hand():
    log = lines((32, "keep", 32, 1.0), (32, "double", 64, 1.0), (64, "lower-rate", 64, 0.3), (64, "halve", 32, 1.0))
    plan = replayed(log)
    assert plan.text == "2/5*32-1/5*64-1/5*64@0.3-1/5*32@0.3;every=2"
    assert plan.spans(10) == (
        Span(Fraction(4), 32), Span(Fraction(2), 64), Span(Fraction(2), 64, 0.3), Span(Fraction(2), 32, 0.3)
    )  # fmt: skip
    assert plan.every == 2 and plan.controller is None
    assert replayed(lines((32, "keep", 32, 1.0))).spans(10) == (Span(Fraction(10), 32),)
    # Every digit of a rate is kept: the product is rounded as it was.
    rate = 0.3 * 0.3 * 0.3 * 0.3
    deep = replayed(lines(*[(32, "lower-rate", 32, 0.3)] * 4))
    assert deep.spans(10)[-1].rate == rate
    thirds = replayed(lines((32, "double", 64, 1.0), epochs=6))
    assert [span.epochs for span in thirds.spans(6)] == [2, 4]


def test_a_log_is_decided_again_from_its_facts():
    controller = Controller(**BOUNDS, **TARGET)
    for seen in (facts(condition=6.7, energy=22.1), facts()):
        line = control.entry(controller, seen, decide(controller, seen), 20, 10)
        again = json.loads(json.dumps(line).replace("NaN", "null"))
        assert decide(controller, control.seen_in(again)) == Decision(*(again[name] for name in Decision._fields))
