"""Batch plans beside hand-worked tables: sizes, shares, steps of every stage."""

import dataclasses
import itertools
import json
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import shared

import hardjax as hj
from hardjax._validate import Refusal
from hardjax.choose.batch_plan import BatchPlan, Span, rate_scale, steps_of

# P3, section 4.3, and the supplement: worked out by hand.
PUBLISHED = {
    "s16-to-64": (16, 16, 32, 32, 64),
    "s16-to-256": (16, 32, 64, 128, 256),
    "s32-to-128": (32, 32, 64, 64, 128),
    "s32-to-512": (32, 64, 128, 256, 512),
    "s64-to-256": (64, 64, 128, 128, 256),
    "s128-to-512": (128, 128, 256, 256, 512),
    "s256-to-16": (256, 128, 64, 32, 16),
    "s512-to-32": (512, 256, 128, 64, 32),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_notation(name):
    sizes = PUBLISHED[name]
    plan = BatchPlan.parse(name)
    assert plan.sizes == sizes and not plan.multi_step
    assert plan == BatchPlan.stages(list(sizes)) == BatchPlan("-".join(map(str, sizes)))
    twice = BatchPlan.parse(f"{name}-MS")
    assert twice == BatchPlan.parse(name, multi_step=True) == BatchPlan.stages(sizes, multi_step=True) != plan
    assert twice.sizes == sizes and twice.multi_step
    epochs = {size: Fraction(8) * sizes.count(size) for size in sizes}
    assert {span.size: span.epochs for span in plan.spans(40)} == epochs


def test_every_published_sequence():
    found = _sequences(json.loads(shared("published/fisher.json").read_text()))
    assert len(found) == 8
    for name, sizes in found.items():
        assert list(BatchPlan(name).sizes) == sizes


def _sequences(content):
    """Everything under "stage_sequences_..."."""
    found = {}
    for name, inner in content.items() if isinstance(content, dict) else ():
        found |= inner if name.startswith("stage_sequences_") else _sequences(inner)
    return found


# MNIST: N = 1875, 938, 469, 235, 118 at 32 ... 512.
@pytest.mark.parametrize(
    "text, decay_at, spans, steps",
    [
        (
            "s32-to-512",
            (0.5, 0.75),
            [(8, 32), (8, 64), (8, 128), (8, 256), (8, 512)],
            [15000, 7504, 3752, 1880, 944],
        ),
        (
            "s512-to-32-MS",
            (0.5, 0.75),
            [(4, 512), (4, 256), (4, 128), (4, 64), (4, 32)] + 2 * [(2, 512), (2, 256), (2, 128), (2, 64), (2, 32)],
            [472, 940, 1876, 3752, 7500] + 2 * [236, 470, 938, 1876, 3750],
        ),
        ("s16-to-64", (), [(16, 16), (16, 32), (8, 64)], [60000, 30000, 7504]),
        # The last of a phase and the first of the next are one stage.
        ("32-64-32-MS", (0.5,), [("20/3", 32), ("20/3", 64), ("40/3", 32), ("20/3", 64), ("20/3", 32)], None),
        ("0.25*32-0.75*128", (), [(10, 32), (30, 128)], [18750, 14070]),
        # 40/3 epochs: 25,000 steps of 32; 12,506.67 of 64; 6,253.33 of 128.
        ("32-64-128", (), [("40/3", 32), ("40/3", 64), ("40/3", 128)], [25000, 12507, 6253]),
        ("64", (), [(40, 64)], [37520]),
    ],
)
def test_stages_worked_out_by_hand(text, decay_at, spans, steps):
    found = BatchPlan(text).spans(40, decay_at)
    assert list(found) == [Span(Fraction(epochs), size) for epochs, size in spans]
    if steps is not None:
        assert steps_of(found, 60000) == steps


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    weights=st.lists(st.integers(1, 9), min_size=6, max_size=6),
    decay_at=st.lists(st.sampled_from([0.1, 1 / 3, 0.5, 0.75]), unique=True, max_size=3).map(sorted),
    epochs=st.integers(1, 90),
    samples=st.integers(300, 5000),
    multi_step=st.booleans(),
)
def test_epochs_and_samples_are_exact(sizes, weights, decay_at, epochs, samples, multi_step):
    total = sum(weights[: len(sizes)])
    shares = [weight / total for weight in weights[: len(sizes)]]
    spans = BatchPlan.stages(sizes, shares, multi_step=multi_step).spans(epochs, decay_at)
    assert sum(span.epochs for span in spans) == epochs
    assert all(a.size != b.size for a, b in itertools.pairwise(spans))
    done, planned = Fraction(0), Fraction(0)
    for span, steps in zip(spans, steps_of(spans, samples), strict=True):
        batches = -(-samples // span.size)
        done, planned = done + Fraction(steps, batches), planned + span.epochs
        assert abs(done - planned) <= Fraction(1, 2 * batches), "never off by more than half a step"


def test_growing_where_the_rate_would_fall():
    """0.5 and 0.75 of 8 epochs: 4 at 32, 2 at 320, 2 at 3200."""
    assert BatchPlan.growing(32) == BatchPlan("1/2*32-1/4*320-1/4*3200")
    assert BatchPlan.growing(32).spans(8) == ((4, 32, 1), (2, 320, 1), (2, 3200, 1))
    assert BatchPlan.growing(30, decay_at=[0.4], factor=2.5).sizes == (30, 75)
    assert BatchPlan.growing(8, decay_at=[]) == BatchPlan.constant(8)
    with pytest.raises(Refusal, match="such as s32-to-512"):
        BatchPlan.growing(8, decay_at=[0.75, 0.5])


def test_rates_of_stages():
    assert [rate_scale("linear", size, 32) for size in (32, 64, 16)] == [1, 2, 0.5]
    assert rate_scale("sqrt", 128, 32) == 2 and rate_scale("none", 128, 32) == 1


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "batch_plan='' such as s32-to-512"),
        ("32-", "such as"),
        ("32--64", "such as"),
        ("s32-to-", "such as"),
        ("-MS", "such as"),
        ("s32-to-96", "to go from one size to another by powers of two"),
        ("s0-to-4", "by powers of two"),
        ("0.5*32-64", "with a share of at least 1e-9 for every stage, or for none"),
        ("0*32-1*64", "with a share of at least 1e-9"),
        ("0.0000000000001*32-0.9999999999999*64", "with a share of at least 1e-9"),
        ("9" * 5000, "such as"),
        ("0.5*32-0.4*64", "with shares that add up to 1, got 0.9"),
        ("0-32", "with sizes of at least 1, got 0"),
        (32, "Expected text=32 to be text"),
    ],
)
def test_a_plan_that_cannot_be_read(text, words):
    with pytest.raises(Refusal, match=re.escape(words)) as caught:
        BatchPlan(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(batch_size=64), "Give batch_size=64 or batch_plan='32-64', not both"),
        (dict(batch_plan=BatchPlan("32-64-MS")), "with a step schedule, whose phases each repeat it"),
        (dict(batch_plan=None, rate_scaling="linear"), "with a batch_plan, which changes the size"),
        (dict(rate_scaling="cubic"), "Unknown rate_scaling 'cubic'"),
        (
            dict(batch_plan=BatchPlan("1-2"), measure=hj.fisher.FisherMeasure()),
            "batch_size=1 to be at least 2 with measure",
        ),
    ],
)
def test_settings_that_contradict_a_plan(settings, words):
    with pytest.raises(Refusal, match=re.escape(words)):
        hj.TrainConfig(**{"batch_plan": BatchPlan("32-64")} | settings)


def test_a_plan_comes_back_from_json():
    config = hj.TrainConfig(batch_plan=BatchPlan("s32-to-512-MS"), schedule="step", rate_scaling="sqrt")
    assert config.batch_sizes == (32, 64, 128, 256, 512)
    other = dataclasses.replace(config, batch_plan=BatchPlan("64-128"))
    assert other.batch_sizes == (64, 128) and dataclasses.replace(
        other, batch_plan=None, rate_scaling="none"
    ).batch_sizes == (128,), "the default, as if there had been no plan"
    assert hj.TrainConfig.from_dict(config.to_dict()) == config
    assert hash(config) == hash(hj.TrainConfig.from_dict(config.to_dict()))
