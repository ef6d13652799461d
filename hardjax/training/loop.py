"""The training loop: dispatches handed to the device one after the other, their reports read, decisions made."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hardjax._validate import OutOfMemory, ran_out_of_memory
from hardjax.engine import devices
from hardjax.engine.plan import Dispatch, Facts, Position, next_dispatch, step_inputs
from hardjax.engine.rounds import RoundInfo
from hardjax.engine.state import StepInputs, TrainData
from hardjax.fisher import memory
from hardjax.training import points
from hardjax.training.ahead import Compiler
from hardjax.training.control import Decider, change_of
from hardjax.training.feed import Feed
from hardjax.training.hosts import Accord
from hardjax.training.record import Record
from hardjax.training.resume import Start
from hardjax.training.saver import Saver
from hardjax.training.setting import DISPATCH_SECONDS, LEAST_BOUND, Setting
from hardjax.training.signals import Asked


class _Window(NamedTuple):
    """Seconds of the clock, of waiting for programs and of compiling, and back-propagations done, at one moment."""

    started: float
    waited: float
    compiled: float
    backprops: int


class Loop:
    """One run under way: what is on the device, what is on the host, and how long it took.

    Between decision points one dispatch is in flight while the report of the one before is read. At them everything is
    read first, so that testing is not timed as training and every decision sees the same facts, however the run was cut
    into dispatches.

    Args:
        setting: what is trained.
        bar: shows progress.
        compiled: `compile_seconds` of its programs when the run began.
        folder: for the record; None keeps it in memory alone.
        saver: writes checkpoints, or None.
        start: where a run that was cut short goes on, or None.
        waited: `wait_seconds` of its programs when the run began.
        compiler: compiles for later stages, or None.
        record: what takes in what is reported; None: the record of one run.
        while_finite: end at the first test point at which the run is lost (`points.is_lost`).
    """

    def __init__(
        self,
        setting: Setting,
        bar: Any,
        compiled: float,
        folder: Path | None = None,
        saver: Saver | None = None,
        start: Start | None = None,
        waited: float = 0.0,
        compiler: Compiler | None = None,
        record: Any = None,
        while_finite: bool = False,
    ) -> None:
        self.setting, self.bar, self.saver, self._compiler = setting, bar, saver, compiler
        self._while_finite = while_finite
        self.position = Position() if start is None else start.position
        self.plan = setting.plan.following(self.position.decided)
        self._decider = Decider(setting)
        self.seconds = 0.0 if start is None else start.seconds
        self.resumed_at = () if start is None else start.resumed_at
        self.state = setting.init_state() if start is None else start.state
        self.record = Record(self.plan, folder) if record is None else record
        self._hyper: Any = setting.hyper
        if start is not None and folder is not None:
            self.record.restore(folder, start.record)
        self._compiled = (0.0 if start is None else start.compile_seconds) - compiled
        self._waited = (0.0 if start is None else start.compile_wait_seconds) - waited
        self._in_flight: tuple[Dispatch, Any] | None = None
        self._feed = Feed(setting, start.input_wait_seconds if start else 0.0) if setting.dataset.streamed else None
        # What the clocks showed when the device was last set going.
        self._window: _Window | None = None
        # Steps a dispatch that this process of several wishes.
        self._wished: int | None = None

    @property
    def compile_seconds(self) -> float:
        """Of this run, what was compiled for it before it was cut short included."""
        return self._compiled + self.setting.programs.compile_seconds

    @property
    def compile_wait_seconds(self) -> float:
        """Of this run, what it stood still for because a program was not ready."""
        return self._waited + self.setting.programs.wait_seconds

    @property
    def input_wait_seconds(self) -> float | None:
        """Of this run, what the device stood still for images, see `Feed.waited`; None of resident data."""
        return None if self._feed is None else self._feed.waited

    def go(self, asked: Asked) -> str:
        """Train to the end; returns why it ended."""
        with self._feed or nullcontext():
            return self._train(asked)

    def _train(self, asked: Asked) -> str:
        facts, accord = Facts(), Accord(self.setting.recipe.mesh, asked)
        while (dispatch := next_dispatch(self.plan, self.position, facts)) is not None:
            first = self.position.backprops == 0
            self._issue(dispatch)
            if dispatch.test:
                self._test()
                facts = Facts(self._reason_to_stop())
            if dispatch.control and facts.stop is None:
                self._control()
            elif first and self._window is not None and dispatch.trained:
                self._read()  # the first steps are timed at once: how many fit a dispatch follows from them
                self._rebound(self._spent())
            if (bound := accord.exchange(self._wished)) is not None:
                self._rebind(bound)
            if self._compiler is not None:
                self._compiler.follow(self.plan, self.position)
            over = facts.stop is not None or self.position.backprops == self.plan.steps
            if accord.asked and not over:
                self._drain()
                facts = Facts("interrupted")
            elif self.saver is not None and not over:
                tested = len(self.record.history.entries) if dispatch.test else None
                if self.saver.due(tested):
                    self._drain()
                    self.saver.save(self.state, self.facts(None))
        return facts.stop or "budget spent"

    def facts(self, end: str | None) -> dict[str, Any]:
        """What is saved beside the state; everything has been read by then.

        Args:
            end: why the run ended, None where it goes on.
        """
        return points.facts(self, end)

    def _issue(self, dispatch: Dispatch) -> None:
        """Hand a dispatch to the device, then read what the one before it reported."""
        programs, donate = self.setting.programs, self.setting.performance.donate
        train = self.setting.splits["train"]
        if self._window is None:
            clocks = time.perf_counter(), programs.wait_seconds, programs.compile_seconds
            self._window = _Window(*clocks, self.position.backprops)
        report = None
        stage = self.plan.stages[dispatch.stage]
        if stage.anew and dispatch.stage != self.plan.state_stage(dispatch.before):
            self.state = self.setting.restage(self.state, stage.sizes)
        if self._feed is not None and dispatch.kind != "plan":
            train = self._feed.given(self.state, dispatch)
        if dispatch.kind == "plan":
            self.state = programs.plan(dispatch.spec, donate, self.state)
        elif dispatch.kind == "look":
            with self._explained_memory():
                report = self._look(stage.sizes.unit, train)
        else:
            call = programs.rounds if dispatch.kind == "rounds" else programs.segment
            inputs = jax.device_put(self._inputs(dispatch))
            self.state, report = call(dispatch.spec, donate, self.state, train, self._hyper, inputs)
        # Only now is the report before read: reading waits, and the device has its next work by then.
        before, self.position = self._in_flight, dispatch.after
        self._in_flight = (dispatch, report)
        self._take(before)

    def _inputs(self, dispatch: Dispatch) -> StepInputs:
        """Of the steps of a dispatch, on the host."""
        return step_inputs(self.plan, dispatch)

    def _look(self, unit: str, train: TrainData) -> Any:
        """A measurement, on the device."""
        observer = self.setting.observer
        assert observer is not None
        return self.setting.programs.look(observer, unit, self.state, train)

    def _read(self) -> None:
        """Everything that was handed out."""
        before, self._in_flight = self._in_flight, None
        self._take(before)

    def _take(self, flown: tuple[Dispatch, Any] | None) -> None:
        if flown is None or flown[1] is None:
            return
        dispatch, report = flown
        if dispatch.kind == "look":
            with self._explained_memory():
                self._looked(dispatch, jax.device_get(report))
            return
        self._trained(dispatch, jax.device_get(report))

    def _looked(self, dispatch: Dispatch, seen: Any) -> None:
        """What a measurement found."""
        self.record.looked(dispatch, seen)

    def _trained(self, dispatch: Dispatch, info: RoundInfo) -> None:
        """What a dispatch of training reported."""
        self.record.trained(dispatch, info)
        epoch = float(self.plan.epoch(dispatch.after.backprops))
        self.bar.update(epoch, float(info.loss.mean()), None if info.top1 is None else 100 * float(info.top1.mean()))

    def _spent(self) -> float:
        """Seconds of training since the device was last set going, waiting for programs aside."""
        assert self._window is not None
        waited = self.setting.programs.wait_seconds - self._window.waited
        return time.perf_counter() - self._window.started - waited

    def _compiled_aside(self) -> bool:
        """Whether anything was compiled, and not waited for, since the device was last set going."""
        assert self._window is not None
        programs = self.setting.programs
        return programs.compile_seconds - self._window.compiled > programs.wait_seconds - self._window.waited

    def _rebound(self, spent: float) -> None:
        """Fewer steps a dispatch where they take much longer than was expected of the network."""
        performance = self.setting.performance
        if performance.steps_per_dispatch is not None or performance.compile_ahead == "first":
            return
        assert self._window is not None
        # Beside a compiler steps are slower than they will be.
        if self._compiler is not None and (self._compiler.busy or self._compiled_aside()):
            return
        affordable = int(DISPATCH_SECONDS * (self.position.backprops - self._window.backprops) / max(spent, 1e-9))
        if self.position.backprops == self._window.backprops:  # a plan alone tells nothing of steps
            return
        # Never upwards, and down only by much: another bound is another set of programs to compile.
        index = self.plan.stage_of(max(0, self.position.backprops - 1))
        share = affordable / self.plan.bound_of(index)
        if share < 1 / 4:
            bound = max(LEAST_BOUND, int(share * self.plan.bound))
            if devices.spans_processes(self.setting.recipe.mesh):
                self._wished = bound  # others have other clocks: all take the least that one of them wishes
            else:
                self._rebind(bound)

    def _rebind(self, bound: int) -> None:
        if bound < self.plan.bound:
            self.plan = dataclasses.replace(self.plan, bound=bound)

    def _drain(self) -> None:
        """Read everything, wait for the device, stop the clock."""
        self._read()
        # Calls return before the device is done: without this, training would be timed as testing.
        jax.block_until_ready(self.state)
        if self._window is None:
            return
        spent = self._spent()
        self._rebound(spent)
        self.seconds, self._window = self.seconds + spent, None

    def _test(self) -> None:
        self._drain()
        self.bar.tested(points.test(self, self.plan, self.state, self._feed))

    def _control(self) -> None:
        """A decision of the controller: written down, and followed from here on."""
        self._drain()
        line = self._decider.decide(self.plan, self.position, self.record.spectra, self.record.decisions)
        if (change := change_of(line)) is not None:
            self.position = dataclasses.replace(self.position, decided=(*self.position.decided, change))
            self.plan = self.plan.following(self.position.decided)
        self.record.decided(line, self.plan)

    def _reason_to_stop(self) -> str | None:
        """Whether the run should end here, at something that is not finite."""
        if self.setting.config.on_nan != "stop":
            if not self._while_finite or self.position.backprops == self.plan.steps:
                return None
            return "diverged" if points.is_lost(self.record.history.entries[-1], self.state) else None
        return "diverged" if self.record.bad_steps or not self.record.spectra.all_finite else None

    @contextmanager
    def _explained_memory(self) -> Iterator[None]:
        """Out of memory while spectra are measured: say what to set."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            measure, batch = self.setting.config.measure, self.plan.batch_size(self.position.backprops)
            assert measure is not None
            advice = memory.advice(measure.rows, measure.method, self.setting.performance.gram_chunk, batch)
            raise OutOfMemory(f"Out of memory while measuring batches of {batch}: {advice}.") from error
