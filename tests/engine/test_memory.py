"""What a run needs against what there is: the arithmetic, the refusal's text, and that it comes before anything big."""

import dataclasses
import types
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hardjax as hj
from hardjax._validate import OutOfMemory
from hardjax.choose.selection import HardBatches
from hardjax.choose.trimming import Trimming
from hardjax.engine import memory
from hardjax.engine.ahead import _later
from hardjax.engine.memory import Need, Temporary, refusal
from hardjax.engine.plan import dispatches
from hardjax.engine.programs import Programs, programs_for
from hardjax.fisher import FisherMeasure
from hardjax.training.setting import prepare

GIB, MIB = 2**30, 2**20
CONFIG = dict(model="mlp", model_options={"widths": [8]}, batch_size=8, learning_rate=0.1, epochs=2)
TRAINING = Temporary("training", 3 * GIB, "take a smaller batch_size")
LOOK = Temporary("measuring spectra", 5 * GIB, "set chunk=2")


@pytest.fixture(autouse=True)
def fresh():
    programs_for.cache_clear()


def has(monkeypatch, size):
    """The device has this much left, whatever is on it."""
    monkeypatch.setattr(memory, "available", lambda device: size)


def setting_of(dataset, performance=None, **changes):
    return prepare(hj.TrainConfig(**{**CONFIG, **changes}), dataset, performance=performance)


def test_the_sum_and_its_refusal():
    need = Need(data=GIB, state=2 * GIB, copies=2 * GIB, programs=(TRAINING, LOOK))
    assert (need.standing, need.largest, need.total) == (5 * GIB, LOOK, 10 * GIB)
    assert refusal(need, 10 * GIB, "this machine") is None
    line = refusal(need, 10 * GIB - 1, "this machine")
    assert line == (
        "Expected a run that fits the memory: it needs 10.0 GiB (data 1.00 GiB, state 2.00 GiB, a copy of the state for"
        " checkpoints 2.00 GiB, measuring spectra 5.00 GiB), and this machine has 10.0 GiB for it; set chunk=2."
    )
    # Training alone would be too much as well; the order is that of the size.
    assert refusal(need, 7 * GIB, "x").endswith("; set chunk=2; take a smaller batch_size.")
    # What stands there is too much whatever runs: no batch size helps.
    assert refusal(need, 4 * GIB, "x").endswith(" for it; take a smaller network.")
    much = dataclasses.replace(need, data=4 * GIB)
    assert refusal(much, 4 * GIB, "x").endswith("; train on fewer or smaller images; take a smaller network.")
    assert Need(data=5).total == 5 and Need().largest is None


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0.00 MiB"),
        (MIB, "1.00 MiB"),
        (9.994 * MIB, "9.99 MiB"),
        (9.996 * MIB, "10.0 MiB"),
        (99.99 * MIB, "100 MiB"),
        (1023.4 * MIB, "1023 MiB"),
        (GIB, "1.00 GiB"),
        (298.02 * GIB, "298 GiB"),
    ],
)
def test_three_digits(size, text):
    assert memory.shown(size) == text


def test_gradients_do_not_grow_with_the_batch():
    assert memory.scaled(TRAINING, GIB, 4, "later").size == GIB + 4 * 2 * GIB
    assert memory.scaled(TRAINING, 9 * GIB, 4, "later").size == 3 * GIB


def write(root, contents):
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


MEMINFO = {"proc/meminfo": "MemTotal: 99999 kB\nMemFree: 5 kB\nMemAvailable:    1000 kB\nBuffers: 1 kB"}
SECOND, FIRST = "0::/a/b", "4:cpu:/c\n3:cpuset,memory:/a/b\n0::/"


@pytest.mark.parametrize(
    ("tree", "left"),
    [
        ({}, 1_024_000),
        ({"proc/self/cgroup": SECOND}, 1_024_000),
        # A group, and one above it that leaves less.
        (
            {
                "proc/self/cgroup": SECOND,
                "sys/fs/cgroup/a/b/memory.max": "900000",
                "sys/fs/cgroup/a/b/memory.current": "100000",
                "sys/fs/cgroup/a/b/memory.stat": "anon 5\nactive_file 5000\ninactive_file 15000",
            },
            820_000,
        ),
        (
            {
                "proc/self/cgroup": SECOND,
                "sys/fs/cgroup/a/b/memory.max": "max",
                "sys/fs/cgroup/a/b/memory.current": "100000",
                "sys/fs/cgroup/a/memory.max": "500000",
                "sys/fs/cgroup/a/memory.current": "200000",
            },
            300_000,
        ),
        # A container: the group has another name outside.
        (
            {
                "proc/self/cgroup": SECOND,
                "sys/fs/cgroup/memory.max": "400000",
                "sys/fs/cgroup/memory.current": "500000",
            },
            0,
        ),
        (
            {
                "proc/self/cgroup": FIRST,
                "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "700000",
                "sys/fs/cgroup/memory/a/b/memory.usage_in_bytes": "100000",
                "sys/fs/cgroup/memory/a/b/memory.stat": "inactive_file 9\ntotal_inactive_file 50000",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
            },
            650_000,
        ),
    ],
)
def test_what_the_host_has_left(tmp_path, tree, left):
    write(tmp_path, MEMINFO | tree)
    assert memory._of_host(tmp_path) == left


def test_hosts_that_tell_less(tmp_path, monkeypatch):
    def sysconf(name):
        if name == "SC_AVPHYS_PAGES":
            raise ValueError("unrecognized configuration name")
        return {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}[name]

    monkeypatch.setattr(memory.os, "sysconf", sysconf)
    assert memory._of_host(tmp_path) == 40960
    monkeypatch.delattr(memory.os, "sysconf")
    assert memory._of_host(tmp_path) is None


def test_what_a_device_says():
    def device(platform, stats):
        return types.SimpleNamespace(platform=platform, memory_stats=lambda: stats)

    assert memory.available(device("gpu", {"bytes_limit": 100, "bytes_in_use": 30})) == 70
    assert memory.available(device("gpu", None)) is None
    assert memory.available(device("gpu", {"bytes_in_use": 30})) is None
    assert memory.available(device("cpu", None)) == pytest.approx(memory._of_host(), rel=0.2)


def test_a_huge_network_is_refused_before_anything_of_its_size_is_made(tiny, monkeypatch):
    has(monkeypatch, 20 * GIB)
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)  # nothing is even compiled
    with pytest.raises(OutOfMemory, match=r"needs 149 GiB \(data .* MiB, state 149 GiB\), and this .* smaller network"):
        setting_of(tiny, model_options={"widths": [200_000, 200_000]}, optimizer="sgd")
    with pytest.raises(MemoryError, match=r"state 447 GiB"):
        setting_of(tiny, model_options={"widths": [200_000, 200_000]}, optimizer="adam", trimming=Trimming())


@pytest.mark.ci
def test_data_and_state_are_counted_as_they_are(tiny, monkeypatch):
    setting = setting_of(tiny, optimizer="adam", validation=0.2)
    need, state = setting.compile(saved=True), setting.init_state()
    assert need.state == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    (drawn,) = (part.size for part in need.programs if part.name == "drawing the first state")
    # No checkpoint is written before: what is drawn may lie where the copy will.
    (alone,) = (part.size for part in setting.compile(saved=False).programs if part.name == "drawing the first state")
    assert drawn == max(0, alone - need.copies)
    assert need.copies == need.state and setting.compile(saved=False).copies == 0
    assert need.data == sum(leaf.nbytes for leaf in jax.tree.leaves(setting.splits))


REPLAY, TRIMMED = HardBatches(0.3), {"trimming": Trimming(), "evaluate_train": False, "epochs": 3}


@pytest.mark.parametrize(
    ("steps", "changes"),
    [
        (100, {"measure": FisherMeasure(every=4)}),
        pytest.param(2, {"measure": FisherMeasure(every=4)}, marks=pytest.mark.ci),
        pytest.param(100, {"selection": REPLAY, "validation": 0.2}, marks=pytest.mark.ci),
        pytest.param(2, {"selection": REPLAY, "validation": 0.2}, marks=pytest.mark.ci),
        pytest.param(100, TRIMMED, marks=pytest.mark.ci),
        pytest.param(2, {"measure": FisherMeasure(every=3), "selection": REPLAY}, marks=pytest.mark.ci),
    ],
)
def test_what_is_compiled_ahead_is_found_again(tiny, steps, changes):
    performance = hj.Performance(steps_per_dispatch=steps)
    run = dict(dataset=tiny, performance=performance, progress=False)
    config = hj.TrainConfig(**{**CONFIG, **changes})
    plain = hj.run(config, **run)
    expected = setting_of(tiny, performance, **changes).programs.traces
    programs_for.cache_clear()
    setting = setting_of(tiny, performance, **changes)
    setting.compile(saved=False)
    ahead = dict(setting.programs.traces)
    assert {"init", "evaluate"} < set(ahead) and ("look" in ahead) == ("measure" in changes)
    assert "rounds" in ahead or "segment" in ahead
    found = hj.run(config, **run)
    assert setting.programs.traces == expected
    # Shapes alone make the same programs as arrays do.
    same = jax.tree.map(np.array_equal, found.state.params, plain.state.params)
    assert all(jax.tree.leaves(same))


def test_a_run_is_refused_where_a_byte_is_missing(tiny, monkeypatch):
    setting = setting_of(tiny)
    need = setting.compile(saved=False)
    # The data are there already, and are no further need.
    has(monkeypatch, need.total - need.data)
    assert setting.compile(saved=False) == need
    has(monkeypatch, need.total - need.data - 1)
    with pytest.raises(OutOfMemory, match="Expected a run that fits the memory"):
        setting.compile(saved=False)
    # A state that a run goes on from is there as well.
    state = setting.init_state()
    has(monkeypatch, max(part.size for part in need.programs if part.name != "drawing the first state"))
    setting.compile(saved=False, state=state)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "look",
            r"measuring spectra .* set chunk=2 \(Performance.gram_chunk, --gram-chunk\) or measure",
        ),
        ("evaluate", r"evaluation .* take a smaller Performance.eval_batch_size"),
        ("rounds", r"training .* take a smaller batch_size, a smaller network"),
        ("init", r"drawing the first state .* take a smaller network"),
    ],
)
def test_the_program_that_is_too_large_says_what_to_change(tiny, monkeypatch, kind, words):
    inner = memory.temporary

    def weighed(of, compiled, advice=None):
        return inner(of, compiled, advice)._replace(size=10 * GIB if of == kind else 1)

    monkeypatch.setattr(memory, "temporary", weighed)
    has(monkeypatch, GIB)
    changes = {"measure": FisherMeasure(every=4)} if kind == "look" else {}
    # Of the whole run, not of the one program.
    with pytest.raises(OutOfMemory, match=rf"\(data .*, state .*, a copy of the state for checkpoints .* {words}"):
        setting_of(tiny, **changes).compile(saved=True)


@pytest.mark.ci
def test_a_program_compiled_later_is_looked_at_before_it_is_called(tiny, monkeypatch):
    setting = setting_of(tiny)
    state, test = setting.init_state(), setting.splits["test"]
    asked = []
    monkeypatch.setattr(memory, "available", lambda device: asked.append(device))
    setting.programs.evaluate(21, state.variables, test)
    setting.programs.evaluate(21, state.variables, test)
    assert len(asked) == 1  # what is found again costs nothing, and an unknown device refuses nothing
    has(monkeypatch, 0)
    setting.programs.evaluate(21, state.variables, test)
    with pytest.raises(OutOfMemory, match="eval_batch_size"):
        setting.programs.evaluate(7, state.variables, test)


@pytest.mark.ci
def test_back_ends_that_tell_nothing(tiny, monkeypatch):
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda self: None)
    need = setting_of(tiny).compile(saved=False)
    assert need.programs == () and need.total == need.data + need.state


@pytest.mark.parametrize(("backend", "look"), [("gpu", 1000), ("cpu", 1300)])
def test_what_a_program_takes(monkeypatch, backend, look):
    """Temporaries, results that take no donated array's place, code; and what convolutions of a CPU do not name."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    sizes = dict(temp=1000, output=500, alias=450, generated_code=7, argument=10**6)
    stats = types.SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})
    compiled = types.SimpleNamespace(memory_analysis=lambda: stats)
    assert memory.temporary("segment", compiled).size == 1057
    assert memory.temporary("look", compiled, "words") == ("measuring spectra", look + 57, "words")
    stats.alias_size_in_bytes = 600
    assert memory.temporary("rounds", compiled).size == 1007


@pytest.mark.ci
def test_donated_states_take_no_room_twice(tiny):
    def training(donate):
        wide = {"model_options": {"widths": [500]}}
        need = setting_of(tiny, hj.Performance(donate=donate), **wide).compile(saved=False)
        (part,) = (part for part in need.programs if part.name == "training")
        return part.size, need.state

    (kept, state), (donated, _) = training(False), training(True)
    assert kept - donated == pytest.approx(state, rel=0.02)


@pytest.mark.ci
def test_later_stages_are_estimated(tiny):
    plan = setting_of(tiny).plan
    (stage,), found = plan.stages, Temporary("training", 1000, "advice")
    larger = [
        dataclasses.replace(stage, sizes=dataclasses.replace(stage.sizes, batch_size=size), epochs=Fraction(1))
        for size in (4, 32)
    ]
    plan = dataclasses.replace(plan, stages=(stage, *larger))
    (estimate,) = _later(plan, next(dispatches(plan)), found, 200)
    assert (estimate.size, estimate.name) == (200 + 4 * 800, "later training, of 32 samples at a time,")


@pytest.mark.ci
@pytest.mark.parametrize(("batch_size", "expected"), [(16, []), (24, [1500])])
def test_later_stages_count_the_samples_that_are_differentiated(tiny, batch_size, expected):
    """The second half of a run keeps half of its larger batches, then a quarter."""

    def stage_of(batch_size):
        trimmed = dict(trimming=Trimming(1.0, 0.25), epochs=4, batch_size=batch_size)
        return setting_of(tiny, hj.Performance(trim_path="gather"), **trimmed).plan

    plan = stage_of(8)
    stages = (*plan.stages, *stage_of(batch_size).stages)
    plan = dataclasses.replace(plan, stages=tuple(dataclasses.replace(s, epochs=Fraction(2)) for s in stages))
    call = next(call for call in dispatches(plan) if call.trained)
    estimates = _later(plan, call, Temporary("training", 1000, ""), 0)
    assert [estimate.size for estimate in estimates] == expected


def test_arrays_are_held_and_shapes_are_not():
    array = jnp.zeros(3)
    assert memory.held(array, {"again": array, "shape": jax.ShapeDtypeStruct((9,), jnp.float32)}) == 12
    assert memory.size_of([array, jax.eval_shape(lambda: jax.random.key(0))]) == 20


def test_neither_garbage_nor_work_in_flight_is_a_reason_to_refuse(monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    monkeypatch.setattr(memory, "available", lambda device: 100 if waited else 1)
    memory.check(Need(data=50), None)
    assert waited == [(None,)]
    with pytest.raises(OutOfMemory):
        memory.check(Need(data=101))


@pytest.mark.ci
def test_only_what_was_asked_is_called(tiny, monkeypatch):
    setting = setting_of(tiny)
    monkeypatch.setattr(Programs, "_call", None)
    need = setting.compile(saved=True)
    assert need.state > 0 and need.copies == need.state and setting.programs.traces
