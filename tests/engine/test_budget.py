import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardjax.choose.selection import HardBatches
from hardjax.engine.plan import dispatches

CASES = dict(
    num_batches=st.integers(1, 60),
    delta=st.floats(0.01, 1.0),
    epochs=st.integers(1, 9),
    test_every=st.sampled_from(["epoch", "round"]),
    steps_per_dispatch=st.integers(1, 40),
)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(**CASES)
def test_budget_is_exact_and_programs_are_few(num_batches, delta, epochs, test_every, steps_per_dispatch):
    steps = HardBatches(delta).round_steps(num_batches)
    plan = list(dispatches(num_batches, steps, epochs, test_every, steps_per_dispatch))

    assert sum(call.steps * call.rounds for call in plan) == epochs * num_batches
    assert len({(call.first, call.steps, call.max_rounds) for call in plan}) <= 3
    assert all(1 <= call.rounds <= call.max_rounds for call in plan)
    assert plan[-1].test


@settings(derandomize=True, max_examples=200, deadline=None)
@given(**CASES)
def test_tests_come_at_the_first_boundary_at_or_after_each_epoch(
    num_batches, delta, epochs, test_every, steps_per_dispatch
):
    steps = HardBatches(delta).round_steps(num_batches)
    done, boundaries, tested = 0, [], []
    for call in dispatches(num_batches, steps, epochs, test_every, steps_per_dispatch):
        for _ in range(call.rounds):
            done += call.steps
            boundaries.append(done)
        if call.test:
            tested.append(done)
    expected = {min(b for b in boundaries if b >= e * num_batches) for e in range(1, epochs + 1)}
    assert tested == (boundaries if test_every == "round" else sorted(expected))


@pytest.mark.parametrize("delta, steps", [(0.2, 2), (0.05, 1), (0.25, 2), (0.35, 4), (1.0, 10)])
def test_round_steps_by_hand(delta, steps):
    assert HardBatches(delta).round_steps(10) == steps
