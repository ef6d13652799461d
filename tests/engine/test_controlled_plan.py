"""Plans under a controller, with decisions drawn at random, against the open-loop plans of what was decided."""

import dataclasses
import json
import math
import types
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hardjax as hj
from hardjax.choose import control
from hardjax.choose.batch_plan import BatchPlan, replayed
from hardjax.choose.control import Decision, Seen
from hardjax.choose.controller import Controller
from hardjax.choose.selection import AllBatches, HardBatches
from hardjax.engine.ahead import later_stages
from hardjax.engine.plan import learning_rate_factors, next_dispatch, step_inputs
from hardjax.engine.recipe import make_run_plan
from hardjax.engine.stages import Change, Position

CASES = dict(
    samples=st.integers(33, 200),
    epochs=st.integers(2, 12),
    every=st.integers(1, 4),
    delta=st.floats(0.05, 1.0),
    measured=st.integers(1, 30),
    bound=st.integers(1, 60),
    test_every=st.sampled_from([1, 2, 5, "round"]),
    actions=st.lists(st.sampled_from(control.ACTIONS), min_size=12, max_size=12),
)


def plan_of(samples, epochs, text, delta=0.3, measured=5, bound=60, **changes):
    config = hj.TrainConfig(
        epochs=epochs,
        batch_plan=BatchPlan(text),
        selection=HardBatches(delta) if delta < 1 else AllBatches(),
        measure=hj.fisher.FisherMeasure(every=measured),
        learning_rate=0.1,
        **changes,
    )
    return make_run_plan(config, types.SimpleNamespace(num_samples=samples), bound=bound)


def decided(plan, actions, epochs, every, controller):
    """The dispatches of a run whose controller does as it is told, where the bounds allow it; and its log."""
    at, calls, log = Position(), [], []
    while (call := next_dispatch(plan, at)) is not None:
        calls.append(call)
        at = call.after
        if not call.control:
            continue
        now = plan.following(at.decided)
        size, rate, action = now.stages[-1].sizes.batch_size, now.share_of_rate, actions[len(log)]
        after = {"double": 2 * size, "halve": size // 2}.get(action, size)
        if not controller.least <= after <= controller.most:
            action, after = "keep", size
        factor = 0.5 if action == "lower-rate" else 1.0
        epoch = now.epoch(at.backprops)
        assert epoch == every * (len(log) + 1) and at.round_steps == 0
        seen = Seen(int(epoch), size, rate, *[0.0] * 8, 0)
        log.append(control.entry(controller, seen, Decision(action, after, factor, ""), at.backprops, epochs))
        if action != "keep":
            at = dataclasses.replace(at, decided=(*at.decided, Change(at.backprops, after, rate * factor)))
    return calls, log, plan.following(at.decided)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(**CASES)
def test_a_closed_loop_is_the_open_loop_of_its_log(samples, epochs, every, delta, measured, bound, test_every, actions):
    controller = Controller(16, 8, 32, every=every)
    settings = dict(schedule="cosine", test_every=test_every)
    plan = plan_of(samples, epochs, controller.text, delta, measured, bound, **settings)
    calls, log, ended = decided(plan, actions, epochs, every, controller)
    assert len(log) == (epochs - 1) // every
    assert sum(call.trained for call in calls) == ended.steps and ended.epochs == epochs
    steps = [stage.steps / stage.epochs for stage in ended.stages]
    assert steps == [stage.sizes.num_batches for stage in ended.stages], "whole epochs: a step is 1/N of one"
    # Gone on with from any position that JSON kept, the rest is the same.
    for index in (len(calls) // 3, len(calls) - 1):
        kept = json.loads(json.dumps(dataclasses.asdict(calls[index].before)))
        assert next_dispatch(plan, Position(**kept)) == calls[index]
    if not log:
        return
    open_loop = plan_of(samples, epochs, replayed(log).text, delta, measured, bound, **settings)
    again, _, _ = decided(open_loop, actions, epochs, every, controller)
    sizes = [[p.stages[c.stage].sizes for c in found] for p, found in ((ended, calls), (open_loop, again))]
    assert sizes[0] == sizes[1]
    for one, other in zip(calls, again, strict=True):
        assert (one.kind, one.spec, one.test, one.trained) == (other.kind, other.spec, other.test, other.trained)
        if one.trained:
            inputs = step_inputs(ended, one), step_inputs(open_loop, other)
            np.testing.assert_array_equal(*[found.learning_rate for found in inputs])


@settings(derandomize=True, max_examples=60, deadline=None)
@given(**CASES)
def test_programs_stay_within_the_sizes(samples, epochs, every, delta, measured, bound, test_every, actions):
    controller = Controller(16, 8, 32, every=every)
    plan = plan_of(samples, epochs, controller.text, delta, measured, bound, test_every=test_every)
    calls, _, ended = decided(plan, actions, epochs, every, controller)
    programs = {(call.kind, call.spec, ended.stages[call.stage].sizes) for call in calls if call.kind != "look"}
    rungs = 1 + math.log(bound, 4)
    # As of a plan without a controller; and the rounds that end where it decides: a plan and two segments, or whole.
    assert len(programs) <= 3 * (9 + 3 + 2 * (1 + rungs))


def test_what_may_come_next():
    plan = plan_of(96, 6, "controlled:start=16,least=8,most=32,every=2")
    batch_sizes = lambda found: [now.stages[index].sizes.batch_size for now, index in found]  # noqa: E731
    assert batch_sizes(later_stages(plan, Position())) == [32, 8]
    doubled = Position(12, decided=(Change(12, 32, 1.0),))
    (following,) = later_stages(plan, doubled)
    assert batch_sizes([following]) == [16]
    assert [stage.steps for stage in following[0].stages] == [12, 6, 12]
    assert later_stages(plan, dataclasses.replace(doubled, backprops=18)) == (), "no decision is left"


def test_a_lower_rate_alone_draws_no_batches_anew():
    plan = plan_of(96, 6, "controlled:start=16,least=8,most=32,every=2", delta=0.5)
    changed = plan.following((Change(12, 16, 0.5), Change(24, 32, 0.25)))
    assert [stage.anew for stage in changed.stages] == [True, False, True]
    assert [stage.learning_rate for stage in changed.stages] == [0.1, 0.05, 0.025]
    assert learning_rate_factors(changed, np.arange(24, 26)).tolist() == [1.0, 1.0]
    assert changed.epoch(12) == 2 and changed.epoch(24) == 4 and changed.backprops(Fraction(4)) == 24
    first = next_dispatch(changed, Position(12, decided=changed.decided, measured=9))
    assert first.spec.steps == 3 and first.spec.selection == HardBatches(0.5), "a replay like those before"


class Stubborn(AllBatches):
    def init(self, size):
        if size > 8:
            raise ValueError("a table of 8 batches at most")
        return super().init(size)


def test_a_selection_that_has_no_table_of_a_size():
    config = hj.TrainConfig(
        batch_plan=BatchPlan("controlled:start=16,least=8,most=32"),
        selection=Stubborn(),
        measure=hj.fisher.FisherMeasure(),
    )
    with pytest.raises(ValueError, match=r"makes its table anew at every size .* a table of 8 batches") as caught:
        make_run_plan(config, types.SimpleNamespace(num_samples=96))
    assert "\n" not in str(caught.value)
