"""The plan of a run, enumerated, against a simulation that goes step by step."""

import dataclasses
import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from hardjax.choose.batch_plan import BatchPlan, steps_of
from hardjax.choose.selection import AllBatches, HardBatches, HardSamples
from hardjax.choose.trimming import Trimming, make_plan
from hardjax.engine.plan import (
    Facts,
    Position,
    RunPlan,
    dispatches,
    learning_rate_factors,
    never_chooses,
    next_dispatch,
    programs,
    step_inputs,
)
from hardjax.engine.rates import Schedule
from hardjax.engine.stages import Stage
from hardjax.engine.state import Sizes

CASES = dict(
    num_batches=st.integers(1, 60),
    delta=st.floats(0.01, 1.0),
    epochs=st.integers(1, 9),
    test_every=st.sampled_from([1, 2, 3, "round"]),
    bound=st.integers(1, 80),
    every=st.none() | st.integers(1, 90),
    end=st.none() | st.floats(0.05, 1.0),
    spread=st.booleans(),
)


def plan_of(num_batches, delta=0.2, epochs=4, *, batch_size=16, bound=64, end=None, every=None, **settings) -> RunPlan:
    selection = HardBatches(delta)
    trimming = None if end is None else Trimming(1.0, end)
    trims = trimming and make_plan(trimming, epochs, batch_size, ("reuse", "gather", "plain"))
    steps = selection.round_steps(num_batches)
    sizes = Sizes(batch_size, num_batches, num_batches, "batch")
    stage = Stage(sizes, Fraction(epochs), epochs * num_batches, steps, 0.1, trims)
    return RunPlan((stage,), selection, trimming=trimming, measure_every=every, bound=bound, **settings)


def simulate(num_batches, delta, epochs, test_every, end, every, spread, batch_size=16) -> dict:
    """What a run does, one step after the other: (round, place in it, samples kept) of each, tests, measured steps."""
    total, steps, tests = epochs * num_batches, [], []
    rounds = 0
    while len(steps) < total:
        began = len(steps)
        epoch = began // num_batches
        share = 1.0 if end is None else 1.0 + (end - 1.0) * (epoch / (epochs - 1) if epochs > 1 else 0.0)
        length = num_batches if rounds == 0 else max(1, round(delta * num_batches))
        for place in range(length):
            if len(steps) < total:
                steps.append((rounds, place, max(1, round(share * batch_size))))
        rounds += 1
        due = test_every != "round" and any(
            mark % (test_every * num_batches) == 0 for mark in range(began + 1, len(steps) + 1)
        )
        if due or test_every == "round" or len(steps) == total:
            tests.append(len(steps))
    measured = []
    for interval in range(0 if every is None else total):
        place = int(every * (interval * (math.sqrt(5) - 1) / 2 % 1)) if spread else 0
        if interval * every + place < total:
            measured.append(interval * every + place)
    return {"steps": steps, "tests": tests, "measured": measured}


def enumerate_plan(plan: RunPlan) -> dict:
    steps, tests, measured, rounds, open_round = [], [], [], -1, False
    for call in dispatches(plan):
        if call.kind == "look":
            assert call.trained == 0 and open_round
            measured.append(call.before.backprops)
        elif call.kind == "plan":
            assert call.trained == 0 and not open_round
            rounds, open_round = rounds + 1, True
        elif call.kind == "rounds":
            assert not open_round
            for _ in range(call.spec.rounds):
                rounds += 1
                steps += [(rounds, place, call.keep) for place in range(call.spec.steps)]
        else:
            assert open_round
            first = call.before.cursor
            steps += [(rounds, first + place, call.keep) for place in range(call.spec.steps)]
            open_round = call.after.cursor != 0
        assert call.trained <= plan.bound
        assert call.after.backprops == len(steps)
        if call.test:
            tests.append(len(steps))
    return {"steps": steps, "tests": tests, "measured": measured}


@settings(derandomize=True, max_examples=400, deadline=None)
@given(**CASES)
def test_the_plan_of_a_whole_run_equals_a_simulation(num_batches, delta, epochs, test_every, bound, every, end, spread):
    plan = plan_of(
        num_batches, delta, epochs, bound=bound, end=end, every=every, test_every=test_every, measure_spread=spread
    )
    assert enumerate_plan(plan) == simulate(num_batches, delta, epochs, test_every, end, every, spread)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(**CASES)
def test_going_on_from_any_position_is_going_on(num_batches, delta, epochs, test_every, bound, every, end, spread):
    plan = plan_of(
        num_batches, delta, epochs, bound=bound, end=end, every=every, test_every=test_every, measure_spread=spread
    )
    calls = list(dispatches(plan))
    for index in {0, len(calls) // 3, len(calls) - 1}:
        kept = json.dumps(dataclasses.asdict(calls[index].before))
        assert list(dispatches(plan, Position(**json.loads(kept)))) == calls[index:]


@settings(derandomize=True, max_examples=200, deadline=None)
@given(**CASES)
def test_programs_are_few(num_batches, delta, epochs, test_every, bound, every, end, spread):
    plan = plan_of(
        num_batches, delta, epochs, bound=bound, end=end, every=every, test_every=test_every, measure_spread=spread
    )
    rungs = 1 + math.log(bound, 4)
    counts = 1 if end is None else 1 + len({call.spec.trim for call in dispatches(plan)})
    # The first, the later and the last round: each a plan and two segments, or whole; several of them together in a
    # few numbers; lengths between measured steps in a few more.
    assert len(programs(plan)) <= (9 + rungs + (0 if every is None else 1 + rungs)) * counts


def test_the_lengths_of_a_cut_round():
    def lengths(num_batches, bound, **options):
        calls = dispatches(plan_of(num_batches, 1.0, 1, bound=bound, **options))
        return [call.spec.steps for call in calls if call.kind in ("segment", "rounds")]

    assert lengths(64, 64) == [64]
    assert lengths(65, 16) == [13] * 5  # equal parts, if few of them divide it
    assert lengths(97, 40) == [33, 32, 32]  # else of two sizes
    assert lengths(97, 1) == [1] * 97
    assert lengths(40, 64, every=50) == [40]
    assert lengths(120, 64, every=50) == [50, 50, 16, 4]
    assert lengths(7, 64, every=3) == [3, 3, 1]
    assert lengths(7, 4, every=7) == [4, 3]  # measured at its first step alone


def test_short_rounds_go_together_up_to_a_test_point():
    calls = [(call.kind, call.spec.rounds, call.spec.steps, call.test) for call in dispatches(plan_of(10, 0.2, 2))]
    assert calls == [("rounds", 1, 10, True), ("rounds", 4, 2, False), ("rounds", 1, 2, True)]
    every_round = list(dispatches(plan_of(10, 0.2, 2, test_every="round")))
    assert [call.after.backprops for call in every_round if call.test] == [10, 12, 14, 16, 18, 20]


@pytest.mark.parametrize("delta, steps", [(0.2, 2), (0.05, 1), (0.25, 2), (0.35, 4), (1.0, 10)])
def test_round_steps_by_hand(delta, steps):
    assert HardBatches(delta).round_steps(10) == steps


def test_a_run_that_is_told_to_stop_stops():
    plan = plan_of(10)
    assert next_dispatch(plan, Position(10), Facts("interrupted")) is None
    assert next_dispatch(plan, Position(10)) is not None
    assert next_dispatch(plan, Position(plan.steps)) is None


def test_every_rank_of_a_short_round_is_measured_alike():
    """Rounds of five steps: the hardest batch comes first, and an interval of 50 would meet it for ever."""
    plan = plan_of(10, 0.5, 2000, every=50, measure_spread=True)
    steps = np.array([plan.measured_step(index) for index in range(1, 399)])
    ranks = np.bincount((steps - 10) % 5, minlength=5)
    assert ranks.min() > 0.8 * ranks.mean() and ranks.max() < 1.2 * ranks.mean()
    assert plan.measured_step(0) == 0 and (steps // 50 == np.arange(1, 399)).all()
    published = dataclasses.replace(plan, measure_spread=False)
    assert [published.measured_step(index) for index in range(3)] == [0, 50, 100]


@pytest.mark.parametrize("bound", [1, 3, 64])
def test_the_bound_moves_no_measurement(bound):
    plan = plan_of(10, 0.2, 12, every=3, bound=bound, measure_spread=True)
    assert enumerate_plan(plan) == enumerate_plan(dataclasses.replace(plan, bound=1000))


def test_a_rate_steps_exactly_where_its_share_is_reached():
    plan = dataclasses.replace(plan_of(98, 1.0, 3), schedule=Schedule("step", (1 / 3, 2 / 3), 0.5))
    factors = learning_rate_factors(plan, np.arange(294))
    assert factors.tolist() == [1.0] * 98 + [0.5] * 98 + [0.25] * 98
    for total in range(3, 400):  # of every length at which the share falls on a step
        for share in (0.1, 0.2, 0.3, 0.6, 0.7, 1 / 3, 2 / 3):
            step = Fraction(share).limit_denominator(100) * total
            if step.denominator == 1:
                long = dataclasses.replace(plan_of(total, 1.0, 1), schedule=Schedule("step", (share,), 0.5))
                found = learning_rate_factors(long, np.arange(total))
                assert found[int(step) - 1] == 1.0 and found[int(step)] == 0.5


def test_inputs_are_those_of_each_step_however_it_is_dispatched():
    schedule = Schedule("cosine", warmup=0.1)
    whole = [dataclasses.replace(plan_of(23, 0.4, 6, end=0.3, bound=bound), schedule=schedule) for bound in (7, 500)]
    rates, keeps = zip(
        *(
            map(
                np.concatenate,
                zip(*(step_inputs(plan, call) for call in dispatches(plan) if call.trained), strict=True),
            )
            for plan in whole
        ),
        strict=True,
    )
    np.testing.assert_array_equal(*rates)
    np.testing.assert_array_equal(*keeps)
    assert rates[0].dtype == np.float32 and len(rates[0]) == 6 * 23


def two_stages() -> RunPlan:
    def stage(batch_size, num_batches, epochs):
        sizes = Sizes(batch_size, num_batches, num_batches, "batch")
        steps = round(epochs * num_batches)
        return Stage(sizes, Fraction(epochs), steps, HardBatches(0.4).round_steps(num_batches), 0.1)

    stages = (stage(8, 10, Fraction(3, 2)), stage(16, 5, Fraction(5, 2)))
    return RunPlan(stages, HardBatches(0.4), schedule=Schedule("step", (0.5,), 0.1))


def test_stages_of_different_sizes_share_one_clock_of_epochs():
    plan = two_stages()
    assert plan.epochs == 4 and plan.steps == 15 + 12
    assert [plan.epoch(done) for done in (0, 10, 15, 20, 27)] == [
        0,
        1,
        1.5,
        Fraction(3, 2) + Fraction(5, 12) * 5 / 2,
        4,
    ]
    calls = list(dispatches(plan))
    # A stage ends exactly, and begins with all of its batches.
    assert [(c.stage, c.spec.steps * c.spec.rounds, c.after.backprops) for c in calls] == [
        (0, 10, 10),
        (0, 4, 14),
        (0, 1, 15),
        (1, 5, 20),
        (1, 2, 22),
        (1, 2, 24),
        (1, 2, 26),
        (1, 1, 27),
    ]
    rates = np.concatenate([step_inputs(plan, call).learning_rate for call in calls])
    progress = [plan.epoch(step) / 4 for step in range(27)]
    np.testing.assert_allclose(rates, [0.1 if share < 0.5 else 0.01 for share in progress], rtol=1e-6)


@pytest.mark.parametrize("selection", [AllBatches(), HardSamples(0.5)], ids=str)
def test_plans_need_no_device(selection):
    """Whatever is asked of a plan is plain Python: no array is made."""
    plan = dataclasses.replace(plan_of(10), selection=selection)
    assert all(isinstance(call.after.backprops, int) for call in dispatches(plan))


STAGES = dict(
    sizes=st.lists(st.sampled_from([4, 8, 16, 32]), min_size=1, max_size=4),
    samples=st.integers(33, 200),
    epochs=st.integers(1, 7),
    delta=st.floats(0.05, 1.0),
    bound=st.integers(1, 40),
    every=st.none() | st.integers(1, 30),
    multi_step=st.booleans(),
)


def staged(sizes, samples, epochs, delta=0.3, bound=64, every=None, multi_step=False, **settings) -> RunPlan:
    """A plan of several stages, as `make_run_plan` builds it of a configuration."""
    spans = BatchPlan.stages(sizes, multi_step=multi_step).spans(epochs, (0.5, 0.75))
    selection, stages = HardBatches(delta), []
    for span, steps in zip(spans, steps_of(spans, samples), strict=True):
        batches = -(-samples // span.size)
        if not steps:
            reject()
        shapes = Sizes(span.size, batches, batches, "batch")
        stages.append(Stage(shapes, span.epochs, steps, selection.round_steps(batches), 0.1))
    return RunPlan(tuple(stages), selection, measure_every=every, bound=bound, **settings)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(**STAGES)
def test_stages_end_exactly_and_begin_with_a_full_epoch(sizes, samples, epochs, delta, bound, every, multi_step):
    settings = dict(bound_by_time=True, measure_spread=samples % 2 == 0)
    plan = staged(sizes, samples, epochs, delta, bound, every, multi_step, **settings)
    trained, begun = [0] * len(plan.stages), set()
    for call in dispatches(plan):
        stage = plan.stages[call.stage]
        if call.stage not in begun:
            begun.add(call.stage)
            assert call.before == plan.position_at(call.stage)
        if call.trained:
            assert plan.stage_of(call.before.backprops) == plan.stage_of(call.after.backprops - 1) == call.stage
            assert plan.state_stage(call.after) == call.stage == plan.stage_of(call.after.backprops - 1)
            assert plan.batch_size(call.after.backprops) == stage.sizes.batch_size
        within = call.before.backprops - call.before.cursor - plan.start_of(call.stage)[0]
        if call.kind in ("rounds", "plan"):
            full = min(stage.sizes.num_batches, stage.steps) if within == 0 else stage.round_steps
            assert call.spec.steps == min(full, stage.steps - within)
            assert call.spec.selection == (plan.selection.first_round() if within == 0 else plan.selection)
        assert call.trained <= plan.bound_of(call.stage)
        trained[call.stage] += call.trained
    assert trained == [stage.steps for stage in plan.stages]


@settings(derandomize=True, max_examples=200, deadline=None)
@given(**STAGES)
def test_progress_and_its_inverse(sizes, samples, epochs, delta, bound, every, multi_step):
    plan = staged(sizes, samples, epochs, delta, bound, every, multi_step)
    assert plan.epoch(0) == 0 and plan.epoch(plan.steps) == plan.epochs == epochs
    whole = [plan.whole_epochs(backprops) for backprops in range(plan.steps)]
    assert whole == sorted(whole) and whole[0] == 0 and whole[-1] < epochs
    for index in range(len(plan.stages)):
        assert whole[plan.start_of(index)[0]] >= math.floor(plan.start_of(index)[1])
    for backprops in range(plan.steps + 1):
        assert plan.backprops(plan.epoch(backprops)) == backprops
        if backprops:
            assert plan.epoch(backprops) > plan.epoch(backprops - 1)
            assert plan.backprops((plan.epoch(backprops) + plan.epoch(backprops - 1)) / 2) == backprops
    for index in range(len(plan.stages)):
        first, done = plan.start_of(index)
        assert plan.epoch(first) == done and plan.stage_of(first) == index


@pytest.mark.parametrize("bound", [1, 64])
def test_what_comes_with_an_epoch_comes_after_all_its_batches_where_a_stage_was_rounded_up(bound):
    trims = make_plan(Trimming(1.0, 0.4), 4, 10, ("plain",))
    # As `steps_of` rounds them, 7.5 to 8, and the second one gets less for it.
    spans = ((3, Fraction(5, 2), 8), (6, Fraction(3, 2), 8))
    stages = tuple(Stage(Sizes(10, n, n, "batch"), epochs, steps, n, 0.1, trims) for n, epochs, steps in spans)
    plan = RunPlan(stages, AllBatches(), trimming=Trimming(1.0, 0.4), bound=bound)
    calls = list(dispatches(plan))
    # The second stage begins in the middle of epoch 2, and its first round ends in that of epoch 3.
    assert [call.after.backprops for call in calls if call.test] == [3, 6, 14, 16]
    kept = {call.before.backprops - call.before.cursor: call.keep for call in calls}
    assert kept == {0: 10, 3: 8, 6: 6, 8: 6, 14: 4}


@pytest.mark.parametrize(
    "plan, never",
    [
        (plan_of(10, epochs=1), True),
        (plan_of(10, epochs=2), False),
        (dataclasses.replace(plan_of(10, epochs=1), selection=AllBatches()), False),
        (two_stages(), False),
        (staged([32, 8], 96, 2), True),
    ],
    ids=["one epoch", "two epochs", "nothing to choose", "long stages", "stages of an epoch"],
)
def test_a_strategy_that_never_chooses_is_known(plan, never):
    assert never_chooses(plan) == never
    rounds = [call for call in dispatches(plan) if call.kind in ("rounds", "plan")]
    first = plan.selection.first_round()
    assert never == (plan.selection != first and all(call.spec.selection == first for call in rounds))


def test_rates_fall_with_the_first_step_of_a_phase():
    plan = staged([32, 8], 96, 8, multi_step=True, schedule=Schedule("step", (0.5, 0.75)))
    # N = 3 and 12: phases of 4, 2 and 2 epochs, each half at 32 and half at 8.
    assert [stage.steps for stage in plan.stages] == [6, 24, 3, 12, 3, 12]
    edges = np.cumsum([0] + [stage.steps for stage in plan.stages])
    factors = np.concatenate([learning_rate_factors(plan, np.arange(*ends)) for ends in itertools.pairwise(edges)])
    np.testing.assert_allclose(factors, np.repeat([1, 0.1, 0.01], [30, 15, 15]))


@pytest.mark.parametrize(
    "sizes, samples, epochs, decay_at, step, factor",
    [
        ([32, 64], 50000, 90, (0.6, 0.8), None, None),  # common denominators beyond 64 bits
        ([16, 32], 1437, 10, (1 / 3, 2 / 3), 225, 0.1),  # the first step of the second phase
    ],
)
def test_shares_that_are_no_short_fractions(sizes, samples, epochs, decay_at, step, factor):
    spans = BatchPlan.stages(sizes, multi_step=True).spans(epochs, decay_at)
    stages = [
        Stage(Sizes(span.size, -(-samples // span.size), 1, "batch"), span.epochs, steps, 1, 0.1)
        for span, steps in zip(spans, steps_of(spans, samples), strict=True)
    ]
    plan = RunPlan(tuple(stages), HardBatches(0.5), schedule=Schedule("step", decay_at))
    for index, stage in enumerate(stages):
        first = plan.start_of(index)[0]
        for at in (first, first + stage.steps - 1):
            progress = float(plan.epoch(at) / plan.epochs)
            expected = 0.1 ** sum(progress >= share for share in decay_at)
            np.testing.assert_allclose(learning_rate_factors(plan, np.array([at])), [expected])
    if step is not None:
        np.testing.assert_allclose(learning_rate_factors(plan, np.array([step - 1, step])), [1.0, factor])


def test_programs_of_stages_are_few():
    plan = staged([16, 32, 64, 128, 256], 60000, 40, 0.2, bound=64, bound_by_time=True)
    rungs = 1 + math.log(64, 4)
    found = programs(plan)
    for index in range(5):
        assert len([1 for _, _, stage in found if stage == index]) <= 9 + rungs


def test_the_bound_of_a_dispatch_follows_the_size():
    plan = staged([4, 16], 64, 4, bound=64, bound_by_time=True)
    assert [plan.bound_of(0), plan.bound_of(1)] == [64, 16]
    assert dataclasses.replace(plan, bound_by_time=False).bound_of(1) == 64
