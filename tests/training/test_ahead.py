"""Programs compiled before they are needed: each once, in whichever thread, with the settings of the run's own."""

import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest

import hardjax as hj
from hardjax._validate import OutOfMemory
from hardjax.choose.batch_plan import BatchPlan
from hardjax.choose.selection import HardBatches
from hardjax.choose.trimming import Trimming
from hardjax.engine import jax_settings, memory
from hardjax.engine.plan import programs
from hardjax.engine.programs import Programs, programs_for
from hardjax.training import loop
from hardjax.training.ahead import Compiler
from hardjax.training.setting import prepare

CONFIG = dict(
    model_options={"widths": [4]},
    epochs=4,
    learning_rate=0.05,
    batch_plan=BatchPlan("8-16"),
    selection=HardBatches(0.4),
    measure=hj.fisher.FisherMeasure(every=4),
)
TRAINING = ("plan", "segment", "rounds")


def run(tiny, ahead, **changes):
    """A run with programs of its own, and how many of them were made."""
    programs_for.cache_clear()
    config, performance = hj.TrainConfig(**CONFIG | changes), hj.Performance(compile_ahead=ahead)
    result = hj.run(config, dataset=tiny, performance=performance, progress=False)
    return result, prepare(config, tiny, performance=performance).programs


def compilers():
    return [thread for thread in threading.enumerate() if thread.name == "hardjax compiler"]


class Slow(Programs):
    """Programs that double a number, made when the gate opens."""

    def __init__(self, error=None):
        super().__init__(types.SimpleNamespace(mesh=None))
        self.begun, self.gate, self.error = threading.Event(), threading.Event(), error

    def _function(self, kind, key):
        self.begun.set()
        assert self.gate.wait(60)
        if self.error is not None:
            raise self.error
        return lambda variables, *rest: 2 * variables


def test_who_asks_while_another_thread_compiles_waits_for_it():
    made, one, found = Slow(), np.float32(3), []
    aside = threading.Thread(target=made.begin, args=("predict", None, one, one, one, one))
    aside.start()
    assert made.begun.wait(60)
    asking = threading.Thread(target=lambda: found.append(made.predict(one, one, one, one)))
    asking.start()
    made.begin("predict", None, one, one, one, one)  # somebody is at it: nothing is left to do, and nothing waits
    assert not found and made.traces == {}
    made.gate.set()
    aside.join(60)
    asking.join(60)
    assert [float(value) for value in found] == [6.0]
    assert made.traces == {"predict": 1}
    assert made.compile_seconds > 0 and made.wait_seconds > 0
    waited = made.wait_seconds
    assert float(made.predict(one, one, one, one)) == 6 and made.wait_seconds == waited


def test_an_error_is_told_once_to_who_asks():
    made, one = Slow(RuntimeError("the compiler's own words")), np.float32(3)
    made.gate.set()
    made.begin("predict", None, one, one, one, one)  # says nothing
    with pytest.raises(RuntimeError, match="the compiler's own words"):
        made.predict(one, one, one, one)
    made.error = None
    assert float(made.predict(one, one, one, one)) == 6 and made.traces == {"predict": 1}


class Interrupting:
    """A lock after whose `at`-th use Ctrl-C comes."""

    def __init__(self, at):
        self.lock, self.left = threading.Lock(), at

    def __enter__(self):
        self.lock.acquire()

    def __exit__(self, *error):
        self.lock.release()
        self.left -= 1
        if self.left == -1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", range(4))
def test_an_interrupt_leaves_nothing_that_would_be_waited_for(at):
    """Before it is looked for, as it is begun, as it is compiled, and after all."""
    made, one = Slow(), np.float32(3)
    made.gate.set()
    made._lock = Interrupting(at)
    with pytest.raises(KeyboardInterrupt):
        made.predict(one, one, one, one)
    assert all(future.done() for future in made._compiled.values())
    assert float(made.predict(one, one, one, one)) == 6


@pytest.mark.parametrize("setting", [("default_prng_impl", "rbg"), ("threefry_partitionable", False)], ids=str)
def test_other_settings_of_jax_are_other_programs(tiny, setting):
    """One after the other in a process, as each alone."""
    config = hj.TrainConfig(model_options={"widths": [4]}, epochs=1, batch_size=16)
    name, value = setting

    def trained(**settings):
        with jax_settings.under(tuple((now | settings).values())):
            return hj.run(config, dataset=tiny, progress=False).history["samples_hash"][-1]

    now = dict(zip(jax_settings.SHAPING, jax_settings.shaping(), strict=True))
    programs_for.cache_clear()
    first, second = trained(), trained(**{name: value})
    programs_for.cache_clear()
    assert trained(**{name: value}) == second != first == trained()


def test_what_was_compiled_aside_is_looked_at_before_it_is_called(tiny, monkeypatch):
    setting = prepare(hj.TrainConfig(**CONFIG), tiny)
    state, test = setting.init_state(), setting.splits["test"]
    setting.programs.begin("evaluate", 11, state.variables, test)
    monkeypatch.setattr(memory, "available", lambda device: 0)
    with pytest.raises(OutOfMemory, match="eval_batch_size") as caught:
        setting.programs.evaluate(11, state.variables, test)
    assert "\n" not in str(caught.value)


@pytest.mark.ci
def test_the_three_ways_train_the_same_with_the_same_programs(tiny):
    (plain, ours), (aside, others), (before, all_at_once) = (run(tiny, way) for way in ("off", "background", "first"))
    assert ours.traces == others.traces == all_at_once.traces
    for found in (aside, before):
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found.state.params, plain.state.params)))
        np.testing.assert_array_equal(found.history["full_train_loss"], plain.history["full_train_loss"])
        np.testing.assert_array_equal(found.measurements["eigenvalues"], plain.measurements["eigenvalues"])
    plan = prepare(hj.TrainConfig(**CONFIG), tiny).plan
    assert sum(ours.traces[kind] for kind in TRAINING if kind in ours.traces) == len(programs(plan))
    assert ours.traces["restage"] == 1 and ours.traces["look"] == 2
    # All that is compiled where nothing else does it is waited for.
    assert plain.summary["compile_wait_seconds"] >= plain.summary["compile_seconds"] > 0
    assert not compilers()


@pytest.mark.ci
@pytest.mark.parametrize(
    "changes", [{}, dict(selection=hj.selection.HardSamples(0.5), measure=None, trimming=Trimming(end=0.5))]
)
def test_first_leaves_nothing_for_training_to_compile(tiny, monkeypatch, changes):
    programs_for.cache_clear()
    config, performance = hj.TrainConfig(**CONFIG | changes), hj.Performance(compile_ahead="first")
    setting = prepare(config, tiny, performance=performance)
    setting.compile(saved=False)
    made, seconds = dict(setting.programs.traces), setting.programs.compile_seconds
    # Dispatches keep their length, or they would be other programs.
    monkeypatch.setattr(loop, "DISPATCH_SECONDS", 1e-9)
    result = hj.run(config, dataset=tiny, performance=performance, progress=False)
    assert setting.programs.traces == made and setting.programs.compile_seconds == seconds
    assert result.summary["compile_seconds"] == result.summary["compile_wait_seconds"] == 0


def test_later_stages_are_compiled_aside(tiny, monkeypatch):
    """Training compiles nothing of later stages, programs or not, if it gives the thread the time."""
    asked, begin, original = [], Programs.begin, Compiler.follow

    def noted(self, kind, *rest, **more):
        asked.append(kind)
        begin(self, kind, *rest, **more)

    monkeypatch.setattr(Programs, "begin", noted)

    def patient(self, plan, at):
        original(self, plan, at)
        while self.busy:
            time.sleep(0.001)

    monkeypatch.setattr(Compiler, "follow", patient)
    waits, compiled, issue, go = [], [], loop.Loop._issue, loop.Loop.go

    def noting(self, dispatch):
        before = self.setting.programs.wait_seconds
        if dispatch.stage:
            compiled.append("stage 2")
        issue(self, dispatch)
        waits.append((dispatch.stage, self.setting.programs.wait_seconds - before))

    def going(self, asked):
        end = go(self, asked)
        compiled.append("end")  # what figures of the whole run take comes after
        return end

    def listener(name, seconds, **more):
        if "backend_compile" in name and threading.current_thread() is threading.main_thread():
            compiled.append(name)

    monkeypatch.setattr(loop.Loop, "_issue", noting)
    monkeypatch.setattr(loop.Loop, "go", going)
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        run(tiny, "background")
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert {"restage", "look"} < set(asked)
    assert [wait for stage, wait in waits if stage] and not any(wait for stage, wait in waits if stage)
    first = compiled.index("stage 2")
    assert first > 0 and set(compiled[first : compiled.index("end")]) == {"stage 2"}


@pytest.mark.ci
def test_the_thread_has_the_settings_of_its_run(tiny):
    """In 64-bit mode for this thread alone, shapes are of other types: programs of the plain mode would be no use."""
    changes = dict(measure=None, selection=hj.selection.AllBatches())
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        plain, ours = run(tiny, "off", **changes)
        aside, others = run(tiny, "background", **changes)
        assert ours.traces == others.traces
    np.testing.assert_array_equal(aside.history["full_train_loss"], plain.history["full_train_loss"])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_thread_ends_with_the_run(tiny, monkeypatch, error):
    """The program under way is waited for, but by a second Ctrl-C, and no other is begun."""
    begun = []

    def slow(self, kind, *rest, **more):
        begun.append(kind)
        time.sleep(0.5)

    def broken(self, dispatch):
        self._compiler.follow(self.plan, self.position)
        while not begun:
            time.sleep(0.001)
        raise error

    monkeypatch.setattr(Programs, "begin", slow)
    monkeypatch.setattr(loop.Loop, "_issue", broken)
    with pytest.raises(error):
        run(tiny, "background")
    assert bool(compilers()) == (error is KeyboardInterrupt)
    for thread in compilers():
        thread.join(60)
    assert not compilers() and begun == ["restage"]


def test_what_goes_wrong_in_the_thread_is_heard(tiny, monkeypatch):
    setting = prepare(hj.TrainConfig(**CONFIG), tiny)

    def broken(plan, index):
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(type(setting), "stage_programs", lambda self, plan, index: broken(plan, index))
    with Compiler(setting) as compiler:
        compiler.follow(setting.plan, setting.plan.position_at(0))
        compiler._thread.join(60)
        with pytest.raises(ZeroDivisionError, match="a fault of ours"):
            compiler.follow(setting.plan, setting.plan.position_at(0))


@pytest.mark.ci
def test_a_process_ends_while_something_is_compiled():
    """A second Ctrl-C does not wait for XLA; the process does, for the one program under way, and then ends."""
    program = """
import threading, numpy as np, hardjax as hj
from hardjax.training.ahead import Compiler
from hardjax.training.setting import prepare
images, labels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), np.uint8), np.arange(64) % 4
data = hj.data.Dataset.from_arrays(images, labels, images, labels, num_classes=4)
config = hj.TrainConfig(model="resnet8", batch_plan=hj.batch_plan.BatchPlan("8-16-32"), epochs=3)
setting = prepare(config, data)
try:
    with Compiler(setting) as compiler:
        compiler.follow(setting.plan, setting.plan.position_at(0))
        while not setting.programs._compiled:
            pass
        raise KeyboardInterrupt
except KeyboardInterrupt:
    print("left", compiler._thread.is_alive())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.split()[:1]) == (0, ["left"]), done.stderr
